"""`exact`: the switch that turns all codes off for a while."""

from __future__ import annotations

import contextvars
import threading
from contextlib import ContextDecorator
from typing import Any

import torch

_here = contextvars.ContextVar("fewbit.exact", default=False)
_lock = threading.Lock()
_open = 0  # how many of these contexts are open, in all threads
_anywhere = False  # whether one is; all that plain calls look at, and what compiled code guards


class exact(ContextDecorator):
    """Within it all of fewbit is torch's own: activations, layers, modules and converted models make no codes.

    For comparing and debugging: what goes wrong in here too is not the codes' doing. Gradients can then be taken twice, and
    forward-mode derivatives too. What counts is where the forward pass runs; with checkpointing, which runs it again, take the
    backward pass inside too. A context manager, and a decorator for functions.

    It holds for the thread (or asyncio task) that enters it, and for the backward passes that this one starts. Compiled code
    is compiled once more for it, and runs exactly while any thread is inside: gradients are right, and more is kept.

    >>> import fewbit
    >>> x = torch.linspace(-2, 2, 5, requires_grad=True)
    >>> with fewbit.exact():
    ...     y = fewbit.functional.gelu(x, bits=1)
    >>> y.grad_fn.name()
    'GeluBackward0'
    """

    def __enter__(self) -> None:
        _count(1)
        if not torch.compiler.is_compiling():
            self._before = (_here.set(True), getattr(self, "_before", None))

    def __exit__(self, *error: Any) -> None:
        _count(-1)
        if not torch.compiler.is_compiling():
            token, self._before = self._before  # type: ignore[misc]  what was entered is left
            _here.reset(token)

    def _recreate_cm(self) -> exact:
        """For each call of a function that it decorates one of its own, since threads may call it at once."""
        return exact()


def is_exact() -> bool:
    """Whether codes are off for the code that runs now."""
    return _anywhere and (torch.compiler.is_compiling() or _here.get() or _is_exact_where_backward_began())


def _count(step: int) -> None:
    global _open, _anywhere
    if torch.compiler.is_compiling():  # a compiler follows no lock
        _open += step
        _anywhere = _open > 0
        return
    with _lock:
        _open += step
        _anywhere = _open > 0


def _is_exact_where_backward_began() -> bool:
    """In a thread of the autograd engine, where checkpointing runs forward again: torch leaves it the context of the thread
    that called backward."""
    tls: Any = torch._C
    context = tls._get_obj_in_tls("context") if tls._is_key_in_tls("context") else None
    return context is not None and context.get(_here, False)
