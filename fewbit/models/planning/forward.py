"""A forward pass of a model that leaves it as it was, on its own tensors or on fake ones, which take no memory and no time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from fewbit import coders
from fewbit.errors import InputError
from fewbit.models.planning.saved import Storage, record, storages_of, tensors_in
from fewbit.models.untouched import preserved, untouched

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
        with untouched(self.model), preserved(self.model), torch.inference_mode(False), torch.enable_grad():
            return self._saved_by_fake() if fake else self._saved_by_real()

    def _saved_by_real(self) -> list[Storage]:
        def kinds() -> dict[int, str]:
            return _kinds(self.model.parameters(), self.model.buffers(), tensors_in((self.args, self.kwargs)), _tables())

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


def run(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch."""
    args, kwargs = arguments_of(batch)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model does not take this batch ({error}): a tensor is passed alone, a tuple or list as forward's arguments, "
            "a mapping as named ones; give batches of what forward takes, or a loss_fn, which takes batches as they are"
        ) from error


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
