"""A pointwise activation that keeps packed codes for backward, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels, torch_internals
from fewbit.autograd import sharing, watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import times, values
from fewbit.autograd.sharing import Recipe
from fewbit.errors import OverwriteError
from fewbit.kernels import DeviceTable, Formula

Tensor = torch.Tensor
Forward = Callable[[Tensor], Tensor]


def coded_activation(
    x: Tensor, table: DeviceTable, value_table: DeviceTable | None = None, *, forward: Forward, formula: Formula | None = None
) -> Tensor:
    """forward(x), whose backward multiplies by the level of each x's code instead of by f'(x).

    x            floating-point, any shape and strides
    table        of f'
    value_table  the same codes with the levels of f: given, layers that read the result find its recipe
    forward      the exact operation
    formula      the operation's, where it has one, so that a backend may compute it and the codes in one pass
    Returns      what the operation returns. Kept for backward: packed codes of ceil(n·bits/8) bytes plus at most 512.

    The gradient can be taken once: differentiating it again raises InputError, since codes carry no second derivative.
    """
    if value_table is None:
        return _CodedActivation.apply(x, forward, table, None, formula, False)[0]  # type: ignore[index]
    y, _, packed = _CodedActivation.apply(x, forward, table, None, formula, True)  # type: ignore[misc]
    return sharing.attach(y, value_recipe(packed, Layout.of(x), value_table))


def overwriting_activation(
    x: Tensor, table: DeviceTable, value_table: DeviceTable | None = None, *, forward: Forward, forward_inplace: Forward
) -> Tensor:
    """The same, written into x, which backward does not need.

    forward_inplace  overwrites its argument and returns it
    """
    if torch_internals.is_view(x):  # torch lets no Function with two outputs overwrite a view
        return overwritten(x, coded_activation(x, table, value_table, forward=forward))
    layout = Layout.of(x)
    y, _, packed = _CodedActivation.apply(x, forward, table, forward_inplace, None, True)  # type: ignore[misc]
    return y if value_table is None else sharing.attach(y, value_recipe(packed, layout, value_table))


def watched_activation(x: Tensor, table: DeviceTable, value_table: DeviceTable | None = None, *, forward: Forward) -> Tensor:
    """As `coded_activation`, where something looks on."""
    y, packed = watched.activation(x, forward, table)
    if value_table is None or torch_internals.is_transformed():
        return y
    return sharing.attach(y, value_recipe(packed, Layout.of(x), value_table))


def value_recipe(packed: Tensor, layout: Layout, table: DeviceTable) -> Recipe:
    """The recipe of a tensor whose values are the levels of packed codes."""
    of_zero = None if torch_internals.is_watched(packed) else table.at_zero
    return Recipe((packed,), lambda kept, dtype: values(kept[0], layout, dtype, table), of_zero=of_zero)


def overwritten(x: Tensor, y: Tensor) -> Tensor:
    """x, after y was written into it; it then has y's recipe."""
    recipe = None if torch_internals.is_transformed() else sharing.find(y)
    x = x.copy_(y)
    return x if recipe is None else sharing.attach(x, recipe)


def check_overwritable(name: str, x: Tensor) -> None:
    """Raise OverwriteError where torch forbids to overwrite x; torch checks too, but after it has written."""
    if any(tensor.is_leaf for tensor in (x, torch_internals.base_of(x)) if tensor is not None):
        raise OverwriteError(f"{name} cannot overwrite a leaf that requires a gradient, nor a view of one; pass inplace=False")
    if torch_internals.is_view_of_several(x):
        raise OverwriteError(
            f"{name} cannot overwrite this view: it is one of several that a function such as chunk returned, or was made "
            "without gradients; pass inplace=False"
        )


def activation_by_sign(x: Tensor, forward: Forward, slopes: tuple[float, float]) -> Tensor | None:
    """forward(x), for an f of two straight lines that meet in 0, of an x that has a recipe which keeps its sign; else None.

    slopes  f' below and above 0

    Keeps what the recipe keeps and no more: one code for what made x, for f and for the readers of f(x).
    """
    recipe = None if torch_internals.is_transformed() else sharing.find(x)
    if recipe is None or recipe.signs is None:
        return None
    y, _ = _ActivationBySign.apply(x, recipe, forward, slopes)  # type: ignore[misc]
    rebuild, signs = recipe.rebuild, recipe.signs if slopes[0] >= 0 < slopes[1] else None
    return sharing.attach(y, Recipe(recipe.kept, lambda kept, dtype: forward(rebuild(kept, dtype)), signs))


class _CodedActivation(torch.autograd.Function):
    """Its second output, the anchor, is empty: it ties a second backward to this node, for `differentiable_once`. A third, if
    asked for, is the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Forward,
        table: DeviceTable,
        forward_inplace: Forward | None,
        formula: Formula | None,
        with_codes: bool,
    ) -> tuple[Tensor, ...]:
        contiguous = x.is_contiguous()
        if forward_inplace is None and contiguous:
            y, packed = kernels.forward(x, table, forward, formula)
        else:
            packed = kernels.encode(x if contiguous else Layout.of(x).flatten(x), table)
            y = (forward_inplace or forward)(x)
            if forward_inplace is not None:
                ctx.mark_dirty(x)
        y, anchor = torch_internals.not_a_view(y) if forward_inplace is None else y, x.new_empty(0)
        ctx.save_for_backward(packed, anchor)
        ctx.set_materialize_grads(False)
        ctx.coded = table, x.dtype, None if contiguous else Layout.of(x)
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
        table, dtype, layout = ctx.coded
        if layout is None and grad.is_contiguous() and not torch_internals.is_watched(grad):
            grad_x = kernels.decode(packed, grad, table)
        else:
            grad_x = times(packed, grad, table, layout or Layout.contiguous(grad.shape))
        if grad_x.dtype != dtype:
            grad_x = grad_x.to(dtype)
        return differentiable_once(grad_x, grad, anchor), None, None, None, None, None


class _ActivationBySign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe,
        forward: Forward,
        slopes: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        y = forward(x)
        anchor = x.new_empty(0)
        ctx.save_for_backward(anchor, *recipe.kept)
        ctx.set_materialize_grads(False)
        ctx.coded = recipe.signs, x.dtype, slopes
        return y, anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 4
        anchor, *kept = ctx.saved_tensors
        signs, dtype, (below, above) = ctx.coded
        # above times leaky_relu's backward with the slope below / above
        grad_x = torch.ops.aten.leaky_relu_backward(grad, signs(kept, grad.dtype), below / above, False)
        grad_x = (grad_x if above == 1 else above * grad_x).to(dtype)
        return differentiable_once(grad_x, grad, anchor), None, None, None
