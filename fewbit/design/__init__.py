"""`design` finds the CodeTable of least error for an activation, a number of bits and a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbit.design.table import CodeTable
    from fewbit.record import Activation


def design(
    activation: str | Activation | Callable[..., Any],
    bits: int | None = None,
    *,
    weight: Any = None,
    coding: str | None = None,
    channels: str | tuple[str, ...] = ("derivative",),
    balance: float = 1.0,
    levels: int | None = None,
    domain: tuple[float, float] | None = None,
    cells: int = 4096,
    **parameters: float,
) -> CodeTable:
    """Design the code table of least error ∫ w (f' - q)² dx among all tables with the given bits.

    activation  A registered name, a record, a pointwise function on tensors, or "identity". "identity" stands for f(x) = x.
                With channels="value" it gives the optimal quantizer of x itself (Lloyd-Max).
    bits        bits of one code, 1 to 8; 3 if neither `bits` nor `levels` is given
    weight      Density of the pre-activation: a text such as "student", "normal(std=2)" or "uniform", a function of a float64
                array, an array of samples, or a Weight. The default is "student" for the derivative alone, and "normal" if the
                value is among the channels, since values want light tails.
    coding      "level" is the default for one channel: each x takes the level nearest to f'(x), and intervals share levels. It
                is never worse than the others. "interval" is the default for several channels: each interval has its own
                level, as published. "uniform" optimises nothing: it has equal bins over centre ± 3 scales of the weight, with
                an edge at zero so that the sign survives, and the level of a bin is f' or f at its middle (Chakrabarti &
                Moseley, NeurIPS 2019).
    channels    what backward will read: "derivative" (f'), "value" (f), or both from one code (a joint table)
    balance     factor of the squared error of "value" relative to that of "derivative"
    levels      number of levels, 2 to 256, if it is not 2**bits
    domain      (low, high): the range of x over which the error counts. The default is (-10, 10), or the range of the samples.
                The outermost intervals extend beyond it.
    cells       Number of grid cells on which the dynamic program searches. The result is then refined between grid points.
    parameters  parameters of the activation, such as alpha=0.5

    The table is the global optimum on the grid, moved to the stationary point next to it. For "interval" the dynamic program is
    that of Novikov et al., ICML 2023, section 3. For "level" it solves weighted k-means of the values f'(x) exactly. If a jump
    of f' separates two levels, a threshold lies exactly on the jump, on the side that torch's backward takes. If the optimum
    for values is antisymmetric, thresholds and levels are antisymmetric to the last digit. Thresholds and levels are rounded to
    9 significant digits unless the fit is exact.

    Raises DesignError or ActivationError. The message says what was wrong and what would be right.

    >>> table = design("relu", bits=1)
    >>> table.thresholds, table.levels, table.mse
    (array([0.]), array([[0., 1.]]), 0.0)
    """
    from fewbit.design.request import Request  # imported here so that `import fewbit` loads neither numpy nor numba
    from fewbit.design.search import search

    return search(
        Request.of(
            activation,
            bits,
            weight=weight,
            coding=coding,
            channels=channels,
            balance=balance,
            levels=levels,
            domain=domain,
            cells=cells,
            **parameters,
        )
    )
