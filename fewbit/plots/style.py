"""One look for all figures."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl

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
