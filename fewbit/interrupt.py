"""Interrupts of the command: remembered, since what is interrupted may make another exception of them, or lose them."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STATUS = 130  # the exit status after one, as shells have it
_came = False


def came() -> bool:
    """Whether an interrupt came since `remembered` began."""
    return _came


@contextmanager
def remembered() -> Iterator[None]:
    """Around all that a process does: interrupts raise KeyboardInterrupt and are remembered; after this context they kill."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)
        sys.unraisablehook = _pass_on
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _remember:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _remember(number: int, frame: Any) -> None:
    global _came
    _came = True
    signal.default_int_handler(number, frame)


def _pass_on(lost: Any) -> None:
    """An interrupt in a callback, such as that of a weak reference, from which nothing can be raised, comes once more."""
    if lost.exc_type is KeyboardInterrupt:
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(lost)
