"""Weights are probability densities of the pre-activation x. A design minimises a table's error under its weight.

A weight has one textual form, the same in `design(weight=...)`, on the command line and in table files:
`uniform`, `normal`, `normal(mean=1, std=2)`, `student`, `student(df=5)`. Densities need not be normalised:
the design divides by the mass on its domain.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fewbit.constants import DEFAULT_DOMAIN, WEIGHTS
from fewbit.errors import DesignError
from fewbit.record import as_float
from fewbit.text import shown

Array = np.ndarray


class Weight:
    """A density over the pre-activation. Subclasses define it."""

    domain: tuple[float, float] = DEFAULT_DOMAIN
    reusable: bool = False  # whether str(self) describes the density completely; its tables can then be stored and found again

    def density(self, x: Array) -> Array:
        """The density at x, up to a constant factor; same shape as x."""
        raise NotImplementedError

    def edges(self, domain: tuple[float, float], cells: int) -> Array:
        """Ascending edges of the cells into which a design divides `domain`.

        There are (cells + 1,) equally spaced edges. If such cells are too wide for the features of activations around 0, or for
        those of the weight, more edges are added. These are dense at the features and spread outwards.
        """
        edges = np.linspace(*domain, cells + 1)
        for center, scale in {(0.0, 1.0), self.feature}:
            if edges[1] - edges[0] > scale / 64:
                ends = np.arcsinh((np.array(domain) - center) / scale)
                inner = center + scale * np.sinh(np.linspace(ends[0], ends[1], cells + 1))[1:-1]
                edges = np.union1d(edges, np.clip(inner, *domain))
        return edges

    @property
    def feature(self) -> tuple[float, float]:
        """The centre and the scale of the density: where it varies most, and over which distance."""
        return 0.0, 1.0


class _Parametric(Weight):
    reusable = True

    def __str__(self) -> str:
        given = {f.name: float(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]
        changed = [f"{name}={repr(value).removesuffix('.0')}" for name, value in given.items()]
        return _name(type(self)) + (f"({', '.join(changed)})" if changed else "")


@dataclass(frozen=True)
class Uniform(_Parametric):
    """Constant on the domain: the weight of Novikov et al. (ICML 2023)."""

    def density(self, x: Array) -> Array:
        return np.ones_like(x)


@dataclass(frozen=True)
class Normal(_Parametric):
    """Normal density."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        _check_numbers(self, positive=("std",))

    @property
    def feature(self) -> tuple[float, float]:
        return float(self.mean), float(self.std)

    def density(self, x: Array) -> Array:
        return np.exp(-0.5 * ((x - self.mean) / self.std) ** 2)


@dataclass(frozen=True)
class Student(_Parametric):
    """Student's t density with `df` degrees of freedom. It is the default because its heavy tails serve many input scales."""

    df: float = 3.0
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        _check_numbers(self, positive=("df", "scale"))

    @property
    def feature(self) -> tuple[float, float]:
        return float(self.mean), float(self.scale)

    def density(self, x: Array) -> Array:
        z = (x - self.mean) / self.scale
        return (1 + z * z / self.df) ** (-0.5 * (self.df + 1))


@dataclass(frozen=True, eq=False)
class Histogram(Weight):
    """A density that is constant between `bin_edges` (n+1,) and proportional to `counts` (n,) over the bins' widths."""

    bin_edges: Array
    counts: Array
    reusable = True

    def __post_init__(self):
        edges, counts = np.array(self.bin_edges, np.float64), np.array(self.counts, np.float64)
        if edges.ndim != 1 or counts.shape != (edges.size - 1,) or edges.size < 2:
            raise DesignError(f"a histogram needs edges (n+1,) and counts (n,), n >= 1; got {edges.shape} and {counts.shape}")
        if not np.all(np.isfinite(edges)) or not np.all(np.diff(edges) > 0):
            raise DesignError("the edges of a histogram must be finite and ascending")
        if not np.all(np.isfinite(counts)) or np.any(counts < 0) or not counts.sum() > 0:
            raise DesignError("the counts of a histogram must be finite, none negative, and not all zero")
        edges.flags.writeable = counts.flags.writeable = False
        object.__setattr__(self, "bin_edges", edges)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def of(cls, samples: Any, bins: int = 4096) -> Histogram:
        """The histogram of an array of pre-activations of any shape.

        Bins are equally wide in arcsinh(x), so they stay narrow around zero even if outliers are far away.
        """
        try:
            x = np.asarray(samples)
        except ValueError:  # lists of several lengths
            x = np.empty(0, object)
        if x.dtype.kind not in "fiu" or x.size == 0:
            raise DesignError(f"samples must be a non-empty real array, got dtype {x.dtype} with {x.size} elements")
        x = np.arcsinh(x.astype(np.float64).ravel())
        if not np.all(np.isfinite(x)):
            raise DesignError(f"samples must be finite; {np.count_nonzero(~np.isfinite(x))} of {x.size} are not")
        low, high = x.min(), x.max()
        margin = 1e-6 * max(1.0, abs(low), abs(high))
        counts, edges = np.histogram(x, bins, (low - margin, high + margin))
        return cls(np.sinh(edges), counts)

    @property
    def domain(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self.bin_edges[0]), float(self.bin_edges[-1])

    @property
    def feature(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        middles, share = 0.5 * (self.bin_edges[1:] + self.bin_edges[:-1]), self.counts / self.counts.sum()
        mean = share @ middles
        variance = share @ ((middles - mean) ** 2 + np.diff(self.bin_edges) ** 2 / 12)
        return float(mean), float(np.sqrt(variance))

    def density(self, x: Array) -> Array:
        inner = (x >= self.bin_edges[0]) & (x <= self.bin_edges[-1])
        bin_index = np.clip(np.searchsorted(self.bin_edges, x, side="right") - 1, 0, self.counts.size - 1)
        return np.where(inner, (self.counts / np.diff(self.bin_edges))[bin_index], 0.0)

    def edges(self, domain: tuple[float, float], cells: int) -> Array:
        inner = self.bin_edges[(self.bin_edges > domain[0]) & (self.bin_edges < domain[1])]
        sparse = np.linspace(*domain, max(cells - inner.size, 1) + 1)
        return np.union1d(sparse, inner)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        digest = hashlib.sha256(self.bin_edges.tobytes() + self.counts.tobytes()).hexdigest()[:12]
        return f"histogram({self.counts.size} bins, {digest})"


@dataclass(frozen=True)
class Custom(Weight):
    """A density given as a function of a float64 array."""

    function: Callable[[Array], Array]

    def density(self, x: Array) -> Array:
        return np.broadcast_to(np.asarray(self.function(x), np.float64), np.shape(x))

    def __str__(self) -> str:
        return f"custom({getattr(self.function, '__qualname__', type(self.function).__name__)})"


_NAMED = {"student": Student, "normal": Normal, "uniform": Uniform}
assert tuple(_NAMED) == WEIGHTS  # the command line takes the names from there, without importing this module


def _name(kind: type[Weight]) -> str:
    return next(name for name, named in _NAMED.items() if named is kind)


def as_weight(weight: Any) -> Weight:
    """The Weight for an argument of a user: a Weight, its text, a density function, or an array of samples.

    >>> str(as_weight("normal(std=2)"))
    'normal(std=2)'
    >>> str(as_weight("student(df=3)"))
    'student'

    Raises DesignError for anything else.
    """
    if isinstance(weight, Weight):
        return weight
    if isinstance(weight, str):
        return _parse(weight)
    if callable(weight):
        return Custom(weight)  # type: ignore[arg-type]
    if isinstance(weight, np.ndarray | list | tuple):
        return Histogram.of(weight)
    if hasattr(weight, "detach"):  # a tensor, of any dtype and device
        weight = weight.detach().cpu().double()
    if hasattr(weight, "__array__"):
        return Histogram.of(np.asarray(weight))
    raise DesignError(
        f"weight must be one of {', '.join(WEIGHTS)}, a density function, or an array of samples; got {type(weight).__name__}"
    )


def weight_named(text: str) -> Weight | None:
    """The weight of a text; None if the text does not describe a weight completely, as for histograms and functions."""
    try:
        return _parse(text)
    except DesignError:
        return None


def _parse(text: str) -> Weight:
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    name, arguments = match.groups() if match else (None, None)
    if name not in _NAMED:
        raise DesignError(f"weight must be one of {', '.join(WEIGHTS)}, such as 'normal(mean=0, std=2)'; got {text!r}")
    kind = _NAMED[name]
    known = [f.name for f in fields(kind)]
    values = {}
    for part in filter(str.strip, (arguments or "").split(",")):
        key, _, number = (piece.strip() for piece in part.partition("="))
        try:
            values[key] = float(number)
        except ValueError:
            key = part.strip()
        if key not in known:
            takes = ", ".join(f"{each}=NUMBER" for each in known) or "no arguments"
            raise DesignError(f"weight {name!r} takes {takes}; got {part.strip()!r} in {text!r}")
    return kind(**values)


def _check_numbers(weight: Weight, positive: tuple[str, ...]) -> None:
    for each in fields(weight):  # type: ignore[arg-type]
        value = getattr(weight, each.name)
        number = as_float(value)
        if not np.isfinite(number) or (each.name in positive and number <= 0):
            kind = "a positive number" if each.name in positive else "a finite number"
            raise DesignError(f"weight {_name(type(weight))!r}: {each.name} must be {kind}, got {shown(value)}")
        object.__setattr__(weight, each.name, number)
