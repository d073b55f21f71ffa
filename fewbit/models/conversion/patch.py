"""Functional calls inside any code, made to keep codes: a context in which torch's functions are fewbit's.

A mode of torch (`torch.overrides.TorchFunctionMode`) sees every call of torch's functions and methods on its thread, wherever
it is written, before torch does; torch.compile traces through it. What the mode does not code goes on to torch as it came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ContextDecorator
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewbit import activations
from fewbit.autograd.exact import check_decorated
from fewbit.constants import DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError, DesignError, InputError
from fewbit.functional import layers
from fewbit.functional.activations import activation_operation
from fewbit.functional.operation import Operation, fixed, is_codable, run
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.store import load_table
from fewbit.torch_internals import function_modes, in_forward_mode, levels, native_functions

Tensor = torch.Tensor
Function = TypeVar("Function", bound=Callable[..., Any])


class patch(ContextDecorator):
    """Let the calls of torch's functions in a block, or in a decorated function, keep codes for backward.

    with fewbit.patch(bits=4):
        loss = model(x).sum()  # F.gelu, torch.tanh, x.sigmoid(), torch.relu_ and their like, in any code that runs here

    bits         of one code, 1 to 8, for every kind or by kind, as in `fewbit.convert`: of activations, and of linear layers,
                 convolutions, norms and GLU that are called as torch.nn.functional.linear and so on, as torch's modules do
    coding       of the tables, as in `fewbit.design`; None for the optimal one
    activations  names of the activations to code, as `fewbit list` shows them; None for all. With names, one number of bits is
                 for the kind "activation" alone.

    The forward pass stays as it is, bit for bit. What cannot be coded is torch's own: inputs that need no gradient, of other
    dtypes, sparse, nested or of a subclass of Tensor; calls with out=, with tensors for parameters, or with parameters for
    which there is no table; layers under `torch.func` transforms; forward-mode differentiation. So are activations that are no
    function of torch (GELU written out), all that torch computes in one operation or out of Python's sight (LSTMs, `torch.jit`
    scripts, attention's projections), and, in compiled code, calls of torch.relu_, functional.elu_ and their like (but not
    x.relu_() and inplace=True), of which the compiler tells no mode.

    Backward may come after the block, but what is recomputed for it is coded only inside: with checkpointing (use_reentrant
    =False) run backward in the block too, or decorate what is checkpointed; else torch raises its CheckpointError. The block
    holds for its own thread. Patches nest, and the innermost one alone is in force: `patch(activations=())` codes nothing.
    One patch can be entered any number of times.

    Raises DesignError (bits, coding), ActivationError (a name) or InputError (what it cannot decorate).

    >>> x = torch.randn(8, requires_grad=True)
    >>> with patch(bits=3):
    ...     y = torch.nn.functional.gelu(x)
    >>> type(y.grad_fn).__name__
    '_CodedActivationBackward'
    """

    def __init__(
        self,
        bits: Bits = DEFAULT_LAYER_BITS,
        *,
        coding: str | None = None,
        activations: Collection[str] | None = None,
    ):
        alone = activations is not None and not isinstance(bits, Mapping)
        self.setting = Setting.of({"activation": bits} if alone else bits, coding)
        self.tables = _layer_tables(self.setting)
        self.activations = None if activations is None else _checked_names(activations)

    def __enter__(self) -> patch:
        outer = _innermost()
        if outer is not None:
            outer.active = False
        _Mode(self, outer).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        mode = _innermost()
        if mode is None or mode.settings is not self:
            raise InputError("patches are left in reverse order, on the thread that entered them; use `with fewbit.patch():`")
        mode.__exit__(None, None, None)
        if mode.outer is not None:
            mode.outer.active = True

    def __call__(self, function: Function) -> Function:
        check_decorated("patch", function)

        @wraps(function)
        def coded(*args: Any, **kwargs: Any) -> Any:
            self.__enter__()  # dynamo traces this, but no `with` of an object that was made outside
            try:
                return function(*args, **kwargs)
            finally:
                self.__exit__()

        return coded  # type: ignore[return-value]


class _Target(NamedTuple):
    """What one of torch's functions is to fewbit: an activation in the registry or a layer of `fewbit.functional`, by its name,
    and whether it overwrites its input, as torch.relu_ does."""

    name: str
    layer: bool = False
    inplace: bool = False


def _targets() -> dict[Callable[..., Any], _Target]:
    """All of torch's functions and methods that compute a built-in activation or a layer, found by their names."""
    found: dict[Any, _Target] = {torch.special.expit: _Target("sigmoid")}  # the one of another name
    homes: tuple[Any, ...] = torch, functional, torch.Tensor, native_functions(), torch.special
    named = [each.torch_name for each in activations.BUILT_IN.values() if isinstance(each.torch_function, str)]
    for name in (each.rpartition(".")[2] for each in named):
        found.update({getattr(home, name): _Target(name) for home in homes if hasattr(home, name)})
        found.update({getattr(home, name + "_"): _Target(name, inplace=True) for home in homes if hasattr(home, name + "_")})
    names = [each for each in layers.FUNCTIONS if hasattr(functional, each)]
    return {**found, **{getattr(functional, each): _Target(each, layer=True) for each in names}}


_TARGETS: Mapping[Callable[..., Any], _Target] = _targets()
_BACKWARDS = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_redispatch: Callable[..., Any] = torch.overrides.redispatch_function  # calls what it is given without asking modes


class _Mode(TorchFunctionMode):
    """One entry into a patch, on the stack of its thread.

    active  whether no other patch was entered since
    outer   the patch around it
    """

    def __init__(self, settings: patch, outer: _Mode | None):
        self.settings, self.outer, self.active = settings, outer, True

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = _TARGETS.get(func) if self.active else None
        if target is not None:
            x, rest, named = _arguments(args, kwargs)
            coded = (_coded_layer if target.layer else _coded_activation)(self.settings, target, x, rest, named)
            return func(*args, **kwargs) if coded is None else coded
        if func in _BACKWARDS and not torch.compiler.is_compiling():
            with self:  # again: backward runs code of any kind, as it recomputes what was checkpointed
                return _redispatch(func, types, args, kwargs)
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
            return args[0].unflatten(*args[1:], **kwargs)  # dynamo cannot trace the function itself, for its super()
        return func(*args, **kwargs)


def _innermost() -> _Mode | None:
    """The patch in force on this thread."""
    return next((mode for mode in function_modes() if isinstance(mode, _Mode)), None)


def _arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
    """The input, and all other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs.get("input"), (), {name: value for name, value in kwargs.items() if name != "input"}


def _coded_activation(settings: patch, target: _Target, x: Any, rest: tuple, named: dict[str, Any]) -> Tensor | None:
    """The activation of x, or None where torch's own function is to give it."""
    setting, compiling = settings.setting, torch.compiler.is_compiling()
    if setting.bits_of("activation") is None or not is_codable(x) or not (compiling or _wants_codes(x)):
        return None
    if not all(isinstance(each, (int, float, str)) for each in (*rest, *named.values())):
        return None
    call = target.name, target.inplace, rest, tuple(named.items()), setting.by_kind, setting.coding, settings.activations
    call = fixed(call) if compiling else call
    if not (_while_tracing(_can_code, *call) if compiling else _known_to_code(*call)):
        return None
    return run(_activation, call, (x,), by_name=False)


def _activation(
    name: str,
    inplace: bool,
    rest: tuple,
    named: tuple[tuple[str, Any], ...],
    by_kind: tuple[tuple[str, int], ...],
    coding: str | None,
    chosen: frozenset[str] | None,
) -> Operation:
    """What a call with these arguments asks for under these settings.

    Raises TypeError, ActivationError or DesignError if it cannot be coded, or is not to be.
    """
    record, setting = activations.BUILT_IN[name], Setting(by_kind, coding)
    keywords = {**dict(named), "inplace": True} if inplace else dict(named)
    found = activation_operation(record, setting.shares, rest, tuple(keywords.items()))
    if chosen is not None and found.name not in chosen:
        raise ActivationError(f"{found.name} is not among the activations to code")
    if coding is not None:
        return replace(found, table=setting.activation_table(found.record))
    bits = setting.bits_of("activation")
    assert bits is not None, "asked for kinds that are coded"
    load_table(found.record, bits, channels=found.channels)  # which raises where there is none
    return replace(found, bits=bits)


def _can_code(*call: Any) -> bool:
    """Whether there is such an operation, with a table."""
    try:
        _activation(*call)
    except (TypeError, ActivationError, DesignError):
        return False
    return True


_known_to_code = lru_cache(maxsize=1024)(_can_code)


def _coded_layer(settings: patch, target: _Target, x: Any, rest: tuple, named: dict[str, Any]) -> Tensor | None:
    """The layer, or None where torch's own function is to give it."""
    function = layers.FUNCTIONS[target.name]
    bits, table = settings.setting.bits_of(function.kind), settings.tables.get(function.kind)
    operands = [x, *(each for each in (*rest, *named.values()) if isinstance(each, Tensor))]
    if bits is None or not all(map(is_codable, operands)):
        return None
    weight = rest[0] if rest else named.get("weight")
    if target.name == "linear" and isinstance(weight, Tensor) and weight.dim() != 2:  # torch takes a vector, too
        return None
    compiling, call = torch.compiler.is_compiling(), (target.name, len(rest), tuple(named))
    if not (_while_tracing(_takes, *call) if compiling else _known_to_take(*call)):
        return None
    code = layers.Code(bits if table is None else None, table, by_name=False)
    return function.with_code(code, x, *rest, **named)


def _takes(name: str, positional: int, named: tuple[str, ...]) -> bool:
    """Whether fewbit's layer has all the arguments that are given to torch's."""
    try:
        inspect.signature(layers.FUNCTIONS[name]).bind(None, *(None for _ in range(positional)), **dict.fromkeys(named))
    except TypeError:
        return False
    return True


_known_to_take = lru_cache(maxsize=256)(_takes)


def _layer_tables(setting: Setting) -> dict[str, CodeTable]:
    """By kind the tables of layers and gated units, where a coding is named; else they are the shipped ones."""
    if setting.coding is None:
        return {}
    if torch.compiler.is_compiling():
        raise InputError("in compiled code patch takes no coding; make such a patch outside, and enter it inside")
    gates = {"linear": None, "norm": None, "product": layers.glu.gate}
    return {kind: setting.layer_table(kind, gate) for kind, gate in gates.items() if setting.bits_of(kind) is not None}


def _wants_codes(x: Tensor) -> bool:
    """Whether an activation of x is to keep codes: x needs a gradient, of the kind that codes can give."""
    return torch.is_grad_enabled() and not in_forward_mode() and any(level.requires_grad for level in levels(x))


def _checked_names(names: Collection[str]) -> frozenset[str]:
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise ActivationError(f"activations must be names such as ('gelu', 'silu'), or None for all; got {names!r}")
    return frozenset(activations.get(name).name for name in names)


def _while_tracing(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), called once while a compiler traces, which does not look into it."""
    from fewbit.autograd import compiled  # here, since it loads dynamo

    return compiled.constant(function, *args)
