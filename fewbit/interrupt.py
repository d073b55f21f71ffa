"""Remembers interrupts of the command, because interrupted code may lose them or turn them into other exceptions."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STATUS = 130  # exit status after an interrupt, as in shells
_came = False


def came() -> bool:
    """Whether an interrupt came since `remembered` began."""
    return _came


@contextmanager
def remembered() -> Iterator[None]:
    """A context around all work of a process. In it interrupts raise KeyboardInterrupt and are remembered. After it they end
    the process at once."""
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
    """Repeat an interrupt that came in a callback from which nothing can be raised, such as that of a weak reference."""
    if lost.exc_type is KeyboardInterrupt:
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(lost)
