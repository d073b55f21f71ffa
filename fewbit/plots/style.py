"""The style of all figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fewbit import files
from fewbit.errors import InputError
from fewbit.text import plain

DARK, LIGHT = "#8c1515", "0.72"  # coded and exact; they also differ in grey print
SHADES = ("0.1", "#c1432e", "#6ba3d6", "#3d6b2f", "0.6")  # of neighbouring lines, which also differ by LINES and MARKERS
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^v"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}


def styled() -> AbstractContextManager[None]:
    """A context that gives the style to figures drawn in it."""
    return mpl.rc_context(_STYLE)


def literal(name: str) -> str:
    r"""A name as text for a picture. Without this, matplotlib would set text between two $ as a formula.

    >>> literal("a$_{b$")
    'a\\$_{b\\$'
    """
    text = plain(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out what begins with an underscore


def apart(places: Sequence[float], least: float) -> list[float]:
    """Descending places for labels, close to where they belong, and each at least `least` from the next.

    >>> apart([3.0, 2.0, 1.9], 0.5)
    [3.0, 2.2, 1.7]
    """
    groups = [([place], place) for place in places]  # labels that touch, and the middle of where they belong
    done: list[tuple[list[float], float]] = []
    for members, middle in groups:
        done.append((members, middle))
        while len(done) > 1 and done[-2][1] - done[-1][1] < least * (len(done[-2][0]) + len(done[-1][0])) / 2 - 1e-12:
            joined = done[-2][0] + done[-1][0]
            done[-2:] = [(joined, sum(joined) / len(joined))]
    return [middle + least * ((len(members) - 1) / 2 - i) for members, middle in done for i in range(len(members))]


def save(figure: Figure, path: str | Path) -> None:
    """Write the picture completely or not at all, in the format of the path's suffix. Without a suffix it is PNG.

    OSError as from open(); InputError if matplotlib does not have the format, or cannot write it here.
    """
    path, picture = Path(path), io.BytesIO()
    if not path.suffix and not files.is_special(path):
        path = path.with_name(f"{path.name}.png")
    form = path.suffix[1:].lower() or "png"
    try:
        figure.savefig(picture, format=form, dpi=150)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"no picture can be written as {form}: {error}") from error
    files.write(path, picture.getvalue())
