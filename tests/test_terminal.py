"""What is shown while something takes long: on a terminal alone."""

import io

import pytest
from rich.console import Console, Group

from fewbit import terminal


def shown(monkeypatch, is_terminal):
    """What a progress of two steps writes."""
    screen = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    monkeypatch.setattr(terminal, "console", lambda stderr: screen)
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


HOSTILE = "\x1b[2J\x9b31m\u202e[bold]x[/bold][/y]:warning:"
HARMLESS = "\\x1b[2J\\x9b31m\\u202e[bold]x[/bold][/y]:warning:"


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
