"""What a model keeps for backward, by module and operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fewbit.plots.style import literal, styled

Stack = Mapping[str, int]  # operation -> bytes
Bars = Mapping[str, Stack]  # label -> what the bar is made of

OTHERS = "others"
_MOST_MODULES, _MOST_OPERATIONS = 20, 9
_UNITS = {1024**4: "TiB", 1024**3: "GiB", 1024**2: "MiB", 1024: "KiB", 1: "bytes"}


def plot_memory(modules: Mapping[str, Bars], title: str, label_of: Callable[[int], str]) -> Figure:
    """Stacked bars, one or several below each other for each module, coloured by operation.

    modules   name of the module -> label of the bar, "" where there is one alone -> operation -> bytes. The largest are drawn,
              and all others as one.
    label_of  a number of bytes, as people read it
    """
    shown = _largest(modules)
    colours = _colours(shown)
    labels = list(dict.fromkeys(label for bars in shown.values() for label in bars))
    step = 0.84 / max(1, len(labels))
    with styled():
        figure = Figure(figsize=(9, 1.7 + 0.26 * len(shown) * max(1, len(labels))), layout="constrained")
        axes = figure.subplots()
        for i, bars in enumerate(shown.values()):
            for j, label in enumerate(labels):
                stack = bars.get(label, {})
                y = i + (j - (len(labels) - 1) / 2) * step
                _draw(axes, y, 0.9 * step, stack, colours)
                end, text = sum(stack.values()), f"{label} {label_of(sum(stack.values()))}".strip()
                axes.annotate(text, (end, y), (3, 0), textcoords="offset points", va="center", size=7)
        axes.set_yticks(range(len(shown)), [literal(name) for name in shown])
        axes.invert_yaxis()
        axes.margins(x=0.16, y=0.01)
        _label_bytes(axes)
        axes.set_title(literal(title), loc="left")
        patches = [Patch(color=colour, label=literal(operation)) for operation, colour in colours.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3)
    return figure


def plot_counts(counts: Mapping[str, int], what: str) -> Figure:
    """A bar for each label, with its number. what: on the axis"""
    with styled():
        figure = Figure(figsize=(7, 1.0 + 0.4 * len(counts)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([literal(label) for label in counts], list(counts.values()), height=0.6)
        axes.bar_label(bars, [str(number) if number else "none" for number in counts.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel(what)
    return figure


def _draw(axes: Axes, y: float, height: float, stack: Stack, colours: Mapping[str, Any]) -> None:
    left = 0
    for operation in colours:
        number = sum(value for name, value in stack.items() if (name if name in colours else OTHERS) == operation)
        if number:
            axes.barh(y, number, height, left=left, color=colours[operation])
            left += number


def _largest(modules: Mapping[str, Bars]) -> dict[str, Bars]:
    order = sorted(modules, key=lambda name: -max((sum(stack.values()) for stack in modules[name].values()), default=0))
    shown = {name: modules[name] for name in order[:_MOST_MODULES]}
    rest: dict[str, Counter[str]] = {}
    for name in order[_MOST_MODULES:]:
        for label, stack in modules[name].items():
            rest.setdefault(label, Counter()).update(stack)
    return {**shown, f"{len(order) - _MOST_MODULES} others": rest} if rest else shown


def _colours(modules: Mapping[str, Bars]) -> dict[str, Any]:
    """Of the operations that keep most, and one for all others."""
    sums: Counter[str] = Counter()
    for bars in modules.values():
        for stack in bars.values():
            sums.update(stack)
    named = [name for name, _ in sums.most_common(_MOST_OPERATIONS)]
    found: dict[str, Any] = dict(zip(named, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    return {**found, OTHERS: "0.7"} if len(sums) > len(named) else found


def _label_bytes(axes: Axes) -> None:
    """Ticks at round numbers of a unit."""
    unit = next(unit for unit in _UNITS if axes.get_xlim()[1] >= unit or unit == 1)
    low, high = axes.get_xlim()
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low / unit, high / unit)
    axes.set_xticks([tick * unit for tick in ticks if 0 <= tick * unit <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(_UNITS[unit])
