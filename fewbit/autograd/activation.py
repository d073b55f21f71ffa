"""A pointwise activation that keeps packed codes for backward, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels
from fewbit.autograd import traced
from fewbit.autograd.codes import times, values
from fewbit.autograd.handle import Recipe, attach
from fewbit.autograd.layout import Layout, inverse, memory_order
from fewbit.autograd.once import once
from fewbit.kernels import Coder, Formula

Tensor = torch.Tensor
Operation = Callable[[Tensor], Tensor]


def coded_activation(
    x: Tensor,
    forward: Operation,
    coder: Coder,
    forward_inplace: Operation | None = None,
    formula: Formula | None = None,
    value_coder: Coder | None = None,
) -> Tensor:
    """forward(x), whose backward multiplies by the level of each x's code instead of by f'(x).

    x                floating-point, any shape and strides
    forward          the exact operation
    forward_inplace  the same, overwriting its argument and returning it; where given, x is overwritten
    formula          the operation's, where it has one, so that a backend may compute it and the codes in one pass
    value_coder      the same codes with the levels of f: given, coded layers that read the result find its recipe
    Returns          what the operation returns. Kept for backward: packed codes of ceil(n·bits/8) bytes plus at most 512.

    The gradient can be taken once: differentiating it again raises InputError, since codes carry no second derivative.
    """
    watched = traced.is_watched(x)
    if value_coder is None and not watched:
        return _CodedActivation.apply(x, forward, coder, forward_inplace, formula, False)[0]  # type: ignore[index]
    layout = Layout.of(x)
    if watched:
        y, packed = traced.coded_activation(x, forward, coder, forward_inplace)
    else:
        y, _, packed = _CodedActivation.apply(x, forward, coder, forward_inplace, formula, True)  # type: ignore[misc]
    if value_coder is None or traced.is_transformed():
        return y
    return attach(y, Recipe((packed,), lambda kept, dtype: values(kept[0], layout, dtype, value_coder)))


def activation_of_coded(
    x: Tensor, recipe: Recipe, forward: Operation, slopes: tuple[float, float], forward_inplace: Operation | None = None
) -> Tensor:
    """forward(x) of an x that has a recipe which keeps its sign, for an f of two straight lines that meet in 0.

    slopes  f' below and above 0

    Keeps what the recipe keeps and no more: one code for what made x, for f and for the readers of f(x).
    """
    y, _ = _ActivationOfCoded.apply(x, recipe, forward, slopes, forward_inplace)  # type: ignore[misc]
    rebuild, keeps_sign = recipe.rebuild, slopes[0] >= 0 < slopes[1]
    return attach(y, Recipe(recipe.kept, lambda kept, dtype: forward(rebuild(kept, dtype)), keeps_sign))


class _CodedActivation(torch.autograd.Function):
    """Its second output, the anchor, has no data but a place in the graph, for `once`; a third, if asked for, is the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Operation,
        coder: Coder,
        forward_inplace: Operation | None,
        formula: Formula | None,
        with_codes: bool,
    ) -> tuple[Tensor, ...]:
        contiguous = x.is_contiguous()
        if forward_inplace is None and contiguous:
            y, packed = kernels.forward(x, coder, forward, formula)
        else:
            packed = kernels.encode(x if contiguous else Layout.of(x).flatten(x), coder)
            y = (forward_inplace or forward)(x)
            if forward_inplace is not None:
                ctx.mark_dirty(x)
        anchor = x.new_empty(0)
        ctx.save_for_backward(packed, anchor)
        ctx.set_materialize_grads(False)
        ctx.coded = coder, x.dtype, forward, None if contiguous else (x.shape, x.stride())
        if not with_codes:
            return y, anchor
        ctx.mark_non_differentiable(packed)
        return y, anchor, packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 6
        packed, anchor = ctx.saved_tensors
        coder, dtype, exact, layout = ctx.coded
        if layout is None and grad.is_contiguous() and not traced.is_watched(grad):
            grad_x = kernels.decode(packed, grad, coder)
        else:
            grad_x = _in_its_layout(packed, grad, coder, exact, layout)
        if grad_x.dtype != dtype:
            grad_x = grad_x.to(dtype)
        return once(grad_x, grad, anchor), None, None, None, None, None


class _ActivationOfCoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe,
        forward: Operation,
        slopes: tuple[float, float],
        forward_inplace: Operation | None,
    ) -> tuple[Tensor, Tensor]:
        y = (forward_inplace or forward)(x)
        if forward_inplace is not None:
            ctx.mark_dirty(x)
        anchor = x.new_empty(0)
        ctx.save_for_backward(anchor, *recipe.kept)
        ctx.set_materialize_grads(False)
        ctx.coded = recipe.rebuild, x.dtype, slopes
        return y, anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        anchor, *kept = ctx.saved_tensors
        rebuild, dtype, (below, above) = ctx.coded
        # above times leaky_relu's backward with the slope below / above
        grad_x = torch.ops.aten.leaky_relu_backward(grad, rebuild(kept, grad.dtype), below / above, False)
        grad_x = (grad_x if above == 1 else above * grad_x).to(dtype)
        return once(grad_x, grad, anchor), None, None, None, None


def _in_its_layout(
    packed: Tensor, grad: Tensor, coder: Coder, exact: Callable[[Tensor], Tensor], layout: tuple | None
) -> Tensor:
    """The gradient of an x, or from a grad, that is not contiguous, or where a transform looks on."""
    shape, stride = layout or (grad.shape, torch.empty(grad.shape, device="meta").stride())
    grad_x = times(packed, grad, coder, Layout(shape, tuple(memory_order(stride))))
    if grad.stride() != grad_x.stride() and not traced.is_watched(grad):
        grad_x = _as_torch_lays_out(grad_x, grad, stride, exact)
    return grad_x


def _as_torch_lays_out(grad_x: Tensor, grad: Tensor, stride: tuple[int, ...], forward: Callable[[Tensor], Tensor]) -> Tensor:
    """grad_x with the strides that torch's own backward gives where the layouts of x and grad differ.

    Which of the two it follows depends on the operation: asked of torch itself, on tensors of two elements a dimension.
    """
    if grad_x.numel() == 0:
        return grad_x
    x, small_grad = _miniature(grad, stride).requires_grad_(), _miniature(grad, grad.stride())
    with torch.enable_grad(), torch._C.DisableTorchFunction():  # nor any mode that changes what the operation is
        (like,) = torch.autograd.grad(forward(x), x, small_grad)
    order = memory_order(like.stride())
    result = torch.empty([grad_x.shape[dim] for dim in order], dtype=grad_x.dtype, device=grad_x.device).permute(inverse(order))
    return result.copy_(grad_x)


def _miniature(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zeros with at most two elements in each of the tensor's dimensions, laid out in the order of the given strides."""
    sizes, strides, step = [min(size, 2) for size in tensor.shape], [0] * tensor.dim(), 1
    for dim in reversed(memory_order(stride)):
        if stride[dim]:
            strides[dim], step = step, step * sizes[dim]
    return torch.zeros(step, device=tensor.device).as_strided(sizes, strides)
