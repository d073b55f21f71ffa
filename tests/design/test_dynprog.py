import itertools
import os
import subprocess
import sys

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fewbit.design import dynprog

# with few distinct values there are many ties, and weights of zero
VALUES = st.one_of(st.integers(-2, 2).map(float), st.floats(-10, 10, allow_subnormal=False))
WEIGHTS = st.one_of(st.just(0.0), st.integers(1, 3).map(float), st.floats(1e-3, 10))


def error_of(cuts, values, weights):
    assert cuts[0] == 0
    assert cuts[-1] == weights.size
    assert np.all(np.diff(cuts) > 0)
    return sum(oracles.group_error(values[:, a:b], weights[a:b]) for a, b in itertools.pairwise(cuts))


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(1, 9), channels=st.integers(1, 3), count=st.integers(1, 5))
def test_runs_are_optimal_by_brute_force(data, n, channels, count):
    values = data.draw(arrays.arrays(float, (channels, n), elements=VALUES))
    weights = data.draw(arrays.arrays(float, n, elements=WEIGHTS))
    cuts = dynprog.optimal_runs(values, weights, count)
    assert len(cuts) <= count + 1
    assert error_of(cuts, values, weights) == pytest.approx(oracles.brute_force_runs(values, weights, count), abs=1e-9)


@settings(max_examples=100)
@given(data=st.data(), n=st.integers(1, 7), count=st.integers(1, 3))
def test_clusters_are_optimal_among_all_assignments(data, n, count):
    values = np.sort(data.draw(arrays.arrays(float, n, elements=VALUES)))
    weights = data.draw(arrays.arrays(float, n, elements=WEIGHTS))
    cuts = dynprog.optimal_clusters(values, weights, count)
    assert len(cuts) <= count + 1
    assert error_of(cuts, values[None], weights) == pytest.approx(
        oracles.brute_force_clusters(values, weights, count), abs=1e-9
    )


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 500])
@pytest.mark.parametrize("count", [2, 7, 16, 256])
@pytest.mark.parametrize("kind", ["noise", "wave", "steps", "sparse"])
def test_both_against_the_quadratic_program(n, count, kind, rng):
    values = {
        "noise": rng.normal(size=n),
        "wave": np.sin(np.linspace(0, 20, n)),
        "steps": np.floor(np.linspace(0, 5, n)),
        "sparse": rng.normal(size=n),
    }[kind]
    weights = rng.exponential(size=n) * (rng.random(n) < 0.3 if kind == "sparse" else 1.0)
    runs = dynprog.optimal_runs(values[None], weights, count)
    expected = oracles.quadratic_program(weights, weights * values, weights * values**2, count)[-1]
    assert error_of(runs, values[None], weights) == pytest.approx(expected, rel=1e-9, abs=1e-11)
    values = np.sort(values)
    clusters = dynprog.optimal_clusters(values, weights, count)
    expected = oracles.quadratic_program(weights, weights * values, weights * values**2, count)[-1]
    assert error_of(clusters, values[None], weights) == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_more_runs_than_points_leave_no_error(rng):
    values = rng.normal(size=(2, 6))
    assert dynprog.optimal_runs(values, np.ones(6), 10).tolist() == list(range(7))
    assert dynprog.optimal_clusters(np.arange(6.0), np.ones(6), 6).tolist() == list(range(7))


@pytest.mark.slow
def test_the_same_without_the_compiler():
    """The kernels run as plain Python. This shows errors that numba might hide: wrong types, reads out of bounds."""
    without = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    chosen = ["-k", "brute_force or assignments or (quadratic and 65 and not 256) or more_runs"]
    arguments = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, *chosen]
    result = subprocess.run(arguments, env=without, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed" in result.stdout
