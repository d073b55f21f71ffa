"""Dynamic programs that split n weighted points into at most K groups with the least squared error.

The error of a group is the weighted sum of squared distances to the group's weighted mean, summed over channels. Prefix sums
give it in O(1) for any run of consecutive points. D[k, j] is the least error of the first j points in at most k groups:

    D[k, j] = min over i <= j of  D[k-1, i] + error(i, j)

`optimal_runs` solves this for points in any order (Novikov et al., ICML 2023, section 3, takes them in the order of x).
`optimal_clusters` solves it for scalar values in ascending order. The clusters of an optimal clustering are then runs, and a
divide-and-conquer search is enough. Both are exact.
"""

from __future__ import annotations

import numpy as np

from fewbit.compiling import compiled

Array = np.ndarray


def optimal_runs(values: Array, weights: Array, count: int) -> Array:
    """Cut points of the best split of points in the given order into at most `count` runs.

    values   (channels, n) float64; the errors of the channels add up
    weights  (n,) float64, none negative
    Returns  cuts, ascending int64 from 0 to n: run r holds the points cuts[r] to cuts[r+1] - 1
    """
    argmin = _run_program(*_prefix_sums(values, weights), count)
    return _cuts(argmin)


def optimal_clusters(values: Array, weights: Array, count: int) -> Array:
    """Cut points of the best clustering of ascending `values` (n,) into at most `count` clusters, in the form of
    `optimal_runs`."""
    argmin = _cluster_program(*_prefix_sums(values[None], weights), count)
    return _cuts(argmin)


def _prefix_sums(values: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Running sums (n+1,), (channels, n+1), (n+1,) of the weights, the first and the second moments.

    The mean is subtracted first. The terms that cancel in `_error` are then of the size of the error itself.
    """
    weights = np.ascontiguousarray(weights, np.float64)
    total = weights.sum()
    centered = values - (values @ weights / total)[:, None] if total > 0 else values
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    first = np.zeros((values.shape[0], mass.size))
    np.cumsum(centered * weights, axis=1, out=first[:, 1:])
    second = np.concatenate([[0.0], np.cumsum((centered**2).sum(0) * weights)])
    return mass, first, second


def _cuts(argmin: Array) -> Array:
    """Follow the argmins (count+1, n+1) back from the last point. Empty groups drop out."""
    cuts = [argmin.shape[1] - 1]
    for k in range(argmin.shape[0] - 1, 0, -1):
        cuts.append(int(argmin[k, cuts[-1]]))
    return np.unique(cuts)


@compiled(inline="always")
def _error(mass, first, second, i, j):
    """Squared error of the points i to j-1 around their mean. Rounding cannot make it negative."""
    inside = mass[j] - mass[i]
    if inside <= 0.0:
        return 0.0
    error = second[j] - second[i]
    for c in range(first.shape[0]):
        moment = first[c, j] - first[c, i]
        error -= moment * moment / inside
    return max(error, 0.0)


@compiled(inline="always")
def _no_better(mass, first, second, i, j, room):
    """Whether error(i, j) >= room, without a division: `_run_program` spends nearly all its time in this test."""
    inside = mass[j] - mass[i]
    if inside <= 0.0:
        return room <= 0.0
    squares = 0.0
    for c in range(first.shape[0]):
        moment = first[c, j] - first[c, i]
        squares += moment * moment
    return (second[j] - second[i] - room) * inside >= squares


@compiled()
def _run_program(mass, first, second, count):
    """Argmins of D by branch and bound, in about n**1.5 steps for each k. An exhaustive search would take n**2 / 2.

    The search for D[k, j] starts at the argmin of the previous point, which is nearly always within a few points of the
    answer. It moves away from there to both sides, in blocks of candidates.
    """
    n = mass.size - 1
    before = np.empty(n + 1)
    for j in range(n + 1):
        before[j] = _error(mass, first, second, 0, j)
    argmin = np.zeros((count + 1, n + 1), np.int32)
    for k in range(2, count + 1):
        here = np.zeros(n + 1)
        guess = 0
        for j in range(1, n + 1):
            here[j], argmin[k, j] = _best_last_run(mass, first, second, before, j, guess)
            guess = argmin[k, j] if argmin[k, j] < j else 0
        before = here
    return argmin


@compiled()
def _best_last_run(mass, first, second, before, j, guess):
    """The least before[i] + error(i, j) over 0 <= i <= j, and its i.

    before[i] grows with i and error(i, j) shrinks, so before[a] + error(b, j) is a lower bound for a block a <= i <= b. If the
    bound is no better than the best candidate so far, the block is skipped and the next one is twice as long. Otherwise half of
    the block is tried, down to single candidates.
    """
    best, at = before[j], j  # i = j means an empty last run
    candidate = before[guess] + _error(mass, first, second, guess, j)
    if candidate < best:
        best, at = candidate, guess
    b, size = guess - 1, 1
    while b >= 0:
        a = max(b - size + 1, 0)
        if _no_better(mass, first, second, b, j, best - before[a]):
            if _no_better(mass, first, second, b, j, best):
                break  # the last run alone costs too much, and more so further left
            b, size = a - 1, 2 * size
        elif a == b:
            best, at = before[a] + _error(mass, first, second, a, j), a
            b -= 1
        else:
            size = (b - a + 1) // 2
    a, size = guess + 1, 1
    while a < j and before[a] < best:
        b = min(a + size, j) - 1
        if _no_better(mass, first, second, b, j, best - before[a]):
            a, size = b + 1, 2 * size
        elif a == b:
            best, at = before[a] + _error(mass, first, second, a, j), a
            a += 1
        else:
            size = (b - a + 1) // 2
    return best, at


@compiled()
def _cluster_program(mass, first, second, count):
    """Argmins of D by divide and conquer, in O(count · n · log n).

    On ascending values the error is Monge, so the least argmin never falls with j. Points are solved in the order n/2, n/4,
    3n/4, n/8, …. Each search runs only between the argmins of the solved neighbours.
    """
    n = mass.size - 1
    before = np.empty(n + 1)
    for j in range(n + 1):
        before[j] = _error(mass, first, second, 0, j)
    argmin = np.zeros((count + 1, n + 1), np.int32)
    stride = 1
    while stride <= n:
        stride *= 2
    for k in range(2, count + 1):
        here = np.zeros(n + 1)
        step = stride
        while step >= 1:
            for j in range(step, n + 1, 2 * step):
                start = argmin[k, j - step]
                stop = min(j, argmin[k, j + step]) if j + step <= n else j
                best, at = np.inf, start
                for i in range(start, stop + 1):
                    candidate = before[i] + _error(mass, first, second, i, j)
                    if candidate < best:
                        best, at = candidate, i
                here[j], argmin[k, j] = best, at
            step //= 2
        before = here
    return argmin
