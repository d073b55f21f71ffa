import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewbit
from fewbit import activations
from fewbit.design.table import CodeTable
from fewbit.design.uniform import uniform_bins
from fewbit.weights import Normal, as_weight

BITS = st.integers(1, 8)
WEIGHT = {"mean": st.floats(-40, 40), "std": st.floats(0.01, 10)}
X = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


def table_of(mean, std, bits):
    thresholds, middles = uniform_bins(Normal(mean, std), bits)
    return CodeTable(thresholds, np.arange(2**bits), [middles], bits, ("value",))


@given(**WEIGHT, bits=BITS, x=X)
def test_codes_and_values_are_the_published_ones(mean, std, bits, x):
    table = table_of(mean, std, bits)
    x = np.array(x)
    # exactly on an edge floor() goes right and a table left; next to an edge rounding decides
    x = x[np.abs(x[:, None] - table.thresholds).min(axis=1) > 1e-9 * std]
    codes, values, _ = oracles.uniform_codes(x / std, mean / std, bits)
    np.testing.assert_array_equal(table.encode(x), codes)
    np.testing.assert_allclose(table(x), np.array(values) * std, rtol=1e-12)


@given(**WEIGHT, bits=BITS, x=X)
def test_the_sign_survives(mean, std, bits, x):
    """For any bias. Zero goes with the negative x, as in torch's ReLU."""
    table = table_of(mean, std, bits)
    _, _, shift = oracles.uniform_codes([], mean / std, bits)
    x = np.array([*x, 0.0, -0.0, 5e-324, -5e-324])
    np.testing.assert_array_equal(table.encode(x) >= shift, x > 0)
    np.testing.assert_array_equal(table(x) > 0, x > 0)


@given(**WEIGHT, bits=BITS)
def test_bins_cover_three_scales_on_either_side_of_the_centre(mean, std, bits):
    thresholds, middles = uniform_bins(Normal(mean, std), bits)
    width = 6 * std / 2**bits
    np.testing.assert_allclose(np.diff(middles), width, rtol=1e-9)
    assert np.count_nonzero(thresholds == 0.0) == 1
    if abs(mean) < 3 * std - width:  # otherwise zero lies outside, and the bins extend to it
        assert abs((middles[0] + middles[-1]) / 2 - mean) <= width * (1 + 1e-9)


def test_by_hand():
    """2 bits over 1.5 ± 3: bins 1.5 wide, moved down to the nearest edge at zero."""
    table = fewbit.design("identity", 2, channels="value", weight="normal(mean=1.5)", coding="uniform")
    assert table.thresholds.tolist() == [0.0, 1.5, 3.0]
    assert table.levels.tolist() == [[-0.75, 0.75, 2.25, 3.75]]
    assert table.encode([-9.0, 0.0, 0.1, 1.5, 2.0, 99.0]).tolist() == [0, 0, 1, 1, 2, 3]
    assert table.coding == "uniform"


@pytest.mark.parametrize("channels", [("derivative",), ("value",), ("derivative", "value")], ids=str)
@pytest.mark.parametrize(("name", "weight"), [("gelu", "normal(mean=0.3, std=1)"), ("relu6", "normal(mean=-1, std=5)")])
def test_levels_are_taken_at_the_middles(name, weight, channels):
    record, density = activations.get(name), as_weight(weight)
    table = fewbit.design(name, 4, channels=channels, weight=weight, coding="uniform")
    thresholds, middles = uniform_bins(density, 4)
    by_channel = {"derivative": record.df, "value": record.f}
    np.testing.assert_allclose(table.thresholds, thresholds, rtol=1e-8)
    np.testing.assert_allclose(table.levels, [by_channel[channel](middles) for channel in channels], rtol=1e-8)
    assert table.codes.tolist() == list(range(16))  # the published codes, although ReLU6' has the same level for many of them
    for c, channel in enumerate(channels):
        row = CodeTable(table.thresholds, table.codes, table.levels[c : c + 1], 4, domain=table.domain)
        expected = oracles.dense_mse(row, by_channel[channel], density.density, points=200_001)
        assert np.atleast_1d(table.mse)[c] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_relu_backward_is_exact(bits, rng):
    table = fewbit.design("relu", bits, channels=("derivative", "value"), weight="normal(mean=2, std=0.7)", coding="uniform")
    x = np.append(rng.normal(2, 3, 1000), 0.0)
    np.testing.assert_array_equal(table(x)[0], activations.get("relu").df(x))
    assert table.mse[0] == 0.0
    assert table.levels.shape == (2, 2**bits)


@pytest.mark.parametrize("channels", ["derivative", "value", ("derivative", "value")], ids=str)
def test_never_better_than_the_optimum(channels):
    errors = [np.sum(fewbit.design("silu", 3, channels=channels, coding=coding).mse) for coding in ("uniform", "interval")]
    assert errors[0] > errors[1]


def test_samples_give_their_mean_and_deviation(rng):
    samples = rng.normal(1.2, 0.4, 50_000)
    by_samples = fewbit.design("gelu", 4, weight=samples, coding="uniform")
    by_normal = fewbit.design("gelu", 4, weight=f"normal(mean={samples.mean()}, std={samples.std()})", coding="uniform")
    np.testing.assert_allclose(by_samples.thresholds, by_normal.thresholds, rtol=1e-3)


def test_levels_may_be_named_if_they_are_all():
    assert fewbit.design("gelu", levels=16, coding="uniform") == fewbit.design("gelu", 4, coding="uniform")
