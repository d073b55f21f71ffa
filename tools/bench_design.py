"""Compare the dynamic programs of fewbit.design with a plain vectorised numpy program: `python tools/bench_design.py`.

The two are timed in turn, five times, on the same 4096 points. Figures are medians, with the smallest and the largest ratio.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from fewbit import activations, terminal
from fewbit.design.dynprog import optimal_clusters, optimal_runs
from fewbit.weights import as_weight

POINTS, PAIRS = 4096, 5


def numpy_program(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    """The least error of splitting the points into at most `count` runs: one vector operation over i for each (k, j)."""
    mass, first, second = (np.concatenate([[0.0], np.cumsum(weights * values**power)]) for power in (0, 1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        best = second - first**2 / mass
    best[0] = 0.0
    for _ in range(count - 1):
        following = best.copy()
        for j in range(1, mass.size):
            moment = first[j] - first[:j]
            following[j] = np.min(best[:j] + second[j] - second[:j] - moment * moment / (mass[j] - mass[:j]))
        best = following
    return float(best[-1])


def error_of(cuts: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """Squared error of the runs between the cuts."""
    means = np.add.reduceat(values * weights, cuts[:-1]) / np.add.reduceat(weights, cuts[:-1])
    return float((weights * (values - np.repeat(means, np.diff(cuts))) ** 2).sum())


def timed(function, *arguments):
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    """Print a row for each activation, coding and number of levels."""
    x = (np.arange(POINTS) + 0.5) / POINTS * 20 - 10
    weights = as_weight("student").density(x)
    weights /= weights.sum()
    view = terminal.table(("activation", "coding"), ("levels", "numpy ms", "fewbit ms", "ratio", "from", "to"))
    for name in ("gelu", "tanh", "hardswish"):
        values = activations.get(name).df(x)
        order = np.argsort(values, kind="stable")
        for coding in ("interval", "level"):
            points = (values, weights) if coding == "interval" else (values[order], weights[order])
            for count in (8, 16):
                view.add_row(name, coding, str(count), *compare(coding, *points, count))
    terminal.console().print(view)


def compare(coding: str, values: np.ndarray, weights: np.ndarray, count: int) -> list[str]:
    """The times of both programs for one problem, after a warm-up of the compiled kernel. Both must find the same error."""
    solve = (lambda v, w, k: optimal_runs(v[None], w, k)) if coding == "interval" else optimal_clusters
    solve(values, weights, count)
    plain, own = [], []
    for _ in range(PAIRS):
        seconds, expected = timed(numpy_program, values, weights, count)
        plain.append(seconds)
        seconds, cuts = timed(solve, values, weights, count)
        own.append(seconds)
        assert np.isclose(error_of(cuts, values, weights), expected, rtol=1e-9), "the two programs disagree"
    ratios = [slow / fast for slow, fast in zip(plain, own, strict=True)]
    milliseconds = [f"{1e3 * statistics.median(each):.1f}" for each in (plain, own)]
    return [*milliseconds, *(f"{ratio:.0f}x" for ratio in (statistics.median(ratios), min(ratios), max(ratios)))]


if __name__ == "__main__":
    main()
