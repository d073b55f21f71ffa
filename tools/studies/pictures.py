"""The pictures of the studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_WAYS = {"calibrated": "tab:blue", "by gradient": "tab:red"}


def plot_errors_beside_noise(noise: dict[str, float], errors: dict[str, dict[str, float]], groups: Sequence[str]) -> Figure:
    """The gradient's error for every group of parameters, with a marker for each way to code, and that group's SGD noise.

    noise   group -> standard deviation between batches, over the gradient's norm
    errors  label -> group -> error over the gradient's norm
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(groups))
    heights = [noise[group] for group in groups]
    axis.bar(places, heights, width=0.8, color="0.88", label="the gradient's own SGD noise")
    for i, (label, by_group) in enumerate(errors.items()):
        aside = 0.12 * (i - (len(errors) - 1) / 2)
        axis.plot(places + aside, [by_group[group] for group in groups], "osD^v"[i % 5], markersize=4.5, label=label)
    axis.set_yscale("log")
    lowest = min(error for by_group in errors.values() for error in by_group.values() if error > 0)
    axis.set_ylim(lowest / 1.5, max(heights) * 1.3)
    axis.set_xticks(places, groups)
    axis.set_ylabel("relative to the gradient's norm")
    axis.grid(axis="y", color="0.93", which="major")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Gradient error of a coded GPT beside the noise between batches", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_calibration_study(results: dict[str, Any]) -> Figure:
    """Errors of the gradient relative to those with shipped tables, against bits. In a second panel, uniform and allocated
    bits."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(1.0, color="0.6", linewidth=1.5)
    for kind, ways in results["tables"].items():
        shipped, *others = ways
        for way in others:
            bits, line = list(ways[way]), "o-" if kind == "GELU" else "s--"
            ratios = [ways[way][each] / ways[shipped][each] for each in bits]
            left.plot(bits, ratios, line, markersize=4.5, color=_WAYS[way], label=f"{kind}, {way}")
            left.set_xticks(bits)
    left.set_xlabel("bits")
    left.set_ylabel("error of the gradient over shipped tables'")
    left.set_title("Tables at equal bits", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    settings = [(kind, bits, found) for kind, by_bits in results["allocation"].items() for bits, found in by_bits.items()]
    places = np.arange(len(settings))
    for i, (way, color) in enumerate((("uniform", "0.6"), ("allocated", "tab:red"))):
        right.bar(places + 0.36 * (i - 0.5), [each[way]["held_out"] for *_, each in settings], 0.36, color=color, label=way)
    right.set_xticks(places, [f"{kind}\n{bits} bits" for kind, bits, _ in settings])
    right.set_ylabel("error of the gradient, relative to its norm")
    right.set_title("Bits at equal bytes, tables calibrated", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(axis="y", color="0.93", which="major")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
