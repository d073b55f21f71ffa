"""Contexts in which a model runs or is changed, and after which it is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from fewbit.torch_internals import buffers_of, dynamo_is_loaded, registered


class State:
    """Buffers and training flags of a model as they are now. Other attributes of its modules are not kept."""

    def __init__(self, model: nn.Module):
        self._training = [(module, module.training) for module in model.modules()]
        self._buffers = [(module, dict(buffers_of(module))) for module in model.modules()]
        found = {id(buffer): buffer for _, buffers in self._buffers for buffer in buffers.values() if buffer is not None}
        self._contents = [(each, each.clone()) for each in map(_memory, found.values())]

    def restore(self) -> None:
        """Put them back: the same tensors with their former numbers."""
        for module, training in self._training:
            module.training = training
        for module, buffers in self._buffers:
            _restore(buffers_of(module), buffers)
        for buffer, content in self._contents:
            buffer.copy_(content)  # through .data, as batch norm does: a new version would break graphs that exist


def _memory(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer's data, each number once: an expanded tensor shows the same number in many places."""
    if buffer.layout != torch.strided:
        return buffer.data
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in buffer.stride())
    return buffer.data[once] if once else buffer.data


class RandomNumbers:
    """The states of the default generators of random numbers: Python's, numpy's, and torch's on these devices."""

    def __init__(self, devices: set[torch.device]):
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._numpy = np.random.get_state()  # noqa: NPY002  the one that others may draw from
        self._devices: list[tuple[Any, torch.device, Any]] = []
        for device in devices:
            if device.type not in ("cpu", "meta"):
                generators: Any = torch.get_device_module(device)
                self._devices.append((generators, device, generators.get_rng_state(device)))

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002  likewise
        torch.set_rng_state(self._cpu)
        for generators, device, state in self._devices:
            generators.set_rng_state(state, device)


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices of its parameters and buffers."""
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[State]:
    """Restore the model's state and the random numbers when this context ends, also after an error.

    Inside, parameters begin without gradients. The context gives the model's state, to restore it between runs.

    Autocast's cache is emptied at the beginning and at the end. Otherwise its casts would outlive the run, and what a run keeps
    would depend on earlier runs.
    """
    state, numbers = State(model), RandomNumbers(devices_of(model))
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    torch.clear_autocast_cache()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield state
    finally:
        torch.clear_autocast_cache()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        try:
            state.restore()
        finally:
            numbers.restore()


class Autocast:
    """The state of autocast now, on the CPU and the devices of a model, to be used in later runs."""

    def __init__(self, model: nn.Module):
        kinds = {"cpu", *(device.type for device in devices_of(model))}
        self._states = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this context autocast is in that state again."""
        with ExitStack() as stack:
            for state in self._states:
                stack.enter_context(torch.autocast(*state))
            yield


def eager() -> AbstractContextManager[Any]:
    """Within this context compiled models run uncompiled."""
    # if dynamo is not loaded, nothing is compiled; loading it takes seconds
    return torch.compiler.set_stance("force_eager") if dynamo_is_loaded() else nullcontext()


@contextmanager
def preserved_structure(model: nn.Module) -> Iterator[None]:
    """After this context every module of the model has the class and the attributes that it had before.

    Changes inside objects that are not modules stay, and so do hooks that were registered meanwhile.
    """
    restore = _structure(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def structure_restored_on_error(model: nn.Module) -> Iterator[None]:
    """The same if an exception leaves this context. Otherwise the changes stay."""
    restore = _structure(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def _structure(model: nn.Module) -> Callable[[], None]:
    """A function that puts back the classes and attributes of now."""
    modules = [(module, type(module), dict(vars(module)), _registrations(module)) for module in model.modules()]
    cells = [(cell, cell.cell_contents) for module in model.modules() for cell in cells_of(module)]

    def restore() -> None:
        for cell, content in cells:
            cell.cell_contents = content
        for module, kind, attributes, registrations in modules:
            if type(module) is not kind:
                module.__class__ = kind
            _restore(vars(module), attributes)
            for name, entries in registrations.items():
                _restore(vars(module)[name], entries)

    return restore


def cells_of(module: nn.Module) -> list[CellType]:
    """The closure cells of functions that replace the module's `forward`. They hold what these functions call, such as the
    original method."""
    pending, cells, seen = [vars(module).get("forward")], [], set()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, partial):
            pending += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            pending.append(each.__func__)
        elif isinstance(each, FunctionType):
            found = [cell for cell in each.__closure__ or () if cell != CellType()]  # without empty ones
            pending += [cell.cell_contents for cell in found]
            cells += found
    return cells


def _registrations(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(entries) for name, entries in registered(module).items()}


def _restore(contents: dict[str, Any], before: dict[str, Any]) -> None:
    """Write only what differs, since compiled code checks whether these dictionaries have changed."""
    for name in contents.keys() - before.keys():
        del contents[name]
    for name, value in before.items():
        if name not in contents or contents[name] is not value:
            contents[name] = value
