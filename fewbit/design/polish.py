"""Newton's method moves the best thresholds on a grid to the stationary point next to them.

If threshold s_i moves by ds, the points in between pass from the code on its right to the code on its left. With optimal
levels, the error is therefore stationary when both codes fit the point s_i equally well. With g the channel functions, b their
factors, and L, R the levels to the left and right of s_i:

    F_i(s) = Σ_c b_c ((g_c(s_i) - L_c)² - (g_c(s_i) - R_c)²) = Σ_c b_c (R_c - L_c)(2 g_c(s_i) - L_c - R_c) = 0

For one channel this is f'(s_i) = (L + R) / 2 (Novikov et al., ICML 2023). The equations also hold if intervals share levels, so
they are the same for both codings. A threshold stays at a jump of g if the jump separates the two codes.
"""

from __future__ import annotations

import numpy as np

from fewbit.design.grid import Grid

Array = np.ndarray
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
    width = np.interp(s, grid.edges[:-1], np.diff(grid.edges))
    for _ in range(_STEPS):
        residual, jacobian = _stationarity(grid, s, codes, count, low, high)
        step = _solve(jacobian[np.ix_(free, free)], -residual[free])
        moved = np.clip(s[free] + np.clip(step, -width[free], width[free]), low[free], high[free])
        done = np.abs(moved - s[free]).max() <= _TOLERANCE * np.abs(grid.edges[[0, -1]]).max()
        s[free] = moved
        if not np.all(np.diff(s) > 0):
            return thresholds
        if done:
            break
    return s if _error(grid, s, codes, count) <= _error(grid, thresholds, codes, count) else thresholds


def _solve(matrix: Array, right: Array) -> Array:
    """The Newton step. If the Jacobian is singular, as on a stretch of constant g, it is the shortest step."""
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(matrix, right, rcond=None)[0]


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


def _stationarity(grid: Grid, s: Array, codes: Array, count: int, low: Array, high: Array) -> tuple[Array, Array]:
    """F (m,) and its Jacobian (m, m).

    F_i depends on s_i through g, and on every s_j through the levels. As s_j grows, the mass w(s_j) ds enters the code on its
    left and leaves the code on its right. It moves each mean by (g(s_j) - mean) / mass of the code.
    """
    m = s.size
    mass, first = grid.integrate_by(s, codes, count)
    total = np.where(mass > 0, mass, np.inf)
    left, right = codes[:-1].astype(np.int64), codes[1:].astype(np.int64)
    g, density = grid.g(s), grid.w(s)
    h = 1e-6 * np.maximum(1.0, np.abs(s))
    ahead, behind = np.minimum(s + h, high), np.maximum(s - h, low)
    slope = (grid.g(ahead) - grid.g(behind)) / (ahead - behind)
    residual, jacobian = np.zeros(m), np.zeros((m, m))
    rows = np.arange(m)
    for c, factor in enumerate(grid.scale**2):
        levels = first[c] / total
        to_left, to_right = g[c] - levels[left], g[c] - levels[right]
        residual += factor * (levels[right] - levels[left]) * (to_left + to_right)
        jacobian[rows, rows] += 2 * factor * (levels[right] - levels[left]) * slope[c]
        by_level = np.zeros((m, count))
        by_level[rows, right] += 2 * factor * to_right
        by_level[rows, left] -= 2 * factor * to_left
        level_moves = np.zeros((count, m))
        level_moves[left, rows] += density * to_left / total[left]
        level_moves[right, rows] -= density * to_right / total[right]
        jacobian += by_level @ level_moves
    return residual, jacobian
