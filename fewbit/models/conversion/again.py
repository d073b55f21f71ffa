"""Forwards that run again in backward, and keep their inputs alone until then."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbit.torch_internals import leaves

ATTRIBUTE = "runs_again"
WRAPPED, ITSELF, INSIDE = (
    True,
    "itself",
    "inside",
)  # its values: by what is here, or as transformers has it: the layer, or around
VALUES = (WRAPPED, ITSELF, INSIDE)
_checkpoint = partial(checkpoint, use_reentrant=False)
# what transformers sets of a layer, and of all around it that has these attributes, which then leave out their cache
_OF_TRANSFORMERS = {"gradient_checkpointing": True, "_gradient_checkpointing_func": _checkpoint}


def way_of(module: nn.Module) -> bool | str:
    """How a module runs again: by its class's own way in training, if it is a layer of transformers, or wrapped."""
    return ITSELF if isinstance(getattr(type(module), "gradient_checkpointing", None), bool) else WRAPPED


def follows(module: nn.Module) -> bool:
    """Whether a module around layers that run again by themselves is told so."""
    return isinstance(vars(module).get("gradient_checkpointing"), bool)


def attributes_set(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What to set of a module that gets these attributes."""
    return {**attributes, **(_OF_TRANSFORMERS if attributes.get(ATTRIBUTE) in (ITSELF, INSIDE) else {})}


def attributes_meant(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a module got, of what was set."""
    return {name: value for name, value in attributes.items() if name not in _OF_TRANSFORMERS}


def run_again_in_backward(function: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """function(module, *args, **kwargs), now and again in backward, each time on arguments as they are given now.

    What the function changes in them, as in a cache that it fills, happens once.
    """
    given = _kept(args, kwargs)
    if given is None:
        return _checkpoint(partial(function, module), *args, **kwargs)
    runs = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        again = given() if runs > 1 else (args, kwargs)
        return function(module, *again[0], **again[1])

    return _checkpoint(run, *args, **kwargs)


def _kept(args: tuple, kwargs: dict[str, Any]) -> Callable[[], tuple[tuple, dict[str, Any]]] | None:
    """What gives the arguments as they are now: containers and objects in them are made anew, tensors and modules are the same.

    None where there is nothing that could change, or where an object cannot be copied.
    """
    if all(each is None or isinstance(each, (torch.Tensor, bool, int, float, str)) for each in leaves((args, kwargs))):
        return None
    constant: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, (torch.Tensor, nn.Module)):
                return None
            constant.append(obj)
            return len(constant) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return constant[pid]

    written = io.BytesIO()
    try:
        Pickler(written).dump((args, kwargs))
    except Exception:  # whatever an object does that cannot be copied
        return None
    return lambda: Unpickler(io.BytesIO(written.getvalue())).load()
