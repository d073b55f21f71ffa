"""Figures of what a model keeps for backward, in total and by module. Colours show the kind of operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fewbit.plots.style import literal, styled

Stack = Mapping[str, int]  # kind of operation -> bytes
Bars = Mapping[str, Stack]  # label of a bar -> its parts

_MOST_MODULES = 20
_LEAST = 0.004  # part of the longest bar; shorter bars would not be visible
_UNITS = {1024**4: "TiB", 1024**3: "GiB", 1024**2: "MiB", 1024: "KiB", 1: "bytes"}
_LOOKS = (  # colour and hatch, chosen so that neighbours also differ in grey print
    ("#1f4e79", ""),
    ("#f2b134", "//"),
    ("#6baed6", ""),
    ("#c1432e", "xx"),
    ("#b9d7a8", ".."),
    ("#5a3d7a", ""),
    ("0.8", ""),
)


def plot_memory(modules: Mapping[str, Bars], kinds: Mapping[str, str], title: str, label_of: Callable[[int], str]) -> Figure:
    """Bars for the whole model, and below them, in a scale of their own, bars for each module.

    modules   name of the module -> label of the bar ("" if there is only one) -> kind of operation -> bytes. The largest
              modules are drawn; all others share a bar.
    kinds     kind of operation -> its words, in the order in which they are drawn
    label_of  gives the text for a number of bytes
    """
    labels = list(dict.fromkeys(label for bars in modules.values() for label in bars)) or [""]
    whole = {label: _sum(bars.get(label, {}) for bars in modules.values()) for label in labels}
    looks = {kind: _LOOKS[i % len(_LOOKS)] for i, kind in enumerate(kinds)}
    shown = _largest(modules)
    row, longest = 0.2 + 0.13 * len(labels), max(map(len, shown), default=0)
    heights = len(labels) * 0.26 + 0.2, row * len(shown) + 0.1
    with styled():
        figure = Figure(figsize=(6.5 + 0.075 * longest, sum(heights) + 2.3), layout="constrained")
        top, bottom = figure.subplots(2, height_ratios=heights)
        for i, stack in enumerate(whole.values()):
            _draw(top, i, 0.75, stack, looks)
            _annotate(top, i, sum(stack.values()), label_of(sum(stack.values())))
        top.set_yticks(range(len(labels)), [literal(label) or "all modules" for label in labels])
        step = 0.8 / len(labels)
        for i, bars in enumerate(shown.values()):
            sums = [sum(bars.get(label, {}).values()) for label in labels]
            for j, label in enumerate(labels):
                _draw(bottom, i + (j - (len(labels) - 1) / 2) * step, 0.94 * step, bars.get(label, {}), looks)
            _annotate(bottom, i, max(sums), " → ".join(map(label_of, sums)))
        bottom.set_yticks(range(len(shown)), [literal(name) for name in shown])
        top.set_title(literal(title), loc="left")
        order = f": {labels[0]} above, {labels[1]} below" if len(labels) == 2 else "; repeated layers share a bar"
        bottom.set_title(f"by module, in a larger scale{literal(order)}", loc="left")
        for axes in (top, bottom):
            _finish(axes)
        used = {kind for stack in whole.values() for kind, number in stack.items() if number}
        patches = [
            Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=literal(kinds[kind]))
            for kind, (colour, hatch) in looks.items()
            if kind in used
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=4)
    return figure


def plot_counts(counts: Mapping[str, int], what: str, title: str) -> Figure:
    """A bar for each label, with its number. what: the name of the axis"""
    with styled():
        figure = Figure(figsize=(7, 1.2 + 0.4 * len(counts)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([literal(label) for label in counts], list(counts.values()), height=0.6, color=_LOOKS[0][0])
        axes.bar_label(bars, [f"{number:,}" if number else "none" for number in counts.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(what)
        axes.set_title(literal(title), loc="left")
    return figure


def _draw(axes: Axes, y: float, height: float, stack: Stack, looks: Mapping[str, tuple[str, str]]) -> None:
    left = 0
    for kind, (colour, hatch) in looks.items():
        if number := stack.get(kind, 0):
            axes.barh(y, number, height, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            left += number


def _annotate(axes: Axes, y: float, end: int, text: str) -> None:
    axes.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", size=8)


def _sum(stacks: Iterable[Stack]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for stack in stacks:
        sums.update(stack)
    return sums


def _largest(modules: Mapping[str, Bars]) -> dict[str, Bars]:
    """The modules whose bars are visible, as many as a picture takes, the longest first. All others share a bar if that is
    visible."""
    longest = {name: max((sum(stack.values()) for stack in bars.values()), default=0) for name, bars in modules.items()}
    order = sorted(modules, key=lambda name: -longest[name])
    least = _LEAST * max(longest.values(), default=0)
    shown = {name: modules[name] for name in order[:_MOST_MODULES] if longest[name] > least}
    others = [modules[name] for name in order if name not in shown]
    labels = dict.fromkeys(label for bars in others for label in bars)
    rest = {label: _sum(bars.get(label, {}) for bars in others) for label in labels}
    visible = max((sum(stack.values()) for stack in rest.values()), default=0) > least
    return {**shown, f"{len(others)} others": rest} if visible else shown


def _finish(axes: Axes) -> None:
    """Order the bars from top to bottom, and set ticks at round numbers of a unit."""
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.22, y=0.01)
    axes.autoscale_view()
    unit = next(unit for unit in _UNITS if axes.get_xlim()[1] >= unit or unit == 1)
    low, high = axes.get_xlim()
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low / unit, high / unit)
    axes.set_xticks([tick * unit for tick in ticks if 0 <= tick * unit <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(_UNITS[unit])
