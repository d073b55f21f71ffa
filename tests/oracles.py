"""Independent, naive code with which the tests compare the library. Nothing here calls what it checks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numba import njit
from scipy import optimize, stats


def cell_moments(df, density, edges):
    """∫ w, ∫ w f', ∫ w f'² over each cell, with normalised w: a 40-point midpoint rule, (cells,) each."""
    fractions = (np.arange(40) + 0.5) / 40
    x = edges[:-1, None] + np.diff(edges)[:, None] * fractions
    w = density(x) * np.diff(edges)[:, None] / 40
    w = w / w.sum()
    g = df(x)
    return w.sum(1), (w * g).sum(1), (w * g * g).sum(1)


@njit(cache=True)
def quadratic_program(mass, first, second, count):
    """The least error of splitting points 0..n-1 into at most k runs, for k = 1..count: every split is tried, O(count · n²)."""
    n = mass.size
    m, f, s = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        m[i + 1], f[i + 1], s[i + 1] = m[i] + mass[i], f[i] + first[i], s[i] + second[i]
    best = np.full((n + 1, count + 1), np.inf)  # best error of the first j points, by k
    best[0] = 0.0
    for j in range(1, n + 1):
        for i in range(j):
            inside = m[j] - m[i]
            error = s[j] - s[i]
            if inside > 0:
                error -= (f[j] - f[i]) ** 2 / inside
            for k in range(1, count + 1):
                best[j, k] = min(best[j, k], best[i, k - 1] + error)
    return best[n, 1:]


def lloyd_max(count):
    """Thresholds, levels and error of the optimal quantizer of N(0, 1) with `count` levels.

    Lloyd's fixed point (each threshold halfway between two levels, each level the mean of its interval) on the closed forms
    of the normal integrals, found by a root finder from Panter and Dite's thresholds for many levels.
    """

    def levels_of(s):
        ends = np.concatenate([[-np.inf], s, [np.inf]])
        mass = np.where(ends[:-1] > 0, stats.norm.sf(ends[:-1]) - stats.norm.sf(ends[1:]), np.diff(stats.norm.cdf(ends)))
        return -np.diff(stats.norm.pdf(ends)) / mass, mass

    def residual(s):
        levels, _ = levels_of(s)
        return s - (levels[1:] + levels[:-1]) / 2

    start = stats.norm.ppf(np.arange(1, count) / count, scale=3**0.5)
    s, _, status, message = optimize.fsolve(residual, start, band=(1, 1), xtol=1e-13, full_output=True)
    assert np.abs(residual(s)).max() < 1e-10, (status, message)
    levels, mass = levels_of(s)
    return s, levels, 1 - mass @ levels**2


def uniform_codes(x, bias, bits):
    """Codes and values by Chakrabarti & Moseley's formulas, for x and bias in units of the standard deviation.

    Only min() is not theirs: without it, their shift grows beyond the last code, where all x lose their sign.
    """
    bins = 2**bits
    shift = min(max(1, bins // 2 - math.floor(bias * bins / 6)), bins - 1)
    codes = [min(max(math.floor(each * bins / 6) + shift, 0), bins - 1) for each in x]
    return codes, [(code + 0.5 - shift) * 6 / bins for code in codes], shift


def group_error(values, weights):
    """Weighted squared distance of values (channels, n) to their weighted mean."""
    if weights.sum() == 0:
        return 0.0
    mean = (values * weights).sum(1) / weights.sum()
    return float((weights * (values - mean[:, None]) ** 2).sum())


def brute_force_runs(values, weights, count):
    """Least error over every split of n points in order into at most `count` runs."""
    n = weights.size
    errors = []
    for inner in itertools.chain.from_iterable(itertools.combinations(range(1, n), r) for r in range(count)):
        cuts = [0, *inner, n]
        errors.append(sum(group_error(values[:, a:b], weights[a:b]) for a, b in itertools.pairwise(cuts)))
    return min(errors)


def brute_force_clusters(values, weights, count):
    """Least error over every assignment of n scalars to `count` clusters, contiguous or not."""
    n = weights.size
    best = np.inf
    for labels in itertools.product(range(count), repeat=n):
        labels = np.array(labels)
        error = sum(group_error(values[None, labels == k], weights[labels == k]) for k in set(labels.tolist()))
        best = min(best, error)
    return best


def dense_mse(table, df, density, points=2_000_001):
    """∫ w (f' - table)² by a midpoint rule over the table's domain, with normalised w."""
    low, high = table.domain
    x = low + (high - low) * (np.arange(points) + 0.5) / points
    w = density(x)
    return float((w * (df(x) - table(x)) ** 2).sum() / w.sum())


def lookup(x, thresholds, codes):
    """The code of each x: that of the first interval whose upper threshold x does not exceed. NaN and other x take the last."""
    below = x[:, None] <= thresholds[None, :]
    return codes[np.where(below.any(1), below.argmax(1) if thresholds.size else 0, thresholds.size)]


def pack(codes, bits, words):
    """Packed codes by their definition: whole words as Python integers, cut into bytes."""
    lanes = np.zeros((8, words), np.uint8)
    lanes.reshape(-1)[: codes.size] = codes
    packed = np.zeros((bits, words), np.uint8)
    for i in range(words):
        word = sum(int(code) << (lane * bits) for lane, code in enumerate(lanes[:, i]))
        packed[:, i] = list(word.to_bytes(bits, "little"))
    return packed.reshape(-1)


def rung_of(x, wide: Any = np.float32):
    """The rung of nine that the numbers take, one at a time: by the fourth moment of 509 of them, in the order of memory."""
    x = x.detach().cpu()
    x = x.permute(sorted(range(x.dim()), key=lambda dim: -x.stride(dim))).reshape(-1)
    size = min(x.numel(), 509)
    sums = [wide(0)] * 16
    with np.errstate(over="ignore", under="ignore"):
        for k in range(size):
            value = x[k * x.numel() // size].double().item()
            square = wide(value if math.isfinite(value) else 0) ** 2
            sums[k % 16] = sums[k % 16] + square * square
        while len(sums) > 1:
            sums = [low + high for low, high in zip(sums[::2], sums[1::2], strict=True)]
    squares = [2.0 ** (2 * k + 1) for k in range(-4, 4)]  # of the geometric means of neighbouring standard deviations
    return sum(float(sums[0]) > 3 * size * square**2 for square in squares) if sums[0] else 4


def expected_gradient(table, x, grad):
    """table(x)·grad, multiplied in float32 (float64 for float64) and rounded once.

    table  a CodeTable, or a ladder of nine
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(table, tuple):
        table = table[rung_of(x, np.float64 if x.dtype == torch.float64 else np.float32) if len(table) > 1 else 0]
    level = torch.from_numpy(np.asarray(table(x.detach().double().numpy()))).to(wide)
    return (grad.to(wide) * level).to(x.dtype)


def expected_by_row(table, x, grad):
    """The same, if each row of x takes its own rung, as under vmap."""
    return torch.stack([expected_gradient(table, *pair) for pair in zip(x, grad, strict=True)])
