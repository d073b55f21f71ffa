"""Attention that keeps codes of query, key and value, and no output or intermediate results.

Backward rebuilds query, key and value, runs torch's own operation on them again, and differentiates that. The probabilities of
the rebuilt queries and keys then add up to one, as in a forward pass. If backward used the exact log-sum-exp instead, gradients
would have twice the error. torch chooses the kernel, and handles masks, grouped queries and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fewbit.autograd.quantize import Quantizer, recipe_of, scaled
from fewbit.autograd.recomputed import Recomputed, generator_of, in_autocast
from fewbit.autograd.rest import narrowed_integers
from fewbit.autograd.sharing import Recipe
from fewbit.kernels import DeviceTable
from fewbit.kernels.layers import SAMPLE
from fewbit.torch_internals import is_rehearsal, is_watched

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
    """exact(query, key, value, mask), differentiated at the tensors that codes of query, key and value give.

    A tensor that already has codes keeps them. Other tensors get codes as in a linear layer, standardized by head and channel
    and scaled by token. A mask is kept as it is, or as bits. The call is torch's own if a tensor is seen not to be finite. It
    is also torch's own if it draws random numbers in watched code, where they would be drawn a second time.

    query, key, value  (batch, …, tokens, channels) or (tokens, channels), floating-point
    mask               what torch's operation takes, or None
    fine, table        tables of a standard normal number: `fine` for query and key, `table` for value
    exact              torch's operation
    is_random          whether it draws random numbers for a dropout
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
    query, key, value, mask = in_autocast(query, key, value, mask)
    of_mask = narrowed_integers(mask) if mask is not None and mask.dtype == torch.bool else None
    recipes.append(of_mask or Recipe((mask,), lambda kept, dtype: kept[0]))  # type: ignore[arg-type]
    state = generator_of(query.device).get_state() if is_random else None
    y, _ = _CodedAttention.apply(exact, recipes, state, query, key, value, mask)  # type: ignore[misc]
    return y


def _by_token(x: Tensor, quantizer: Quantizer) -> Recipe | None:
    """The recipe of codes of x (batch, …, tokens, channels), with one row for each token; None if x is seen not to be finite.
    Elements of expanded dimensions are kept once."""
    once = x
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    shape, by_token = x.shape, once.movedim(-2, 1).flatten(2) if x.dim() > 2 else once
    order = (*once.shape[:1], *once.shape[-2:-1], *once.shape[1:-2], *once.shape[-1:])  # tokens before heads
    found = scaled(by_token, quantizer, -1, sample=SAMPLE)
    if found is None:
        return None
    rebuild = found.rebuild

    def rebuilt(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        made = rebuild(kept, dtype)
        return (made.view(order).movedim(1, -2) if len(shape) > 2 else made).expand(shape)

    return found._replace(rebuild=rebuilt)


class _CodedAttention(Recomputed):
    """A class of its own, because reports show its name."""
