"""How tables look in the terminal: one style, narrow enough for 80 columns where they can be."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def console(stderr: bool = False, at_least: int = 0) -> Console:
    """A console that colours nothing by itself; `at_least` so many columns wide, in a narrower window too."""
    found = Console(stderr=stderr, highlight=False)
    if found.width < at_least:
        found.width = at_least
    return found


def table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """An empty table with columns aligned left, then columns aligned right."""
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for names, side in ((left, "left"), (right, "right")):
        for name in names:
            view.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    return view


def text(view: RenderableType, width: int) -> str:
    """What a console so many columns wide would show, as plain text without trailing spaces."""
    shown = io.StringIO()
    Console(file=shown, width=width, highlight=False, markup=False, color_system=None).print(view)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())
