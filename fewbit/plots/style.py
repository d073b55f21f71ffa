"""One look for all figures."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fewbit import files
from fewbit.errors import InputError
from fewbit.text import plain

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def styled() -> AbstractContextManager[None]:
    """The style, for a figure that is drawn in this context."""
    return mpl.rc_context(_STYLE)


def literal(name: str) -> str:
    r"""A name as a picture shows it: matplotlib would set what stands between two $ as a formula.

    >>> literal("a$_{b$")
    'a\\$_{b\\$'
    """
    text = plain(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out what begins with an underscore


def save(figure: Figure, path: str | Path) -> None:
    """Write the picture whole or not at all, in the format of the path's suffix; without one it is PNG.

    OSError as from open(), InputError for a format that matplotlib does not have, or cannot write here.
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
