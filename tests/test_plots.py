"""Pictures: what they show is checked here by their parts; how they look, by looking."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

import fewbit
from fewbit import activations, plots


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
