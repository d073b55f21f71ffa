"""How well a table, however it was made, does under a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fewbit.design.grid import Grid
from fewbit.errors import DesignError, TableError
from fewbit.record import Activation
from fewbit.weights import Weight

if TYPE_CHECKING:
    from fewbit.design.table import CodeTable

CELLS = 4096  # at least, on which the errors are taken that a table states


def errors_under(
    weight: Weight,
    table: CodeTable,
    activation: Activation,
    cells: int = CELLS,
    domain: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """∫ w (g - q)² dx and ∫ w g² dx for each channel of the table, (channels,) each, over the domain, or else the weight's.

    activation  whose f' and f the channels are of
    cells       as in `fewbit.design`
    """
    grid = Grid(activation, table.channels, np.ones(len(table.channels)), weight, domain or weight.domain, cells)
    return grid.error(table.thresholds, table.codes, table.levels), grid.power()


def check_errors(table: CodeTable, activation: Activation, weight: Weight) -> None:
    """Raise TableError where the errors and powers that a table states are not those of its levels for this activation under
    this weight: it is then for something else, or its numbers are damaged. A table that states none passes."""
    if table.domain is None or table.errors is None or table.powers is None:
        return
    try:
        with np.errstate(all="ignore"):
            errors, powers = errors_under(weight, table, activation, domain=table.domain)
    except (DesignError, ArithmeticError) as error:
        raise TableError(f"no such table can be: {error}") from error
    # as the design rounds them; and its cells, which no table records, were perhaps others
    if not (np.allclose(table.errors, errors, 1e-3, 1e-9 * powers.max()) and np.allclose(table.powers, powers, 1e-3, 0.0)):
        raise TableError(
            f"it states errors {table.errors} and powers {table.powers}, but its levels have {tuple(errors.tolist())} and "
            f"{tuple(powers.tolist())} for {activation} under the weight {weight} on {table.domain}"
        )
