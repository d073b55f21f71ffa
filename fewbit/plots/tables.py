"""Figures of activations and their tables, and of the demo and the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewbit import activations
from fewbit.constants import DEFAULT_BITS, DEFAULT_DOMAIN, SHIPPED_BITS, SHIPPED_CODINGS
from fewbit.design.table import CodeTable
from fewbit.plots.style import literal, styled
from fewbit.record import Activation, plural
from fewbit.store import load_table

# title of a panel -> label of a line -> points (elements, median, lower, upper end of the spread)
RatioPanels = dict[str, dict[str, list[tuple[int, float, float, float]]]]

_EXACT, _CODED = "0.15", "tab:red"  # in grey print they differ by width: 2.2 and 1.2 points
_SYMBOLS = {"derivative": "f'", "value": "f"}
_ERROR_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5)
_COARSE_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FINE_TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4)


def plot_tables(record: Activation, tables: Sequence[CodeTable]) -> Figure:
    """For each channel the exact function with the steps of each table, and the error below, the tables side by side."""
    channels = tables[0].channels
    with styled():
        figure = Figure(figsize=(1.2 + 3.1 * len(tables), 0.9 + 4.7 * len(channels)), layout="constrained")
        ratios = (2, 1) * len(channels)
        axes = figure.subplots(2 * len(channels), len(tables), sharex=True, sharey="row", squeeze=False, height_ratios=ratios)
        span = _span(tables)
        for column, table in zip(axes.T, tables, strict=True):
            sizes = f"{plural(table.levels.shape[1], 'level')}, {plural(table.codes.size, 'interval')}"
            for top, bottom, channel, error in zip(
                column[::2], column[1::2], channels, np.atleast_1d(table.relative_rms), strict=True
            ):
                _draw_steps(top, record, table, span, channel)
                _draw_error(bottom, record, table, span, channel)
                top.set_title(f"relative rms error {error:.3g}")
            column[0].set_title(f"{plural(table.bits, 'bit')}: {sizes}\n{column[0].get_title()}")
            column[-1].set_xlabel("pre-activation x")
        for row, channel in enumerate(channels):
            axes[2 * row, 0].set_ylabel(channel)
            axes[2 * row + 1, 0].set_ylabel("coded − exact")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        between = "\n" if len(tables) == 1 else ", "
        functions = " and ".join(_SYMBOLS[channel] for channel in channels) + (" and its" if len(channels) == 1 else ": their")
        figure.suptitle(f"{literal(str(record))}: {functions} {tables[0].coding} codes{between}weight {tables[0].weight}")
    return figure


def plot_gallery(bits: int = DEFAULT_BITS) -> Figure:
    """f' of every registered activation with the steps of its default table."""
    records = [activations.get(name) for name in activations.names()]
    with styled():
        columns = 5
        rows = -(-len(records) // columns)
        figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axis, record in zip(axes.flat, records, strict=False):
            table = load_table(record, bits)
            _draw_steps(axis, record, table, (-7.0, 7.0))
            error = "exact" if table.mse == 0 else f"{table.relative_rms:.3f}"
            axis.set_title(f"{literal(record.name)}  ({error})")
        for axis in axes.flat[len(records) :]:
            axis.set_axis_off()
        last = len(records) - (rows - 1) * columns
        for axis in axes[-2, last:]:
            axis.tick_params(labelbottom=True)
        for axis in [*axes[-1, :last], *axes[-2, last:]]:
            axis.set_xlabel("pre-activation x")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower right", fontsize=9)
        figure.suptitle(f"Derivatives and their {bits}-bit codes; in brackets the relative rms error, weight student")
    return figure


def plot_errors() -> Figure:
    """Relative rms error against bits for every built-in activation, both optimal codings, at the default weight."""
    errors = {name: {coding: _errors(name, coding) for coding in SHIPPED_CODINGS} for name in activations.BUILT_IN}
    exact = [name for name, by_coding in errors.items() if max(by_coding["level"]) == 0]
    coded = sorted((name for name in errors if name not in exact), key=lambda name: -errors[name]["level"][-1])
    with styled():
        columns = 5
        rows = -(-len(coded) // columns)
        figure = Figure(figsize=(2.4 * columns, 2.2 * rows + 0.9), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(axes.flat, coded, strict=False):
            axis.semilogy(SHIPPED_BITS, errors[name]["interval"], "s--", color="0.55", label="interval coding", markersize=4)
            axis.semilogy(SHIPPED_BITS, errors[name]["level"], "o-", color="0.1", label="level coding", markersize=4)
            axis.set_title(name)
            axis.set_xticks(SHIPPED_BITS)
            axis.set_yticks(_ERROR_TICKS, [f"{tick:g}" for tick in _ERROR_TICKS])
            axis.minorticks_off()
            axis.grid(axis="y", color="0.9", which="major")
        for axis in axes.flat[len(coded) :]:
            axis.set_axis_off()
        figure.supxlabel("bits of one code")
        figure.supylabel("relative rms error of the derivative")
        axes[0, 0].legend(loc="upper right", fontsize=7)
        listed = ", ".join(exact)
        figure.suptitle(f"Error against bits, weight student. Exact with 1 bit in level coding: {listed}", fontsize=9)
    return figure


def plot_losses(curves: dict[str, Sequence[float]], smoothing: int = 10) -> Figure:
    """Training loss against steps, a line for each run, and below how far each is from the first.

    Lines are moving means over `smoothing` steps, drawn at the last of them.
    """
    styles = ("-", "--", ":", "-.")
    window = max(1, min(smoothing, *(len(losses) for losses in curves.values())))
    smooth = {label: np.convolve(losses, np.full(window, 1 / window), "valid") for label, losses in curves.items()}
    first, *others = smooth
    with styled():
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        for i, (label, losses) in enumerate(smooth.items()):
            steps = np.arange(window, window + len(losses))
            top.plot(steps, losses, styles[i % 4], label=label, linewidth=1.6, color=f"C{i}")
            if label in others:
                bottom.plot(steps, losses - smooth[first], styles[i % 4], linewidth=1.6, color=f"C{i}")
        bottom.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        bottom.set_xlabel("step")
        bottom.set_ylabel(f"difference from {first}")
        top.set_ylabel("training loss, nats per byte")
        top.set_title(f"A small GPT on the Python standard library, mean of {window} steps")
        top.legend()
    return figure


def plot_ratios(panels: RatioPanels, columns: int, subtitle: str) -> Figure:
    """Time over the exact activation's against size, both axes logarithmic: medians, with bars for their spread.

    panels    drawn row by row, `columns` in each
    subtitle  where and how often it was timed
    """
    rows = -(-len(panels) // columns)
    with styled():
        figure = Figure(figsize=(max(5.4, 0.8 + 3.0 * columns), 1.1 + 2.3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            _draw_ratios(axis, lines)
            axis.set_title(literal(title))
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        _label_ratio_ticks(axes[0, 0], panels)
        for i, axis in enumerate(axes.flat[: len(panels)]):
            if i + columns >= len(panels):  # the lowest of its column
                axis.set_xlabel("elements")
                axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("time over exact's")
        figure.suptitle(f"Coded against exact activations, forward and backward\n{subtitle}", fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_ratios(axis: Axes, lines: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    axis.axhline(1.0, color=_EXACT, linewidth=1.0, zorder=1)
    for i, (label, points) in enumerate(lines.items()):
        sizes, medians, low, high = np.array(sorted(points), float).T
        aside = 2.0 ** (0.25 * (i - (len(lines) - 1) / 2))  # so that bars at one size lie side by side
        spread = (medians - low, high - medians)
        marker = "osD^v"[i % 5]
        axis.errorbar(sizes * aside, medians, spread, fmt=f"{marker}-", label=label, markersize=4, linewidth=1.2, capsize=3)


def _label_ratio_ticks(axis: Axes, panels: RatioPanels) -> None:
    """Ticks at the sizes measured, and at round ratios: few where they span much."""
    points = [point for lines in panels.values() for line in lines.values() for point in line]
    sizes = sorted({point[0] for point in points})
    low, high = min([0.9, *(point[2] for point in points)]) / 1.05, max([1.1, *(point[3] for point in points)]) * 1.05
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(sizes[0] / 2, sizes[-1] * 2)
    axis.set_ylim(low, high)
    ticks = [tick for tick in (_FINE_TICKS if high < 6 * low else _COARSE_TICKS) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    powers = all(size & (size - 1) == 0 for size in sizes)
    axis.set_xticks(sizes, [f"$2^{{{size.bit_length() - 1}}}$" if powers else f"{size:,}" for size in sizes])
    axis.minorticks_off()


def _draw_steps(
    axis: Axes, record: Activation, table: CodeTable, span: tuple[float, float], channel: str = "derivative"
) -> None:
    x = _dense(table, span)
    axis.plot(x, _broken(record, x, channel), color=_EXACT, linewidth=2.2, alpha=0.55, label="exact")
    axis.plot(x, _coded(table, x, channel), color=_CODED, linewidth=1.2, label="coded")
    axis.set_xlim(span)


def _draw_error(axis: Axes, record: Activation, table: CodeTable, span: tuple[float, float], channel: str) -> None:
    x = _dense(table, span)
    axis.axhline(0.0, color="0.8", linewidth=0.8)
    axis.plot(x, _coded(table, x, channel) - _exact(record, x, channel), color=_CODED, linewidth=1.0)


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
