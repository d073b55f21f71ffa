"""A pointwise activation that keeps only packed codes for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels, torch_internals
from fewbit.autograd import sharing, watched
from fewbit.autograd.double_backward import differentiable_once, new_anchor
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import has_many_zeros, times, values
from fewbit.autograd.sharing import BySign, Recipe
from fewbit.errors import OverwriteError
from fewbit.kernels import DeviceTable, Formula
from fewbit.torch_internals import EagerFunction, not_a_view

Tensor = torch.Tensor
Forward = Callable[[Tensor], Tensor]


def coded_activation(
    x: Tensor,
    table: DeviceTable,
    value_table: DeviceTable | None = None,
    *,
    forward: Forward,
    formula: Formula | None = None,
    keeps_zeros: bool = False,
) -> Tensor:
    """forward(x). Backward multiplies by the level of x's code instead of f'(x).

    x            floating-point, any shape and strides
    table        table of f'
    value_table  The same codes with the levels of f. If given, layers that read the result find its recipe.
    forward      the exact operation
    formula      closed form of the operation, if it has one; a backend may then compute it and the codes in one pass
    keeps_zeros  whether f(0) = 0; if there are many zeros, they are then rebuilt as zeros
    Returns      What the operation returns. Packed codes of ceil(n·bits/8) bytes plus at most 512 are kept for backward.

    The gradient can be taken once. Differentiating it again raises InputError, because codes carry no second derivative.
    """
    backend, layout = kernels.backend(x), None if x.is_contiguous() else Layout.of(x)
    if formula is not None and layout is None and backend.has_formula(formula[0]):
        made, packed = backend.forward(x, table, *formula)
        y, _ = _CodedActivation.apply(x, (packed, table, layout), lambda x: made)  # type: ignore[misc]
    else:
        packed, finite = backend.encode_checked(x if layout is None else layout.flatten(x.detach()), table)
        if not finite:
            return forward(x)
        y, _ = _CodedActivation.apply(x, (packed, table, layout), forward)  # type: ignore[misc]
    return y if value_table is None else sharing.attach(y, value_recipe(packed, Layout.of(x), value_table, keeps_zeros))


def overwriting_activation(
    x: Tensor,
    table: DeviceTable,
    value_table: DeviceTable | None = None,
    *,
    forward: Forward,
    forward_inplace: Forward,
    keeps_zeros: bool = False,
) -> Tensor:
    """The same, but the result is written into x, which backward does not need.

    forward_inplace  overwrites its argument and returns it
    """
    layout = None if x.is_contiguous() else Layout.of(x)
    packed, finite = kernels.encode_checked(x if layout is None else layout.flatten(x.detach()), table)
    if not finite:
        return overwritten(x, forward(x.clone()))
    codes = packed, table, layout
    if torch_internals.is_view(x):  # torch lets no Function with two outputs overwrite a view
        y = overwritten(x, _CodedActivation.apply(x, codes, forward)[0])  # type: ignore[index]
    else:
        y = _CodedActivation.apply(x, codes, forward_inplace, True)[0]  # type: ignore[index]
    if value_table is None:
        return y
    return sharing.attach(y, value_recipe(packed, layout or Layout.contiguous(x.shape), value_table, keeps_zeros))


def watched_activation(x: Tensor, table: DeviceTable, value_table: DeviceTable | None = None, *, forward: Forward) -> Tensor:
    """`coded_activation` for watched code (see `fewbit.torch_internals`)."""
    y, packed = watched.activation(x, forward, table)
    if value_table is None or torch_internals.is_transformed():
        return y
    return sharing.attach(y, value_recipe(packed, Layout.of(x), value_table))


def value_recipe(packed: Tensor, layout: Layout, table: DeviceTable, keeps_zeros: bool = False) -> Recipe:
    """The recipe of a tensor whose values are the levels of packed codes.

    keeps_zeros  as in `coded_activation`; ignored on other devices than the CPU, for which the process would have to wait
    """
    recipe = Recipe((packed,), lambda kept, dtype: values(kept[0], layout, dtype, table), hides=True)
    if not keeps_zeros or packed.device.type != "cpu" or torch_internals.is_watched(packed) or table.with_zeros is table:
        return recipe
    return recipe._replace(with_zeros=lambda x: value_recipe(packed, layout, table.with_zeros) if has_many_zeros(x) else recipe)


def overwritten(x: Tensor, y: Tensor) -> Tensor:
    """Write y into x and return x, which gets y's recipe."""
    recipe = None if torch_internals.is_transformed() else sharing.find(y)
    x = x.copy_(y)
    return x if recipe is None else sharing.attach(x, recipe)


def check_overwritable(name: str, x: Tensor) -> None:
    """Raise OverwriteError if torch forbids overwriting x. torch checks this too, but only after it has written."""
    if any(tensor.is_leaf for tensor in (x, torch_internals.base_of(x)) if tensor is not None):
        raise OverwriteError(f"{name} cannot overwrite a leaf that requires a gradient, nor a view of one; pass inplace=False")
    if torch_internals.is_view_of_several(x):
        raise OverwriteError(
            f"{name} cannot overwrite this view: it is one of several that a function such as chunk returned, or was made "
            "without gradients; pass inplace=False"
        )


def activation_by_sign(x: Tensor, forward: Forward, slopes: tuple[float, float]) -> Tensor | None:
    """forward(x) for an f of two straight lines that meet at 0, if x has a recipe that keeps its sign; else None.

    slopes  f' below and above 0

    It keeps only what the recipe keeps. One code thus serves the operation that made x, f, and the layers that read f(x).
    """
    recipe = None if torch_internals.is_transformed() else sharing.find(x)
    if recipe is None or recipe.by_sign is None:
        return None
    y, _ = _ActivationBySign.apply(x, recipe.kept, recipe.by_sign, forward, slopes)  # type: ignore[misc]
    (below, above), (rebuild, times) = slopes, recipe.by_sign
    by_sign = None
    if below >= 0 < above:
        by_sign = BySign(lambda kept, dtype, low, high: rebuild(kept, dtype, below * low, above * high), times)
    return sharing.attach(
        y, Recipe(recipe.kept, lambda kept, dtype: rebuild(kept, dtype, *slopes), by_sign, hides=recipe.hides)
    )


class _CodedActivation(EagerFunction):
    """The second output is an empty anchor. It ties a second backward to this node, for `differentiable_once`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: tuple[Tensor, DeviceTable, Layout | None],
        forward: Forward,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        packed, *ctx.decoding = codes
        anchor = new_anchor()
        ctx.save_for_backward(packed, anchor)
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
            return forward(x), anchor
        return not_a_view(forward(x)), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # autograd casts to x's dtype
        grad, _ = grads
        if grad is None:
            return (None,) * 4
        packed, anchor = ctx.saved_tensors
        return differentiable_once(times(packed, grad, *ctx.decoding), grad, anchor), None, None, None


class _ActivationBySign(EagerFunction):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: tuple[Tensor, ...],
        by_sign: BySign,
        forward: Forward,
        slopes: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        y = forward(x)
        anchor = x.new_empty(0)
        ctx.save_for_backward(anchor, *kept)
        ctx.set_materialize_grads(False)
        ctx.coded = by_sign.times, x.dtype, slopes
        return y, anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        anchor, *kept = ctx.saved_tensors
        times, dtype, slopes = ctx.coded
        return differentiable_once(times(kept, grad, *slopes).to(dtype), grad, anchor), None, None, None, None
