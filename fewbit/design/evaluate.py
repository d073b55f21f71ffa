"""How well a table, however it was made, does under a weight."""

from __future__ import annotations

import numpy as np

from fewbit.design.grid import Grid
from fewbit.design.table import CodeTable
from fewbit.record import Activation
from fewbit.weights import Weight


def errors_under(weight: Weight, table: CodeTable, activation: Activation, cells: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """∫ w (g - q)² dx and ∫ w g² dx for each channel of the table, (channels,) each, over the weight's domain.

    activation  whose f' and f the channels are of
    cells       as in `fewbit.design`
    """
    grid = Grid(activation, table.channels, np.ones(len(table.channels)), weight, weight.domain, cells)
    return grid.error(table.thresholds, table.codes, table.levels), grid.power()
