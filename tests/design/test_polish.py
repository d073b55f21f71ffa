import numpy as np
import pytest
from scipy import sparse

from fewbit import activations
from fewbit.design.grid import Grid
from fewbit.design.polish import _solve, _stationarity, polish
from fewbit.design.search import _interval_search, _level_search
from fewbit.weights import as_weight


def error(grid, thresholds, codes):
    levels = grid.mean_by(thresholds, codes, int(codes.max()) + 1)
    return float(grid.scale**2 @ grid.error(thresholds, codes, levels))


def grid_of(name, channels=("derivative",), balance=1.0, weight="student", cells=512):
    scale = np.sqrt([1.0, balance][: len(channels)])
    return Grid(activations.get(name), channels, scale, as_weight(weight), (-10.0, 10.0), cells)


def best_on_grid(grid, coding, count):
    return (_level_search if coding == "level" else _interval_search)(grid, count)


@pytest.mark.parametrize("name", ["gelu", "tanh", "softsign", "hardswish", "selu", "elu"])
@pytest.mark.parametrize("coding", ["level", "interval"])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_levels_meet_halfway_at_every_threshold_that_is_no_jump(name, coding, count):
    grid = grid_of(name)
    start, codes = best_on_grid(grid, coding, count)
    s = polish(grid, start, codes, count)
    levels = grid.mean_by(s, codes, count)[0]
    free = ~np.isin(s, grid.jumps)
    halfway = (levels[codes[:-1]] + levels[codes[1:]]) / 2
    np.testing.assert_allclose(grid.g(s)[0][free], halfway[free], atol=1e-9)
    assert error(grid, s, codes) <= error(grid, start, codes)


def test_no_nearby_thresholds_are_better(rng):
    grid = grid_of("gelu", ("derivative", "value"), balance=3.0)
    start, codes = best_on_grid(grid, "interval", 4)
    s = polish(grid, start, codes, 4)
    least = error(grid, s, codes)
    assert least < error(grid, start, codes)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            assert error(grid, np.sort(s + size * rng.normal(size=3)), codes) >= least


def test_thresholds_at_jumps_that_part_their_codes_stay():
    grid = grid_of("relu6")
    start = np.array([0.0, 6.0])
    assert polish(grid, start, np.array([0, 1, 0]), 2).tolist() == [0.0, 6.0]


def test_a_threshold_leaves_a_jump_that_does_not_part_its_codes():
    grid, codes = grid_of("hardswish", cells=8), np.arange(3)  # f' jumps from 1.5 to 1 at 3, while the levels lie below 1
    start = np.array([-2.5, 3.0])
    s = polish(grid, start, codes, 3)
    assert s[1] < 2.5
    assert error(grid, s, codes) < error(grid, start, codes)


def test_never_worse_from_any_start(rng):
    for name in ("gelu", "selu", "hardswish", "softsign", "sigmoid"):
        grid = grid_of(name, weight="uniform", cells=64)
        for _ in range(10):
            count = int(rng.integers(2, 9))
            start = np.sort(rng.choice(grid.edges[1:-1], count - 1, replace=False))
            codes = np.arange(count)
            assert error(grid, polish(grid, start, codes, count), codes) <= error(grid, start, codes)


@pytest.mark.parametrize("channels", [("derivative",), ("derivative", "value")])
@pytest.mark.parametrize("shared", [True, False])
def test_the_newton_step_solves_with_the_jacobian(channels, shared, rng):
    grid = grid_of("gelu", channels, balance=2.0, cells=4096)
    s = np.sort(rng.uniform(-4, 4, 12))
    codes = np.append(np.arange(7), np.arange(6)) if shared else np.arange(13)
    count, ends = int(codes.max()) + 1, (np.full(12, -10.0), np.full(12, 10.0))

    def residual(at):
        return _stationarity(grid, at, codes, count, *ends)[0]

    jacobian = np.stack([(residual(s + step) - residual(s - step)) / 2e-4 for step in 1e-4 * np.eye(12)], axis=1)
    force, slopes, by_level, moves = _stationarity(grid, s, codes, count, *ends)
    dense = np.diag(slopes) + by_level.toarray() @ moves.toarray()
    np.testing.assert_allclose(dense, jacobian, atol=2e-3 * np.abs(jacobian).max())
    np.testing.assert_allclose(_solve(slopes, by_level, moves, -force), np.linalg.solve(dense, -force), rtol=1e-8)


def test_a_singular_step_is_the_shortest():
    slopes, nothing = np.array([2.0, 0.0]), np.zeros((2, 1))
    assert _solve(slopes, sparse.csr_array(nothing), sparse.csc_array(nothing.T), np.array([4.0, 0.0])).tolist() == [2.0, 0.0]
