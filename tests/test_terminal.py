"""Progress bars: they are shown only on a terminal."""

import io
import sys

import pytest
from rich.console import Console, Group
from rich.text import Text

from fewbit import terminal

HOSTILE = "\x1b[2J\x9b31m\u202e[bold]x[/bold][/y]:warning:"
HARMLESS = "\\x1b[2J\\x9b31m\\u202e[bold]x[/bold][/y]:warning:"


def shown(monkeypatch, is_terminal):
    """The output of a progress bar with two steps."""
    screen = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    monkeypatch.setattr(terminal, "_progress_console", lambda: screen)
    with terminal.progress("measuring layers", 2) as advance:
        advance()
        advance()
    return screen.file.getvalue()


def test_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, True)
    assert "measuring layers" in text
    assert "2 of 2" in text


def test_nowhere_else(monkeypatch):
    assert not shown(monkeypatch, False).strip()


def test_within_another_it_is_one_more_line(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "_progress_console", lambda: screen)
    with terminal.progress("outer"):
        with terminal.progress("inner") as advance:
            advance()
            assert [task.description for task in terminal._displays[-1].tasks] == ["outer", "inner"]
        assert [task.description for task in terminal._displays[-1].tasks] == ["outer"]
    assert not terminal._displays


def test_no_name_commands_the_terminal_where_it_is_shown_what_takes_long(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(terminal, "_progress_console", lambda: screen)
    with terminal.progress(HOSTILE):
        pass
    assert HARMLESS in screen.file.getvalue()


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_views_are_no_wider_than_the_terminal(monkeypatch, columns):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=columns)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    table = terminal.table(("module",), ("bytes",))
    table.add_column("because")
    table.add_row("encoder.layers.0-11.feed_forward", "1.50 MiB", "it keeps what nothing else needs, and more than that " * 2)
    terminal.show(Group("a sentence of several words " * 9, Group("", table)))
    shown = screen.file.getvalue()
    assert max(map(len, shown.splitlines())) <= min(columns, 170)
    assert "encoder.layers.0-11.feed_forward" in shown
    assert "1.50 MiB" in shown


def test_python_to_paste_is_not_broken(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=20)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    code = "convert(model, recompute=['encoder.layers.0', 'encoder.layers.1'])"
    terminal.show(Group("so", Text(code)))
    assert screen.file.getvalue() == f"so\n{code}\n"


def test_who_kept_stderr_as_it_was_writes_above_what_is_shown_later(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(terminal, "console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=80))
    terminal._progress_console.cache_clear()
    try:
        with terminal.progress("making"):
            kept = sys.stderr
        with terminal.progress("running"):
            kept.write("a warning\n")
        last = file.getvalue().rpartition("a warning")[0].splitlines()[-1]
        assert "running" not in last  # its line was cleared before
    finally:
        terminal._progress_console.cache_clear()


def test_what_is_wrapped_is_indented_as_its_line_is(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=20)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    terminal.show(Group("peak: 3 MiB\n  1 MiB of inputs, 2 MiB kept\n\nnext: train"))
    lines = ["peak: 3 MiB", "  1 MiB of inputs,", "  2 MiB kept", "", "next: train"]
    assert [line.rstrip() for line in screen.file.getvalue().splitlines()] == lines


def test_where_there_is_no_terminal_lines_have_120_columns(monkeypatch):
    screen = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    terminal.show("word " * 100)
    assert 110 < max(map(len, screen.file.getvalue().splitlines())) <= 120


def views():
    table = terminal.table(("name",), ("bits",))
    table.add_row(HOSTILE, "3")
    return HOSTILE, table, Group(HOSTILE, table)


@pytest.mark.parametrize("number", range(3))
def test_no_name_commands_the_terminal(number, capsys):
    view = views()[number]
    terminal.console(at_least=100).print(view)
    for shown in (capsys.readouterr().out, terminal.text(view, 100)):
        assert HARMLESS in shown
        assert shown.replace("\n", "").isprintable()
