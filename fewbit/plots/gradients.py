"""Figures on whether coded gradients are safe: errors beside noise, and drift over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fewbit.plots.style import literal, styled


def plot_fidelity(parts: Sequence[Any], title: str, most: int = 40) -> Figure:
    """Bars of each group's noise, and on them its error and the part of that which does not average out.

    parts  objects with `group`, `error`, `noise`, `systematic`; the last is the whole. Of more than `most` groups those with
           the largest errors are drawn.
    """
    *groups, whole = parts
    if len(groups) > most:
        largest = {part.group for part in sorted(groups, key=lambda part: -(part.error or 0))[:most]}
        groups = [part for part in groups if part.group in largest]
    shown = [*groups, whole]
    with styled():
        figure = Figure(figsize=(7.2, 1.5 + 0.24 * len(shown)), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(shown))
        axis.barh(places, [part.noise or np.nan for part in shown], height=0.7, color="0.87", label="SGD noise")
        axis.plot(
            [part.error or np.nan for part in shown], places, "o", color="#c1432e", markersize=5, label="error of the codes"
        )
        if any(part.noise for part in shown):
            tenth = [(part.noise or np.nan) / 10 for part in shown]
            axis.plot(tenth, places, "|", color="0.35", markersize=10, label="a tenth of the noise")
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        drawn = [value for part in shown for value in (part.error, part.noise) if value]
        if drawn:
            axis.set_xlim(min(*drawn, *(value / 10 for value in drawn if value > 0.1)) / 1.5, max(drawn) * 1.5)
        axis.set_yticks(places, [literal(part.group) for part in shown])
        axis.get_yticklabels()[-1].set_fontweight("bold")
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlabel("relative to the norm of the gradient")
        axis.grid(axis="x", color="0.93")
        axis.set_axisbelow(True)
        axis.set_title(literal(title), loc="left", fontsize=9, wrap=True)
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _plain_numbers(axis: Any) -> None:
    """0.1 and 2 for 10⁻¹ and 2 × 10⁰."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))


def plot_drift(histories: Mapping[str, Sequence[tuple[int, float]]], factor: float, most: int = 10) -> Figure:
    """Error over design error against the number of forward passes, a line for each layer, and the factor that warns.

    histories  layer -> (forward pass, ratio) of its checks. Of more than `most` layers those with the largest ratios are in
               colour, and named.
    """
    with styled():
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axis = figure.subplots()
        peaks = {name: max((ratio for _, ratio in checks), default=0.0) for name, checks in histories.items()}
        named = sorted(peaks, key=lambda name: -peaks[name])[:most]
        for name, checks in histories.items():
            steps, ratios = np.array(checks, float).reshape(-1, 2).T
            look: dict[str, Any] = {"label": literal(name)} if name in named else {"color": "0.8", "zorder": 1}
            axis.plot(steps, ratios, ".-", markersize=4, linewidth=1, **look)
        axis.axhline(factor, color="0.3", linestyle="--", linewidth=1)
        axis.annotate(
            f"warns above {factor:g}", (0.01, factor), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
        axis.set_xlabel("forward passes of the layer in training")
        axis.set_ylabel("error over the design's")
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        if named:
            figure.legend(loc="outside right center")
    return figure
