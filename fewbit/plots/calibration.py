"""Figures of calibrations and allocations: what each layer gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fewbit.plots.style import literal, styled

_BEFORE, _AFTER = "0.6", "tab:red"


def plot_calibration(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float | None, float | None]]]) -> Figure:
    """The error of each layer's table before and after, a panel for each channel, layers from top to bottom.

    panels  channel -> (before, after) of each layer, relative rms; None where the layer has no such channel
    """
    with styled():
        figure = Figure(figsize=(1.5 + 3.6 * max(len(panels), 1), 1.3 + 0.22 * max(len(names), 3)), layout="constrained")
        axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
        places = np.arange(len(names))
        for axis, (channel, pairs) in zip(axes, panels.items(), strict=False):
            before, after = np.array(pairs, float).T
            axis.hlines(places, after, before, color="0.85", linewidth=2, zorder=1)
            axis.plot(before, places, "o", color=_BEFORE, markersize=5, label="before")
            axis.plot(after, places, "o", color=_AFTER, markersize=4, label="after")
            axis.set_xlim(left=0)
            axis.set_xlabel(f"relative rms error of the {channel}")
            axis.grid(axis="x", color="0.93")
            axis.set_axisbelow(True)
        axes[0].set_yticks(places, [literal(name) for name in names])
        axes[0].invert_yaxis()
        if panels:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle("Tables before and after calibration, under each layer's own histogram", fontsize=10)
    return figure


def plot_allocation(
    names: Sequence[str], bits: Sequence[int], errors: Sequence[tuple[float, float]], uniform_bits: int
) -> Figure:
    """The bits of each layer, and the error that it adds to the gradient's with uniform bits and with its own.

    errors  (uniform, chosen) of each layer, relative to the gradient's norm
    """
    with styled():
        figure = Figure(figsize=(7.6, 1.4 + 0.22 * max(len(names), 3)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        places = np.arange(len(names))
        left.barh(places, bits, height=0.7, color=_AFTER, alpha=0.75)
        left.axvline(uniform_bits, color=_BEFORE, linewidth=1.5)
        left.set_xticks(range(max(*bits, uniform_bits) + 1))
        left.set_xlabel("bits")
        uniform, chosen = np.array(errors, float).T
        right.hlines(places, chosen, uniform, color="0.85", linewidth=2, zorder=1)
        right.plot(uniform, places, "o", color=_BEFORE, markersize=5, label=f"{uniform_bits} bits everywhere")
        right.plot(chosen, places, "o", color=_AFTER, markersize=4, label="as allocated")
        right.set_xlim(left=0)
        right.set_xlabel("predicted error of the gradient from this layer")
        right.grid(axis="x", color="0.93")
        right.set_axisbelow(True)
        left.set_yticks(places, [literal(name) for name in names])
        left.invert_yaxis()
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
