"""Layers that multiply by a weight: linear and convolution. All is exact except the weight's gradient, which comes from codes.

With y = x W^T + b, backward needs W for x's gradient, which is exact. It needs x only for W's gradient; codes stand for x there
(Chakrabarti and Moseley, NeurIPS 2019, section 3). Errors therefore do not add up from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.quantize import Quantizer, nan_if_not_finite, recipe_of, scaled
from fewbit.autograd.sharing import Recipe, attach
from fewbit.errors import InputError
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import EagerFunction, is_distributed, not_a_view

Tensor = torch.Tensor


class Product(Protocol):
    """An operation that is linear in x and in the weight."""

    @property
    def channel(self) -> int:
        """x's dimension of channels, as `fewbit.autograd.quantize.scaled` takes it."""
        ...

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's own operation."""
        ...

    def grads(
        self, grad: Tensor, x: Tensor | Sequence[int], weight: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The needed gradients of x, weight and bias; None for others. If the weight's gradient is not needed, x is a shape. If
        x's is not needed, the weight may be any tensor of its shape."""
        ...


class Linear(NamedTuple):
    """x (*, in), weight (out, in), bias (out,) or None -> (*, out)."""

    channel: int = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def grads(self, grad: Tensor, x: Any, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        rows = _rows(grad)
        return (
            (rows @ weight).view(*grad.shape[:-1], weight.shape[1]) if needed[0] else None,
            rows.t() @ _rows(x) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


def _rows(x: Tensor) -> Tensor:
    """(*, n) as (rows, n)."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


class Convolution(NamedTuple):
    """x (batch, in, *), weight (out, in / groups, *), or (in, out / groups, *) if transposed -> (batch, out, *).

    stride, padding, dilation and output_padding have an integer for each spatial dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    channel: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch.convolution is not used because it refuses complex numbers
        if self.transposed:
            transposed = getattr(torch, f"conv_transpose{len(self.stride)}d")
            return transposed(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        function = getattr(torch, f"conv{len(self.stride)}d")
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def grads(self, grad: Tensor, x: Any, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        if not isinstance(x, Tensor):  # torch only reads its shape
            x = grad.new_empty(1).expand(x)
        channels = grad.shape[1]
        return torch.ops.aten.convolution_backward(grad, x, weight, [channels], *self[:-1], list(needed))


def numbers(number: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each dimension.

    >>> numbers(1, 2), numbers((1, 2), 2), numbers([3], 2)
    ((1, 1), (1, 2), (3, 3))
    """
    found = (number,) if isinstance(number, int) else tuple(number)
    return found * dims if len(found) == 1 else found


def padded(input: Tensor, weight: Tensor, padding: str, dilation: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the padding, the same on both sides, for padding="same" or "valid"."""
    if padding not in ("same", "valid"):
        raise InputError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    if weight.dim() != len(dilation) + 2:
        return input, (0,) * len(dilation)  # torch's convolution raises its own error
    missing = [step * (size - 1) * (padding == "same") for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(each % 2 for each in missing):  # as in torch, the odd one is added at the end
        input = torch.nn.functional.pad(input, [part for each in reversed(missing) for part in (0, each % 2)])
    return input, tuple(each // 2 for each in missing)


def coded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: DeviceTable, *, product: Product, stochastic: bool = False
) -> Tensor:
    """product(x, weight, bias). The weight's gradient comes from codes of x.

    If x has codes, from the layer that made it or from a layer that read it, these are kept. If x needs no gradient, as a
    batch, or the operation that made x keeps it anyway, x itself is kept. Otherwise new codes with scales are made, and later
    layers that read x find them. If the weight needs no gradient, nothing of x is kept. If x is seen not to be finite, the call
    is torch's own.

    table       table of a standard normal number, for new codes
    product     the operation
    stochastic  as in `fewbit.autograd.quantize.Quantizer`, for new codes

    A linear layer may make its output from a much narrower x, such as the second half of a low-rank pair. Layers that read this
    output keep the codes of x and the weight, which are kept anyway, and multiply again.
    """
    recipe, lost = None, None
    if weight.requires_grad:
        recipe = recipe_of(x, Quantizer(table, stochastic), partial(scaled, channel=product.channel))
        if recipe is None:
            return product(x, weight, bias)
        lost = nan_if_not_finite(x.detach(), product.channel) if recipe.hides else None
    dtype = watched.autocast_dtype(x, weight, bias)
    y, _ = _CodedProduct.apply(x, weight, bias, product, recipe, lost, dtype)  # type: ignore[misc]
    if recipe is not None and x.requires_grad and isinstance(product, Linear) and _is_wide(weight):
        attach(y, _widened(recipe, weight, bias))
    return y


# How much narrower x must be. Multiplying again takes as many operations per output element as x is wide. The factor is a
# heuristic. At 8, this is a small part of the other products of a layer of that width, and the codes of x take at most an
# eighth of those of the output.
_NARROW = 8


def _is_wide(weight: Tensor) -> bool:
    """Whether a linear layer's output is much wider than its input. False in distributed training, which may free the memory of
    a sharded weight before backward."""
    return _NARROW * weight.shape[1] <= weight.shape[0] and not is_distributed()


def _widened(recipe: Recipe, weight: Tensor, bias: Tensor | None) -> Recipe:
    """The recipe of a linear layer's output, from the recipe of its input. The layer keeps the weight and the codes anyway."""
    rebuild_x, count = recipe.rebuild, len(recipe.kept)
    parameters = [each.detach() for each in (weight, bias) if each is not None]

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        weight, *bias = (each.to(dtype) for each in kept[count:])
        return torch.nn.functional.linear(rebuild_x(kept[:count], dtype), weight, *bias)

    return Recipe((*recipe.kept, *parameters), rebuild, bits=recipe.bits, hides=recipe.hides)


class _CodedProduct(EagerFunction):
    """The second output is the anchor of `differentiable_once`.

    Under autocast the weight itself is kept, and cast again in backward. It is in memory anyway, and each use of a shared
    weight would keep its own cast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Product,
        recipe: Recipe | None,
        lost: Tensor | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        anchor = x.new_empty(0)
        kept = recipe.kept if recipe else ()
        ctx.save_for_backward(anchor, weight if ctx.needs_input_grad[0] else None, lost, *kept)
        ctx.set_materialize_grads(False)
        ctx.product, ctx.rebuild, ctx.shapes = product, recipe and recipe.rebuild, (x.shape, weight.shape)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return not_a_view(product(x, weight, bias)), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 7
        anchor, weight, lost, *kept = ctx.saved_tensors
        needed, (x_shape, weight_shape) = ctx.needs_input_grad[:3], ctx.shapes
        weight = grad.new_empty(1).expand(weight_shape) if weight is None else weight.to(grad.dtype)
        x = ctx.rebuild(kept, grad.dtype) if needed[1] else x_shape
        if lost is not None and needed[1]:
            _one_place_of_each_channel(x, ctx.product.channel).add_(lost)
        found = ctx.product.grads(grad, x, weight, needed)
        return *(each if each is None else differentiable_once(each, grad, anchor) for each in found), *(None,) * 4


def _one_place_of_each_channel(x: Tensor, channel: int) -> Tensor:
    """A view (channels,) of x. For images it is the middle, which every element of a convolution's weight reads."""
    for _ in range(x.dim() - 1 - channel % x.dim()):
        x = x.select(-1, x.shape[-1] // 2)
    while x.dim() > 1:
        x = x[0]
    return x
