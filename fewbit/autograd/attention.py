"""Attention that keeps codes of query, key and value, and neither its output nor anything between.

Backward rebuilds the three, runs torch's own operation again on what was rebuilt, and differentiates that. The probabilities of
rebuilt queries and keys then add up to one, as they do in a forward pass; with the exact log-sum-exp in their place gradients
would err twice as much. Whatever kernel torch chooses, masks, grouped queries and dropout stay torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.quantize import Quantizer, recipe_of, scaled
from fewbit.autograd.rest import narrowed_integers
from fewbit.autograd.sharing import Recipe
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import EagerFunction, hook_on_saved, is_rehearsal, is_watched, not_a_view, unintercepted

Tensor = torch.Tensor
Exact = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def coded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    fine: DeviceTable,
    table: DeviceTable,
    *,
    exact: Exact,
    is_random: bool,
    stochastic: bool = False,
) -> Tensor:
    """exact(query, key, value, mask), differentiated at what codes of the first three stand for.

    The codes are those that a tensor brings along, or its own, as for a linear layer: standardized by head and channel, scaled
    by token. A mask is kept as it is, or as bits. What is seen not to be finite is left to torch, and so are random numbers
    where something looks on, which would draw them once more.

    query, key, value  (batch, …, tokens, channels) or (tokens, channels), floating-point
    mask               what torch's operation takes, or None
    fine, table        of a standard normal number: for query and key, and for value
    exact              torch's operation
    is_random          whether it draws random numbers, for a dropout
    stochastic         as in `fewbit.autograd.quantize.Quantizer`
    """
    if (is_random and is_watched(query) and not is_rehearsal(query)) or key.numel() == 0:
        return exact(query, key, value, mask)
    tensors, tables = (query, key, value), (fine, fine, table)
    recipes = []
    for x, each in zip(tensors, tables, strict=True):
        recipe = recipe_of(x, Quantizer(each, stochastic), _by_token)
        if recipe is None:
            return exact(query, key, value, mask)
        recipes.append(recipe)
    dtype = watched.autocast_dtype(query, key, value)
    if dtype is not None:
        query, key, value = (each.to(dtype) for each in tensors)
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    of_mask = narrowed_integers(mask) if mask is not None and mask.dtype == torch.bool else None
    recipes.append(of_mask or Recipe((mask,), lambda kept, dtype: kept[0]))  # type: ignore[arg-type]
    state = _generator(query.device).get_state() if is_random else None
    y, _ = _CodedAttention.apply(query, key, value, mask, exact, recipes, state)  # type: ignore[misc]
    return y


def _by_token(x: Tensor, quantizer: Quantizer) -> Recipe | None:
    """The recipe of codes of x (batch, …, tokens, channels), in which all that belongs to a token is a row; None where x is
    seen not to be finite. What was expanded is kept once."""
    once = x
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    shape, by_token = x.shape, once.movedim(-2, 1).flatten(2) if x.dim() > 2 else once
    order = (*once.shape[:1], *once.shape[-2:-1], *once.shape[1:-2], *once.shape[-1:])  # tokens before heads
    found = scaled(by_token, quantizer, -1)
    if found is None:
        return None
    rebuild = found.rebuild

    def rebuilt(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        made = rebuild(kept, dtype)
        return (made.view(order).movedim(1, -2) if len(shape) > 2 else made).expand(shape)

    return found._replace(rebuild=rebuilt)


@contextmanager
def _random_numbers(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """A context in which random numbers on the device start from a state, if there is one; after it they go on as before it."""
    if state is None:
        yield
        return
    generator = _generator(device)
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


class _CodedAttention(EagerFunction):
    """Its second output is the anchor of `differentiable_once`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        exact: Exact,
        recipes: Sequence[Recipe],
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        anchor = query.new_empty(0)
        ctx.save_for_backward(anchor, state, *(tensor for each in recipes for tensor in each.kept))
        ctx.set_materialize_grads(False)
        ctx.parts = [(each.rebuild, len(each.kept)) for each in recipes]
        ctx.exact, ctx.dtype = exact, query.dtype
        y, _ = _with_graph(exact, (query, key, value, mask), ctx.needs_input_grad[:4])
        return not_a_view(y.detach()), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, nothing = grads[0], (None,) * 3
        if grad is None:
            return *(None,) * 4, *nothing
        anchor, state, *kept = ctx.saved_tensors
        tensors = []
        for rebuild, number in ctx.parts:
            tensors.append(rebuild(kept[:number], ctx.dtype))
            kept = kept[number:]
        needed = ctx.needs_input_grad[:4]
        with unintercepted():  # by `patch`, which would code it once more
            with _random_numbers(anchor.device, state):
                y, leaves = _with_graph(ctx.exact, tensors, needed)
            wanted = [leaf for leaf, needs in zip(leaves, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(y, wanted, grad))  # type: ignore[arg-type]
        return *(differentiable_once(next(found), grad, anchor) if needs else None for needs in needed), *nothing


def _with_graph(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Any, ...]:
    """function(*tensors) with a graph down to leaves that hold the tensors, and these leaves.

    torch may choose a kernel by whether gradients are needed: the one that is chosen here is that of exact training. What
    others do with saved tensors (offload them, make them anew) is not done with those of this graph, which does not last.
    """
    with torch.enable_grad(), _PLAIN() if hook_on_saved() else nullcontext():
        leaves = [
            each.detach().requires_grad_(needs) if each is not None else None
            for each, needs in zip(tensors, needed, strict=True)
        ]
        return function(*leaves), leaves


_PLAIN = partial(torch.autograd.graph.saved_tensors_hooks, Tensor.detach, lambda tensor: tensor)


def _generator(device: torch.device) -> torch.Generator:
    """The one from which torch's operations draw on that device."""
    if device.type == "cpu":
        return torch.default_generator
    return getattr(torch, device.type).default_generators[device.index]
