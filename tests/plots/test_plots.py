"""Pictures: the tests check their parts. How they look must be checked by eye."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

import fewbit
from fewbit import activations, plots
from fewbit.plots import plot_ratios, plot_tables, save
from fewbit.plots.calibration import plot_allocation, plot_calibration
from fewbit.plots.frontier import plot_frontier
from fewbit.plots.gradients import plot_drift, plot_fidelity
from fewbit.plots.memory import plot_memory
from fewbit.record import from_callable


def boxes_of_texts(figure):
    """The places of titles, axis labels and legends: (text, box) for each. Tick labels may lie outside."""
    FigureCanvasAgg(figure).draw()
    legends = [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    titles = [text for axis in figure.axes for text in (axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label)]
    shown = [text for text in {*legends, *titles, *figure.texts} if text.get_text() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def overlapping(texts):
    """Pairs that overlap, without arrows of annotations."""
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_visible() and text.get_text()]
    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])]


def tick_labels(axis):
    """The drawn ticks of an axis: matplotlib has some beyond its ends."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]


def check(figure):
    assert isinstance(figure, Figure)
    boxes = boxes_of_texts(figure)
    assert len(boxes) >= 3
    assert [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])] == []
    for axis in figure.axes:
        for each in (axis.xaxis, axis.yaxis):
            assert overlapping(tick_labels(each)) == []
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
        assert len(axis.collections) == 1  # the density
    assert figure.axes[0].get_ylabel() == "derivative f'"
    assert figure.axes[-1].get_xlabel() == "pre-activation x"
    assert "Student's t, ν = 3" in figure.get_suptitle()
    assert "intervals may share a level" in figure.get_suptitle()


def test_exact_tables_are_drawn_once():
    record = activations.get("relu")
    figure = plots.plot_tables(record, [fewbit.load_table("relu", bits) for bits in (1, 2, 3, 4)])
    check(figure)
    (axis,) = figure.axes
    assert axis.get_title() == "exact with 1 bit: 2 levels, 2 intervals\nalso exact with more bits, not drawn"
    assert "not drawn" not in plots.plot_tables(record, [fewbit.load_table("relu", 1)]).axes[0].get_title()


def test_tables_that_become_exact():
    record = activations.get("relu6")
    tables = [fewbit.load_table("relu6", bits, coding="interval") for bits in (1, 2, 3)]
    figure = plots.plot_tables(record, tables)
    check(figure)
    assert len(figure.axes) == 4
    assert ["exact" in axis.get_title() for axis in figure.axes[:2]] == [False, True]


def test_the_density_of_samples_is_not_known():
    samples = np.linspace(-1, 2, 50)
    figure = plots.plot_tables(activations.get("gelu"), [fewbit.design("gelu", bits=2, weight=samples)])
    check(figure)
    assert not figure.axes[0].collections
    assert figure.get_suptitle().endswith("a histogram of samples")


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
        assert axes[2 * i, 0].get_ylabel().startswith(channel)
        for top, bottom, table in zip(axes[2 * i], axes[2 * i + 1], tables, strict=True):
            exact, coded = top.get_lines()
            x = coded.get_xdata()
            expected = record.df(x) if channel == "derivative" else record.f(x)
            np.testing.assert_array_equal(coded.get_ydata(), np.reshape(table(x), (-1, x.size))[i])
            np.testing.assert_array_equal(bottom.get_lines()[1].get_ydata(), coded.get_ydata() - expected)
            inner = np.isfinite(exact.get_ydata())
            np.testing.assert_array_equal(exact.get_ydata()[inner], expected[inner])
            assert f"relative rms error {np.atleast_1d(table.relative_rms)[i]:.3g}" in top.get_title()


def test_gallery_shows_every_activation_that_is_not_exact():
    figure = plots.plot_gallery(3)
    check(figure)
    drawn = [axis.get_title().partition(":")[0] for axis in figure.axes if axis.get_title()]
    exact = figure.get_suptitle().partition("not drawn: ")[2].split(", ")
    assert len(exact) == 8
    assert sorted([*drawn, *exact]) == sorted(activations.names())
    scales = {axis.get_title().partition(":")[0]: axis.get_ylim() for axis in figure.axes}
    assert scales["gelu"] == scales["selu"] != scales["sigmoid"]
    marked = [axis.get_title().partition(":")[0] for axis in figure.axes if axis.texts]
    assert marked == ["sigmoid"]


def test_errors_show_every_activation_in_one_panel():
    figure = plots.plot_errors()
    check(figure)
    (axis,) = figure.axes
    words = axis.get_title(loc="left") + " ".join(text.get_text() for text in axis.texts)
    assert all(name in words for name in activations.BUILT_IN)
    assert overlapping(axis.texts) == []
    lines = [np.asarray(line.get_ydata()) for line in axis.get_lines()]
    interval, level = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert len(level) == 16  # 15 activations, and their median
    assert np.all(np.array(level) <= np.array(interval))
    np.testing.assert_allclose(level[-1], np.median(level[:-1], 0))


def test_training():
    kept = {"exact": (2**20, 3 * 2**20), "3 bits": (2**17, 2**21 + 2**17)}
    figure = plots.plot_training({"exact": [3.0, 2.0, 1.0], "3 bits": [3.0, 2.5, 2.0]}, kept, smoothing=2)
    check(figure)
    losses, memory, difference = figure.axes
    assert losses.get_lines()[0].get_ydata() == pytest.approx([2.5, 1.5])
    assert difference.get_lines()[0].get_ydata() == pytest.approx([0.25, 0.75])
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["exact", "3 bits"]
    assert [bar.get_height() for bar in memory.patches] == pytest.approx([2, 2, 1, 1 / 8])
    assert overlapping(memory.texts) == []


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
    assert figure.axes[0].get_ylabel() == "time, exact = 1"


def test_ratios_of_one_odd_size():
    figure = plots.plot_ratios({"gelu, float32": {"3 bits": [(1000, 1.02, 0.97, 1.1)]}}, 1, "cuda (a device with a long name)")
    check(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1,000"]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.97 < 1.1 < high


def test_many_sizes_and_a_wild_spread():
    """Labels do not overlap, and spreads do not set the scale."""
    sizes = [1000, 1200, 90_000, 100_000, 120_000, 1_000_000, 1_100_000]
    points = [(size, 1.1, 0.01, 50.0) for size in sizes]
    figure = plots.plot_ratios({f"{name}, float32": {"3 bits": points} for name in ("gelu", "silu", "tanh")}, 3, "cpu")
    check(figure)
    low, high = figure.axes[0].get_ylim()
    assert low > 0.5
    assert high < 2
    assert sum(line.get_marker() in "^v" for line in figure.axes[0].get_lines()) == 2
    figure = plots.plot_ratios({"gelu": {"3 bits": [(2**e, 3.0 - e / 10, 0.4, 4.0) for e in range(10, 26)]}}, 1, "cpu")
    check(figure)


MANY = {f"encoder.layers.{'*' * i}.a_rather_long_name": {"exact": {"linear": 2**20 >> i, "rest": 3}} for i in range(25)}
WORDS = {"linear": "matrix products", "norm": "norms", "rest": "all else"}


def test_memory():
    modules = {
        "encoder.layers.0-11.attention.output.dense_of_a_long_name": {"exact": {"linear": 4000}, "converted": {"linear": 500}},
        "norm": {"exact": {"norm": 1000, "rest": 1000}, "converted": {"norm": 100}},
        "nothing": {"exact": {"linear": 1}, "converted": {}},
    }
    figure = plot_memory(modules, WORDS, "Model", str)
    check(figure)
    top, bottom = figure.axes
    assert [label.get_text() for label in top.get_yticklabels()] == ["exact", "converted"]
    assert [text.get_text() for text in top.texts] == ["6001", "600"]
    assert [label.get_text() for label in bottom.get_yticklabels()] == list(modules)[:2]
    assert [text.get_text() for text in bottom.texts] == ["4000 → 500", "2000 → 100"]
    assert all(patch.get_width() > 0 for axis in figure.axes for patch in axis.patches)
    assert sum(patch.get_width() for patch in top.patches) == 6601
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in top.patches}
    assert len(looks) == 3
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["all else", "matrix products", "norms"]


def test_memory_of_many_modules():
    figure = plot_memory(MANY, WORDS, "Model", str)
    check(figure)
    top, bottom = figure.axes
    labels = [label.get_text() for label in bottom.get_yticklabels()]
    assert labels[:2] == list(MANY)[:2]
    assert len(labels) < 12  # all others are too small to be visible
    assert [text.get_text() for text in top.texts] == [str(sum(sum(bars["exact"].values()) for bars in MANY.values()))]


def test_memory_of_nothing():
    figure = plot_memory({}, WORDS, "Model", str)
    FigureCanvasAgg(figure).draw()


def part(group, share, systematic=None):
    return SimpleNamespace(group=group, error=0.1, noise=share and 0.1 / share, share=share, systematic=systematic)


def test_fidelity_names_the_zones():
    figure = plot_fidelity([part("a", 0.01, 0.2), part("b", 0.3), part("all", 0.2)], "codes of 3 bits", (0.1, 0.5))
    check(figure)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["safe", "doubtful", "unsafe"]
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    assert [band[1] for band in bands[:2]] == pytest.approx([0.1, 0.5])
    assert axis.get_lines()[0].get_xdata() == pytest.approx([0.01, 0.3, 0.2])
    assert overlapping(axis.texts) == []


def test_fidelity_without_noise_has_no_zones():
    figure = plot_fidelity([part("a", None), part("all", None)], "one batch", (0.1, 0.5))
    check(figure)
    assert not figure.axes[0].texts


def test_calibration_and_allocation():
    names = ["blocks.0.act", "blocks.1.act"]
    figure = plot_calibration(names, [3, 4], {"derivative": [(0.1, 0.05)] * 2, "value": [(0.2, 0.1), (None, None)]})
    check(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["blocks.0.act, 3 bits", "blocks.1.act, 4 bits"]
    assert all(axis.get_xlim()[1] > 0.1 for axis in figure.axes)
    figure = plot_allocation(names, [2, 5], ["1000 B", "1.00 MiB"], [(0.1, 0.05)] * 2, 3, "Bits of each layer")
    check(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["2: 1000 B", "5: 1.00 MiB"]


@pytest.mark.parametrize("checks", [[(1, 1.2)], [(1, 1.2), (300, 0.9), (90_000, 40.0)], []], ids=len)
def test_drift(checks):
    figure = plot_drift({"a": checks, "b": checks}, 2.0, "none drifted")
    check(figure)
    (axis,) = figure.axes
    assert all(float(label.get_text()).is_integer() for label in tick_labels(axis.xaxis))
    assert len({line.get_linestyle() for line in axis.get_lines()[:2]}) == 2
    assert "2" in {label.get_text() for label in tick_labels(axis.yaxis)}


@pytest.mark.parametrize(
    "uniform",
    [
        {"keep": (20, 1.0), "code": (10, 1.2), "recompute": (12, 1.3), "code and recompute": (9, 1.5)},
        {"keep": (20, 1.0), "code": (20, 1.0), "recompute": (20, 1.0), "code and recompute": (20, 1.0)},
        {"keep": (20, 1.0), "code": (9, 1.3), "recompute": (9, 1.31), "code and recompute": (10, 1.29)},
    ],
    ids=["apart", "one point", "near"],
)
def test_frontier(uniform):
    figure = plot_frontier([*uniform.values()][:2], uniform, (9, 1.3), 15, "Model: memory against time")
    check(figure)
    (axis,) = figure.axes
    assert sorted(text.get_text() for text in axis.texts) == sorted(f"all blocks: {way}" for way in uniform)
    assert overlapping(axis.texts) == []
    ends = [Text.get_window_extent(text) for text in axis.texts]
    assert all(axis.bbox.x0 < end.x0 and end.x1 < figure.bbox.x1 for end in ends)


@pytest.mark.parametrize("name", ["a$_{b", "$\\frac$", "$a_{b}$", "\x1b[2J", "_", "a\\$b$c", "ä\n"])
def test_names_are_no_formulas(name, tmp_path):
    """Names of modules, operations and activations: matplotlib would set text between two $ as a formula."""
    record = from_callable(torch.tanh, name=f"{name}$")
    figures = (
        plot_memory({f"{name}${name}": {"": {name: 3}}}, {name: f"{name}$"}, f"{name} $", str),
        plot_calibration([name, name], [3, 3], {"derivative": [(0.1, 0.05)] * 2}),
        plot_allocation([name], [3], [name], [(0.1, 0.05)], 4, f"{name} $"),
        plot_fidelity([part(name, 0.1, 0.01)] * 2, f"{name} $", (0.1, 0.5)),
        plot_drift({name: [(1, 2.0)]}, 2.0, f"{name} $"),
        plot_frontier([(1, 1.0)], {name: (1, 1.0)}, (1, 1.0), 1, f"{name} $"),
        plot_tables(record, [fewbit.load_table("tanh", 2)]),
        plot_ratios({f"{name} $": {"3 bits": [(16, 1.0, 0.9, 1.1)]}}, 1, "here"),
    )
    for figure in figures:
        save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
