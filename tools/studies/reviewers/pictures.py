"""The pictures of final losses."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.studies.reviewers.comparison import Line

_COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:cyan")
_LINEAR = 1.0  # percent to either side of zero where the axis is linear


def plot_distances(panels: dict[str, dict[str, Line]], title: str, columns: int = 5) -> Figure:
    """Distances of final losses from exact ones, against bits: a panel for each task, a line for each way. The band is the
    spread of exact runs."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(2.1 * columns, 5.6) + 0.4, 2.3 * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    drawn = [each.mean for lines in panels.values() for line in lines.values() for each in line.distances.values()]
    largest = 100 * max(map(abs, drawn), default=0.0)
    for axis, (task, lines) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, lines, largest)
        axis.set_title(task, fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[len(panels) - columns : len(panels)]:
        axis.set_xlabel("bits", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supylabel("final loss above exact, %", fontsize=9)
    shown = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(shown) > 1:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_panel(axis: Axes, lines: dict[str, Line], largest: float) -> None:
    axis.axhline(0.0, color="0.6", linewidth=1.0)
    spreads = [100 * each.spread for each in lines.values() if math.isfinite(each.spread)]
    if spreads:
        axis.axhspan(-max(spreads), max(spreads), color="0.88", linewidth=0, label="spread of exact runs over seeds")
    for i, (label, (distances, _)) in enumerate(lines.items()):
        points = {bits: each for bits, each in sorted(distances.items()) if math.isfinite(each.mean)}
        means, errors = ([100 * each[k] for each in points.values()] for k in (0, 1))
        errors = [each if math.isfinite(each) else 0.0 for each in errors]
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": "osD^v<>"[i % 7], "markersize": 3.5, "linewidth": 1.2}
        axis.errorbar(list(points), means, errors, capsize=2, label=label, **style)
    if largest > 2 * _LINEAR:
        axis.set_yscale("symlog", linthresh=_LINEAR)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axis.set_xticks(sorted({bits for each in lines.values() for bits in each.distances}))
    axis.grid(axis="y", color="0.93", which="major")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
