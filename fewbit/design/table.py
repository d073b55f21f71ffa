"""CodeTable maps pre-activations to codes, and codes to what backward reads. Its invariants and its JSON form are here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fewbit import files
from fewbit.activations import built_in
from fewbit.constants import CHANNELS, MAX_BITS
from fewbit.design.evaluate import check_errors
from fewbit.errors import ActivationError, TableError, TableFileError
from fewbit.record import label, plural
from fewbit.text import cut, plain, shown
from fewbit.weights import weight_named

Array = np.ndarray
FORMAT = "fewbit-table"
VERSION = 1
MOST_BYTES = 1 << 24  # largest file of tables that is read: it holds a thousand of the largest tables that a design gives


@dataclass(frozen=True, eq=False)
class CodeTable:
    """A piecewise-constant function of x, stored as thresholds, codes and levels. Immutable.

    x lies in interval i when `thresholds[i-1] < x <= thresholds[i]`. Its code is `codes[i]`. For channel c, backward reads
    `levels[c, codes[i]]`. NaN lies in the last interval.

    thresholds     (m,) float64, strictly ascending
    codes          (m+1,) uint8, each below K
    levels         (channels, K) float64, K <= 2**bits
    bits           bits of one code, 1 to 8
    channels       what the rows of levels hold: "derivative" (f') or "value" (f)
    activation     name of the activation that the table is for; None if it is for any
    parameters     that activation's parameters
    weight, coding, domain, balance   how the table was designed
    errors         (channels,) ∫ w (g - q)² dx with w of mass 1 on the domain
    powers         (channels,) ∫ w g² dx

    Raises TableError if an invariant does not hold.

    >>> relu = CodeTable(thresholds=[0.0], codes=[0, 1], levels=[[0.0, 1.0]], bits=1)
    >>> relu(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 1.])
    """

    thresholds: Array
    codes: Array
    levels: Array
    bits: int
    channels: tuple[str, ...] = ("derivative",)
    activation: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    weight: str | None = None
    coding: str | None = None
    domain: tuple[float, float] | None = None
    balance: float = 1.0
    errors: tuple[float, ...] | None = None
    powers: tuple[float, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "bits", check_bits(self.bits, TableError))
        thresholds, levels = _floats("thresholds", self.thresholds, 1), _floats("levels", self.levels, 2)
        codes = _codes(self.codes)
        channels = check_channels(self.channels, TableError)
        _check_shapes(thresholds, codes, levels, self.bits, channels)
        for name, array in (("thresholds", thresholds), ("codes", codes), ("levels", levels)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "parameters", _parameters(self.parameters))
        object.__setattr__(self, "balance", _positive("balance", self.balance))
        for name in ("activation", "weight", "coding"):
            if not isinstance(getattr(self, name), str | None):
                raise TableError(f"{name} must be a text or None, got {shown(getattr(self, name))}")
        for name, size in (("domain", 2), ("errors", levels.shape[0]), ("powers", levels.shape[0])):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(_floats(name, getattr(self, name), 1).tolist()))
                if len(getattr(self, name)) != size:
                    raise TableError(f"{name} must be {size} number(s), got {shown(getattr(self, name))}")
        if self.domain is not None and not self.domain[0] < self.domain[1]:
            raise TableError(f"domain must ascend, got {self.domain}")
        if min((*(self.errors or ()), *(self.powers or ())), default=0.0) < 0:
            raise TableError(f"errors and powers cannot be negative, got {self.errors} and {self.powers}")
        object.__setattr__(self, "_hash", hash((self.bits, thresholds.tobytes(), codes.tobytes(), levels.tobytes())))

    @property
    def mse(self) -> float | tuple[float, ...]:
        """∫ w (g - q)² dx, with w of mass 1 on the domain.

        A float, or a tuple for several channels. NaN if the table was not designed.
        """
        return self._one_or_all(self.errors or (np.nan,) * len(self.channels))

    @property
    def relative_rms(self) -> float | tuple[float, ...]:
        """sqrt(mse / ∫ w g² dx), shaped as `mse`. If ∫ w g² dx is 0, it is 0 or infinite."""
        if self.errors is None or self.powers is None:
            return self._one_or_all((np.nan,) * len(self.channels))
        pairs = zip(self.errors, self.powers, strict=True)
        ratios = (0.0 if not error else error / power if power else np.inf for error, power in pairs)
        return self._one_or_all(tuple(float(np.sqrt(ratio)) for ratio in ratios))

    @property
    def even(self) -> bool:
        """Whether the code depends only on |x|. The thresholds then mirror each other, and each one belongs to the interval of
        larger |x|.
        """
        mirrored = np.nextafter(-self.thresholds[::-1], -np.inf)
        half = self.thresholds.size // 2
        same = np.array_equal(self.thresholds[:half], mirrored[:half]) and self.thresholds.size % 2 == 0
        return same and np.array_equal(self.codes, self.codes[::-1])

    def _one_or_all(self, values: tuple[float, ...]) -> float | tuple[float, ...]:
        return values[0] if len(values) == 1 else values

    def encode(self, x: Any) -> Array:
        """Codes of x: uint8, same shape."""
        if hasattr(x, "detach"):  # a tensor of any dtype and device
            x = x.detach().cpu().double()
        return self.codes[np.searchsorted(self.thresholds, np.asarray(x), side="left")]

    def __call__(self, x: Any) -> Array:
        """What backward reads at x, float64: x's shape, or (channels, *x.shape) for several channels."""
        values = self.levels[:, self.encode(x)]
        return values[0] if len(self.channels) == 1 else values

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, CodeTable) and self.to_dict() == other.to_dict())

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        parts = [label(self.activation or "custom", self.parameters), plural(self.bits, "bit")]
        parts.append("+".join(self.channels))
        parts += [part for part in (self.weight, self.coding) if part]
        parts.append(f"{self.thresholds.size + 1} intervals, {self.levels.shape[1]} levels")
        if self.errors is not None:
            rms = self.relative_rms if isinstance(self.relative_rms, tuple) else (self.relative_rms,)
            parts.append("relative rms " + ", ".join(f"{value:.3g}" for value in rms))
        return cut(plain(f"CodeTable({', '.join(parts)})"), 500)

    def __copy__(self) -> CodeTable:
        return self

    def __deepcopy__(self, memo: dict) -> CodeTable:
        return self

    def __reduce__(self):
        return CodeTable.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain numbers, strings and lists."""
        return {
            "activation": self.activation,
            "parameters": dict(self.parameters),
            "bits": self.bits,
            "coding": self.coding,
            "weight": self.weight,
            "domain": self.domain and list(self.domain),
            "channels": list(self.channels),
            "balance": self.balance,
            "errors": self.errors and list(self.errors),
            "powers": self.powers and list(self.powers),
            "thresholds": self.thresholds.tolist(),
            "codes": self.codes.tolist(),
            "levels": self.levels.tolist(),
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> CodeTable:
        """The inverse of `to_dict`. Raises TableError for missing or unknown entries and broken invariants."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(entries, Mapping):
            raise TableError(f"a table has named entries, got {shown(entries)}")
        if set(entries) != known:
            missing, unknown = sorted(known - set(entries)), sorted(set(entries) - known)
            raise TableError(f"a table has the entries {', '.join(sorted(known))}; missing {missing}, unknown {shown(unknown)}")
        try:
            return cls(**entries)
        except TableError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise TableError(f"an entry of the table has the wrong type: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the table to `path` as JSON. The file is written completely or not at all. Links and devices work too.

        Raises OSError as open() does.
        """
        text = dump_tables([self])
        if len(text) > MOST_BYTES:
            raise TableError(f"a table file holds at most {MOST_BYTES >> 20} MiB, this table takes {len(text) >> 20}")
        files.write(path, text)

    @classmethod
    def load(cls, path: str | Path) -> CodeTable:
        """Read a file that `save` wrote. Any other file raises TableFileError, which names the file and the remedy."""
        tables = read_tables(path)
        if len(tables) != 1:
            raise TableFileError(f"{path} holds {len(tables)} tables, not one; load_table() picks one of a shipped file")
        try:
            tables[0].check()
        except TableError as error:
            raise _broken(str(path), error) from error
        return tables[0]

    def check(self) -> None:
        """Raise TableError if the errors that the table states are not those of its levels.

        Only tables of built-in activations, under weights that their text describes completely, are checked. `load` calls this.
        """
        record, weight = built_in(self.activation or ""), weight_named(self.weight or "")
        if record is not None and weight is not None:
            try:
                record = record.with_parameters(**self.parameters)
            except ActivationError as error:
                raise TableError(str(error)) from error
            check_errors(self, record, weight)


def check_bits(bits: Any, error: type[Exception]) -> int:
    """`bits` itself if it is an integer from 1 to 8; else raises `error`."""
    if type(bits) is int and 1 <= bits <= MAX_BITS:
        return bits
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= MAX_BITS:
        raise error(f"bits must be an integer from 1 to {MAX_BITS}, got {shown(bits)}")
    return int(bits)


def check_channels(channels: Any, error: type[Exception]) -> tuple[str, ...]:
    """The channels as a tuple if they are some of CHANNELS, each at most once; else raises `error`."""
    few = isinstance(channels, list | tuple) and 0 < len(channels) <= len(CHANNELS)
    if not few or not all(isinstance(each, str) and each in CHANNELS for each in channels) or len({*channels}) != len(channels):
        raise error(f"channels must be some of {CHANNELS}, each once; got {shown(channels)}")
    return tuple(channels)


def finite(name: str, value: Any) -> float:
    """A number of a table as a float. Raises TableError with its name if it is not a finite number."""
    return float(_floats(name, value, 0))


def _floats(name: str, values: Any, dimensions: int) -> Array:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TableError(f"{name} must be numbers: {error}") from error
    if array.ndim != dimensions or not np.all(np.isfinite(array)):
        raise TableError(f"{name} must be finite and have {dimensions} dimension(s), got shape {array.shape}: {shown(values)}")
    return array


def _parameters(values: Any) -> Mapping[str, float]:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TableError(f"parameters must be named numbers, got {shown(values)}")
    numbers = {name: finite(f"parameter {name}", value) for name, value in values.items()}
    return MappingProxyType(numbers)


def _positive(name: str, value: Any) -> float:
    number = finite(name, value)
    if number <= 0:
        raise TableError(f"{name} must be positive, got {shown(value)}")
    return number


def _codes(values: Any) -> Array:
    try:
        codes = np.asarray(values)
    except ValueError:  # lists of several lengths
        codes = np.empty(0)
    if codes.ndim != 1 or codes.dtype.kind not in "iu" or codes.size == 0 or codes.min() < 0 or codes.max() > 255:
        raise TableError(f"codes must be a non-empty list of integers from 0 to 255, got {shown(values)}")
    return codes.astype(np.uint8)


def _check_shapes(thresholds: Array, codes: Array, levels: Array, bits: int, channels: tuple[str, ...]) -> None:
    if not np.all(np.diff(thresholds) > 0):
        at = int(np.argmax(~(np.diff(thresholds) > 0)))
        raise TableError(
            f"thresholds must ascend strictly, but thresholds[{at}] = {float(thresholds[at])} is followed by "
            f"{float(thresholds[at + 1])}; sort them and drop repetitions"
        )
    if codes.size != thresholds.size + 1:
        raise TableError(
            f"m thresholds separate m+1 intervals with one code each, got {thresholds.size} thresholds, {codes.size} codes"
        )
    if levels.shape[0] != len(channels):
        raise TableError(f"levels must have a row for each of the channels {channels}, got shape {levels.shape}")
    if not 1 <= levels.shape[1] <= 2**bits:
        raise TableError(f"{bits} bits hold at most {2**bits} levels, got {levels.shape[1]}")
    if codes.max() >= levels.shape[1]:
        raise TableError(f"each code must have a level: got code {codes.max()} with {levels.shape[1]} levels")


def read_tables(path: str | Path) -> list[CodeTable]:
    """All tables of a file. If it is missing or damaged, raises TableFileError, which names the file and the remedy."""
    return parse_tables(read_text(path, MOST_BYTES), str(path))


def read_text(path: str | Path, most: int) -> str:
    """The text of a file of at most `most` bytes. Raises TableFileError, which names the file, if it cannot be read."""
    try:
        return files.read(path, most).decode("utf-8")
    except OSError as error:
        raise TableFileError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:  # not UTF-8, or a path that no file can have
        raise TableFileError(f"{path} is not a fewbit table file: it is not text") from error


def dump_tables(tables: list[CodeTable]) -> str:
    """The text of a table file. Each entry of each table has its own line, so that diffs are easy to read."""
    blocks = (
        "  {\n" + ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in table.to_dict().items()) + "\n  }"
        for table in tables
    )
    return f'{{\n "format": "{FORMAT}",\n "version": {VERSION},\n "tables": [\n' + ",\n".join(blocks) + "\n ]\n}\n"


def parse_tables(text: str, origin: str) -> list[CodeTable]:
    """The inverse of `dump_tables`. Raises TableFileError, naming `origin`, for anything that is not such a text."""
    try:
        return [CodeTable.from_dict(entries) for entries in parse_entries(text, origin, FORMAT, "tables")]
    except TableFileError:
        raise
    except TableError as error:
        raise _broken(origin, error) from error


def _broken(origin: str, error: TableError) -> TableFileError:
    return TableFileError(f"{origin} holds a broken table: {error}; design it anew")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def parse_entries(text: str, origin: str, form: str, name: str) -> list[Any]:
    """The list under `name` in a JSON text of this format and version. Raises TableFileError for any other text."""
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        what = f"{origin} is not valid JSON, perhaps cut short ({error!s:.200})"
        raise TableFileError(f"{what}; delete it or write it anew") from error
    if not isinstance(content, dict) or content.get("format") != form or not isinstance(content.get(name), list):
        raise TableFileError(f'{origin} is not a {form.replace("-", " ")} file: it lacks "format": "{form}" and its {name}')
    if content.get("version") != VERSION:
        raise TableFileError(
            f"{origin} has version {shown(content.get('version'))}, this fewbit reads version {VERSION}; "
            "upgrade fewbit or design the table anew"
        )
    return content[name]
