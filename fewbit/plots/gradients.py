"""Figures that show whether coded gradients are safe: errors relative to noise, and drift over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fewbit.plots.style import DARK, LINES, MARKERS, SHADES, literal, styled

_ZONES = ("white", "0.92", "0.8")  # safe, doubtful, unsafe


def plot_fidelity(parts: Sequence[Any], title: str, zones: tuple[float, float], most: int = 40) -> Figure:
    """The error of each group relative to its noise, and its systematic part relative to the mean gradient, with the zones of
    the verdict.

    If no noise is known, the error is drawn relative to the gradient's norm, without zones.

    parts  objects with `group`, `error`, `share`, `systematic`; the last is the whole. Of more than `most` groups, only those
           with the largest errors are drawn.
    zones  the ends of the zones "safe" and "doubtful"
    """
    *groups, whole = parts
    if len(groups) > most:
        largest = {part.group for part in sorted(groups, key=lambda part: -(part.error or 0))[:most]}
        groups = [part for part in groups if part.group in largest]
    shown = [*groups, whole]
    judged = any(part.share for part in shown)
    errors = [(part.share if judged else part.error) or np.nan for part in shown]
    systematic = [(part.systematic if judged else None) or np.nan for part in shown]
    with styled():
        figure = Figure(figsize=(7.4, 1.9 + 0.24 * len(shown)), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(shown))
        label = "error of the codes / noise from batch to batch" if judged else "error of the codes"
        axis.plot(errors, places, "o", color=DARK, markersize=5, label=label)
        if np.isfinite(systematic).any():
            label = "part of the error that does not average out / mean gradient"
            axis.plot(systematic, places, "D", color="0.3", markersize=5, fillstyle="none", label=label)
        axis.set_xscale("log")
        _draw_zones(axis, [*errors, *systematic], zones if judged else ())
        _plain_numbers(axis.xaxis)
        axis.set_yticks(places, [literal(part.group) for part in shown])
        axis.get_yticklabels()[-1].set_fontweight("bold")
        axis.set_ylim(len(shown) - 0.4, -1.0)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("share of the noise, or of the mean gradient" if judged else "share of the gradient's norm")
        axis.grid(axis="x", color="0.88")
        axis.set_axisbelow(True)
        axis.set_title(literal(title), loc="left", fontsize=9, wrap=True)
        figure.legend(loc="outside lower center")
    return figure


def _draw_zones(axis: Axes, values: Sequence[float], zones: tuple[float, ...]) -> None:
    """Draw the zones as named bands. The limits show all values and a part of each zone."""
    drawn = [value for value in values if np.isfinite(value)]
    low, high = min([*drawn, *zones[:1]], default=0.1) / 3, max([*drawn, *(2 * zone for zone in zones[-1:])], default=1.0) * 1.5
    axis.set_xlim(low, high)
    if zones:
        edges = (low, *zones, high)
        for i, name in enumerate(("safe", "doubtful", "unsafe")):
            axis.axvspan(edges[i], edges[i + 1], color=_ZONES[i], zorder=0)
            axis.annotate(name, (np.sqrt(edges[i] * edges[i + 1]), -0.9), ha="center", va="top", size=8, style="italic")


def _plain_numbers(axis: Any) -> None:
    """Write ticks as 0.1 and 2 instead of 10⁻¹ and 2 × 10⁰."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_drift(histories: Mapping[str, Sequence[tuple[int, float]]], factor: float, title: str, most: int = 10) -> Figure:
    """The error over the design's error, against the number of forward passes: a line for each layer, and the warning limit.

    histories  layer -> (forward pass, ratio) of its checks. Of more than `most` layers, only those with the largest ratios get
               a name and a style of their own.
    """
    with styled():
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        axis = figure.subplots()
        peaks = {name: max((ratio for _, ratio in checks), default=0.0) for name, checks in histories.items()}
        named = sorted(peaks, key=lambda name: -peaks[name])[:most]
        for name, checks in histories.items():
            steps, ratios = np.array(checks, float).reshape(-1, 2).T
            axis.plot(steps, ratios, **_look(named.index(name), name) if name in named else {"color": "0.85", "zorder": 1})
        axis.axhline(factor, color="0.3", linestyle=(0, (6, 3)), linewidth=1)
        axis.annotate(
            f"warns above {factor:g}",
            (0.99, factor),
            (0, 3),
            xycoords=axis.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
        )
        ratios = [ratio for checks in histories.values() for _, ratio in checks if ratio > 0]
        axis.set_yscale("log")
        axis.set_ylim(min([0.5, *ratios]) / 1.2, max([2 * factor, *ratios]) * 1.2)
        _plain_numbers(axis.yaxis)
        last = max((step for checks in histories.values() for step, _ in checks), default=1)
        axis.set_xlim(0, last + max(1.0, 0.03 * last))
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axis.set_xlabel("forward passes of the layer in training")
        axis.set_ylabel("error of the table /\nerror of its design")
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        axis.set_title(literal(title), loc="left", fontsize=9, wrap=True)
        if named:
            figure.legend(loc="outside right center")
    return figure


def _look(i: int, name: str) -> dict[str, Any]:
    line, marker, colour = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)], SHADES[i % len(SHADES)]
    return {"linestyle": line, "marker": marker, "color": colour, "markersize": 4, "linewidth": 1, "label": literal(name)}
