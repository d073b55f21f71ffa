"""Which class of fewbit replaces which class, and how modules change their class.

A module of exactly torch's class gets fewbit's class. A module of a subclass gets a new class, made from both. In it fewbit's
class comes before the module's own, so fewbit's methods replace torch's, and all else stays the module's.

In this file `own` is a module's own class, `ours` is fewbit's class for it or for one of its bases, and a twin is made of both.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fewbit import activations
from fewbit.models.conversion.interception import Intercepted, forward_of
from fewbit.models.conversion.other_activations import activation_class
from fewbit.models.preserve import cells_of
from fewbit.nn import activations as activation_modules
from fewbit.nn import exact_codes, layers, recurrent
from fewbit.nn.activations import CodedActivation
from fewbit.nn.exact_codes import ExactlyCoded
from fewbit.nn.layers import CodedLayer

CODED = (CodedActivation, CodedLayer, ExactlyCoded)
_OURS = (*CODED, Intercepted)
# torch's modules whose forward calls functions that can be coded
_OF_TORCH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# lazy modules are no layers yet; MultiheadAttention never calls its out_proj, it only reads the weight
_EXCEPT = (LazyModuleMixin, NonDynamicallyQuantizableLinear, torch.jit.ScriptModule, *_OURS)
_ATTRIBUTES = {"bits", "table", "shared", "rounding"}  # attributes of coded modules
_OPEN = {"extra_repr"}  # methods that both classes may define
_FORMER = "_before_fewbit"  # attribute of a class that was made again: the class before
_OF_ONE_CLASS = {"__dict__", "__weakref__", "__signature__", _FORMER}  # entries that such a class does not take over


class Twin:
    """Base of the classes that `coded_class` makes. Their instances are pickled and copied by way of the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *rest = reduced
        if function.__name__ != "__newobj__" or Twin not in type(self).__bases__:  # the module's own class has its own way
            return reduced
        return (_new_intercepted if isinstance(self, Intercepted) else _new), (type(self).__bases__[-1], *arguments[1:]), *rest


def _new(own: type[nn.Module], *arguments: Any) -> nn.Module:
    return _made_again(own, coded_class(own, torch_twins()), *arguments)


def _new_intercepted(own: type[nn.Module], *arguments: Any) -> nn.Module:
    return _made_again(own, intercepted_class(own), *arguments)


def _made_again(own: type[nn.Module], coded: type[nn.Module] | None, *arguments: Any) -> nn.Module:
    assert coded is not None, f"{own} had a class of fewbit's when it was saved"
    return coded.__new__(coded, *arguments)


def torch_twins() -> dict[type[nn.Module], type[nn.Module]]:
    """torch's class -> fewbit's class for it."""
    names = {activations.get(name).module for name in activations.names() if name in activations.BUILT_IN}
    found = {getattr(nn, name): activation_modules.module(name) for name in names if hasattr(nn, name)}
    return {**{torchs: ours for torchs, ours in found.items() if ours is not None}, **_layer_twins()}


@cache
def _layer_twins() -> dict[type[nn.Module], type[nn.Module]]:
    return {
        getattr(nn, name): coded
        for name, coded in {**layers.CLASSES, **recurrent.CLASSES, **exact_codes.CLASSES}.items()
        if hasattr(nn, name)
    }


def coded_class(own: type[nn.Module], twins: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module] | None:
    """The coded class for modules of the class `own`, or None if there is none. `own` is the last of its bases.

    twins  as `torch_twins` gives them

    There is none if `own` overrides what fewbit replaces (mostly `forward`), or uses the names of fewbit's attributes itself.
    """
    if issubclass(own, _EXCEPT):
        return None
    for base in own.__mro__:
        ours = twins.get(base) or activation_class(base)
        if ours is None:
            continue
        if base in twins and own is base:
            return ours
        if _names(own, base) & (_names(ours, base) - _OPEN | _ATTRIBUTES):
            return None
        try:
            return _made(ours, own)
        except TypeError:  # from its own __init_subclass__ or metaclass, which needs more arguments
            return None
    return None


def intercepted_class(own: type[nn.Module]) -> type[nn.Module] | None:
    """The class that runs the `forward` of a class under an interception; None for fewbit's own, or if it cannot be made."""
    if issubclass(own, _EXCEPT):
        return None
    try:
        return _made(Intercepted, own)
    except TypeError:  # as above
        return None


def calls_functions(own: type[nn.Module]) -> bool:
    """Whether the forward of a class may call functions of torch that can be coded. This holds mostly for classes outside of
    torch."""
    if own.__module__.partition(".")[0] == "torch":
        return issubclass(own, _OF_TORCH)
    return own.forward not in (nn.Module.forward, nn.Sequential.forward)


def _names(cls: type, base: type) -> set[str]:
    """The names, without special methods, that a class and its bases define and that `base` and its bases do not."""
    own = [each for each in cls.__mro__[: cls.__mro__.index(nn.Module)] if each not in base.__mro__]
    return {name for each in own for name in vars(each) if not name.startswith("__")}


def _made(ours: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """The class made of both. It lives only while something uses it, since classes hold weak references to their subclasses."""
    for known in own.__subclasses__():
        if known.__bases__ == (Twin, ours, own):
            return known
    contents = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    if ours is Intercepted:
        contents["forward"] = forward_of(own)
    return types.new_class(own.__name__, (Twin, ours, own), exec_body=lambda namespace: namespace.update(contents))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that fewbit's class replaces: the module's; of a parametrized module, the class below the parametrizations."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and cls.__name__.startswith("Parametrized") else cls


def exchange(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Replace the class `old` by `new` in the module's class. Also replace its methods that others hold, to call them in a
    `forward` of their own."""
    module.__class__ = _exchanged(type(module), old, new)
    state = vars(module)
    for name in [name for name, value in state.items() if _is_method(value, module, old)]:
        state[name] = _method_of(new, state[name])
    for cell in cells_of(module):
        if _is_method(cell.cell_contents, module, old):
            cell.cell_contents = _method_of(new, cell.cell_contents)


def runs_its_forward(module: nn.Module, own: type[nn.Module]) -> bool:
    """Whether a call of the module reaches the `forward` of its own class, as far as this can be seen: directly, or through a
    function that replaces it and holds it."""
    if "forward" not in vars(module):
        return True
    held = [*vars(module).values(), *(cell.cell_contents for cell in cells_of(module))]
    return any(_is_method(each, module, own) and each.__name__ == "forward" for each in held)


def _is_method(value: Any, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the value is a method of the module, unchanged from the class."""
    is_method = isinstance(value, types.MethodType) and value.__self__ is module
    return is_method and value.__func__ is getattr(cls, value.__name__, None)


def _method_of(cls: type[nn.Module], method: types.MethodType) -> types.MethodType:
    return types.MethodType(getattr(cls, method.__name__, method.__func__), method.__self__)


def _exchanged(cls: type, old: type, new: type) -> type:
    """The class with its base `old` replaced by `new`. Something like a parametrization may have made a class for one module on
    top of `old`: that class is made again on top of `new`. If it was exchanged before and has not changed since, the former
    class is used again."""
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    contents = {name: value for name, value in vars(cls).items() if name not in _OF_ONE_CLASS}
    former = vars(cls).get(_FORMER)
    if former is not None and new in former.__mro__ and contents.items() <= vars(former).items():
        return former
    bases = tuple(_exchanged(each, old, new) for each in cls.__bases__)
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update({**contents, _FORMER: cls}))


def fewbits_class(module: nn.Module, own: type[nn.Module]) -> type[nn.Module] | None:
    """The class of fewbit that replaced `own` in this module; None if there is none."""
    return next((each for each in type(module).__mro__ if issubclass(each, _OURS) and each.__bases__[-1] is own), None)
