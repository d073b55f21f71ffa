"""How texts and tables fit a terminal."""

import pytest
from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from fewbit import layout, terminal

NAME = "base_model.model.visual_backbone.transformer_encoder_layers.0-11.feed_forward_network.1"


def shown(view, width):
    return [line.plain for line in layout.lines(view, width)]


def table(name=NAME, because="it keeps 1.50 MiB that nothing else needs, and more than that"):
    view = terminal.table(("module", "tensor"), ("bytes", "share of\nall"))
    view.add_column("because")
    view.add_row(name, "float32 4×64", "1.50 MiB", "12.5 %", because)
    view.add_row("head", "float32 4×1", "16 B", "", "")
    return view


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120, 200])
def test_no_line_is_longer_than_the_terminal_and_nothing_is_cut(width):
    lines = shown(Group("a sentence of several words " * 9 + NAME, Group("", table())), width)
    assert max(map(cell_len, lines)) <= width
    together = "".join("".join(lines).split())
    for part in (NAME, NAME, "float324×64", "1.50MiB", "shareof", "12.5%"):
        assert part in together
        together = together.replace(part, "", 1)
    assert "…" not in together


def test_a_table_that_has_room_keeps_its_columns():
    assert shown(table("head.0", "it is"), 80) == [
        "                                share of",
        "module  tensor           bytes       all  because",
        "─────────────────────────────────────────────────",
        "head.0  float32 4×64  1.50 MiB    12.5 %  it is",
        "head    float32 4×1       16 B",
    ]


def test_names_get_lines_of_their_own_where_the_others_have_no_room_beside_them():
    assert shown(table(), 64) == [
        "module",
        "                          share of",
        "  tensor           bytes       all  because",
        "────────────────────────────────────────────────────────────────",
        "base_model.model.visual_backbone.transformer_encoder_layers.",
        "    0-11.feed_forward_network.1",
        "  float32 4×64  1.50 MiB    12.5 %  it keeps 1.50 MiB that",
        "                                    nothing else needs, and more",
        "                                    than that",
        "head",
        "  float32 4×1       16 B",
    ]


def test_sentences_stand_below_where_they_have_no_room_beside_the_figures():
    assert shown(table("head.0"), 40)[4:] == [
        "head.0",
        "  float32 4×64  1.50 MiB    12.5 %",
        "  because it keeps 1.50 MiB that nothing",
        "    else needs, and more than that",
        "head",
        "  float32 4×1       16 B",
    ]


def test_rows_are_paragraphs_where_the_figures_have_no_room_beside_each_other():
    view = terminal.table(("run",), ("forward\nµs", "kept", "of exact"))
    view.add_row("exact", "12.5", "4.00 KiB", "")
    view.add_row("3 bits", "25.0", "385 B", "0.09")
    assert shown(view, 22) == [
        "exact",
        "  forward µs 12.5,",
        "    kept 4.00 KiB",
        "3 bits",
        "  forward µs 25.0,",
        "    kept 385 B,",
        "    of exact 0.09",
    ]


def test_rules_between_rows_stay():
    view = terminal.table(("run",), ("µs",))
    view.add_row("exact", "12.5", end_section=True)
    view.add_row("all", "12.5")
    assert shown(view, 20) == ["run      µs", "───────────", "exact  12.5", "───────────", "all    12.5"]


def test_headings_are_bold_and_nothing_else_is_styled():
    assert [str(line.style) for line in layout.lines(table(), 64)] == ["bold"] * 3 + [""] * 8


def test_a_sentence_is_no_wider_than_can_be_read():
    assert 100 < max(map(len, shown("word " * 100, 200))) <= layout.WIDTH


@pytest.mark.parametrize("unit", ["%", "MiB", "B", "×", "ms", "bits"])
def test_a_number_keeps_its_unit(unit):
    for width in range(12, 30):
        assert f"12 {unit}" in "\n".join(layout.broken(f"some words before 12 {unit}, some words after", width))


def test_what_is_explained_stands_apart_from_what_explains_it():
    assert layout.broken("over exact  both over exact's both", 24) == ["over exact  both over", "            exact's both"]


def test_what_is_already_as_it_is_to_be_stays():
    assert shown(Text("convert(model, bits=4)"), 10) == ["convert(model, bits=4)"]


def test_names_of_any_length_are_cut():
    view = terminal.table(("name",), ("number",))
    view.add_row("a" * 10**6, "1")
    assert len(terminal.text(view, 80)) < 600
