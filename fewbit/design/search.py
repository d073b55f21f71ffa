"""From a request to its table: search on the grid, polish, and put the numbers into their final form."""

from __future__ import annotations

import numpy as np

from fewbit.design.dynprog import optimal_clusters, optimal_runs
from fewbit.design.grid import Grid
from fewbit.design.polish import polish
from fewbit.design.request import Request
from fewbit.design.table import CodeTable
from fewbit.record import Activation

Array = np.ndarray


def search(request: Request) -> CodeTable:
    """The table of least error for the request; DesignError if its function is not finite."""
    request.check_finite()
    scale = np.sqrt([1.0 if channel == "derivative" else request.balance for channel in request.channels])
    grid = Grid(request.activation, request.channels, scale, request.weight, request.domain, request.cells)
    best_on_grid = _level_search if request.coding == "level" else _interval_search
    thresholds, codes, levels = _finish(grid, request, *best_on_grid(grid, request.levels))
    errors, powers = _rounded(grid.error(thresholds, codes, levels)), _rounded(grid.power())
    return CodeTable(thresholds, codes, levels, errors=tuple(errors), powers=tuple(powers), **request.describe())


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
    return _run_ends(grid.edges, code[which])


def _run_ends(edges: Array, codes: Array) -> tuple[Array, Array]:
    """Merge neighbouring pieces of the same code: inner edges (m,) that remain, and codes (m+1,)."""
    changes = np.flatnonzero(np.diff(codes)) + 1
    return edges[changes], codes[np.concatenate([[0], changes])]


def _finish(grid: Grid, request: Request, thresholds: Array, codes: Array) -> tuple[Array, Array, Array]:
    """Polish, put the thresholds into their final form, compute the levels: thresholds (m,), codes, levels (channels, K)."""
    # where f' is constant the search may have cut at no gain: its cuts there have equal levels on both sides
    thresholds, codes, levels = _without_repetitions(thresholds, codes, grid.mean_by(thresholds, codes, int(codes.max()) + 1))
    thresholds = polish(grid, thresholds, codes, levels.shape[1])
    thresholds = _tidy_thresholds(grid, request.activation, thresholds, request.coding)
    levels = grid.mean_by(thresholds, codes, levels.shape[1])
    if np.any(grid.error(thresholds, codes, levels) > 0):
        levels = _tidied(levels)
    return _without_repetitions(thresholds, codes, levels)


def _tidy_thresholds(grid: Grid, record: Activation, thresholds: Array, coding: str) -> Array:
    """Round thresholds; put those at jumps on torch's side; mirror those of an even function."""
    at_jump = np.isin(thresholds, grid.jumps)
    tidy = np.where(at_jump, thresholds, _tidied(thresholds))
    for i in np.flatnonzero(at_jump):
        below, at, above = (record.df(x) for x in (np.nextafter(tidy[i], -np.inf), tidy[i], np.nextafter(tidy[i], np.inf)))
        if abs(at - above) < abs(at - below):  # torch counts the jump itself to the right: x <= threshold must fail there
            tidy[i] = np.nextafter(tidy[i], -np.inf)
    symmetric = grid.edges[0] == -grid.edges[-1] and thresholds.size % 2 == 0
    if coding == "level" and record.derivative_shape.even and symmetric and np.allclose(tidy, -tidy[::-1], 1e-6, 1e-6):
        half = tidy.size // 2
        tidy[:half] = np.nextafter(-tidy[half:][::-1], -np.inf)
    return tidy


def _rounded(values: Array) -> Array:
    """To 9 significant digits: finer than float32 resolves, short enough to read, coarser than rounding noise."""
    return np.array([float(f"{value:.9g}") for value in values.ravel()]).reshape(values.shape)


def _tidied(values: Array) -> Array:
    """To 9 significant digits and to 1e-12: a threshold that ought to be 0 is 0."""
    return _rounded(np.round(values, 12)) + 0.0  # + 0.0: no negative zero


def _without_repetitions(thresholds: Array, codes: Array, levels: Array) -> tuple[Array, Array, Array]:
    """Give equal levels one code and merge neighbouring intervals of the same code."""
    levels, which = np.unique(levels, axis=1, return_inverse=True)
    codes = which.reshape(-1)[codes]
    kept, codes = _run_ends(np.concatenate([[-np.inf], thresholds]), codes)
    return kept, codes.astype(np.uint8), levels
