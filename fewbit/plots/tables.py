"""Figures of activations and their tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fewbit import activations
from fewbit.constants import DEFAULT_BITS, DEFAULT_DOMAIN, DEFAULT_WEIGHT, SHIPPED_BITS, SHIPPED_CODINGS
from fewbit.design.table import CodeTable
from fewbit.plots.style import DARK, LIGHT, apart, literal, styled
from fewbit.record import Activation, plural
from fewbit.store import load_table
from fewbit.weights import Normal, Student, Uniform, weight_named

_SYMBOLS = {"derivative": "f'", "value": "f"}
_CODINGS = {
    "level": "intervals may share a level",
    "interval": "each interval has a level of its own",
    "uniform": "intervals of equal width",
}
_DENSITY = "0.92"
_ERROR_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5)
_COMMON_SCALE = (-0.65, 1.85)  # scale of f' in the gallery
_LEAST_SPAN = 0.6  # if f' spans less in the gallery, the common scale would hide its steps


def plot_tables(record: Activation, tables: Sequence[CodeTable]) -> Figure:
    """For each channel: the exact function with the steps of each table, and the error below. Tables are drawn side by side.

    The density that weights the error is drawn at the bottom. Of several exact tables only the first is drawn.
    """
    channels, given = tables[0].channels, len(tables)
    tables = _without_more_exact_ones(tables)
    rows = 1 if all(map(_is_exact, tables)) else 2  # for each channel; the error of exact tables is 0
    with styled():
        size = (max(4.6, 1.2 + 3.1 * len(tables)), 1.3 + (1.4 + 1.6 * rows) * len(channels))
        figure = Figure(figsize=size, layout="constrained")
        ratios = (2, 1)[:rows] * len(channels)
        shape = rows * len(channels), len(tables)
        axes = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False, height_ratios=ratios)
        span = _span(tables)
        for column, table in zip(axes.T, tables, strict=True):
            errors = np.atleast_1d(table.relative_rms)
            for i, (channel, error) in enumerate(zip(channels, errors, strict=True)):
                _draw_density(column[rows * i], table, span)
                _draw_steps(column[rows * i], record, table, span, channel)
                column[rows * i].set_title(f"relative rms error {error:.3g}")
                if rows == 2:
                    _draw_error(column[2 * i + 1], record, table, span, channel)
            column[0].set_title(_heading(table, column[0].get_title(), more=len(tables) < given))
            column[-1].set_xlabel("pre-activation x")
        for row, channel in enumerate(channels):
            axes[rows * row, 0].set_ylabel(f"{channel} {_SYMBOLS[channel]}")
            if rows == 2:
                axes[2 * row + 1, 0].set_ylabel("coded − exact")
        figure.align_ylabels()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(_title(record, tables[0], "\n" if len(tables) < 3 else ". "))
    return figure


def plot_gallery(bits: int = DEFAULT_BITS) -> Figure:
    """f' of the registered activations with the steps of their default tables. Exact ones are only named."""
    records = [activations.get(name) for name in activations.names()]
    tables = {record: load_table(record, bits) for record in records}
    exact = [record.name for record, table in tables.items() if _is_exact(table)]
    drawn = {record: table for record, table in tables.items() if record.name not in exact}
    with styled():
        columns = 5
        rows = -(-len(drawn) // columns)
        figure = Figure(figsize=(2.5 * columns, 2.1 * rows + 0.9), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (record, table) in zip(axes.flat, drawn.items(), strict=False):
            axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            axis.axhline(1, color="0.85", linewidth=0.8, zorder=0)
            _draw_steps(axis, record, table, (-7.0, 7.0))
            _set_common_scale(axis)
            axis.set_title(f"{literal(record.name)}: {table.relative_rms:.3f}")
            axis.set_xticks([-5, 0, 5])
        for axis in axes.flat[len(drawn) :]:
            axis.set_axis_off()
        figure.supxlabel("pre-activation x", fontsize=9)
        figure.supylabel("derivative f'", fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        title = f"Derivatives and their codes of {plural(bits, 'bit')}; beside each name the relative rms error"
        also = f"\nexact, and so not drawn: {literal(', '.join(exact))}" if exact else ""
        figure.suptitle(f"{title}, x weighted by {weight_words(DEFAULT_WEIGHT)}{also}", fontsize=10)
    return figure


def plot_errors() -> Figure:
    """Relative rms error against bits, for both optimal codings: each built-in activation, and the median over all."""
    errors = {name: {coding: _errors(name, coding) for coding in SHIPPED_CODINGS} for name in activations.BUILT_IN}
    exact = [name for name, by_coding in errors.items() if max(by_coding["level"]) == 0]
    coded = {name: by_coding for name, by_coding in errors.items() if name not in exact}
    looks = {"level": ("-", "o", DARK), "interval": ("--", "s", "0.5")}
    with styled():
        figure = Figure(figsize=(7.6, 5.4), layout="constrained")
        axis = figure.subplots()
        for coding, (line, marker, colour) in reversed(looks.items()):
            curves = np.array([by_coding[coding] for by_coding in coded.values()])
            axis.semilogy(SHIPPED_BITS, curves.T, line, color=colour, linewidth=0.7, alpha=0.5)
            label = f"{coding} coding: {_CODINGS[coding]}"
            axis.semilogy(SHIPPED_BITS, np.median(curves, 0), line, marker=marker, color=colour, linewidth=2.4, label=label)
        axis.set_xticks(SHIPPED_BITS)
        axis.set_yticks(_ERROR_TICKS, [f"{tick:g}" for tick in _ERROR_TICKS])
        axis.minorticks_off()
        axis.grid(axis="y", color="0.9")
        axis.set_xlabel("bits of a code")
        axis.set_ylabel("relative rms error of the derivative")
        _name_ends(axis, SHIPPED_BITS[-1], {name: by_coding["level"][-1] for name, by_coding in coded.items()})
        handles, labels = axis.get_legend_handles_labels()
        single = Line2D([], [], color="0.5", linewidth=0.7)
        axis.legend(
            [*handles[::-1], single], [*(f"{label}, median" for label in labels[::-1]), "one activation, either coding"]
        )
        title = f"Error against bits, x weighted by {weight_words(DEFAULT_WEIGHT)}"
        axis.set_title(f"{title}\nexact with 1 bit in level coding: {_in_lines(exact, 5)}", loc="left")
    return figure


def weight_words(weight: str | None) -> str:
    """The words for a weight in pictures.

    >>> weight_words("student"), weight_words("normal(std=2)"), weight_words("uniform")
    ("Student's t, ν = 3", 'normal(std=2)', 'the uniform density')
    """
    known = weight_named(weight or "")
    if isinstance(known, Student) and known == Student(df=known.df):
        return f"Student's t, ν = {known.df:g}"
    if known == Normal():
        return "the standard normal density"
    if (weight or "").startswith("histogram("):
        return "a histogram of samples"
    return "the uniform density" if isinstance(known, Uniform) else literal(weight or "no density")


def _title(record: Activation, table: CodeTable, between: str) -> str:
    functions = " and ".join(f"its {channel} {_SYMBOLS[channel]}" for channel in table.channels)
    parts = [f"{literal(str(record))}: {functions}, exact and coded"]
    if table.coding in _CODINGS:
        parts.append(f"{table.coding} coding: {_CODINGS[table.coding]}".capitalize())
    shaded = ", shaded" if weight_named(table.weight or "") else ""
    return between.join([*parts, f"Error weighted by {weight_words(table.weight)}{shaded}"])


def _is_exact(table: CodeTable) -> bool:
    return bool(np.all(np.atleast_1d(table.mse) == 0))


def _without_more_exact_ones(tables: Sequence[CodeTable]) -> list[CodeTable]:
    exact = [table for table in tables if _is_exact(table)]
    return [table for table in tables if table not in exact[1:]]


def _heading(table: CodeTable, error: str, more: bool) -> str:
    """more: whether tables of more bits, which are exact too, are left out"""
    levels, intervals = plural(table.levels.shape[1], "level"), plural(table.codes.size, "interval")
    if not _is_exact(table):
        return f"{plural(table.bits, 'bit')}: {levels}, {intervals}\n{error}"
    return f"exact with {plural(table.bits, 'bit')}: {levels}, {intervals}" + "\nalso exact with more bits, not drawn" * more


def _set_common_scale(axis: Axes) -> None:
    """Set the common scale of the gallery if it fits. If not, set another scale, and say so in the panel."""
    y = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()[2:]])
    low, high = np.nanmin(y), np.nanmax(y)
    if _COMMON_SCALE[0] <= low and high <= _COMMON_SCALE[1] and high - low >= _LEAST_SPAN:
        axis.set_ylim(_COMMON_SCALE)
        axis.set_yticks([0, 1])
        return
    margin = 0.1 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.text(0.03, 0.97, "another scale", transform=axis.transAxes, va="top", size=8, style="italic")


def _name_ends(axis: Axes, x: float, ends: dict[str, float]) -> None:
    """Write the names at the right ends of the lines. Names with the same end share a line of text. Texts that would overlap
    are moved apart, with lines to their ends."""
    together: dict[str, list[str]] = {}
    for name, end in sorted(ends.items(), key=lambda item: -item[1]):
        together.setdefault(f"{end:.3g}", []).append(name)
    heights = [np.log(float(end)) for end in together]
    places = np.exp(apart(heights, 0.13))
    axis.set_xlim(right=x + 0.2)
    axis.spines.bottom.set_bounds(axis.get_xlim()[0], x)
    for names, end, place in zip(together.values(), together, places, strict=True):
        style = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
        axis.annotate(", ".join(names), (x, float(end)), (x + 0.2, place), va="center", size=8, arrowprops=style)


def _in_lines(names: Sequence[str], most: int) -> str:
    return ",\n".join(", ".join(names[i : i + most]) for i in range(0, len(names), most))


def _draw_density(axis: Axes, table: CodeTable, span: tuple[float, float]) -> None:
    """Draw the density at the bottom of the panel, in a scale of its own. Nothing is drawn if the table does not name it."""
    weight = weight_named(table.weight or "")
    if weight is not None:
        x = np.linspace(*span, 501)
        heights = weight.density(x)
        axis.fill_between(
            x,
            0.3 * heights / heights.max(),
            transform=axis.get_xaxis_transform(),
            facecolor=_DENSITY,
            edgecolor="0.75",
            linewidth=0.6,
            label="density of x",
            zorder=0,
        )


def _draw_steps(
    axis: Axes, record: Activation, table: CodeTable, span: tuple[float, float], channel: str = "derivative"
) -> None:
    x = _dense(table, span)
    axis.plot(x, _broken(record, x, channel), color=LIGHT, linewidth=3.6, label="exact")
    axis.plot(x, _coded(table, x, channel), color=DARK, linewidth=1.1, label="coded")
    axis.set_xlim(span)


def _draw_error(axis: Axes, record: Activation, table: CodeTable, span: tuple[float, float], channel: str) -> None:
    x = _dense(table, span)
    axis.axhline(0.0, color=LIGHT, linewidth=0.8)
    axis.plot(x, _coded(table, x, channel) - _exact(record, x, channel), color=DARK, linewidth=1.0)


def _exact(record: Activation, x: np.ndarray, channel: str) -> np.ndarray:
    return record.df(x) if channel == "derivative" else record.f(x)


def _coded(table: CodeTable, x: np.ndarray, channel: str) -> np.ndarray:
    return table.levels[table.channels.index(channel), table.encode(x)]


def _dense(table: CodeTable, span: tuple[float, float]) -> np.ndarray:
    """A fine grid with a point on either side of every threshold, so that steps come out upright."""
    return np.unique(np.concatenate([np.linspace(*span, 2001), table.thresholds, table.thresholds + 1e-9]))


def _broken(record: Activation, x: np.ndarray, channel: str) -> np.ndarray:
    """f' or f at x, with a gap at each jump of f'."""
    return np.where(np.isin(x, record.derivative_shape.jumps), np.nan, _exact(record, x, channel))


def _span(tables: Sequence[CodeTable]) -> tuple[float, float]:
    """From -6 to 6, or as far out as thresholds lie, within the domain."""
    low, high = tables[0].domain or DEFAULT_DOMAIN
    reach = max([6.0, *(1.15 * np.abs(table.thresholds).max(initial=0.0) for table in tables)])
    return max(low, -reach), min(high, reach)


def _errors(name: str, coding: str) -> list[float]:
    return [float(load_table(name, bits, coding=coding).relative_rms) for bits in SHIPPED_BITS]  # type: ignore[arg-type]
