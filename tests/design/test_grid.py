import numpy as np
import pytest
from scipy import integrate, stats

from fewbit import activations
from fewbit.design.grid import Grid
from fewbit.errors import DesignError
from fewbit.weights import as_weight

ONE = np.ones(1)


def grid_of(name, channels=("derivative",), weight="student", domain=(-10.0, 10.0), cells=64):
    return Grid(activations.get(name), channels, np.ones(len(channels)), as_weight(weight), domain, cells)


def test_jumps_and_kinks_are_edges():
    grid = grid_of("hardswish", cells=7)
    assert set(grid.edges) >= {-3.0, 3.0}
    assert grid.jumps.tolist() == [-3.0, 3.0]
    assert 0.0 in grid_of("softsign", cells=7).edges
    assert grid_of("relu6", domain=(-2.0, 5.0)).jumps.tolist() == [0.0]


@pytest.mark.parametrize("name", ["gelu", "hardswish", "selu"])
@pytest.mark.parametrize("weight", ["student", "normal(mean=1, std=0.5)", "uniform"])
def test_integrals_against_adaptive_quadrature(name, weight):
    grid, density = grid_of(name, ("derivative", "value"), weight, cells=256), as_weight(weight).density
    record = activations.get(name)
    breaks = [-3.0, 0.0, 1.0, 3.0]

    def quad(f, high):
        points = [b for b in breaks if b < high]
        return integrate.quad(lambda x: f(np.array(x)), -10, high, points=points, limit=400, epsabs=1e-13)[0]

    total = quad(density, 10.0)
    x = np.array([-7.3, -0.011, 2.0, 10.0])
    mass, first = grid.integrate_by(x[:-1], np.arange(4), 4)
    np.testing.assert_allclose(np.cumsum(mass), [quad(density, h) / total for h in x], atol=1e-10)
    for row, g in zip(first, (record.df, record.f), strict=True):
        np.testing.assert_allclose(np.cumsum(row), [quad(lambda t, g=g: density(t) * g(t), h) / total for h in x], atol=1e-10)
    np.testing.assert_allclose(grid.power()[0], quad(lambda t: density(t) * record.df(t) ** 2, 10.0) / total, atol=1e-10)
    assert grid.mass.sum() == pytest.approx(1.0, abs=1e-12)


def test_constants_come_out_exactly():
    grid = grid_of("leaky_relu")
    thresholds, codes = np.array([-1.234, 0.0, 0.777]), np.array([0, 1, 2, 2])
    levels = grid.mean_by(thresholds, codes, 3)
    assert levels.tolist() == [[0.01, 0.01, 1.0]]
    assert grid.error(thresholds, codes, levels).tolist() == [0.0]


def test_levels_are_weighted_means_over_shared_codes():
    grid = grid_of("tanh", weight="normal", cells=512)
    thresholds, codes = np.array([-0.8, 0.5]), np.array([0, 1, 0])
    x = np.linspace(-10, 10, 400_001)
    w, g = np.exp(-x * x / 2), 1 - np.tanh(x) ** 2
    inner = (x > -0.8) & (x <= 0.5)
    expected = [np.average(g[~inner], weights=w[~inner]), np.average(g[inner], weights=w[inner])]
    levels = grid.mean_by(thresholds, codes, 2)
    np.testing.assert_allclose(levels[0], expected, atol=1e-4)
    error = np.average((g - np.where(inner, levels[0, 1], levels[0, 0])) ** 2, weights=w)
    np.testing.assert_allclose(grid.error(thresholds, codes, levels), [error], atol=1e-5)


def test_little_mass_far_out_keeps_its_digits():
    grid, thresholds = grid_of("sigmoid", ("value",), "normal", cells=512), np.array([-6.0, 6.5])
    mass, _ = grid.integrate_by(thresholds, np.arange(3), 3)
    np.testing.assert_allclose(mass[[0, 2]], stats.norm.sf([6.0, 6.5]), rtol=1e-9)
    shared, _ = grid.integrate_by(thresholds, np.array([1, 0, 1]), 2)
    np.testing.assert_allclose(shared, [mass[1], mass[0] + mass[2]], rtol=1e-14)


def test_errors_end_with_the_domain():
    grid = grid_of("tanh", weight="normal", domain=(-1.0, 1.0))
    inner, codes, levels = np.array([0.0]), np.array([0, 1]), np.array([[0.4, 0.9]])
    wider = np.array([-3.0, 0.0, 2.5]), np.array([1, 0, 1, 0])
    np.testing.assert_array_equal(grid.error(*wider, levels), grid.error(inner, codes, levels))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("normal(mean=100)", "no finite mass on the domain"),
        (lambda x: np.zeros_like(x), "no finite mass"),
        (lambda x: x, "nowhere negative"),
        (lambda x: np.full_like(x, np.nan), "must be finite"),
    ],
)
def test_weights_that_cannot_serve(weight, message):
    with pytest.raises(DesignError, match=message):
        grid_of("gelu", weight=weight)
