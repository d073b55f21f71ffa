"""The peak of a training step: how much memory is in use at its worst moment, what it holds, and where in the model that is.

The step runs on fake tensors. Every tensor that an operation makes is seen: in the forward pass, the loss, the backward pass
and the optimizer's step, if there is an optimizer. With an optimizer two steps run, since its state exists from the second step
on. Memory that an operation allocates and frees before it returns is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.models.arguments import roots_of, trainable
from fewbit.models.memory.alive import GRADIENTS, KEPT, TEMPORARY, Alive, Seen
from fewbit.models.memory.forward import Forward, with_tensors
from fewbit.models.memory.saved import tensors_in
from fewbit.terminal import bytes_label
from fewbit.torch_internals import fake_mode, needs_numbers, silent_fakes

Tensor = torch.Tensor
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
Optimizer = str | torch.optim.Optimizer | MakeOptimizer
ROLES = ("parameters", "buffers", "inputs", "optimizer", GRADIENTS, KEPT, TEMPORARY)
_LOGITS = 0.25  # logits set the peak if they take this part of what a step takes beyond the model


@dataclass(frozen=True)
class Peak:
    """The bytes that a training step takes at its worst moment, on the device where most parameters lie.

    bytes      all bytes, parameters included
    moment     when it is, such as "backward of transformer.h.3.mlp"
    parts      bytes by role: "parameters", "buffers", "inputs", "optimizer" (its state), "gradients", "kept" (made by forward,
               to keep for backward or to use at once), "temporary" (made by backward or the optimizer)
    by_module  name of the module that ran when tensors were made -> their bytes, kept or temporary; "" is the model itself
    head       the linear layer whose output sets the peak, as a language model's logits do; "" if there is none
    """

    bytes: int
    moment: str
    parts: dict[str, int]
    by_module: dict[str, int]
    head: str = ""

    @property
    def beyond_model(self) -> int:
        """Bytes that the step itself takes: all but parameters, buffers, inputs and the optimizer's state."""
        return sum(self.parts[role] for role in (GRADIENTS, KEPT, TEMPORARY))

    @property
    def advice(self) -> str:
        """A simple way to lower the peak, if there is one; else empty."""
        if not self.head:
            return ""
        return (
            f"Tensors of the size of the output of {self.head} set the peak: torch.nn.functional.linear_cross_entropy computes "
            "the loss without making these logits."
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, as plain numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        listed = ", ".join(f"{bytes_label(size)} {role}" for role, size in self.parts.items() if size)
        lines = [f"peak of a training step: {bytes_label(self.bytes)}, in the {self.moment}", f"  {listed}", self.advice]
        return "\n".join(filter(None, lines))


def optimizer_of(given: Optimizer | None) -> MakeOptimizer | None:
    """A function that makes an optimizer from parameters.

    given  the name of one of torch's optimizers, such as "adamw"; an optimizer, whose class and settings are copied; or a
           function of the parameters

    Raises InputError for a name that torch does not have, and for anything else.
    """
    if given is None:
        return None
    if isinstance(given, torch.optim.Optimizer):
        kind, names = type(given), signature(type(given)).parameters
        settings = {name: value for name, value in given.defaults.items() if name in names}
        return lambda parameters: kind(parameters, **settings)  # pyright: ignore[reportCallIssue]
    if isinstance(given, str):
        known = {name.lower(): each for name, each in vars(torch.optim).items() if _is_optimizer(each)}
        if given.lower() not in known:
            raise InputError(
                f"torch.optim has no optimizer {given!r}; give one of {', '.join(sorted(known))}, or a function of parameters"
            )
        return known[given.lower()]
    if not callable(given):
        raise InputError(
            f"optimizer is a name such as 'adamw', an optimizer, or a function of the parameters that makes one; got {given!r}"
        )
    return given


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer) and thing is not torch.optim.Optimizer


def peak_of(
    forward: Forward,
    make_optimizer: MakeOptimizer | None,
    change: Callable[[Any], Any] = lambda batch: batch,
    tell: Callable[[Seen], None] | None = None,
) -> Peak:
    """The peak of a step of the model as it is now. The model is unchanged afterwards.

    make_optimizer  makes an optimizer from parameters; None for a step without one
    change          makes another batch from the batch of fake tensors
    tell            is called with each operator that runs, of all steps

    Raises InputError if the control flow of the model or the loss depends on numbers, since fake tensors have none, and if the
    optimizer needs a closure or finds no parameters. Passes on what the model, the loss or the optimizer raises on fake
    tensors.
    """
    with forward.untouched(), silent_fakes():
        mode = fake_mode()
        parameters, buffers, batch = forward.fakes(mode)
        names = {id(module): name for name, module in forward.model.named_modules()}
        alive = Alive(_main_device([*parameters.values(), *buffers.values()]), names, partial(_gradients, parameters), tell)
        with mode:
            batch = change(batch)
            there = {"parameters": parameters.values(), "buffers": buffers.values(), "inputs": tensors_in(batch)}
            for role, tensors in there.items():
                alive.enter(tensors, role)
            try:
                with_tensors(forward.model, {**parameters, **buffers}, _train, forward, batch, make_optimizer, alive)
            except RuntimeError as error:
                if not needs_numbers(error):
                    raise
                raise InputError(
                    "the peak is found on fake tensors, which hold no numbers, but the model or its loss reads numbers "
                    f"({type(error).__name__}: {error}); `fewbit bench --model` measures it by running the model"
                ) from error
    return _described(alive, forward.model)


def _train(forward: Forward, batch: Any, make_optimizer: MakeOptimizer | None, alive: Alive) -> None:
    """Run one step; with an optimizer two steps, of which the second counts."""
    optimizer = None if make_optimizer is None else make_optimizer(trainable(forward.model))
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError("LBFGS runs the model several times in a step, so its peak is not known; name another optimizer")
    for _ in range(1 if optimizer is None else 2):
        alive.forget()
        with alive.watching():
            _backward(forward, batch)
        if optimizer is not None:
            with alive.watching(optimizer=True):
                optimizer.step()
            alive.enter(tensors_in(list(optimizer.state.values())), "optimizer")
            optimizer.zero_grad()


def _backward(forward: Forward, batch: Any) -> None:
    roots = roots_of(forward.model, batch, forward.loss_fn)
    torch.autograd.backward(roots, [each.new_ones(()).expand(each.shape) for each in roots])


def main_device(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device that holds most bytes of a model, and the dtype of most bytes there."""
    tensors = [*model.parameters(), *model.buffers()]
    device, sizes = _main_device(tensors), Counter[torch.dtype]()
    for each in tensors:
        if each.device == device and each.is_floating_point():
            sizes[each.dtype] += each.nbytes
    return device, sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


def _main_device(tensors: Iterable[Tensor]) -> torch.device:
    """The device that holds most of their bytes."""
    sizes: Counter[torch.device] = Counter()
    for each in tensors:
        sizes[each.device] += each.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.device("cpu")


def _gradients(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters.values() if each.grad is not None]


def _described(alive: Alive, model: nn.Module) -> Peak:
    parts: dict[str, int] = dict.fromkeys(ROLES, 0)
    modules: Counter[str] = Counter()
    for piece in alive.pieces:
        parts[piece.role] += piece.bytes
        if piece.role in (KEPT, TEMPORARY) and piece.place is not None:
            modules[piece.place.module or ""] += piece.bytes
    head = _head(alive, model, sum(parts[role] for role in (GRADIENTS, KEPT, TEMPORARY)))
    return Peak(alive.most, str(alive.worst), parts, dict(modules.most_common()), head)


def _head(alive: Alive, model: nn.Module, beyond_model: int) -> str:
    """The linear layer whose output has the size of the tensors that take most at the peak. "" if there is none, or if the peak
    is not at that layer or the loss."""
    sizes: Counter[int] = Counter()
    for piece in alive.pieces:
        if piece.role in (KEPT, TEMPORARY):
            sizes[piece.numbers] += piece.bytes
    numbers, taken = next(iter(sizes.most_common(1)), (0, 0))
    name = alive.makers.get(numbers) or ""
    is_linear = isinstance(model.get_submodule(name), nn.Linear)
    return name if is_linear and taken >= _LOGITS * beyond_model and alive.worst.module in (None, "", name) else ""
