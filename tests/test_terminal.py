"""What is shown while something takes long: on a terminal alone."""

import io

from rich.console import Console

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
