"""A pointwise activation that keeps packed codes for backward, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels
from fewbit.autograd import traced
from fewbit.errors import InputError
from fewbit.kernels import Coder

Tensor = torch.Tensor


def coded_activation(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    coder: Coder,
    forward_inplace: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """forward(x), whose backward multiplies by the level of each x's code instead of by f'(x).

    x                floating-point, any shape and strides
    forward          the exact operation
    forward_inplace  the same, overwriting its argument and returning it; where given, x is overwritten
    Returns          what the operation returns. Kept for backward: packed codes of ceil(n·bits/8) bytes plus at most 512.

    The gradient can be taken once: differentiating it again raises InputError, since codes carry no second derivative.
    """
    if traced.is_watched(x):
        return traced.coded_activation(x, forward, coder, forward_inplace)
    anchor = torch.as_strided_copy(x, (0,), (1,))  # no data, but a place in x's graph, for `_Once`
    return _CodedActivation.apply(x, anchor, forward, coder, forward_inplace)  # type: ignore[return-value]


class _CodedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, forward: Callable, coder: Coder, forward_inplace: Callable | None
    ) -> Tensor:
        packed = _encode(x, coder)  # before f may overwrite x
        ctx.save_for_backward(packed)
        ctx.anchor, ctx.exact, ctx.coder = anchor, forward, coder
        ctx.shape, ctx.stride, ctx.dtype = x.shape, x.stride(), x.dtype
        if forward_inplace is None:
            return forward(x)
        ctx.mark_dirty(x)
        return forward_inplace(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        order = _memory_order(ctx.stride)
        flat = grad.permute(order).reshape(-1)
        watched = traced.is_watched(grad)
        product = (traced.decode if watched else kernels.decode)(packed, flat, ctx.coder).to(ctx.dtype)
        grad_x = product.view([ctx.shape[dim] for dim in order]).permute(_inverse(order))
        if grad.stride() != grad_x.stride() and not watched:
            grad_x = _as_torch_lays_out(grad_x, grad, ctx.stride, ctx.exact)
        if torch.is_grad_enabled():  # create_graph=True
            grad_x = _Once.apply(grad_x, grad, ctx.anchor)
        return grad_x, None, None, None, None


class _Once(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated again, by whatever way: `grad` and `anchor` tie it to the graphs
    of the incoming gradient and of the input, so that no second derivative passes it by."""

    @staticmethod
    def forward(ctx: Any, grad_x: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad_x.view_as(grad_x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise InputError(
            "the gradient of a coded activation can be taken once: its codes hold f' but no second derivative; "
            "for double backward (gradient penalties, Hessians) use torch's own activation"
        )


def _encode(x: Tensor, coder: Coder) -> Tensor:
    """Codes follow memory, not the logical order, so that dense inputs of any strides are read without a copy."""
    flat = x.permute(_memory_order(x.stride())).reshape(-1)
    return kernels.encode(flat, coder)


def _memory_order(stride: tuple[int, ...]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _inverse(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    return inverse


def _as_torch_lays_out(grad_x: Tensor, grad: Tensor, stride: tuple[int, ...], forward: Callable[[Tensor], Tensor]) -> Tensor:
    """grad_x with the strides that torch's own backward gives where the layouts of x and grad differ.

    Which of the two it follows depends on the operation: asked of torch itself, on tensors of two elements a dimension.
    """
    if grad_x.numel() == 0:
        return grad_x
    x, small_grad = _miniature(grad.shape, stride).requires_grad_(), _miniature(grad.shape, grad.stride())
    with torch.enable_grad():
        (like,) = torch.autograd.grad(forward(x), x, small_grad)
    order = _memory_order(like.stride())
    result = torch.empty([grad_x.shape[dim] for dim in order], dtype=grad_x.dtype, device=grad_x.device).permute(
        _inverse(order)
    )
    return result.copy_(grad_x)


def _miniature(shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Zeros with at most two elements a dimension, laid out in the order of the given strides."""
    sizes, strides, step = [min(size, 2) for size in shape], [0] * len(shape), 1
    for dim in reversed(_memory_order(stride)):
        if stride[dim]:
            strides[dim], step = step, step * sizes[dim]
    return torch.zeros(step).as_strided(sizes, strides)
