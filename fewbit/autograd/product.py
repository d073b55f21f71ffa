"""Layers that multiply by a weight: linear and convolution. Exact but for the weight's gradient, which is made from codes.

With y = x W^T + b, backward needs W for x's gradient, which is exact, and x for W's alone: that is what the codes stand for
(Chakrabarti and Moseley, NeurIPS 2019, section 3). Errors therefore do not add up from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from fewbit.autograd import sharing, watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.quantize import Quantizer, scaled
from fewbit.autograd.sharing import Recipe
from fewbit.errors import InputError
from fewbit.kernels import DeviceTable

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
        """The gradients of x, weight and bias, those needed. x is a shape where the weight's is not needed, and likewise the
        weight may be anything of its shape where x's is not."""
        ...


class Linear(NamedTuple):
    """x (*, in), weight (out, in), bias (out,) or None -> (*, out)."""

    channel: int = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def grads(self, grad: Tensor, x: Any, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        rows = _rows(grad)
        return (
            grad @ weight if needed[0] else None,
            rows.t() @ _rows(x) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


class TransposedLinear(NamedTuple):
    """x (*, in), weight (in, out), bias (out,) -> (*, out), as Hugging Face's Conv1D computes it."""

    channel: int = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view((*x.size()[:-1], weight.size(1)))

    def grads(self, grad: Tensor, x: Any, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = Linear().grads(grad, x, weight.t(), needed)
        return grad_x, None if grad_weight is None else grad_weight.t(), grad_bias


def _rows(x: Tensor) -> Tensor:
    """(*, n) as (rows, n)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


class Convolution(NamedTuple):
    """x (batch, in, *), weight (out, in / groups, *), or (in, out / groups, *) if transposed -> (batch, out, *).

    For each spatial dimension an integer of: stride, padding, dilation, output_padding.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    channel: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # not torch.convolution, which refuses complex numbers
        if self.transposed:
            transposed = getattr(torch, f"conv_transpose{len(self.stride)}d")
            return transposed(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        function = getattr(torch, f"conv{len(self.stride)}d")
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def grads(self, grad: Tensor, x: Any, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        if not isinstance(x, Tensor):  # its shape alone is looked at
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
    missing = [step * (size - 1) * (padding == "same") for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(each % 2 for each in missing):  # as torch does: one more behind
        input = torch.nn.functional.pad(input, [part for each in reversed(missing) for part in (0, each % 2)])
    return input, tuple(each // 2 for each in missing)


def coded_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: DeviceTable, *, product: Product, stochastic: bool = False
) -> Tensor:
    """product(x, weight, bias), whose weight gradient is that of codes of x.

    The codes are those that x brings along from the layer that made it, or from one that read it before; or none, but x itself,
    where the operation that made it keeps it anyway; or codes of its own, with scales, which x brings along from then on.
    Nothing of x is kept if the weight needs no gradient.

    table       of a standard normal number, for codes of its own
    product     the operation
    stochastic  as in `fewbit.autograd.quantize.Quantizer`; for codes of its own
    """
    recipe = None
    if weight.requires_grad:
        recipe = sharing.find(x)
        if recipe is not None and recipe.bits is not None and (stochastic or recipe.bits < table.bits):
            recipe = None  # codes that another reader made, of less than is asked for here
        if recipe is None and sharing.is_kept_exactly(x):
            recipe = sharing.as_it_is(x)
        if recipe is None:
            with torch.no_grad():
                recipe = scaled(x, Quantizer(table, stochastic), product.channel)
            # a leaf, such as a batch, may outlive this pass, and its codes with it
            if x.grad_fn is not None and not stochastic:
                sharing.attach(x, recipe._replace(bits=table.bits))
    if watched.is_autocast(x):
        x, weight, bias = _autocast(x, weight, bias)
    y, _ = _CodedProduct.apply(x, weight, bias, product, recipe)  # type: ignore[misc]
    return y


def _autocast(*tensors: Tensor | None) -> Sequence[Any]:
    """The tensors as autocast gives them to torch's operation, which here runs where autocast does not reach."""
    found = (each for each in tensors if each is not None)
    if any(each.dtype == torch.float64 for each in found):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
    return [each if each is None else each.to(dtype) for each in tensors]


class _CodedProduct(torch.autograd.Function):
    """Its second output is the anchor of `differentiable_once`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, recipe: Recipe | None
    ) -> tuple[Tensor, Tensor]:
        anchor = x.new_empty(0)
        kept = recipe.kept if recipe else ()
        ctx.save_for_backward(anchor, weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.set_materialize_grads(False)
        ctx.product, ctx.rebuild, ctx.shapes = product, recipe and recipe.rebuild, (x.shape, weight.shape)
        return product(x, weight, bias), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        anchor, weight, *kept = ctx.saved_tensors
        needed, (x_shape, weight_shape) = ctx.needs_input_grad[:3], ctx.shapes
        if weight is None:
            weight = grad.new_empty(1).expand(weight_shape)
        x = ctx.rebuild(kept, grad.dtype) if needed[1] else x_shape
        found = ctx.product.grads(grad, x, weight, needed)
        return *(each if each is None else differentiable_once(each, grad, anchor) for each in found), None, None
