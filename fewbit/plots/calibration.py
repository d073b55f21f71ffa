"""Figures of calibrations and allocations: the error of each layer before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewbit.plots.style import DARK, literal, styled

_BEFORE = "0.6"
Pair = tuple[float | None, float | None]


def plot_calibration(names: Sequence[str], bits: Sequence[int], panels: Mapping[str, Sequence[Pair]]) -> Figure:
    """The error of each layer's table before and after, with a panel for each channel, and layers from top to bottom.

    panels  channel -> (before, after) of each layer, relative rms; None if the layer has no such channel
    """
    with styled():
        height = 1.5 + 0.24 * max(len(names), 3)
        figure = Figure(figsize=(1.5 + 3.8 * max(len(panels), 1), height), layout="constrained")
        axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
        for axis, (channel, pairs) in zip(axes, panels.items(), strict=False):
            _draw_pairs(axis, np.array(pairs, float), "before", "after")
            axis.set_xlabel(f"relative rms error of the {channel}")
        _name_layers(axes, [f"{name}, {_bits(number)}" for name, number in zip(names, bits, strict=True)])
        if panels:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        title = "Tables before and after calibration,\nweighted by each layer's own histogram of inputs"
        figure.suptitle(title, fontsize=10)
    return figure


def plot_allocation(
    names: Sequence[str],
    bits: Sequence[int],
    sizes: Sequence[str],
    errors: Sequence[tuple[float, float]],
    uniform_bits: int,
    title: str,
) -> Figure:
    """The bits of each layer, and the error that it adds to the gradient's with uniform bits and with its own.

    sizes   bytes of the codes of each layer with its bits, as text
    errors  (with uniform bits, with its own) of each layer, relative to the gradient's norm
    """
    with styled():
        figure = Figure(figsize=(8.2, 1.6 + 0.24 * max(len(names), 3)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        bars = left.barh(np.arange(len(names)), bits, height=0.6, color="#d9a5a0", edgecolor=DARK)
        left.bar_label(bars, [f"{number}: {literal(size)}" for number, size in zip(bits, sizes, strict=True)], padding=4)
        left.axvline(uniform_bits, color="0.4", linewidth=1.2, linestyle="--")
        left.set_xticks(range(max(*bits, uniform_bits) + 1))
        left.set_xlim(0, 1.6 * max(*bits, uniform_bits))
        left.set_xlabel("bits, and bytes of the codes")
        _draw_pairs(right, np.array(errors, float), f"{_bits(uniform_bits)} everywhere", "as allocated")
        right.set_xlabel("error of the gradient from this layer alone, predicted,\nrelative to the gradient's norm")
        _name_layers([left, right], names)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(literal(title), fontsize=10)
    return figure


def _draw_pairs(axis: Axes, pairs: np.ndarray, before: str, after: str) -> None:
    """A ring and a dot for each layer, with a line between them. The axis begins at 0."""
    places, (first, second) = np.arange(len(pairs)), pairs.T
    axis.hlines(places, second, first, color="0.8", linewidth=2, zorder=1)
    axis.plot(first, places, "o", color=_BEFORE, markersize=7, fillstyle="none", markeredgewidth=1.6, label=before)
    axis.plot(second, places, "o", color=DARK, markersize=4, label=after)
    largest = np.nanmax(pairs, initial=0.0)
    axis.set_xlim(0, 1.08 * largest or 1.0)
    axis.grid(axis="x", color="0.93")
    axis.locator_params(axis="x", nbins=6)
    axis.set_axisbelow(True)


def _name_layers(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Name the layers from top to bottom, with room at the ends of the axes."""
    axes[0].set_yticks(range(len(names)), [literal(name) for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(axis="y", length=0)


def _bits(number: int) -> str:
    return "1 bit" if number == 1 else f"{number} bits"
