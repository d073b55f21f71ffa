"""Modules whose forward runs again in backward. Until then they keep only their inputs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbit.torch_internals import buffers_of, is_fake

Tensor = torch.Tensor
ATTRIBUTE = "runs_again"
# values of the attribute: checkpointed by this file; a layer of transformers, which does it itself; a module around such layers
VALUES = (WRAPPED, ITSELF, INSIDE) = True, "itself", "inside"
_checkpoint = partial(checkpoint, use_reentrant=False)
# what transformers sets on a layer, and on all modules around it that have these attributes; they then leave out their cache
_OF_TRANSFORMERS = {"gradient_checkpointing": True, "_gradient_checkpointing_func": _checkpoint}
_CONSTANT = (Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, ModuleType)
_PLAIN = (Tensor, bool, int, float, str, type(None))
# module -> mode -> places of the buffers that its forward changes
_changing: WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], list[int]]] = WeakKeyDictionary()


def way_of(module: nn.Module) -> bool | str:
    """How a module runs again: by itself if it is a layer of transformers, which does so in training; else wrapped."""
    return ITSELF if isinstance(getattr(type(module), "gradient_checkpointing", None), bool) else WRAPPED


def follows(module: nn.Module) -> bool:
    """Whether a module around layers that run again by themselves must be told so."""
    return isinstance(vars(module).get("gradient_checkpointing"), bool)


def attributes_set(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What to set on a module that gets these attributes."""
    return {**attributes, **(_OF_TRANSFORMERS if attributes.get(ATTRIBUTE) in (ITSELF, INSIDE) else {})}


def attributes_meant(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: the attributes that a module got, from all that was set."""
    return {name: value for name, value in attributes.items() if name not in _OF_TRANSFORMERS}


def run_again_in_backward(function: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run function(module, *args, **kwargs) now and again in backward, both times on arguments and buffers as they are now.

    If the function changes them, such as a cache that it fills or running statistics, it changes them only once. Compiled code
    uses torch's checkpoint as it is.
    """
    if torch.compiler.is_compiling():
        return _checkpoint(partial(function, module), *args, **kwargs)
    given, before, runs = _copied(args, kwargs), _Buffers(module), 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            try:
                return function(module, *args, **kwargs)
            finally:
                before.keep_those_that_changed()
        args, kwargs = (args, kwargs) if given is None else given()
        with before.there_again():
            return function(module, *args, **kwargs)

    return _checkpoint(run, *args, **kwargs)


class _Buffers:
    """The buffers of a module as they are before it runs."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._mode = tuple(each.training for each in module.modules())
        places = [(buffers_of(each), name) for each in module.modules() for name in buffers_of(each)]
        self._known = _changing.setdefault(module, {}).get(self._mode)
        chosen = range(len(places)) if self._known is None else self._known
        self._kept = {i: _Kept(*places[i]) for i in chosen if places[i][0][places[i][1]] is not None}

    def keep_those_that_changed(self) -> None:
        """Forget the buffers that did not change. The first run in each mode finds out which they are, and waits for the device
        then.

        Fake tensors have no numbers, so they count as unchanged.
        """
        if any(is_fake(each.content) for each in self._kept.values()):
            self._kept = {}
        elif self._known is None:
            self._kept = {i: each for i, each in self._kept.items() if each.has_changed()}
            _changing[self._module][self._mode] = [*self._kept]

    @contextmanager
    def there_again(self) -> Iterator[None]:
        """Within this context the kept buffers replace the current ones."""
        now = [(each, each.buffers[each.name]) for each in self._kept.values()]
        try:
            for each, _ in now:
                each.buffers[each.name] = each.content.clone()
            yield
        finally:
            for each, buffer in now:
                each.buffers[each.name] = buffer


class _Kept:
    """A buffer: the dictionary that holds it, its name there, and a copy of its content."""

    def __init__(self, buffers: Any, name: str):
        self.buffers, self.name = buffers, name
        self.content: Tensor = buffers[name].detach().clone()

    def has_changed(self) -> bool:
        now = self.buffers[self.name]
        return now is None or now.shape != self.content.shape or not torch.equal(now, self.content)


def _copied(args: tuple, kwargs: dict[str, Any]) -> Callable[[], tuple[tuple, dict[str, Any]]] | None:
    """A function that gives the arguments as they are now. Containers and objects in them are copied, tensors and modules stay
    the same.

    None if nothing in them could change, or if an object cannot be copied.
    """
    if all(isinstance(each, _PLAIN) for each in (*args, *kwargs.values())):
        return None
    constant: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, _CONSTANT):
                return None
            constant.append(obj)
            return len(constant) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return constant[pid]

    written = io.BytesIO()
    try:
        Pickler(written).dump((args, kwargs))
    except Exception:  # an object that cannot be copied may raise anything
        return None
    return lambda: Unpickler(io.BytesIO(written.getvalue())).load()
