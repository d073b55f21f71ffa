"""The figure of the benchmark: times of coded activations relative to exact ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fewbit.plots.style import LINES, MARKERS, SHADES, literal, styled

# title of a panel -> label of a line -> points (elements, median, lower, upper end of the spread)
RatioPanels = dict[str, dict[str, list[tuple[int, float, float, float]]]]

_COARSE_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FINE_TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4)
_BEYOND = 1.5  # how far the scale follows spreads beyond the medians


def plot_ratios(panels: RatioPanels, columns: int, subtitle: str) -> Figure:
    """Time relative to the exact activation's, against size: medians, with bars for their spread. Both axes are logarithmic.

    Spreads do not set the scale. A bar that ends in a triangle continues outside of the picture.

    panels    drawn row by row, `columns` in each
    subtitle  where and how often it was timed
    """
    rows = -(-len(panels) // columns)
    with styled():
        figure = Figure(figsize=(max(5.4, 0.8 + 3.0 * columns), 1.1 + 2.3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        low, high = _limits(panels)
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            _draw_ratios(axis, lines, low, high)
            axis.set_title(literal(title))
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        _set_scales(axes[0, 0], panels, low, high)
        for i, axis in enumerate(axes.flat[: len(panels)]):
            if i + columns >= len(panels):  # the lowest of its column
                axis.set_xlabel("elements")
                axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("time, exact = 1")
        figure.suptitle(f"Coded against exact activations, forward and backward\n{literal(subtitle)}", fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_ratios(axis: Axes, lines: Mapping[str, Sequence[tuple[int, float, float, float]]], low: float, high: float) -> None:
    axis.axhline(1.0, color="0.15", linewidth=1.0, zorder=1)
    for i, (label, points) in enumerate(lines.items()):
        sizes, medians, lower, upper = np.array(sorted(points), float).T
        sizes = sizes * 2.0 ** (0.25 * (i - (len(lines) - 1) / 2))  # so that bars at one size lie side by side
        look = {"color": SHADES[i % len(SHADES)], "markersize": 4}
        form = f"{MARKERS[i % len(MARKERS)]}{LINES[i % len(LINES)]}"
        axis.errorbar(
            sizes, medians, (medians - lower, upper - medians), fmt=form, label=label, capsize=3, linewidth=1.2, **look
        )
        for ends, edge, marker in ((upper > high, high, "^"), (lower < low, low, "v")):
            if ends.any():
                axis.plot(sizes[ends], np.full(ends.sum(), edge), marker, clip_on=False, **look)


def _limits(panels: RatioPanels) -> tuple[float, float]:
    """The limits of the ratios. They hold all medians, and their spreads up to a factor."""
    points = [point for lines in panels.values() for line in lines.values() for point in line]
    medians = [point[1] for point in points]
    low = max(min([0.9, *(point[2] for point in points)]), min([0.9, *medians]) / _BEYOND)
    high = min(max([1.1, *(point[3] for point in points)]), max([1.1, *medians]) * _BEYOND)
    return low / 1.05, high * 1.05


def _set_scales(axis: Axes, panels: RatioPanels, low: float, high: float) -> None:
    """Ticks at the measured sizes, with labels if they have room; and at round ratios, fewer if the ratios span much."""
    sizes = sorted({point[0] for lines in panels.values() for line in lines.values() for point in line})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(sizes[0] / 2, sizes[-1] * 2)
    axis.set_ylim(low, high)
    ticks = [tick for tick in (_FINE_TICKS if high < 6 * low else _COARSE_TICKS) if low <= tick <= high]
    ticks = _with_room(sorted(ticks, key=lambda tick: tick != 1), 0.1 * np.log2(high / low))
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    powers = all(size & (size - 1) == 0 for size in sizes)
    octaves = np.log2(4 * sizes[-1] / sizes[0])
    labelled = _with_room([sizes[-1], *sizes[:1], *sizes[-2:0:-1]], (0.11 if powers else 0.26) * octaves)
    axis.set_xticks(labelled, [f"$2^{{{np.log2(size):.0f}}}$" if powers else f"{size:,}" for size in labelled])
    axis.set_xticks([size for size in sizes if size not in labelled], minor=True)
    axis.xaxis.set_minor_formatter(NullFormatter())


def _with_room(numbers: Sequence[float], octaves: float) -> list[float]:
    """The numbers, in ascending order, that are at least so far from all numbers chosen before them.

    >>> _with_room([1_000_000, 1000, 100_000, 1200], 1.5)
    [1000, 100000, 1000000]
    """
    found: list[float] = []
    for number in numbers:
        if all(abs(np.log2(number / other)) >= octaves for other in found):
            found.append(number)
    return sorted(found)
