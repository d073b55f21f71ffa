"""Brings the numbers of a table into their final form: rounded, exactly symmetric if the optimum is, without repetitions."""

from __future__ import annotations

import numpy as np

from fewbit.design.grid import Grid
from fewbit.design.request import Request
from fewbit.record import Activation

Array = np.ndarray


def tidy_thresholds(grid: Grid, request: Request, thresholds: Array) -> Array:
    """Round thresholds (m,), mirror those of a symmetric optimum, and put those at jumps on torch's side."""
    at_jump = np.isin(thresholds, grid.jumps)
    rounded = tidied(_antisymmetric(thresholds, _leeway(grid, thresholds)) if "value" in request.channels else thresholds)
    tidy = _on_torchs_side(request.activation, np.where(at_jump, thresholds, rounded), at_jump)
    by_size = request.coding == "level" and request.channels == ("derivative",) and request.activation.derivative_shape.even
    symmetric = grid.edges[0] == -grid.edges[-1] and thresholds.size % 2 == 0
    # an even f' has the same value at both thresholds of a pair; they differ only if the polish ended early, with little mass
    if by_size and symmetric and np.allclose(tidy, -tidy[::-1], 2e-3, 1e-6):
        half = tidy.size // 2
        tidy[:half] = np.nextafter(-tidy[half:][::-1], -np.inf)
    return tidy


def tidy_levels(grid: Grid, request: Request, thresholds: Array, codes: Array, levels: Array) -> Array:
    """Levels (channels, K). Values become exactly antisymmetric if the thresholds are. Levels are rounded unless the fit is
    exact."""
    if "value" in request.channels and np.allclose(thresholds, -thresholds[::-1], rtol=1e-15, atol=0.0):
        levels = levels.copy()
        row = levels[request.channels.index("value")]
        order = np.argsort(row)
        row[order] = _antisymmetric(row[order], 1e-10 * np.abs(row).max())
    return tidied(levels) if np.any(grid.error(thresholds, codes, levels) > 0) else levels


def rounded(values: Array) -> Array:
    """Round to 9 significant digits: finer than float32 resolves, short enough to read, coarser than rounding noise."""
    return np.array([float(f"{value:.9g}") for value in values.ravel()]).reshape(values.shape)


def tidied(values: Array) -> Array:
    """Round to 9 significant digits and to 1e-12, so that a threshold that should be 0 is 0."""
    return rounded(np.round(values, 12)) + 0.0  # + 0.0: no negative zero


def without_repetitions(thresholds: Array, codes: Array, levels: Array) -> tuple[Array, Array, Array]:
    """Give equal levels one code and merge neighbouring intervals of the same code."""
    levels, which = np.unique(levels, axis=1, return_inverse=True)
    codes = which.reshape(-1)[codes]
    kept, codes = run_ends(np.concatenate([[-np.inf], thresholds]), codes)
    return kept, codes.astype(np.uint8), levels


def run_ends(edges: Array, codes: Array) -> tuple[Array, Array]:
    """Merge neighbouring pieces of the same code. Returns the inner edges (m,) that remain, and codes (m+1,)."""
    changes = np.flatnonzero(np.diff(codes)) + 1
    return edges[changes], codes[np.concatenate([[0], changes])]


def _on_torchs_side(record: Activation, thresholds: Array, at_jump: Array) -> Array:
    """Move a threshold at a jump to the next lower float, if torch counts the point of the jump to the right."""
    moved = thresholds.copy()
    for i in np.flatnonzero(at_jump):
        below, at, above = (record.df(x) for x in (np.nextafter(moved[i], -np.inf), moved[i], np.nextafter(moved[i], np.inf)))
        if abs(at - above) < abs(at - below):  # x <= threshold must fail at the jump
            moved[i] = np.nextafter(moved[i], -np.inf)
    return moved


def _antisymmetric(ascending: Array, tolerance: Array | float) -> Array:
    """The values (n,), made exactly antisymmetric if they are antisymmetric within the tolerance; else unchanged.

    >>> _antisymmetric(np.array([-1.0, 1e-15, 1.0]), 1e-10)
    array([-1.,  0.,  1.])
    """
    mirrored = -ascending[::-1]
    return 0.5 * (ascending + mirrored) if np.all(np.abs(ascending - mirrored) <= tolerance) else ascending


def _leeway(grid: Grid, thresholds: Array) -> Array:
    """How far from the exact optimum the polish may end (m,). A heuristic: a hundred times the distance seen with 8 bits."""
    return 1e-4 * np.interp(thresholds, grid.edges[:-1], np.diff(grid.edges))
