import numpy as np
import pytest

import fewbit
from fewbit import activations

ODD = [record.name for record in activations.BUILT_IN.values() if record.derivative_shape.even and record.f(0.0) == 0]
FLAT = ("softshrink", "hardshrink", "tanhshrink")  # around zero, where an even number of levels has no level for zero
QUANTIZERS = [
    *(("normal", bits) for bits in range(1, 9)),
    *((weight, bits) for weight in ("student", "uniform", "normal(std=0.01)", "student(df=1.5)") for bits in (1, 2, 3, 6)),
]


@pytest.mark.parametrize(("weight", "bits"), QUANTIZERS)
def test_quantizers_of_symmetric_weights_mirror_themselves(weight, bits):
    """Symmetric to the last digit, with a threshold at zero, so that the sign survives."""
    table = fewbit.design("identity", bits, channels="value", weight=weight)
    assert table.levels.shape == (1, 2**bits)
    assert table.thresholds[table.thresholds.size // 2] == 0.0
    np.testing.assert_array_equal(table.thresholds, -table.thresholds[::-1])
    np.testing.assert_array_equal(table.levels, -table.levels[:, ::-1])


@pytest.mark.parametrize("levels", [3, 5, 31])
def test_odd_numbers_of_levels_have_one_at_zero(levels):
    table = fewbit.design("identity", levels=levels, channels="value")
    np.testing.assert_array_equal(table.thresholds, -table.thresholds[::-1])
    np.testing.assert_array_equal(table.levels, -table.levels[:, ::-1])
    assert table.levels[0, levels // 2] == 0.0


@pytest.mark.parametrize("coding", ["level", "interval"])
def test_a_shifted_weight_keeps_its_shift(coding):
    """The shift is far below the width of a bin, but not rounding noise: the table follows it."""
    for mean in (1e-3, 1e-5):
        table = fewbit.design("identity", 1, channels="value", weight=f"normal(mean={mean})", coding=coding)
        assert table.thresholds[0] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_values_of_odd_functions_mirror_themselves(name):
    table = fewbit.design(name, levels=15 if name in FLAT else 16, channels="value")
    np.testing.assert_allclose(table.thresholds, -table.thresholds[::-1], rtol=1e-15)  # at a jump one of them is one float off
    np.testing.assert_array_equal(table.levels, -table.levels[:, ::-1])


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "hardtanh"])
def test_joint_tables_of_even_derivatives_part_at_zero(name):
    for bits in (1, 2, 3, 4):
        assert 0.0 in fewbit.load_table(name, bits, channels=("derivative", "value")).thresholds


def test_no_negative_zeros(record):
    for channels in ("value", ("derivative", "value")):
        table = fewbit.load_table(record, 3, channels=channels)
        for array in (table.thresholds, table.levels):
            assert not np.any(np.signbit(array) & (array == 0))
