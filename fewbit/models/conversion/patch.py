"""`patch`: a context in which calls of torch's functions, in any code, keep codes for backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ContextDecorator
from functools import wraps
from typing import Any, TypeVar

from fewbit import activations
from fewbit.autograd.exact import check_decorated
from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.errors import ActivationError, InputError
from fewbit.models.conversion import interception
from fewbit.models.conversion.interception import Interception
from fewbit.models.conversion.setting import Bits, Setting

Function = TypeVar("Function", bound=Callable[..., Any])


class patch(ContextDecorator):
    """Let calls of torch's functions in a block, or in a decorated function, keep codes for backward.

        with fewbit.patch(bits=4):
            loss = model(x).sum()  # F.gelu, torch.tanh, x.sigmoid(), torch.relu_ and similar calls, in any code that runs here

    bits         Bits of one code, 1 to 8, for every kind or by kind, as in `fewbit.convert`. Calls of activations, linear
                 layers, convolutions, norms, GLU, attention and recurrent layers are coded (torch.nn.functional.linear,
                 torch.lstm, …), also if torch's modules make them. In eager code, what torch's other operations keep is coded
                 too, such as the factors of products. Dropout, pooling and padding are coded with any bits, since their codes
                 lose nothing, unless `activations` is given.
    coding       Coding of the tables, as in `fewbit.design`. None is the optimal one.
    activations  Names of the activations to code, as `fewbit list` shows them. None codes all. If names are given, a single
                 number of bits is for the kind "activation" only.

    The forward pass stays exact, bit for bit. Torch's own operation runs if nothing can be coded: inputs that need no
    gradient, other dtypes, sparse and nested tensors, subclasses of Tensor, calls with out=, calls with tensors as parameters,
    parameters that no table exists for, layers under `torch.func` transforms, and forward-mode differentiation. The same holds
    for what torch computes outside of Python (`torch.jit` scripts). In compiled code it also holds for torch.relu_,
    functional.elu_ and similar calls, since the compiler hides them from the patch. It does not hide x.relu_() and
    inplace=True.

    Backward may come after the block. But what is recomputed for backward is coded only inside the block. With checkpointing
    (use_reentrant=False), run backward in the block too, or decorate the function that is checkpointed. Otherwise torch raises
    its CheckpointError. A block holds for its own thread. Patches nest, and only the innermost one is in force, so
    `patch(activations=())` codes nothing. One patch can be entered any number of times.

    Raises DesignError (bits, coding), ActivationError (a name) or InputError (something that it cannot decorate).

    >>> import torch
    >>> x = torch.randn(8, requires_grad=True)
    >>> with patch(bits=3):
    ...     y = torch.nn.functional.gelu(x)
    >>> type(y.grad_fn).__name__
    '_CodedActivationBackward'
    """

    def __init__(
        self,
        bits: Bits = DEFAULT_MODEL_BITS,
        *,
        coding: str | None = None,
        activations: Collection[str] | None = None,
    ):
        alone = activations is not None and not isinstance(bits, Mapping)
        setting = Setting.of({"activation": bits} if alone else bits, coding)
        self.interception = Interception(setting, None if activations is None else _checked_names(activations))

    def __enter__(self) -> patch:
        interception.enter(self.interception, anywhere=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        mode = interception.innermost()
        if mode is None or mode.settings is not self.interception:
            raise InputError("leave patches in reverse order, on the thread that entered them; use `with fewbit.patch():`")
        interception.leave(mode)

    def __call__(self, function: Function) -> Function:
        check_decorated("patch", function)

        @wraps(function)
        def coded(*args: Any, **kwargs: Any) -> Any:
            self.__enter__()  # dynamo traces this, but cannot trace a `with` of an object that was made outside
            try:
                return function(*args, **kwargs)
            finally:
                self.__exit__()

        return coded  # type: ignore[return-value]


def _checked_names(names: Collection[str]) -> frozenset[str]:
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise ActivationError(f"activations must be names such as ('gelu', 'silu'), or None for all; got {names!r}")
    return frozenset(activations.get(name).name for name in names)
