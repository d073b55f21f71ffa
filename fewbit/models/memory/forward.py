"""A forward pass that leaves the model as it was. It runs on real tensors, or on fake ones, which take no memory or time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fewbit import resolve
from fewbit.errors import InputError
from fewbit.models.arguments import LossFunction, arguments_of, run
from fewbit.models.memory.saved import Storage, record, shape_label, storages_of, tensors_in
from fewbit.models.preserve import Autocast, preserved_state, preserved_structure
from fewbit.torch_internals import fake_mode, map_tensors, silent_fakes, storage_key

Tensor = torch.Tensor
_MOST_INPUTS = 4  # of a batch, in words


class Forward(NamedTuple):
    """A call of a model, or of a loss that calls it.

    classes   of the model's modules when this was made
    autocast  as it was when this was made
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFunction | None
    classes: list[type[nn.Module]]
    autocast: Autocast

    @classmethod
    def of(cls, model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> Forward:
        return cls(model, batch, loss_fn, [type(module) for module in model.modules()], Autocast(model))

    def call(self, batch: Any) -> Any:
        """The output of the model or the loss for a batch. InputError if the model does not take the batch."""
        return run(self.model, batch) if self.loss_fn is None else self.loss_fn(self.model, batch)

    @property
    def words(self) -> str:
        """The batch, dtypes and devices in words: "a batch of x float32 8×3×224×224; parameters float32 on cpu"."""
        named = self.batch if isinstance(self.batch, Mapping) else {"": self.batch}
        found = [(name, each) for name, value in named.items() for each in tensors_in(value)]
        shapes = [f"{name} {shape_label(each)}".strip() for name, each in found[:_MOST_INPUTS]]
        shapes += ["…"] * (len(found) > _MOST_INPUTS)
        kinds = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in self.model.parameters())
        devices = dict.fromkeys(str(each.device) for each in self.model.parameters())
        parameters = f"; parameters {', '.join(kinds)} on {', '.join(devices)}" if kinds else ""
        return f"a batch of {', '.join(shapes) or 'no tensors'}{parameters}"

    def check_unchanged(self) -> None:
        """Raise InputError if modules of the model have changed their class since this was made."""
        if [type(module) for module in self.model.modules()] != self.classes:
            raise InputError("the model was converted or changed since this report; make a new one with fewbit.memory")

    def saved(self, fake: bool) -> list[Storage]:
        """What the call keeps for backward with the model as it is now. The model's state and gradients and torch's random
        numbers are restored, also after an error."""
        with self.untouched():
            return self._saved_by_fake() if fake else self._saved_by_real()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A context to run the model in, with gradients enabled and with the autocast of when this was made. Afterwards the
        model's state, structure and gradients and torch's random numbers are restored. InputError if the model has lazy modules
        that never ran."""
        _check_initialized(self.model)
        with ExitStack() as stack:
            for each in (preserved_state(self.model), preserved_structure(self.model), self.autocast.again()):
                stack.enter_context(each)
            for each in (torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(each)
            yield

    def fakes(self, mode: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        """Parameters and buffers by name, and the batch, as fake tensors."""
        parameters, buffers = (
            {name: _faked(tensor, mode) for name, tensor in named}
            for named in (self.model.named_parameters(), self.model.named_buffers())
        )
        batch = dict(self.batch) if isinstance(self.batch, Mapping) else self.batch
        return parameters, buffers, map_tensors(lambda tensor: _faked(tensor, mode), batch)

    def _saved_by_real(self) -> list[Storage]:
        def roles() -> dict[int, str]:
            return _roles(self.model.parameters(), self.model.buffers(), tensors_in(arguments_of(self.batch)), _tables())

        return record(self.model, lambda: self.call(self.batch), roles)

    def _saved_by_fake(self) -> list[Storage]:
        mode = fake_mode()
        parameters, buffers, batch = self.fakes(mode)

        def roles() -> dict[int, str]:
            tables = (mode.from_tensor(table) for table in _tables())  # misses tables of one number, copied each time
            return _roles(parameters.values(), buffers.values(), tensors_in(arguments_of(batch)), tables)

        with mode, silent_fakes():
            return record(self.model, lambda: with_tensors(self.model, {**parameters, **buffers}, self.call, batch), roles)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor], function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), called while these tensors, by name, replace the model's parameters and buffers."""
    whole = _Whole(model, function)
    return torch.func.functional_call(whole, {f"model.{name}": each for name, each in tensors.items()}, arguments)


class _Whole(nn.Module):
    """A module around a model whose forward is a function that calls the model."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.model, self._function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _check_initialized(model: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model has lazy modules whose parameters have no shape yet; run it once on a batch before")


def _faked(tensor: Tensor, mode: Any) -> Tensor:
    """A fake tensor of the same kind. A tensor of the meta device counts as one on the CPU, where torch chooses operations as
    in training. On the meta device it would, for example, compose attention of its parts."""
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor)
    with mode:
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(found, tensor.requires_grad)
        return found.requires_grad_(tensor.requires_grad)


def _tables() -> list[Tensor]:
    return [tensor for table in list(resolve.in_use) for tensor in (table.thresholds, table.codes, table.levels)]


def _roles(parameters: Iterable[Tensor], buffers: Iterable[Tensor], inputs: Iterable[Tensor], tables: Iterable[Tensor]) -> Any:
    """Identity of a storage -> its role. A storage with several roles gets the first of them."""
    found: dict[int, str] = {}
    roles = {"parameters": parameters, "buffers": buffers, "inputs": inputs, "tables": tables}
    for role, tensors in roles.items():
        for tensor in tensors:
            for storage in storages_of(tensor):
                found.setdefault(storage_key(storage), role)
    return found
