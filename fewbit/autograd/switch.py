"""`exact`: the switch that turns all codes off for a while."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch

from fewbit.errors import InputError

_here = contextvars.ContextVar("fewbit.exact", default=0)  # how many of these contexts this thread or task is inside
_lock = threading.Lock()
_open = 0  # how many are open, in all threads
_anywhere = False  # whether one is; all that plain calls look at, and what compiled code guards
_traced = 0  # how many are open inside compiled code, which writes it without a lock

Function = TypeVar("Function", bound=Callable[..., Any])


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

    def __exit__(self, *error: Any) -> None:
        _count(-1)

    def __call__(self, function: Function) -> Function:
        check_decorated("exact", function)
        return super().__call__(function)


def check_decorated(name: str, function: Any) -> None:
    """Raise InputError for what goes on after the call of it has returned: the context would be left before."""
    if isinstance(function, type) or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise InputError(
            f"{name} decorates functions that return when they are done, got {function!r}; decorate a method of the "
            f"class, or use `with fewbit.{name}():` inside"
        )


def is_exact() -> bool:
    """Whether codes are off for the code that runs now."""
    here = _anywhere and (torch.compiler.is_compiling() or _here.get() > 0 or _is_exact_where_backward_began())
    return here or _traced > 0


def _count(step: int) -> None:
    global _open, _anywhere, _traced
    if torch.compiler.is_compiling():
        _traced += step
        return
    _here.set(_here.get() + step)
    with _lock:
        _open += step
        _anywhere = _open > 0


def _is_exact_where_backward_began() -> bool:
    """In a thread of the autograd engine, where checkpointing runs forward again: torch leaves it the context of the thread
    that called backward."""
    tls: Any = torch._C
    context = tls._get_obj_in_tls("context") if tls._is_key_in_tls("context") else None
    return context is not None and context.get(_here, 0) > 0
