"""The error of any table under a weight, and a check of the errors that a table states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fewbit.design.grid import Grid
from fewbit.errors import DesignError, TableError
from fewbit.record import Activation
from fewbit.weights import Weight

if TYPE_CHECKING:
    from fewbit.design.table import CodeTable

CELLS = 4096  # the errors that a table states are computed on at least this many cells


def errors_under(
    weight: Weight,
    table: CodeTable,
    activation: Activation,
    cells: int = CELLS,
    domain: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """∫ w (g - q)² dx and ∫ w g² dx for each channel of the table: (channels,) each.

    activation  the activation whose f' and f are the channel functions g
    cells       as in `fewbit.design`
    domain      range of x; by default the weight's
    """
    grid = Grid(activation, table.channels, np.ones(len(table.channels)), weight, domain or weight.domain, cells)
    return grid.error(table.thresholds, table.codes, table.levels), grid.power()


def check_errors(table: CodeTable, activation: Activation, weight: Weight) -> None:
    """Raise TableError if a table states other errors and powers than its levels have for this activation and weight.

    Such a table is for something else, or its numbers are damaged. A table that states no errors passes.
    """
    if table.domain is None or table.errors is None or table.powers is None:
        return
    try:
        with np.errstate(all="ignore"):
            errors, powers = errors_under(weight, table, activation, domain=table.domain)
    except (DesignError, ArithmeticError) as error:
        raise TableError(f"its errors cannot be computed: {error}") from error
    # the tolerance covers the design's rounding, and its number of cells, which a table does not record
    if not (np.allclose(table.errors, errors, 1e-3, 1e-9 * powers.max()) and np.allclose(table.powers, powers, 1e-3, 0.0)):
        raise TableError(
            f"it states errors {table.errors} and powers {table.powers}, but its levels have {tuple(errors.tolist())} and "
            f"{tuple(powers.tolist())} for {activation} under the weight {weight} on {table.domain}"
        )
