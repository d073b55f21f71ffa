"""Shows tables, texts and progress in the terminal, in one style and as wide as it is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fewbit.errors import InputError
from fewbit.layout import WIDTH, lines
from fewbit.text import plain, shown

_displays: list[Progress] = []
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])?(i)?B?", re.IGNORECASE)


class _Console(Console):
    """A console that prints texts literally: nothing in a name can colour, move or clear anything."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


def console(stderr: bool = False, at_least: int = 0) -> Console:
    """A console that colours nothing by itself. It has `at_least` this many columns, even in a narrower window."""
    found = _Console(stderr=stderr)
    if found.width < at_least:
        found.width = at_least
    return found


def show(*views: RenderableType, on: Console | None = None) -> None:
    """Print each view on stdout, or on another console, no wider than the terminal. Without a terminal, in WIDTH columns."""
    screen = console() if on is None else on
    width = screen.width if screen.is_terminal else max(screen.width, WIDTH)
    for view in views:
        for line in lines(view, width):
            screen.print(line, soft_wrap=True)


def say_written(path: Any) -> None:
    """Say that this file was written."""
    console().print(f"wrote {path}", soft_wrap=True)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """While this context lasts, show progress on stderr, if that is a terminal. Gives a function to call after each step.

    A context within another one adds a line to its display.
    """
    with _display() as shown:
        task, done = shown.add_task(plain(description), total=total, steps=""), 0

        def advance() -> None:
            nonlocal done
            done += 1
            shown.update(task, advance=1, steps=f"{done} of {total}" if total else f"{done}")

        try:
            yield advance
        finally:
            if len(shown.tasks) > 1:  # the last task stays until the whole display is removed
                shown.remove_task(task)


@cache
def _progress_console() -> Console:
    """One console for all displays. A handler of logging may keep the sys.stderr of an earlier display: it then writes above
    a later one, not into it."""
    return console(stderr=True)


@contextmanager
def _display() -> Iterator[Progress]:
    """The current display, or a new one. Two displays would overwrite each other."""
    if _displays:
        yield _displays[-1]
        return
    screen = _progress_console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as shown:
        _displays.append(shown)
        try:
            yield shown
        finally:
            _displays.remove(shown)


def table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """An empty table with columns aligned left, then columns aligned right. Their cells stay on one line.

    Columns that are added with `add_column` hold sentences, which may be wrapped.
    """
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for names, side in ((left, "left"), (right, "right")):
        for name in names:
            view.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    return view


def text(view: RenderableType, width: int) -> str:
    """What a console of this width would show, as plain text without trailing spaces."""
    shown = io.StringIO()
    screen = _Console(file=shown, width=width, color_system=None, force_jupyter=False)  # in a notebook, too
    for line in lines(view, width):
        screen.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())


def bytes_label(number: int) -> str:
    """A number of bytes with its unit.

    >>> bytes_label(384), bytes_label(1536), bytes_label(16 * 2**20), bytes_label(2**20 - 1)
    ('384 B', '1.50 KiB', '16.0 MiB', '1024 KiB')
    """
    if number < 1024:
        return f"{number} B"
    scaled, units = number / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while scaled >= 1024 and len(units) > 1:
        scaled /= 1024
        units.pop(0)
    return f"{three_figures(scaled)} {units[0]}"


def parse_bytes(given: int | str) -> int:
    """The number of bytes in an integer or a text such as "24 GiB", "8GB" or "512 MiB". InputError for anything else.

    >>> parse_bytes("1.5 KiB"), parse_bytes("2GB"), parse_bytes(100)
    (1536, 2000000000, 100)
    """
    found = _BYTES.fullmatch(given.strip()) if isinstance(given, str) else None
    if isinstance(given, bool) or not (found or isinstance(given, int)) or (isinstance(given, int) and given < 1):
        raise InputError(f"a number of bytes is an integer, or a text such as '24 GiB' or '512 MB'; got {shown(given)}")
    if found is None:
        return int(given)
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))


def three_figures(number: float) -> str:
    """A number with three significant figures, or more before the point, and at most two decimals.

    >>> three_figures(1.0), three_figures(12.345), three_figures(123.45)
    ('1.00', '12.3', '123')
    """
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def percent(share: float) -> str:
    """A share in percent, with more decimals where it is small.

    >>> percent(0.241), percent(0.0504), percent(0.0004), percent(3.2), percent(0.0)
    ('24 %', '5.0 %', '0.04 %', '320 %', '0.0 %')
    """
    return f"{100 * share:.{2 if 0 < share < 0.01 else 1 if share < 0.2 else 0}f} %"
