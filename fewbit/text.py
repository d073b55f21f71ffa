"""Names and values that come from outside, as messages, pages and file names may show them."""

from __future__ import annotations

import re
import reprlib
from typing import Any


def plain(text: str) -> str:
    r"""The text with all that a terminal would obey, or not show, written as its escape; line breaks stay.

    >>> plain("a\x1b[31mb\n\u202ec")
    'a\\x1b[31mb\n\\u202ec'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text)


def cut(text: str, most: int) -> str:
    """The text without its middle where it is longer than that.

    >>> cut("a" * 20, 9)
    'aaa … aaa'
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def shown(value: Any) -> str:
    """What messages show of a value: its repr, cut where it is long.

    >>> shown([1] * 1000), shown(10**400)
    ('[1, 1, 1, 1, 1, 1, ...]', '100000000000000000000000000...0000000000000000000000000000')
    """
    try:
        return _SHORT.repr(value)
    except Exception:  # whatever the repr of a user's class does; and Python shows no integer of many thousand digits
        return f"<{type(value).__name__}>"


def file_name(text: str) -> str:
    """A text as a part of a file's name, on any system.

    >>> file_name("../../outside"), file_name("elu")
    ('outside', 'elu')
    """
    return re.sub(r"[^\w-]+", "_", text, flags=re.ASCII).strip("_")[:64] or "unnamed"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 60
