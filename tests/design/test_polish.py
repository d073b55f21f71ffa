import numpy as np
import pytest

from fewbit import activations
from fewbit.design.grid import Grid
from fewbit.design.polish import polish
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
