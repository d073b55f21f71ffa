"""Pictures of what codes cost and save: seconds, noise, batches, and the rival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tools.studies.common import ALL
from tools.studies.reviewers.comparison import Distance

COLORS = ("0.35", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def panels(titles: Sequence[str], width: float = 4.2, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Panels side by side, each with its title."""
    figure = Figure(figsize=(width * len(titles) + 0.4, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, len(titles))).flat)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        _clear(axis)
    return figure, axes


def _clear(axis: Axes) -> None:
    axis.grid(axis="y", color="0.93", which="major")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, axis: Axes, columns: int) -> None:
    """Draw the legend of that panel below all panels."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def plot_batches(cases: dict[tuple[str, int], dict[str, int]], labels: Sequence[str]) -> Figure:
    """Bars of the largest batches relative to exact ones, with their sizes above: a panel for each number of bytes.

    cases: (task, MiB) -> label -> batch; the first label is that of exact steps.
    """
    sizes = sorted({mebibytes for _, mebibytes in cases})
    figure, axes = panels([f"{mebibytes} MiB beyond the model" for mebibytes in sizes], width=5.0)
    for axis, mebibytes in zip(axes, sizes, strict=True):
        found = {task: batches for (task, size), batches in cases.items() if size == mebibytes}
        for i, label in enumerate(labels):
            batches = [each.get(label, 0) for each in found.values()]
            heights = [batch / max(1, each.get(labels[0], 0)) for batch, each in zip(batches, found.values(), strict=True)]
            bars = axis.bar(
                np.arange(len(found)) + 0.2 * (i - (len(labels) - 1) / 2), heights, 0.2, color=COLORS[i], label=label
            )
            axis.bar_label(bars, [str(batch) for batch in batches], fontsize=6)
        axis.set_xticks(np.arange(len(found)), list(found))
    axes[0].set_ylabel("largest batch that fits, over the exact one")
    legend(figure, axes[0], len(labels))
    return figure


def plot_clock(cases: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Losses against seconds, a panel for each task. cases: task -> label -> "curve" and "seconds", means over rounds."""
    figure, axes = panels(list(cases), width=4.6)
    for axis, ways in zip(axes, cases.values(), strict=True):
        for color, (label, found) in zip(COLORS, ways.items(), strict=False):
            points = len(found["curve"])
            axis.plot(found["seconds"] * (np.arange(points) + 0.5) / points, found["curve"], color=color, label=label)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("training loss")
    legend(figure, axes[0], 5)
    return figure


def plot_rival(cases: dict[str, dict[str, Distance]], labels: Sequence[str]) -> Figure:
    """Final losses above exact ones with their standard errors. cases: task -> label -> distance."""
    figure, (axis,) = panels(["Final loss above that of exact training"], width=6.4)
    axis.axhline(0, color="0.6", linewidth=1)
    for i, label in enumerate(labels):
        there = [(place, ways[label]) for place, ways in enumerate(cases.values()) if label in ways]
        places = [place + 0.12 * (i - (len(labels) - 1) / 2) for place, _ in there]
        heights, errors = [100 * each.mean for _, each in there], [100 * np.nan_to_num(each.error) for _, each in there]
        axis.errorbar(places, heights, errors, fmt="osD^v"[i % 5], markersize=5, color=COLORS[i + 1], label=label)
    axis.set_yscale("symlog", linthresh=10)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(range(len(cases)), list(cases))
    axis.set_ylabel("percent")
    legend(figure, axis, len(labels))
    return figure


def plot_ratios(tasks: dict[str, dict[str, Any]], size: int) -> Figure:
    """Error over noise: above by layer, for batches of that size; below of the whole gradient, against the size of the batch.

    tasks: task -> "layers", and "ratios": bits -> size -> layer -> error over noise; ALL stands for the whole gradient.
    """
    figure, grid = _two_rows(list(tasks))
    for (above, below), found in zip(grid, tasks.values(), strict=True):
        layers = found["layers"]
        for i, (bits, by_size) in enumerate(found["ratios"].items()):
            there = by_size.get(size, {})
            above.plot(range(len(layers)), [there.get(layer, np.nan) for layer in layers], "osD^v"[i % 5], color=COLORS[i + 1])
            whole = [ratios[ALL] for ratios in by_size.values()]
            below.plot(list(by_size), whole, "osD^v"[i % 5] + "-", color=COLORS[i + 1], markersize=4.5, label=f"{bits} bits")
        above.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
        below.set_xscale("log", base=2)
        below.xaxis.set_major_formatter("{x:g}")
        below.set_xlabel("samples in a batch")
        for axis in (above, below):
            axis.axhline(0.1, color="0.6", linewidth=1, linestyle="--")
            axis.axhline(1.0, color="0.6", linewidth=1)
            axis.set_yscale("log")
    grid[0][0].set_ylabel(f"error over noise, batches of {size}")
    grid[0][1].set_ylabel("error over noise, whole gradient")
    legend(figure, grid[0][1], 3)
    return figure


def _two_rows(titles: Sequence[str]) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    figure = Figure(figsize=(4.2 * len(titles) + 0.4, 7.4), layout="constrained")
    rows = figure.subplots(2, len(titles), squeeze=False)
    for title, axis in zip(titles, rows[0], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in rows.flat:
        _clear(axis)
    return figure, list(zip(*rows, strict=True))
