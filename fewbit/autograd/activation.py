"""A pointwise activation that keeps packed codes for backward, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels
from fewbit.autograd import traced
from fewbit.kernels import Coder, Formula, ops

Tensor = torch.Tensor


def coded_activation(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    coder: Coder,
    forward_inplace: Callable[[Tensor], Tensor] | None = None,
    formula: Formula | None = None,
) -> Tensor:
    """forward(x), whose backward multiplies by the level of each x's code instead of by f'(x).

    x                floating-point, any shape and strides
    forward          the exact operation
    forward_inplace  the same, overwriting its argument and returning it; where given, x is overwritten
    formula          the operation's, where it has one, so that a backend may compute it and the codes in one pass
    Returns          what the operation returns. Kept for backward: packed codes of ceil(n·bits/8) bytes plus at most 512.

    The gradient can be taken once: differentiating it again raises InputError, since codes carry no second derivative.
    """
    if traced.is_watched(x):
        return traced.coded_activation(x, forward, coder, forward_inplace)
    return _CodedActivation.apply(x, forward, coder, forward_inplace, formula)[0]  # type: ignore[index]


class _CodedActivation(torch.autograd.Function):
    """Its second output, the anchor, has no data but a place in the graph, for `_Once`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable, coder: Coder, forward_inplace: Callable | None, formula: Formula | None
    ) -> tuple[Tensor, Tensor]:
        contiguous = x.is_contiguous()
        if forward_inplace is None and contiguous:
            y, packed = kernels.forward(x, coder, forward, formula)
        else:
            packed = kernels.encode(x if contiguous else _in_memory_order(x), coder)
            y = (forward_inplace or forward)(x)
            if forward_inplace is not None:
                ctx.mark_dirty(x)
        anchor = x.new_empty(0)
        ctx.save_for_backward(packed, anchor)
        ctx.set_materialize_grads(False)
        ctx.coded = coder, x.dtype, forward, None if contiguous else (x.shape, x.stride())
        return y, anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        packed, anchor = ctx.saved_tensors
        coder, dtype, exact, layout = ctx.coded
        if layout is None and grad.is_contiguous() and not traced.is_watched(grad):
            grad_x = kernels.decode(packed, grad, coder)
        else:
            grad_x = _in_its_layout(packed, grad, coder, exact, layout)
        if grad_x.dtype != dtype:
            grad_x = grad_x.to(dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad_x = _Once.apply(grad_x, grad, anchor)
        return grad_x, None, None, None, None


class _Once(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated again, by whatever way: `grad` and `anchor` tie it to the graphs
    of the incoming gradient and of the activation, so that no second derivative passes it by."""

    @staticmethod
    def forward(ctx: Any, grad_x: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad_x.view_as(grad_x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        ops.refuse_second_derivative()


def _in_memory_order(x: Tensor) -> Tensor:
    """Codes follow memory, not the logical order, so that dense inputs of any strides are read without a copy."""
    return x.permute(_memory_order(x.stride())).reshape(-1)


def _in_its_layout(
    packed: Tensor, grad: Tensor, coder: Coder, exact: Callable[[Tensor], Tensor], layout: tuple | None
) -> Tensor:
    """The gradient of an x, or from a grad, that is not contiguous, or where a transform looks on."""
    shape, stride = layout or (grad.shape, torch.empty(grad.shape, device="meta").stride())
    order, watched = _memory_order(stride), traced.is_watched(grad)
    product = (traced.decode if watched else kernels.decode)(packed, grad.permute(order).reshape(-1), coder)
    grad_x = product.view([shape[dim] for dim in order]).permute(traced.inverse(order))
    if grad.stride() != grad_x.stride() and not watched:
        grad_x = _as_torch_lays_out(grad_x, grad, stride, exact)
    return grad_x


def _memory_order(stride: tuple[int, ...]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _as_torch_lays_out(grad_x: Tensor, grad: Tensor, stride: tuple[int, ...], forward: Callable[[Tensor], Tensor]) -> Tensor:
    """grad_x with the strides that torch's own backward gives where the layouts of x and grad differ.

    Which of the two it follows depends on the operation: asked of torch itself, on tensors of two elements a dimension.
    """
    if grad_x.numel() == 0:
        return grad_x
    x, small_grad = _miniature(grad, stride).requires_grad_(), _miniature(grad, grad.stride())
    with torch.enable_grad():
        (like,) = torch.autograd.grad(forward(x), x, small_grad)
    order = _memory_order(like.stride())
    result = torch.empty([grad_x.shape[dim] for dim in order], dtype=grad_x.dtype, device=grad_x.device).permute(
        traced.inverse(order)
    )
    return result.copy_(grad_x)


def _miniature(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zeros with at most two elements in each of the tensor's dimensions, laid out in the order of the given strides."""
    sizes, strides, step = [min(size, 2) for size in tensor.shape], [0] * tensor.dim(), 1
    for dim in reversed(_memory_order(stride)):
        if stride[dim]:
            strides[dim], step = step, step * sizes[dim]
    return torch.zeros(step, device=tensor.device).as_strided(sizes, strides)
