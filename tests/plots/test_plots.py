"""Pictures: what they show is checked here by their parts; how they look, by looking."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

import fewbit
from fewbit import activations, plots
from fewbit.plots import plot_ratios, plot_tables, save
from fewbit.plots.calibration import plot_allocation, plot_calibration
from fewbit.plots.gradients import plot_drift, plot_fidelity
from fewbit.plots.memory import plot_memory
from fewbit.record import from_callable


def boxes_of_texts(figure):
    """Where titles, axis labels and legends lie: (text, box) for each. Not tick labels: matplotlib has some beyond the axes."""
    FigureCanvasAgg(figure).draw()
    legends = [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    titles = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    shown = [text for text in {*legends, *titles, *figure.texts} if text.get_text() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def check(figure):
    assert isinstance(figure, Figure)
    boxes = boxes_of_texts(figure)
    assert len(boxes) >= 3
    assert [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])] == []
    frame = figure.bbox
    assert [
        text for text, box in boxes if box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1
    ] == []


@pytest.mark.parametrize("bits", [(1, 2, 3, 4), (3,), (1, 8)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "hardswish"])
def test_tables(name, bits):
    record = activations.get(name)
    tables = [fewbit.load_table(name, b) for b in bits]
    figure = plots.plot_tables(record, tables)
    check(figure)
    assert len(figure.axes) == 2 * len(bits)
    for axis, table in zip(figure.axes, tables, strict=False):
        exact, coded = axis.get_lines()
        x, y = coded.get_data()
        np.testing.assert_array_equal(y, table(x))
        inner = np.isfinite(exact.get_ydata())
        np.testing.assert_array_equal(exact.get_ydata()[inner], record.df(x)[inner])
        assert f"{table.relative_rms:.3g}" in axis.get_title()
    assert figure.axes[0].get_ylabel() == "derivative"
    assert figure.axes[-1].get_xlabel() == "pre-activation x"


@pytest.mark.parametrize(
    ("name", "channels", "coding"),
    [
        ("gelu", ("derivative", "value"), None),
        ("hardshrink", ("value", "derivative"), "uniform"),
        ("identity", ("value",), None),
    ],
)
def test_tables_of_values_have_a_panel_for_each_channel(name, channels, coding):
    record = activations.get(name)
    tables = [fewbit.load_table(name, bits, channels=channels, coding=coding) for bits in (1, 3)]
    figure = plots.plot_tables(record, tables)
    check(figure)
    axes = np.reshape(figure.axes, (2 * len(channels), 2))
    for i, channel in enumerate(channels):
        assert axes[2 * i, 0].get_ylabel() == channel
        for top, bottom, table in zip(axes[2 * i], axes[2 * i + 1], tables, strict=True):
            exact, coded = top.get_lines()
            x = coded.get_xdata()
            expected = record.df(x) if channel == "derivative" else record.f(x)
            np.testing.assert_array_equal(coded.get_ydata(), np.reshape(table(x), (-1, x.size))[i])
            np.testing.assert_array_equal(bottom.get_lines()[1].get_ydata(), coded.get_ydata() - expected)
            inner = np.isfinite(exact.get_ydata())
            np.testing.assert_array_equal(exact.get_ydata()[inner], expected[inner])
            assert f"relative rms error {np.atleast_1d(table.relative_rms)[i]:.3g}" in top.get_title()


def test_gallery_shows_every_activation():
    figure = plots.plot_gallery(3)
    check(figure)
    assert [axis.get_title().split()[0] for axis in figure.axes if axis.get_title()] == activations.names()


def test_errors_show_every_activation():
    figure = plots.plot_errors()
    check(figure)
    words = " ".join([axis.get_title() for axis in figure.axes] + [figure.get_suptitle()])
    assert all(name in words for name in activations.BUILT_IN)
    for axis in (axis for axis in figure.axes if axis.get_title()):
        interval, level = axis.get_lines()
        assert np.all(level.get_ydata() <= interval.get_ydata())


def test_losses():
    figure = plots.plot_losses({"exact": [3.0, 2.0, 1.0], "3 bits": [3.0, 2.5, 2.0]}, smoothing=2)
    check(figure)
    assert figure.axes[0].get_lines()[0].get_ydata() == pytest.approx([2.5, 1.5])
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx([0.25, 0.75])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["exact", "3 bits"]


def test_ratios():
    lines = {
        "3 bits": [(1024, 3.0, 2.5, 4.0), (2**20, 1.1, 1.0, 1.3)],
        "1 bit": [(1024, 2.5, 2.0, 3.0), (2**20, 0.9, 0.8, 1.0)],
    }
    panels = {f"{name}, {dtype}": lines for dtype in ("float32", "bfloat16") for name in ("gelu", "silu")}
    figure = plots.plot_ratios({**panels, "tanh, float32": {"3 bits": lines["3 bits"]}}, 2, "cpu (a processor)\n2 threads")
    check(figure)
    assert [axis.get_title() for axis in figure.axes] == [*panels, "tanh, float32", ""]
    for axis in figure.axes[:4]:
        for container, points in zip(axis.containers, lines.values(), strict=True):
            median, _, (bar,) = container
            assert median.get_ydata() == pytest.approx([point[1] for point in points])
            assert median.get_xdata() == pytest.approx([point[0] for point in points], rel=0.2)
            ends = [sorted(segment[:, 1]) for segment in bar.get_segments()]
            np.testing.assert_allclose(ends, [point[2:] for point in points])
        assert [1.0, 1.0] in [list(line.get_ydata()) for line in axis.get_lines()]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["$2^{10}$", "$2^{20}$"]
    assert figure.axes[0].get_ylabel() == "time over exact's"


def test_ratios_of_one_odd_size():
    figure = plots.plot_ratios({"gelu, float32": {"3 bits": [(1000, 1.02, 0.97, 1.1)]}}, 1, "cuda (a device with a long name)")
    check(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1,000"]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.97 < 1.1 < high


@pytest.mark.parametrize("name", ["a$_{b", "$\\frac$", "$a_{b}$", "\x1b[2J", "_", "a\\$b$c", "ä\n"])
def test_names_are_no_formulas(name, tmp_path):
    """Of modules, operations and activations: matplotlib would take what stands between two $ for a formula."""
    part = SimpleNamespace(group=name, error=0.1, noise=1.0, systematic=0.01)
    record = from_callable(torch.tanh, name=f"{name}$")
    figures = (
        plot_memory({f"{name}${name}": {"": {name: 3}}}, f"{name} $", str),
        plot_calibration([name, name], {"derivative": [(0.1, 0.05)] * 2}),
        plot_allocation([name], [3], [(0.1, 0.05)], 4),
        plot_fidelity([part, part], f"{name} $"),
        plot_drift({name: [(1, 2.0)]}, 2.0),
        plot_tables(record, [fewbit.load_table("tanh", 2)]),
        plot_ratios({f"{name} $": {"3 bits": [(16, 1.0, 0.9, 1.1)]}}, 1, "here"),
    )
    for figure in figures:
        save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
