"""Newton's method moves the best thresholds on a grid to the stationary point next to them.

If threshold s_i moves by ds, the points in between pass from the code on its right to the code on its left. With optimal
levels, the error is therefore stationary when both codes fit the point s_i equally well. With g the channel functions, b their
factors, and L, R the levels to the left and right of s_i:

    F_i(s) = Σ_c b_c ((g_c(s_i) - L_c)² - (g_c(s_i) - R_c)²) = Σ_c b_c (R_c - L_c)(2 g_c(s_i) - L_c - R_c) = 0

For one channel this is f'(s_i) = (L + R) / 2 (Novikov et al., ICML 2023). The equations also hold if intervals share levels, so
they are the same for both codings. A threshold stays at a jump of g if the jump separates the two codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from fewbit.design.grid import Grid

Array = np.ndarray
Sparse = Any  # scipy's sparse arrays, of whose shapes type checkers know nothing
_STEPS = 30
_TOLERANCE = 1e-12


def polish(grid: Grid, thresholds: Array, codes: Array, count: int) -> Array:
    """Thresholds (m,) of least error near the given ones.

    thresholds  (m,) edges of `grid`
    codes       (m+1,) below `count`; they stay as they are

    If Newton's method finds nothing better, the given thresholds come back: the result is never worse.
    """
    low, high, free = _segments(grid, thresholds, codes, count)
    if not free.any():
        return thresholds
    s = thresholds.copy()
    cells = np.diff(grid.edges)
    at = np.clip(np.searchsorted(grid.edges, s), 1, cells.size - 1)
    width = np.maximum(cells[at - 1], cells[at])  # how far a step may go: cells beside each other differ much in size
    for _ in range(_STEPS):
        residual, slopes, by_level, moves = _stationarity(grid, s, codes, count, low, high)
        step = _solve(slopes[free], by_level[free], moves[:, free], -residual[free])
        moved = np.clip(s[free] + np.clip(step, -width[free], width[free]), low[free], high[free])
        done = np.abs(moved - s[free]).max() <= _TOLERANCE * np.abs(grid.edges[[0, -1]]).max()
        s[free] = moved
        if not np.all(np.diff(s) > 0):
            return thresholds
        if done:
            break
    return s if _error(grid, s, codes, count) <= _error(grid, thresholds, codes, count) else thresholds


def _solve(slopes: Array, by_level: Sparse, moves: Sparse, right: Array) -> Array:
    """The Newton step x of (diag(slopes) + by_level moves) x = right; the shortest one where that matrix is singular.

    With y = moves x for what the levels do, this is a sparse system in x and y, of a few entries for each threshold.
    The matrix is singular on a stretch of constant g, for example.
    """
    still = np.zeros(moves.shape[0])
    blocks = [[sparse.diags_array(slopes), by_level], [-moves, sparse.eye_array(still.size)]]
    try:
        return splu(sparse.block_array(blocks, format="csc")).solve(np.concatenate([right, still]))[: right.size]
    except RuntimeError:  # exactly singular
        return np.linalg.lstsq(np.diag(slopes) + by_level.toarray() @ moves.toarray(), right, rcond=None)[0]


def _error(grid: Grid, thresholds: Array, codes: Array, count: int) -> float:
    levels = grid.mean_by(thresholds, codes, count)
    return float(grid.scale**2 @ grid.error(thresholds, codes, levels))


def _segments(grid: Grid, thresholds: Array, codes: Array, count: int) -> tuple[Array, Array, Array]:
    """For each threshold the ends of the range without jumps in which it may move, and whether it may move: (m,) each."""
    walls = np.concatenate([grid.edges[:1], grid.jumps, grid.edges[-1:]])
    before, after = np.nextafter(walls, -np.inf), np.nextafter(walls, np.inf)
    at = np.searchsorted(walls, thresholds, side="right")  # walls[at-1] <= threshold < walls[at]
    low, high = after[at - 1], before[np.minimum(at, walls.size - 1)]
    free = np.ones(thresholds.size, bool)
    levels = grid.mean_by(thresholds, codes, count)
    for i in np.flatnonzero(np.isin(thresholds, grid.jumps)).tolist():
        prefers_right = [_preference(grid, x, levels, codes, i) for x in (float(before[at[i] - 1]), float(after[at[i] - 1]))]
        if prefers_right[1] < 0:  # the code on the left also fits the points just right of the jump better
            continue
        if prefers_right[0] > 0:
            low[i], high[i] = after[at[i] - 2], before[at[i] - 1]
        else:
            free[i] = False
    return low, high, free


def _preference(grid: Grid, x: float, levels: Array, codes: Array, i: int) -> float:
    """F_i at x. It is positive if the code to the right of threshold i fits x better."""
    left, right = levels[:, codes[i]], levels[:, codes[i + 1]]
    return float(grid.scale**2 @ ((right - left) * (2 * grid.g(np.array([x]))[:, 0] - left - right)))


def _stationarity(
    grid: Grid, s: Array, codes: Array, count: int, low: Array, high: Array
) -> tuple[Array, Array, Sparse, Sparse]:
    """F (m,), and its Jacobian diag(slopes) + by_level moves: slopes (m,), by_level (m, n), moves (n, m).

    n is the number of levels of all channels. F_i depends on s_i by the slope of g, and on every s_j through the levels: as
    s_j grows, the mass w(s_j) ds enters the code on its left and leaves the one on its right. It moves each mean by
    (g(s_j) - mean) / mass of the code.
    """
    m, channels = s.size, grid.scale.size
    mass, first = grid.integrate_by(s, codes, count)
    total = np.where(mass > 0, mass, np.inf)
    left, right = codes[:-1].astype(np.int64), codes[1:].astype(np.int64)
    g, density = grid.g(s), grid.w(s)
    h = 1e-6 * np.maximum(1.0, np.abs(s))
    ahead, behind = np.minimum(s + h, high), np.maximum(s - h, low)
    factors, levels = grid.scale[:, None] ** 2, first / total
    to_left, to_right, rise = g - levels[:, left], g - levels[:, right], levels[:, right] - levels[:, left]
    residual = (factors * rise * (to_left + to_right)).sum(0)
    slopes = (2 * factors * rise * (grid.g(ahead) - grid.g(behind)) / (ahead - behind)).sum(0)
    offsets = count * np.arange(channels)[:, None]
    of_levels = np.concatenate([left + offsets, right + offsets]).ravel()
    of_thresholds = np.tile(np.arange(m), 2 * channels)
    by_level = np.concatenate([-2 * factors * to_left, 2 * factors * to_right]).ravel()
    moves = np.concatenate([density * to_left / total[left], -density * to_right / total[right]]).ravel()
    shape = (m, channels * count)
    return (
        residual,
        slopes,
        sparse.csr_array((by_level, (of_thresholds, of_levels)), shape=shape),
        sparse.csc_array((moves, (of_levels, of_thresholds)), shape=shape[::-1]),
    )
