"""To run a model without a trace: its buffers and the random numbers are afterwards what they were before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fewbit.errors import InputError


def run(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch: a tuple or list are its arguments, a mapping its named ones, all else the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def without_compiler(name: str, model: Any) -> nn.Module:
    """The model inside of what `torch.compile` returned, or the model itself; names of modules are those inside.

    InputError, naming the function `name`, for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} takes a torch.nn.Module, got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within this context the model runs eagerly; after it buffers and the states of random number generators are as before."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
    # where dynamo is not loaded, which takes seconds, nothing is compiled
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with torch.random.fork_rng(devices), eager:
            yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                buffer.copy_(content)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If an exception leaves this context, the modules have their classes and attributes of before."""
    before = [(module, module.__class__, dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        raise
