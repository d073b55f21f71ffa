import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbit
from fewbit import activations
from fewbit.errors import ActivationError, DesignError
from fewbit.weights import as_weight

WEIGHTS = ("student", "normal", "uniform")
BITS = (1, 2, 3, 4)
EXACT_AT_ONE_BIT = ("relu", "leaky_relu", "relu6", "hardtanh", "hardsigmoid", "softshrink", "hardshrink", "threshold")
QUICK = [("gelu", "student"), ("hardswish", "uniform"), ("softsign", "normal"), ("selu", "student"), ("tanh", "uniform")]
REST = [(name, weight) for name in activations.names() for weight in WEIGHTS if (name, weight) not in QUICK]


def grid_optima(record, weight, coding):
    """Least errors with 1 to 16 levels on a grid of 4096 cells, by the quadratic program."""
    shape = record.derivative_shape
    edges = np.union1d(np.linspace(-10, 10, 4097), [x for x in (*shape.jumps, *shape.kinks) if -10 < x < 10])
    moments = oracles.cell_moments(record.df, as_weight(weight).density, edges)
    if coding == "level":
        order = np.argsort(moments[1] / np.where(moments[0] > 0, moments[0], 1.0), kind="stable")
        moments = [moment[order] for moment in moments]
    return oracles.quadratic_program(*moments, 16)


@pytest.mark.parametrize(
    ("name", "weight"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)], ids=lambda value: value
)
def test_optimal_and_ordered(name, weight):
    """As good as the best on the grid; not worse with more bits; level coding not worse than interval coding."""
    record = activations.get(name)
    errors = {
        coding: [fewbit.design(name, b, weight=weight, coding=coding).mse for b in BITS] for coding in ("level", "interval")
    }
    for coding, found in errors.items():
        best = grid_optima(record, weight, coding)[[1, 3, 7, 15]]
        # 1e-14: the oracle's own rounding remains where an optimum is (nearly) zero
        assert np.all(found <= best * (1 + 1e-6) + 1e-14), (coding, found, best)
        assert np.all(np.diff(found) <= 0)
    assert np.all(np.array(errors["level"]) <= errors["interval"])


@pytest.mark.parametrize("name", EXACT_AT_ONE_BIT)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("bits", BITS)
def test_piecewise_linear_activations_are_exact(name, weight, bits, rng):
    table = fewbit.design(name, bits, weight=weight)
    assert table.mse == 0.0
    assert table.relative_rms == 0.0
    record = activations.get(name)
    x = np.concatenate([rng.normal(0, 5, 10_000), record.derivative_shape.jumps])
    np.testing.assert_array_equal(table(x), record.df(x))


# Novikov et al.'s optima as published and recomputed elsewhere: integral of (f' - q)^2 over [-10, 10]
PUBLISHED = {
    ("gelu", 3): (0.0119, 0.0081),
    ("silu", 3): (0.0170, 0.0122),
    ("tanh", 3): (0.0259, 0.0073),
    ("selu", 2): (0.101, None),
}


@pytest.mark.parametrize(("name", "bits"), PUBLISHED)
def test_known_figures(name, bits):
    for coding, figure in zip(("interval", "level"), PUBLISHED[name, bits], strict=True):
        if figure:
            found = 20 * fewbit.design(name, bits, weight="uniform", coding=coding).mse
            assert found == pytest.approx(figure, rel=0.006)


@pytest.mark.parametrize("name", ["gelu", "hardswish", "tanh", "selu"])
@pytest.mark.parametrize("coding", ["level", "interval"])
def test_recorded_errors_are_the_errors_of_the_table(name, coding):
    table, record = fewbit.design(name, 3, coding=coding), activations.get(name)
    density = as_weight("student").density
    assert oracles.dense_mse(table, record.df, density) == pytest.approx(table.mse, rel=1e-4)
    x = np.linspace(-10, 10, 200_001)
    power = np.average(record.df(x) ** 2, weights=density(x))
    assert table.relative_rms == pytest.approx(np.sqrt(table.mse / power), rel=1e-3)


def test_jumps_sit_exactly_on_thresholds():
    assert fewbit.design("relu", 1).thresholds.tolist() == [0.0]
    assert 0.0 in fewbit.design("selu", 3).thresholds
    for name, low, high in (("hardsigmoid", -3.0, 3.0), ("relu6", 0.0, 6.0)):
        # at the upper jump torch's derivative is already 0: the float below it belongs to the middle, the jump does not
        assert fewbit.design(name, 1).thresholds.tolist() == [low, np.nextafter(high, 0)]


def test_level_coding_takes_the_level_nearest_to_the_derivative(record):
    table = fewbit.design(record.name, 3)
    x = np.linspace(-9.99, 9.99, 5001)
    distance = np.abs(record.df(x)[:, None] - table.levels[0])
    chosen = np.abs(record.df(x) - table(x))
    assert np.all(chosen <= distance.min(axis=1) + 1e-5)


def test_even_derivatives_get_even_tables(record):
    table = fewbit.design(record.name, 4)
    assert table.even == record.derivative_shape.even
    if table.even:
        x = np.concatenate([table.thresholds, np.nextafter(table.thresholds, np.inf), np.linspace(0, 9, 1001)])
        np.testing.assert_array_equal(table.encode(x), table.encode(-x))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("coding", ["level", "interval"])
def test_all_bits(bits, coding):
    table = fewbit.design("mish", bits, coding=coding)
    assert table.bits == bits
    assert table.levels.shape == (1, 2**bits)
    assert table.mse < 0.16 / 4**bits


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (5, 3), (17, 5), (256, 8)])
def test_any_number_of_levels(levels, bits):
    table = fewbit.design("silu", levels=levels)
    assert table.bits == bits
    assert table.levels.shape[1] == levels
    assert fewbit.design("silu", 8, levels=levels).bits == 8


@pytest.mark.parametrize("balance", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", ["gelu", "tanh", "relu"])
def test_joint_tables_against_brute_force(name, balance):
    """12 cells, 3 intervals: every pair of cut points is tried."""
    table = fewbit.design(name, levels=3, channels=("derivative", "value"), balance=balance, cells=12, domain=(-3, 3))
    record, density = activations.get(name), as_weight("normal").density
    x = np.linspace(-3, 3, 12 * 500 + 1)
    x = (x[1:] + x[:-1]) / 2
    values = np.stack([record.df(x), np.sqrt(balance) * record.f(x)])
    weights = density(x) / density(x).sum()
    best = min(
        sum(oracles.group_error(values[:, a:b], weights[a:b]) for a, b in ((0, i), (i, j), (j, x.size)))
        for i in range(500, x.size, 500)
        for j in range(i + 500, x.size, 500)
    )
    found = table.mse[0] + balance * table.mse[1]
    assert found <= best * (1 + 1e-5)
    assert found > 0.5 * best  # the polish moves by a cell at most


def test_joint_table_trades_one_channel_for_the_other():
    tables = [fewbit.design("gelu", 4, channels=("derivative", "value"), balance=b) for b in (0.01, 1.0, 100.0)]
    derivative, value = zip(*(table.mse for table in tables), strict=True)
    assert derivative[0] < derivative[1] < derivative[2]
    assert value[0] > value[1] > value[2]
    assert tables[0].channels == ("derivative", "value")
    assert tables[0].coding == "interval"
    assert tables[0](np.zeros((2, 3))).shape == (2, 2, 3)


def test_value_channel_alone():
    table = fewbit.design("tanh", 3, channels="value")
    x = np.linspace(-3, 3, 101)
    assert np.abs(table(x) - np.tanh(x)).max() < 0.2


@pytest.mark.parametrize("bits", range(1, 9))
def test_identity_tables_are_the_quantizers_of_lloyd_and_max(bits):
    table = fewbit.design("identity", bits, channels="value")
    thresholds, levels, error = oracles.lloyd_max(2**bits)
    assert table.weight == "normal"
    assert table.mse == pytest.approx(error, rel=1e-7)
    np.testing.assert_allclose(table.thresholds, thresholds, atol=1e-6)
    np.testing.assert_allclose(table.levels[0], levels, atol=1e-6)
    assert table.relative_rms == pytest.approx(np.sqrt(error), rel=1e-6)


@settings(max_examples=10)
@given(mean=st.floats(-3, 3), std=st.floats(0.05, 4), bits=st.integers(1, 4))
def test_quantizers_move_and_stretch_with_the_weight(mean, std, bits):
    unit = fewbit.design("identity", bits, channels="value")
    weight, domain = f"normal(mean={mean}, std={std})", (mean - 10 * std, mean + 10 * std)
    table = fewbit.design("identity", bits, channels="value", weight=weight, domain=domain)
    np.testing.assert_allclose(table.thresholds, mean + std * unit.thresholds, atol=1e-5 * std)
    np.testing.assert_allclose(table.levels, mean + std * unit.levels, atol=1e-5 * std)
    assert table.mse == pytest.approx(std**2 * unit.mse, rel=1e-5)


@pytest.mark.parametrize(
    ("channels", "weight"),
    [("derivative", "student"), ("value", "normal"), (("derivative", "value"), "normal"), (("value", "derivative"), "normal")],
    ids=str,
)
def test_weight_left_out(channels, weight):
    for make in (fewbit.design, fewbit.load_table):
        assert make("gelu", 2, channels=channels).weight == weight
        assert make("gelu", 2, channels=channels, weight=None).weight == weight
        assert make("gelu", 2, channels=channels, weight="uniform").weight == "uniform"


def test_the_derivative_of_the_identity_needs_no_code():
    table = fewbit.design("identity", 3)
    assert (table.thresholds.tolist(), table.levels.tolist(), table.mse) == ([], [[1.0]], 0.0)


class TestWeights:
    def test_callable(self):
        gaussian = fewbit.design("gelu", 3, weight=lambda x: 17 * np.exp(-x * x / 2))
        normal = fewbit.design("gelu", 3, weight="normal")
        np.testing.assert_array_equal(gaussian.thresholds, normal.thresholds)
        assert gaussian.mse == pytest.approx(normal.mse, rel=1e-8)

    def test_samples(self, rng):
        samples = rng.normal(-1.0, 0.5, (200, 500))
        table = fewbit.design("gelu", 3, weight=samples)
        normal = fewbit.design("gelu", 3, weight="normal(mean=-1, std=0.5)")
        on_samples = [np.mean((t(samples) - activations.get("gelu").df(samples)) ** 2) for t in (table, normal)]
        assert on_samples[0] == pytest.approx(table.mse, rel=1e-2)
        assert on_samples[0] == pytest.approx(on_samples[1], rel=0.02)
        assert on_samples[0] < 0.5 * np.mean((fewbit.design("gelu", 3)(samples) - activations.get("gelu").df(samples)) ** 2)

    def test_samples_with_atoms_and_an_outlier(self):
        table = fewbit.design("silu", 2, weight=[0.0] * 500 + [1.0] * 400 + [-2.0] * 300 + [1e5])
        np.testing.assert_allclose(table([0.0, 1.0, -2.0]), activations.get("silu").df([0.0, 1.0, -2.0]), atol=1e-2)

    def test_domain(self):
        narrow = fewbit.design("gelu", 3, domain=(-1, 1))
        assert np.all(np.abs(narrow.thresholds) < 1)
        assert narrow.domain == (-1.0, 1.0)
        assert narrow.mse < fewbit.design("gelu", 3).mse

    @pytest.mark.parametrize(("std", "domain"), [(3e-4, None), (1e-3, None), (0.05, (-50, 50)), (1.0, (-1e5, 1e5))])
    def test_narrow_weights_on_wide_domains(self, std, domain, rng):
        table = fewbit.design("gelu", 3, weight=f"normal(std={std})", domain=domain)
        x = rng.normal(0, std, 200_000)
        error = np.mean((table(x) - activations.get("gelu").df(x)) ** 2)
        assert error == pytest.approx(table.mse, rel=0.02)
        assert table.mse == pytest.approx(fewbit.design("gelu", 3, weight=x).mse, rel=0.05)

    def test_functions_too_narrow_for_the_cells(self):
        with pytest.raises(DesignError, match="is too narrow for the cells of"):
            fewbit.design("gelu", 3, weight=lambda x: np.exp(-((x / 1e-3) ** 2)))

    def test_mass_in_two_islands(self):
        def islands(x):
            return np.where(np.abs(np.abs(x) - 2) < 0.5, 1.0, 0.0)

        assert fewbit.design("gelu", 3, weight=islands, coding="interval").mse < 1e-4
        assert fewbit.design("gelu", 3, weight=islands).mse < 1e-4


class TestActivations:
    def test_parameters_shape_the_table(self):
        assert fewbit.design("elu", 2, alpha=0.5).parameters == {"alpha": 0.5}
        assert fewbit.design("elu", 2, alpha=0.5) != fewbit.design("elu", 2)
        assert fewbit.design("leaky_relu", 1, negative_slope=0.3).levels.tolist() == [[0.3, 1.0]]

    def test_a_function_on_tensors(self):
        def wobble(x):
            return x + 0.3 * (3 * x).sin()

        table = fewbit.design(wobble, 3)
        x = np.linspace(-5, 5, 1001)
        assert table.activation == "wobble"
        assert np.abs(table(x) - (1 + 0.9 * np.cos(3 * x))).max() < 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 9}, DesignError, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 0}, DesignError, "got 0"),
        ({"bits": True}, DesignError, "got True"),
        ({"bits": 2.0}, DesignError, r"got 2\.0"),
        ({"levels": 257}, DesignError, "levels must be an integer from 2 to 256, got 257"),
        ({"levels": 9, "bits": 3}, DesignError, "9 levels need 4 bits, got bits=3"),
        (
            {"levels": 9, "coding": "uniform"},
            DesignError,
            r"'uniform' has 2\*\*bits levels, got 9 with bits=4; leave levels out",
        ),
        ({"coding": "levle"}, DesignError, "coding must be one of .*got 'levle'"),
        ({"channels": ("derivative", "value"), "coding": "level"}, DesignError, "use coding='interval' for several"),
        ({"channels": ("slope",)}, DesignError, "channels must be some of"),
        ({"channels": ()}, DesignError, "channels must be some of"),
        ({"balance": 0.0, "channels": ("derivative", "value")}, DesignError, "balance must be a positive number"),
        ({"domain": (1, 1)}, DesignError, "domain must be two finite numbers"),
        ({"domain": (0, np.inf)}, DesignError, "domain must be two finite numbers"),
        ({"domain": 3}, DesignError, "domain must be two finite numbers"),
        ({"cells": 1}, DesignError, "cells must be an integer from 2"),
        ({"weight": "gauss"}, DesignError, "weight must be one of"),
        ({"activation": "celu", "alpha": 0}, DesignError, "celu alpha=0 has no finite value and derivative"),
        ({"activation": "gleu"}, ActivationError, "did you mean 'gelu'"),
        ({"alpha": 2.0}, ActivationError, "gelu has no parameter 'alpha'"),
    ],
    ids=str,
)
def test_wrong_requests(arguments, error, message):
    with pytest.raises(error, match=message):
        fewbit.design(**{"activation": "gelu", **arguments})


def test_same_request_same_bytes():
    assert fewbit.design("mish", 4) == fewbit.design("mish", 4)
    assert fewbit.design("mish", 4) != fewbit.design("mish", 4, weight="normal")
