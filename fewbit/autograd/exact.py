"""`exact` is a context in which fewbit makes no codes."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch

from fewbit.errors import InputError

# Codes are off if `active` is true or `compiled_depth` is above 0. Each call checks both, and compiled code guards them.
active = False  # whether one of these contexts is open in code that is not compiled
# How many contexts are open inside compiled code. It is separate from _depth because compiled code writes it without a lock.
compiled_depth = 0
_depth = 0  # how many are open in all other code
_lock = threading.Lock()

Function = TypeVar("Function", bound=Callable[..., Any])


class exact(ContextDecorator):
    """Turn codes off: inside, fewbit's functions, modules and converted models run torch's own operations.

    Use it as a context manager or as a decorator, to compare and to debug. If a problem remains inside, codes do not cause it.
    Second derivatives and forward-mode derivatives work inside too. The forward pass has to run inside. With checkpointing,
    run backward inside too, because it runs forward again.

    It applies to the whole process, with all threads and tasks, as long as any of them is inside. Compiled code is compiled
    once more for it.

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
    """Raise InputError for classes, coroutines and generators. Their code runs on after the call, when the context has
    ended."""
    if (
        not callable(function)
        or isinstance(function, type)
        or inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
    ):
        raise InputError(
            f"{name} decorates functions that return when they are done, got {function!r}; decorate a method of the "
            f"class, or use `with fewbit.{name}():` inside"
        )


def is_active() -> bool:
    """Whether codes are off."""
    return active or compiled_depth > 0


def _count(step: int) -> None:
    global active, compiled_depth, _depth
    if torch.compiler.is_compiling():
        compiled_depth = max(compiled_depth + step, 0)
        return
    with _lock:
        _depth += step
        active = _depth > 0
