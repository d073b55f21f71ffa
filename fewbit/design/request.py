"""The checked arguments of a design, with all defaults filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbit import activations
from fewbit.constants import CHANNELS, CODINGS, DEFAULT_BITS, DEFAULT_DOMAIN, DEFAULT_WEIGHT, MAX_BITS, VALUE_WEIGHT
from fewbit.design.table import CodeTable, check_bits, check_channels
from fewbit.errors import DesignError
from fewbit.record import Activation, as_float
from fewbit.text import shown
from fewbit.weights import Normal, Weight, as_weight


@dataclass(frozen=True)
class Request:
    """The checked arguments of a design. Equal requests give equal tables. `Request.of` takes the arguments of users."""

    activation: Activation
    bits: int
    levels: int
    weight: Weight
    coding: str
    channels: tuple[str, ...]
    balance: float
    domain: tuple[float, float]
    cells: int

    @classmethod
    def of(
        cls,
        activation: str | Activation | Callable[..., Any],
        bits: int | None = None,
        *,
        weight: Any = None,
        coding: str | None = None,
        channels: Any = ("derivative",),
        balance: float = 1.0,
        levels: int | None = None,
        domain: Any = None,
        cells: int = 4096,
        **parameters: float,
    ) -> Request:
        """See `fewbit.design` for the arguments and the errors."""
        record = activations.get(activation, **parameters)
        bits, levels = _bits_and_levels(bits, levels)
        channels, coding = _channels_and_coding(channels, coding)
        if coding == "uniform" and levels != 2**bits:
            raise DesignError(f"coding 'uniform' has 2**bits levels, got {levels} with bits={bits}; leave levels out")
        density = as_weight(_default_weight(channels) if weight is None else weight)
        domain = _reaching(density.domain, record) if domain is None else _domain(domain)
        return cls(record, bits, levels, density, coding, channels, _balance(balance), domain, _cells(cells))

    @classmethod
    def rung(cls, activation: Activation, bits: int, channels: tuple[str, ...], std: float) -> Request:
        """The request for one rung of a ladder: the best table for normal pre-activations of this standard deviation.

        Errors of values are measured in standard deviations, so their weight relative to errors of f' is the same on every
        rung. The domain extends to six standard deviations, and at least as far as the default.
        """
        reach = max(*DEFAULT_DOMAIN, 6 * std)
        balance = std**-2 if channels == CHANNELS else 1.0
        domain = _reaching((-reach, reach), activation)
        return cls.of(activation, bits, weight=Normal(std=std), channels=channels, balance=balance, domain=domain)

    def describe(self) -> dict[str, Any]:
        """The entries that a table of this request states: those of CodeTable other than its arrays and errors."""
        return {
            "activation": self.activation.name,
            "parameters": dict(self.activation.parameters),
            "bits": self.bits,
            "weight": str(self.weight),
            "coding": self.coding,
            "channels": self.channels,
            "balance": self.balance,
            "domain": self.domain,
        }

    def check_finite(self) -> None:
        """Raise DesignError if f or f' is not finite. `of` does not call this: a shipped table needs no evaluation of f."""
        x = np.linspace(*self.domain, 33)
        try:
            with np.errstate(all="ignore"):
                finite = np.all(np.isfinite(self.activation.df(x))) and np.all(np.isfinite(self.activation.f(x)))
        except ArithmeticError:
            finite = False
        if not finite:
            raise DesignError(
                f"{self.activation} has no finite value and derivative everywhere on {self.domain}; change its parameters or "
                "the domain"
            )

    def answered_by(self, table: CodeTable) -> bool:
        """Whether the entries that the table states are those of this request."""
        stated = table.errors is not None and table.powers is not None
        return stated and all(getattr(table, name) == value for name, value in self.describe().items())


def _bits_and_levels(bits: int | None, levels: int | None) -> tuple[int, int]:
    if levels is None:
        bits = check_bits(DEFAULT_BITS if bits is None else bits, DesignError)
        return bits, 2**bits
    if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or not 2 <= levels <= 2**MAX_BITS:
        raise DesignError(f"levels must be an integer from 2 to {2**MAX_BITS}, got {shown(levels)}")
    needed = int(levels - 1).bit_length()
    bits = needed if bits is None else check_bits(bits, DesignError)
    if needed > bits:
        raise DesignError(f"{levels} levels need {needed} bits, got bits={bits}")
    return bits, int(levels)


def _channels_and_coding(channels: Any, coding: str | None) -> tuple[tuple[str, ...], str]:
    channels = check_channels((channels,) if isinstance(channels, str) else channels, DesignError)
    coding = ("level" if len(channels) == 1 else "interval") if coding is None else coding
    if not isinstance(coding, str) or coding not in CODINGS:
        raise DesignError(f"coding must be one of {CODINGS}, got {shown(coding)}")
    if coding == "level" and len(channels) > 1:
        raise DesignError("coding 'level' orders x by one function and so takes one channel; use coding='interval' for several")
    return channels, coding


def _default_weight(channels: tuple[str, ...]) -> str:
    """Measurements show that derivatives tolerate heavy tails, which serve many input scales, and values want light tails."""
    return VALUE_WEIGHT if "value" in channels else DEFAULT_WEIGHT


def _balance(balance: Any) -> float:
    number = as_float(balance) if isinstance(balance, int | float) else np.nan
    if not (number > 0 and np.isfinite(number)):
        raise DesignError(f"balance must be a positive number, got {shown(balance)}")
    return number


def _reaching(domain: tuple[float, float], record: Activation) -> tuple[float, float]:
    """The domain, widened to include jumps of f' up to ten times as far out. Without the jump, inputs beyond it would get the
    gradient from its other side."""
    low, high = domain
    far = [x for x in record.derivative_shape.jumps if not low <= x <= high and 10 * low <= x <= 10 * high]
    with np.errstate(all="ignore"):
        sides = [record.df(np.array([x - 1e-9 * abs(x), x + 1e-9 * abs(x)])) for x in far]
    seen = [x for x, (left, right) in zip(far, sides, strict=True) if abs(right - left) > 1e-6]  # not softplus's at 20
    return min([low, *(1.1 * x for x in seen)]), max([high, *(1.1 * x for x in seen)])


def _domain(domain: Any) -> tuple[float, float]:
    try:
        low, high = (as_float(end) for end in domain)
    except (TypeError, ValueError):
        low = high = np.nan
    if not (np.isfinite([low, high]).all() and low < high):
        raise DesignError(f"domain must be two finite numbers (low, high) with low < high, got {shown(domain)}")
    return low, high


def _cells(cells: Any) -> int:
    if isinstance(cells, bool) or not isinstance(cells, int | np.integer) or not 2 <= cells <= 1 << 20:
        raise DesignError(f"cells must be an integer from 2 to {1 << 20}, got {shown(cells)}")
    return int(cells)
