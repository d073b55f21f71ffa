"""Operations of torch that run again in backward, on operands rebuilt from codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.sharing import Recipe
from fewbit.torch_internals import EagerFunction, hook_on_saved, not_a_view, unintercepted

Tensor = torch.Tensor


class Recomputed(EagerFunction):
    """function(*operands), and the anchor of `differentiable_once`.

    function  function of torch; its result is a tensor of the first operand's dtype
    recipes   what to keep of each operand
    state     state of the random numbers with which it runs; None if it draws none
    operands  tensors of one dtype, masks of booleans, or None
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        recipes: Sequence[Recipe],
        state: Tensor | None,
        *operands: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        first = operands[0]
        assert first is not None, "it is the input"
        anchor = first.new_empty(0)
        ctx.save_for_backward(anchor, state, *(tensor for each in recipes for tensor in each.kept))
        ctx.set_materialize_grads(False)
        ctx.parts = [(each.rebuild, len(each.kept)) for each in recipes]
        ctx.function, ctx.dtype = function, first.dtype
        y, _ = _with_graph(function, operands, ctx.needs_input_grad[3:])
        return not_a_view(y.detach()), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, needed = grads[0], ctx.needs_input_grad[3:]
        if grad is None:
            return *(None,) * 3, *(None for _ in needed)
        anchor, state, *kept = ctx.saved_tensors
        operands = []
        for rebuild, number in ctx.parts:
            operands.append(rebuild(kept[:number], ctx.dtype))
            kept = kept[number:]
        with unintercepted():  # `patch` would code the operation again
            with _random_numbers(anchor.device, state):
                y, leaves = _with_graph(ctx.function, operands, needed)
            wanted = [leaf for leaf, needs in zip(leaves, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(y, wanted, grad))  # type: ignore[arg-type]
        return *(None,) * 3, *(differentiable_once(next(found), grad, anchor) if needs else None for needs in needed)


def in_autocast(*operands: Any) -> Sequence[Any]:
    """The operands in the dtype in which autocast runs an operation. Masks of booleans and None stay as they are."""
    dtype = watched.autocast_dtype(*(each for each in operands if each is not None and each.is_floating_point()))
    if dtype is None:
        return operands
    return [each.to(dtype) if each is not None and each.is_floating_point() else each for each in operands]


def generator_of(device: torch.device) -> torch.Generator:
    """The generator from which torch's operations draw on that device."""
    if device.type == "cpu":
        return torch.default_generator
    return getattr(torch, device.type).default_generators[device.index]


def _with_graph(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Any, ...]:
    """function(*tensors) with a graph down to leaves that hold the tensors, and these leaves.

    torch may choose a kernel by whether gradients are needed. With a graph it chooses the kernel of exact training. This graph
    does not last, so hooks on saved tensors (offloading, checkpointing) do not apply to it.
    """
    with torch.enable_grad(), _PLAIN() if hook_on_saved() else nullcontext():
        leaves = [
            each.detach().requires_grad_(needs) if each is not None else None
            for each, needs in zip(tensors, needed, strict=True)
        ]
        return function(*leaves), leaves


_PLAIN = partial(torch.autograd.graph.saved_tensors_hooks, Tensor.detach, lambda tensor: tensor)


@contextmanager
def _random_numbers(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """A context in which random numbers on the device start from `state`, if it is given. After it they go on as before."""
    if state is None:
        yield
        return
    generator = generator_of(device)
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
