"""Makes the table of a request: by a search on the grid and a polish, or from the bins of the uniform coding."""

from __future__ import annotations

import numpy as np

from fewbit.design.dynprog import optimal_clusters, optimal_runs
from fewbit.design.evaluate import CELLS
from fewbit.design.grid import Grid
from fewbit.design.polish import polish
from fewbit.design.request import Request
from fewbit.design.table import CodeTable
from fewbit.design.tidy import rounded, run_ends, tidy_levels, tidy_thresholds, without_repetitions
from fewbit.design.uniform import uniform_bins
from fewbit.errors import DesignError, TableError

Array = np.ndarray


def search(request: Request) -> CodeTable:
    """The table of a request. Raises DesignError if its function is not finite, or a number is beyond float64."""
    request.check_finite()
    try:
        with np.errstate(all="ignore"):
            return _search(request)
    except (TableError, ArithmeticError) as error:
        raise DesignError(
            f"no table of {request.activation} was found under the weight {request.weight} on {request.domain}: {error}; "
            "choose other parameters, another domain or more cells"
        ) from error


def _search(request: Request) -> CodeTable:
    scale = np.sqrt([1.0 if channel == "derivative" else request.balance for channel in request.channels])
    arguments = request.activation, request.channels, scale, request.weight, request.domain
    grid = Grid(*arguments, request.cells)
    thresholds, codes, levels = (_uniform if request.coding == "uniform" else _optimal)(grid, request)
    judge = grid if request.cells >= CELLS else Grid(*arguments, CELLS)
    errors, powers = rounded(judge.error(thresholds, codes, levels)), rounded(judge.power())
    return CodeTable(thresholds, codes, levels, errors=tuple(errors), powers=tuple(powers), **request.describe())


def _uniform(grid: Grid, request: Request) -> tuple[Array, Array, Array]:
    """Thresholds (m,), codes (m+1,) and levels (channels, m+1). Codes ascend with x, even if levels are equal."""
    edges, middles = uniform_bins(request.weight, request.bits)
    thresholds, codes = rounded(edges), np.arange(middles.size)
    return thresholds, codes, tidy_levels(grid, request, thresholds, codes, grid.g(middles))


def _optimal(grid: Grid, request: Request) -> tuple[Array, Array, Array]:
    """Search, polish and tidy: thresholds (m,), codes (m+1,) and levels (channels, K) of least error."""
    best_on_grid = _level_search if request.coding == "level" else _interval_search
    thresholds, codes = best_on_grid(grid, request.levels)
    # the search may cut a stretch of constant f' without any gain; such cuts have equal levels on both sides and are removed
    thresholds, codes, levels = without_repetitions(thresholds, codes, grid.mean_by(thresholds, codes, int(codes.max()) + 1))
    count = levels.shape[1]
    thresholds = tidy_thresholds(grid, request, polish(grid, thresholds, codes, count))
    levels = tidy_levels(grid, request, thresholds, codes, grid.mean_by(thresholds, codes, count))
    return without_repetitions(thresholds, codes, levels)


def _interval_search(grid: Grid, count: int) -> tuple[Array, Array]:
    """The best `count` intervals on the grid's cells, in the order of x: thresholds (m,) and codes (m+1,)."""
    cuts = optimal_runs(grid.mean * grid.scale[:, None], grid.mass, count)
    return grid.edges[cuts[1:-1]], np.arange(cuts.size - 1)


def _level_search(grid: Grid, count: int) -> tuple[Array, Array]:
    """The best clustering of the cells by their mean value into `count` levels: thresholds (m,) and codes (m+1,)."""
    values, which = np.unique(grid.mean[0], return_inverse=True)
    code = np.arange(values.size)
    if values.size > count:
        cuts = optimal_clusters(values, np.bincount(which, grid.mass), count)
        code = np.repeat(np.arange(cuts.size - 1), np.diff(cuts))
    return run_ends(grid.edges, code[which])
