"""The pictures of the studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure


def plot_errors_beside_noise(noise: dict[str, float], errors: dict[str, dict[str, float]], groups: Sequence[str]) -> Figure:
    """The gradient's error for every group of parameters, what codes it by marker, under that group's SGD noise.

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
