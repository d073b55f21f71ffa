"""`exact`: for a while, no codes at all."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch

from fewbit.errors import InputError

# Codes are off while either holds; each call looks at both, and compiled code guards them
active = False  # whether one of these contexts is open
compiled_depth = (
    0  # how many are open inside compiled code, which writes it back without a lock: apart, so that none of _depth is lost
)
_depth = 0  # how many are open in all other code
_lock = threading.Lock()

Function = TypeVar("Function", bound=Callable[..., Any])


class exact(ContextDecorator):
    """Inside it, all of fewbit is torch's own: activations, layers, modules and converted models make no codes.

    Use it as a context manager or as a decorator, to compare and to debug. If a problem remains inside, codes do not cause it.
    Second derivatives and forward-mode derivatives work inside too. The forward pass has to run inside. Checkpointing runs
    forward again in backward, so run backward inside too then.

    It holds for the whole process, with all threads and tasks, as long as any of them is inside. Compiled code compiles once
    more for it.

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
    """Raise InputError for classes, coroutines and generators: they run on after the call returns, when the context is left."""
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
