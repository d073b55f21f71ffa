"""Intercept calls of torch's functions, so that they keep codes in any code.

A mode of torch (`torch.overrides.TorchFunctionMode`) sees every call of torch's functions and methods on its thread before
torch does, and torch.compile traces through it. Calls that the mode does not code go on to torch unchanged. `patch` enters such
a mode for a block of code. `convert` lets modules that have a forward of their own enter one while that forward runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewbit import activations, resolve
from fewbit.autograd import exact as exact_mode
from fewbit.autograd.rest import Saving
from fewbit.autograd.sharing import region
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError, DesignError, InputError
from fewbit.functional import exact_codes, layers, products
from fewbit.functional.activations import activation_operation
from fewbit.functional.operation import Operation, fixed, is_codable, run, takes_part
from fewbit.kernels import DeviceTable
from fewbit.models.conversion.again import WRAPPED, run_again_in_backward
from fewbit.models.conversion.setting import Setting
from fewbit.store import load_table
from fewbit.torch_internals import (
    function_modes,
    in_forward_mode,
    is_transformed,
    leaves,
    levels,
    native_functions,
    traces_a_region,
)

Tensor = torch.Tensor


class Interception:
    """What an interception codes.

    setting      bits and tables by kind; None codes nothing
    activations  names of the activations to code; None codes all
    """

    def __init__(self, setting: Setting | None, activations: frozenset[str] | None = None):
        self.setting, self.activations = setting, activations
        self.tables = {} if setting is None else _layer_tables(setting)
        self.value_tables = {} if setting is None or setting.coding is None else _value_tables(setting)


class Mode(TorchFunctionMode):
    """One entry into an interception, on the stack of its thread.

    active  whether it codes something and no other mode was entered after it
    outer   the mode around it
    region  the checkpointed region in which it was entered. Calls in another region stay torch's own, unless the mode holds
            `anywhere`, since the mode is missing when that region runs again.
    saving  makes codes of what torch's own operations save; None if nothing is coded, or if hooks would see nothing
    """

    def __init__(self, settings: Interception, outer: Mode | None, given: Any, anywhere: bool):
        self.settings, self.outer, self.active, self.anywhere = settings, outer, settings.setting is not None, anywhere
        self.region = None if torch.compiler.is_compiling() else region()
        left_out = torch.compiler.is_compiling() or is_transformed() or not self.active or settings.activations is not None
        self.saving = None if left_out else Saving(partial(_table, settings.setting), given)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.active and (self.anywhere or torch.compiler.is_compiling() or region() is self.region)
        target = _TARGETS.get(func) if here else None
        if target is not None:
            x, rest, named = _arguments(args, kwargs, target.first)
            coded = (_coded_layer if target.layer else _coded_activation)(self.settings, target, x, rest, named)
            if coded is not None:
                return coded
        if func in _EXACT_CODES and here and self.settings.activations is None:
            return _exact_code(func, args, kwargs)
        if here and torch.compiler.is_compiling() and self.settings.activations is None:
            coded = _coded_product(self.settings, func, args, kwargs)
            if coded is not None:
                return coded
        if func in _CALL_OTHERS and not torch.compiler.is_compiling():
            with self:  # entered again, for the calls inside
                return _redispatch(func, types, args, kwargs)
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
            return args[0].unflatten(*args[1:], **kwargs)  # dynamo cannot trace the function itself, because of its super()
        if here and self.saving is not None and type(func) is not _GETTER and _may_save_codes():
            return self.saving.run(func, args, kwargs)
        return func(*args, **kwargs)


def _may_save_codes() -> bool:
    """Whether torch's own operations may save codes now."""
    return torch.is_grad_enabled() and not exact_mode.is_active() and not is_transformed()


def innermost() -> Mode | None:
    """The mode in force on this thread."""
    return next((mode for mode in function_modes() if isinstance(mode, Mode)), None)


def enter(settings: Interception, given: Any = (), anywhere: bool = False) -> Mode:
    """Let these settings be in force on this thread, until `leave`. given: arguments of the call, which are kept exactly."""
    outer = innermost()
    if outer is not None:
        outer.active = False
    mode = Mode(settings, outer, given, anywhere)
    mode.__enter__()
    return mode


def leave(mode: Mode) -> None:
    """Let the settings from before `enter` be in force again."""
    mode.__exit__(None, None, None)
    if mode.outer is not None:
        mode.outer.active = mode.outer.settings.setting is not None


class Intercepted(torch.nn.Module):
    """Base of the classes made for modules with a forward of their own. Calls of torch's functions in it are intercepted.

    interception  what is coded; modules that must stay exact inside others have one that codes nothing
    runs_again    whether the forward keeps only its inputs and runs again in backward; see `again`
    """

    interception: Interception
    runs_again: bool | str = False


def forward_of(own: type[torch.nn.Module]) -> Callable[..., Any]:
    """The forward of a class, wrapped: it enters the module's `interception` if that is not in force yet, and it is
    checkpointed if the module `runs_again`."""

    @wraps(own.forward)  # others read its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.runs_again is WRAPPED and torch.is_grad_enabled():
            return run_again_in_backward(partial(run_intercepted, self.interception), self, args, kwargs)
        return run_intercepted(self.interception, self, *args, **kwargs)

    def run_intercepted(settings: Interception, self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_in_force(settings) or not _needs_gradients(self, args, kwargs):
            return own.forward(self, *args, **kwargs)
        mode = enter(settings, (args, kwargs))
        try:
            return own.forward(self, *args, **kwargs)
        finally:
            leave(mode)

    return forward


def _needs_gradients(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether there is something to code and a mode can be entered. If not, no mode is entered, so that torch can take the fast
    paths that it takes without one."""
    if not torch.is_grad_enabled() or (torch.compiler.is_compiling() and _while_tracing(traces_a_region)):
        return False
    if any(each.requires_grad for each in module.parameters()):
        return True
    return any(isinstance(each, Tensor) and each.requires_grad for each in leaves((args, kwargs)))


def _is_in_force(settings: Interception) -> bool:
    mode = innermost()
    if mode is None:
        return settings.setting is None
    return mode.settings is settings and (torch.compiler.is_compiling() or mode.region is region())


class _Target(NamedTuple):
    """fewbit's counterpart of one of torch's functions.

    name     of an activation in the registry, or of a layer in `fewbit.functional`
    layer    which of the two it is
    inplace  whether torch's function overwrites its input, as torch.relu_ does
    first    the name of its first argument
    """

    name: str
    layer: bool = False
    inplace: bool = False
    first: str = "input"


def _targets() -> dict[Callable[..., Any], _Target]:
    """All of torch's functions and methods that compute a built-in activation or a layer. They are found by their names."""
    found: dict[Any, _Target] = {torch.special.expit: _Target("sigmoid")}  # the only one with another name
    homes: tuple[Any, ...] = torch, functional, torch.Tensor, native_functions(), torch.special
    named = [each.torch_name for each in activations.BUILT_IN.values() if isinstance(each.torch_function, str)]
    for name in (each.rpartition(".")[2] for each in named):
        found.update({getattr(home, name): _Target(name) for home in homes if hasattr(home, name)})
        found.update({getattr(home, name + "_"): _Target(name, inplace=True) for home in homes if hasattr(home, name + "_")})
    for name, ours in layers.FUNCTIONS.items():
        torchs = getattr(torch if ours.kind == "recurrent" else functional, name, None)  # torch has no gated units
        if torchs is not None:
            found[torchs] = _Target(name, layer=True, first=next(iter(inspect.signature(ours).parameters)))
    return found


def _exact_codes() -> dict[Callable[..., Any], tuple[str, dict[str, Any]]]:
    """torch's functions that have exact codes -> the name of fewbit's function, and the arguments that torch's one implies."""
    found = {getattr(functional, name): (name, {}) for name in exact_codes.FUNCTIONS}
    for name in exact_codes.FUNCTIONS:
        if hasattr(functional, name + "_with_indices"):  # torch calls this one for return_indices=True
            found[getattr(functional, name + "_with_indices")] = name, {"return_indices": True}
    return found


_TARGETS: Mapping[Callable[..., Any], _Target] = _targets()
_GETTER = type(Tensor.shape.__get__)  # type: ignore[attr-defined]
_EXACT_CODES = _exact_codes()
# functions that call others in Python, or any code, as backward does when it recomputes a checkpointed region
_CALL_OTHERS = frozenset(
    {functional.multi_head_attention_forward, torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}
)
_redispatch: Callable[..., Any] = torch.overrides.redispatch_function  # calls a function without asking modes


def _arguments(args: tuple, kwargs: dict[str, Any], first: str = "input") -> tuple[Any, tuple, dict[str, Any]]:
    """The input, whose name is `first`, and all other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs.get(first), (), {name: value for name, value in kwargs.items() if name != first}


def _coded_activation(settings: Interception, target: _Target, x: Any, rest: tuple, named: dict[str, Any]) -> Tensor | None:
    """The activation of x; None if torch's own function must compute it."""
    setting, compiling = settings.setting, torch.compiler.is_compiling()
    if setting is None or setting.bits_of("activation") is None or not is_codable(x) or not (compiling or _wants_codes(x)):
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
    """The coded operation that a call with these arguments means under these settings.

    Raises TypeError, ActivationError or DesignError if the call cannot be coded, or must not be.
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
    load_table(found.record, bits, channels=found.channels)  # raises if there is no table
    return replace(found, bits=bits)


def _can_code(*call: Any) -> bool:
    """Whether the operation exists and has a table."""
    try:
        _activation(*call)
    except (TypeError, ActivationError, DesignError):
        return False
    return True


_known_to_code = lru_cache(maxsize=1024)(_can_code)


def _coded_layer(settings: Interception, target: _Target, x: Any, rest: tuple, named: dict[str, Any]) -> Tensor | None:
    """The output of the layer; None if torch's own function must compute it."""
    function = layers.FUNCTIONS[target.name]
    if settings.setting is None:
        return None
    bits, table = settings.setting.bits_of(function.kind), settings.tables.get(function.kind)
    others = [each for each in (*rest, *named.values()) if isinstance(each, Tensor)]
    if bits is None or not is_codable(x):
        return None
    if function.kind != "recurrent" and not all(map(takes_part, others)):  # recurrent layers also take sizes of steps
        return None
    weight = rest[0] if rest else named.get("weight")
    if target.name == "linear" and isinstance(weight, Tensor) and weight.dim() != 2:  # torch also takes a vector
        return None
    compiling, call = torch.compiler.is_compiling(), (target.name, len(rest), tuple(named))
    if not (_while_tracing(_takes, *call) if compiling else _known_to_take(*call)):
        return None
    code = layers.Code(bits if table is None else None, table, by_name=False)
    return function.with_code(code, x, *rest, **named)


def _exact_code(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The output of fewbit's function. If the call has arguments that fewbit's function lacks, torch's function runs."""
    name, implied = _EXACT_CODES[function]
    x, rest, named = _arguments(args, {**kwargs, **implied})
    compiling, call = torch.compiler.is_compiling(), (name, len(rest), tuple(named))
    if not (_while_tracing(_takes, *call) if compiling else _known_to_take(*call)):
        return function(*args, **kwargs)
    return exact_codes.FUNCTIONS[name].quietly(x, *rest, **named)


def _coded_product(settings: Interception, function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """In compiled code: the output of a product or a cast; None if torch's own function must compute it."""
    found, setting = products.find(function, args, kwargs), settings.setting
    if found is None or setting is None:
        return products.casted(function, args, kwargs)
    bits, table = setting.bits_of(found.kind), settings.value_tables.get(found.kind)
    if bits is None:
        return None
    return products.product(found, args, bits if table is None else None, table)


def _takes(name: str, positional: int, named: tuple[str, ...]) -> bool:
    """Whether fewbit's function has all the arguments of this call of torch's function."""
    found = layers.FUNCTIONS.get(name) or exact_codes.FUNCTIONS[name]
    try:
        inspect.signature(found).bind(None, *(None for _ in range(positional)), **dict.fromkeys(named))
    except TypeError:
        return False
    return True


_known_to_take = lru_cache(maxsize=256)(_takes)


@lru_cache(maxsize=256)
def _table(setting: Setting, kind: str, dtype: torch.dtype, device: torch.device) -> DeviceTable | None:
    """The device table of values of a kind; None if the kind stays exact."""
    bits = setting.bits_of(kind)
    if bits is None:
        return None
    if setting.coding is None:
        return resolve.shipped_tables(activations.IDENTITY, ("value",), bits, dtype, device)[0]
    return resolve.device_tables(setting.layer_table(kind, None), dtype, device)[0]


def _layer_tables(setting: Setting) -> dict[str, CodeTable]:
    """Kind -> table of layers and gated units, if a coding is named. Without one they use the shipped tables."""
    if setting.coding is None:
        return {}
    if torch.compiler.is_compiling():
        raise InputError("in compiled code patch takes no coding; make such a patch outside of it, and enter it inside")
    gates = {**dict.fromkeys(("linear", "norm", "attention", "recurrent")), "product": layers.glu.gate}
    return {kind: setting.layer_table(kind, gate) for kind, gate in gates.items() if setting.bits_of(kind) is not None}


def _value_tables(setting: Setting) -> dict[str, CodeTable]:
    """Kind -> table of the factors of products, for a named coding."""
    kinds = [kind for kind in ("product", "linear", "rest") if setting.bits_of(kind) is not None]
    return {kind: setting.layer_table(kind, None) for kind in kinds}


def _wants_codes(x: Tensor) -> bool:
    """Whether an activation of x must keep codes: x needs a gradient, and codes can give it."""
    return torch.is_grad_enabled() and not in_forward_mode() and any(level.requires_grad for level in levels(x))


def _while_tracing(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), called once while a compiler traces. The compiler does not trace into it."""
    from fewbit.autograd import compiled  # imported here, since it loads dynamo

    return compiled.constant(function, *args)
