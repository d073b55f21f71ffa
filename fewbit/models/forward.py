"""A forward pass of a model that leaves it as it was, on its own tensors or on fake ones, which take no memory and no time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from fewbit import coders
from fewbit.errors import InputError
from fewbit.models.saved import Storage, record, storages_of, tensors_in

Tensor = torch.Tensor
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Forward(NamedTuple):
    """A call of a model: the model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def saved(self, fake: bool) -> list[Storage]:
        """What the call keeps for backward, of the model as it is now; its state, gradients and torch's random numbers are
        as before, after an error too."""
        _check_initialized(self.model)
        with preserved(self.model), torch.inference_mode(False), torch.enable_grad():
            return self._saved_by_fake() if fake else self._saved_by_real()

    def _saved_by_real(self) -> list[Storage]:
        def kinds() -> dict[int, str]:
            return _kinds(self.model.parameters(), self.model.buffers(), tensors_in((self.args, self.kwargs)), _tables())

        with _random_numbers_kept(self.model):
            return record(self.model, lambda: self.model(*self.args, **self.kwargs), kinds)

    def _saved_by_fake(self) -> list[Storage]:
        from torch._subclasses.fake_tensor import FakeTensorMode  # here, since it loads sympy
        from torch.func import functional_call

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        parameters, buffers = (
            {name: _faked(tensor, mode) for name, tensor in named}
            for named in (self.model.named_parameters(), self.model.named_buffers())
        )
        args, kwargs = tree_map_only(Tensor, lambda tensor: _faked(tensor, mode), (self.args, self.kwargs))

        def kinds() -> dict[int, str]:
            tables = (mode.from_tensor(table) for table in _tables())  # but not those of one number, copied each time
            return _kinds(parameters.values(), buffers.values(), tensors_in((args, kwargs)), tables)

        with mode:
            return record(self.model, lambda: functional_call(self.model, {**parameters, **buffers}, args, kwargs), kinds)


def arguments_of(batch: Any) -> Arguments:
    """What a batch passes to a model: a tensor alone, the elements of a tuple or list, the values of a mapping by name.

    >>> arguments_of((1, 2)), arguments_of({"x": 1})
    (((1, 2), {}), ((), {'x': 1}))
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """After this context every module of the model has the class and the attributes that it had before, and every buffer its
    values. Not undone: changes inside objects that are no tensors, and hooks registered meanwhile."""
    modules = [(module, type(module), dict(vars(module)), _registered(module)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for module, kind, attributes, registered in modules:
            if type(module) is not kind:
                module.__class__ = kind
            _restore(vars(module), attributes)
            for name, entries in registered.items():
                _restore(vars(module)[name], entries)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # only then: a write would spoil graphs of the caller that hold the buffer
                    buffer.copy_(value)


def _registered(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}


def _restore(contents: dict[str, Any], before: dict[str, Any]) -> None:
    """Writes what differs and no more: compiled code looks whether these dictionaries have changed."""
    for name in contents.keys() - before.keys():
        del contents[name]
    for name, value in before.items():
        if name not in contents or contents[name] is not value:
            contents[name] = value


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng(sorted({device.index or 0 for device in devices if device.type == "cuda"})):
        yield


def _check_initialized(model: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model has lazy modules whose parameters have no shape yet; run it once on a batch before")


def _faked(tensor: Tensor, mode: Any) -> Tensor:
    """A fake tensor of the same kind. One of the meta device is taken for one on the CPU, where operations are chosen as in
    training: on the meta device attention, for one, would be composed of its parts."""
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad
        )


def _tables() -> list[Tensor]:
    return [tensor for coder in list(coders.made) for tensor in (coder.thresholds, coder.codes, coder.levels)]


def _kinds(parameters: Iterable[Tensor], buffers: Iterable[Tensor], inputs: Iterable[Tensor], tables: Iterable[Tensor]) -> Any:
    """Identity of a storage -> its kind; a storage of several kinds is the first of them."""
    found: dict[int, str] = {}
    kinds = {"parameters": parameters, "buffers": buffers, "inputs": inputs, "tables": tables}
    for kind, tensors in kinds.items():
        for tensor in tensors:
            for storage in storages_of(tensor):
                found.setdefault(storage._cdata, kind)
    return found
