"""Finds tables and ladders of tables: in the shipped files, then in the user's cache, else by a new design.

`shipped_requests` lists what the shipped files hold: tables of every built-in activation with its default parameters, and of
the identity. The cache is in `FEWBIT_CACHE_DIR`, or where the platform keeps a user's caches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fewbit import activations, files
from fewbit.constants import CHANNELS, DEFAULT_BITS, MAX_BITS, RUNGS, SHIPPED_BITS, SHIPPED_CODINGS, WEIGHTS
from fewbit.design.evaluate import check_errors, errors_under
from fewbit.design.request import Request
from fewbit.design.table import VERSION, CodeTable, check_channels, dump_tables, read_tables
from fewbit.errors import DesignError, TableError, TableFileError
from fewbit.record import Activation
from fewbit.text import file_name, plain


def load_table(
    activation: str | Activation | Callable[..., Any],
    bits: int = DEFAULT_BITS,
    *,
    weight: Any = None,
    coding: str | None = None,
    channels: str | tuple[str, ...] = ("derivative",),
    balance: float = 1.0,
    domain: tuple[float, float] | None = None,
    **parameters: Any,
) -> CodeTable:
    """Get the table that `fewbit.design` makes with the same arguments: a shipped one, a cached one, or a new design.

    A new design goes to the cache. The arguments are those of `fewbit.design`. Parameters of the activation count too, as in
    `load_table("elu", 3, alpha=0.5)`. A weight given as a function has no lasting name, so its table is designed at each call
    and not cached.

    Raises DesignError or ActivationError as `design` does, and TableFileError if a shipped file is damaged. If a file in the
    cache is damaged, its table is designed anew. If the cache cannot be written, the table is not kept. Both give a warning.

    >>> load_table("gelu", bits=3)
    CodeTable(gelu, 3 bits, derivative, student, level, 10 intervals, 8 levels, relative rms 0.0641)
    """
    record = activations.get(activation, **parameters)
    request = Request.of(record, bits, weight=weight, coding=coding, channels=channels, balance=balance, domain=domain)
    return _load(request) if request.weight.reusable else _search(request)


def load_ladder(
    activation: str | Activation | Callable[..., Any],
    bits: int = DEFAULT_BITS,
    *,
    channels: str | tuple[str, ...] = ("derivative",),
    **parameters: Any,
) -> tuple[CodeTable, ...]:
    """Get the tables of a ladder. Each is best for normal inputs of one standard deviation. The input's spread selects one.

    The tables are in the order of `fewbit.constants.RUNGS`. Each one is found as `load_table` finds it. If a single table is
    exact, as for ReLU's derivative, the ladder is that table alone. If the activation is not finite at the inputs of a rung, or
    its levels are beyond float32, the next rung towards 1 takes its place.

    Raises what `load_table` raises.

    >>> [table.weight for table in load_ladder("gelu", bits=3)][3:6]
    ['normal(std=0.5)', 'normal', 'normal(std=2)']
    """
    record = activations.get(activation, **parameters)
    channels = check_channels((channels,) if isinstance(channels, str) else channels, DesignError)
    single = load_table(record, bits, channels=channels)
    if _is_exact(single):
        return (single,)
    middle = RUNGS.index(1.0)
    below = above = [_rung(record, bits, channels, 1.0) or single]
    for std in reversed(RUNGS[:middle]):
        below = [_rung(record, bits, channels, std) or below[0], *below]
    for std in RUNGS[middle + 1 :]:
        above = [*above, _rung(record, bits, channels, std) or above[-1]]
    return (*below[:-1], *above)


def rung_for(ladder: tuple[CodeTable, ...], spread: float) -> CodeTable:
    """The table of a ladder for inputs of this spread. The spread is the standard deviation of normal numbers with the same
    fourth moment."""
    first, *others = ladder
    return ladder[bisect_left(_BETWEEN, spread)] if others else first


_BETWEEN = [(low * high) ** 0.5 for low, high in pairwise(RUNGS)]


def _is_exact(table: CodeTable) -> bool:
    return table.errors is not None and not any(table.errors)


def _rung(record: Activation, bits: int, channels: tuple[str, ...], std: float) -> CodeTable | None:
    """The table of a rung; None if there is none."""
    try:
        table = _load(Request.rung(record, bits, channels, std))
    except DesignError:
        return None
    return table if np.abs(table.levels).max() <= np.finfo(np.float32).max else None


@lru_cache(maxsize=1024)
def _load(request: Request) -> CodeTable:
    if request.activation == activations.SHIPPED.get(request.activation.name):
        for table in _shipped(request.activation.name):
            if table.bits == request.bits and request.answered_by(table):
                return table
    return _from_cache(request)


@cache
def _shipped(name: str) -> tuple[CodeTable, ...]:
    path = tables_directory() / f"{name}.json"
    return tuple(read_tables(path)) if path.exists() else ()


def tables_directory() -> Path:
    """The folder of the shipped tables: inside the installed package, or beside the package in a source tree."""
    inside = Path(__file__).parent / "tables"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "tables"


def cache_directory() -> Path:
    """The folder of tables designed on this machine. It need not exist."""
    if chosen := os.environ.get("FEWBIT_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))
    import platformdirs

    return Path(platformdirs.user_cache_dir("fewbit", appauthor=False))


def cache_path(request: Request) -> Path:
    """The cache file of a request. Its name has a digest of all that determines the table.

    The digest includes samples of f and f'. If a user changes an activation but not its name, its table is thus designed anew.
    Raises DesignError if f or f' is not finite.
    """
    request.check_finite()
    x, shape = np.linspace(*request.domain, 129), dataclasses.astuple(request.activation.derivative_shape)
    with np.errstate(all="ignore"):
        samples = [f"{value:.9g}" for value in (*request.activation.df(x), *request.activation.f(x))]
    key = json.dumps([VERSION, request.describe(), shape, samples], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_directory() / f"{file_name(request.activation.name)}-{request.bits}bit-{digest}.json"


def _from_cache(request: Request) -> CodeTable:
    path = cache_path(request)
    if os.path.exists(path):  # unlike path.exists(), this is False for a folder that may not be searched
        try:
            table, *others = read_tables(path) or [None]
            if table is None or others or not request.answered_by(table):
                raise TableFileError(f"{path} holds a different table than its name says")
            check_errors(table, request.activation, request.weight)
            return table
        except TableError as error:
            named = error if isinstance(error, TableFileError) else f"{path} is damaged: {error}"
            warnings.warn(plain(f"designing the table anew: {named}"), stacklevel=4)
    table = _search(request)
    _write_to_cache(path, table)
    return table


def _search(request: Request) -> CodeTable:
    from fewbit.design.search import search  # imported here because shipped tables need no numba

    return search(request)


def _write_to_cache(path: Path, table: CodeTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
    except OSError as error:
        _warn_once(
            f"tables designed here are not kept: cannot write to the cache {path.parent} ({error.strerror}); "
            "set FEWBIT_CACHE_DIR to a writable folder"
        )


@cache
def _warn_once(message: str) -> None:
    warnings.warn(plain(message), stacklevel=6)


def shipped_requests(name: str) -> Iterator[Request]:
    """The requests whose tables are in the shipped file of a name, in the file's order.

    For an activation these are tables of the derivative under every named weight, in both optimal codings, then the joint
    tables, then the other rungs of the ladders of both. For the identity they are the quantizers of a unit normal. All other
    arguments have their defaults.
    """
    record = activations.SHIPPED[name]
    if record == activations.IDENTITY:
        yield from (Request.of(record, bits, channels="value") for bits in range(1, MAX_BITS + 1))
        return
    for weight in WEIGHTS:
        for coding in SHIPPED_CODINGS:
            yield from (Request.of(record, bits, weight=weight, coding=coding) for bits in SHIPPED_BITS)
    yield from (Request.of(record, bits, channels=CHANNELS) for bits in SHIPPED_BITS)
    for channels in (("derivative",), CHANNELS):
        for bits in SHIPPED_BITS:
            if not _is_exact(_search(Request.of(record, bits, channels=channels))):  # an exact table is the whole ladder
                yield from (Request.rung(record, bits, channels, std) for std in RUNGS if std != 1)


def shipped_designs(name: str) -> list[CodeTable]:
    """The tables of the shipped file of a name, from new designs."""
    return [_search(request) for request in shipped_requests(name)]


def build_tables(directory: Path, *, check: bool = False) -> Iterator[tuple[str, bool]]:
    """Design every shipped file anew. After each, yields its name and whether the file on disk differs.

    A file stands if its tables are the new ones, or have the same errors to ten digits: where two tables are best, as a table
    and its mirror image may be, the last bit of a processor's arithmetic chooses. With `check` nothing is written.
    """
    if not check:
        directory.mkdir(parents=True, exist_ok=True)
    for name in activations.SHIPPED:
        path, designed = directory / f"{name}.json", shipped_designs(name)
        differs = not _stands(path, name, designed)
        if differs and not check:
            files.write(path, dump_tables(designed))
        yield name, differs


def _stands(path: Path, name: str, designed: list[CodeTable]) -> bool:
    try:
        there = read_tables(path)
    except (OSError, TableError):
        return False
    requests = list(shipped_requests(name))
    return len(there) == len(designed) and all(map(_as_good, requests, there, designed))


def _as_good(request: Request, table: CodeTable, designed: CodeTable) -> bool:
    if table == designed:
        return True
    if not request.answered_by(table):
        return False
    ours, theirs = (
        errors_under(request.weight, each, request.activation, domain=request.domain)[0] for each in (table, designed)
    )
    return np.allclose(ours, theirs, rtol=1e-10, atol=0.0)
