"""Makes names and values from outside safe to show in messages, pages and file names."""

from __future__ import annotations

import re
import reprlib
from typing import Any


def plain(text: str) -> str:
    r"""The text with escapes in place of characters that a terminal would obey or not show. Line breaks stay.

    >>> plain("a\x1b[31mb\n\u202ec")
    'a\\x1b[31mb\n\\u202ec'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text)


def cut(text: str, most: int) -> str:
    """The text, without its middle if it is longer than `most` characters.

    >>> cut("a" * 20, 9)
    'aaa … aaa'
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def shown(value: Any) -> str:
    """A value as messages show it: its repr, which is cut if it is long.

    >>> shown([1] * 1000), shown(10**400)
    ('[1, 1, 1, 1, 1, 1, ...]', '100000000000000000000000000...0000000000000000000000000000')
    """
    try:
        return _SHORT.repr(value)
    except Exception:  # a user's repr may raise anything, and Python's raises for integers of many thousand digits
        return f"<{type(value).__name__}>"


def file_name(text: str) -> str:
    """A text in a form that can be part of a file name on any system.

    >>> file_name("../../outside"), file_name("elu")
    ('outside', 'elu')
    """
    return re.sub(r"[^\w-]+", "_", text, flags=re.ASCII).strip("_")[:64] or "unnamed"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 60
