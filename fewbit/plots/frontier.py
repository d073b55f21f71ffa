"""The figure of a plan: memory against time of the best choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewbit.plots.style import DARK, MARKERS, apart, literal, styled

Cost = tuple[int, float]  # bytes, and time as a multiple of the exact step's
_NAME, _LINE = 0.35, 0.06  # parts of the width and the height that a name takes


def plot_frontier(frontier: Sequence[Cost], uniform: Mapping[str, Cost], chosen: Cost, budget: int, title: str) -> Figure:
    """A line through the frontier, a named mark for each uniform way, a ring around the chosen plan, and the budget."""
    unit, name = _unit(max(peak for peak, _ in (*frontier, *uniform.values())))
    points = [*frontier, *uniform.values(), chosen]
    with styled():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        steps = sorted(frontier)
        peaks, times = [peak / unit for peak, _ in steps], [time for _, time in steps]
        axes.plot(peaks, times, color="0.55", drawstyle="steps-post", label="fastest mix of ways for this peak")
        for (peak, time), marker in zip(uniform.values(), MARKERS, strict=False):
            axes.plot(peak / unit, time, marker, color="0.2", ms=6)
        axes.plot(chosen[0] / unit, chosen[1], "o", color=DARK, fillstyle="none", ms=14, mew=2, zorder=3, label="chosen")
        axes.axvline(budget / unit, color=DARK, ls="--", lw=1, label=f"budget, {budget / unit:.3g} {name}")
        axes.set_xlim(*_limits([*(peak / unit for peak, _ in points), budget / unit], 0.08, 0.08))
        axes.set_ylim(*_limits([1.0, *(time for _, time in points)], 0.08, 0.12))
        _name_points(axes, {label: (peak / unit, time) for label, (peak, time) in uniform.items()})
        axes.set_xlabel(f"peak of a training step, {name}")
        axes.set_ylabel("time of forward and backward, exact = 1")
        axes.set_title(literal(title), loc="left")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _limits(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    return low - below * span, high + above * span


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names beside the marks. Names of marks that lie close together are written below each other."""
    (start, end), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = {label: ((x - start) / (end - start), (y - bottom) / (top - bottom)) for label, (x, y) in points.items()}
    order = sorted(places, key=lambda label: -places[label][1])
    while order:
        column = [order[0]]
        for label in order[1:]:
            if _would_collide(places[label], places[column[-1]]):
                column.append(label)
        right = places[column[0]][0] < 0.6  # names to the right of the marks, or else to the left
        beside = max(places[each][0] for each in column) + 0.035 if right else min(places[each][0] for each in column) - 0.035
        heights = apart([places[label][1] for label in column], _LINE)
        for label, height in zip(column, heights, strict=True):
            style = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (1 - right, 0.5), "shrinkA": 0}
            axes.annotate(
                literal(f"all blocks: {label}"),
                places[label],
                (beside, height),
                xycoords="axes fraction",
                textcoords="axes fraction",
                ha="left" if right else "right",
                va="center",
                size=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                arrowprops=style,
            )
        order = [label for label in order if label not in column]


def _would_collide(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether the names beside these two marks would overlap."""
    return abs(one[0] - other[0]) < _NAME and abs(one[1] - other[1]) < _LINE


def _unit(largest: int) -> tuple[int, str]:
    return next(
        (size, name) for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if largest >= size
    )
