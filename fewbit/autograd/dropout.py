"""Dropout that keeps one bit per element: an exact code of torch's own mask.

Layers that read the output keep a code of the dropout's input, and the bits. They share that code with all layers that read the
input, with or without a dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from fewbit.autograd import sharing
from fewbit.autograd.activation import check_overwritable, overwritten
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import at_least_float32, encode_checked, times, values
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import EagerFunction, is_watched, unwatched

Tensor = torch.Tensor


def coded_dropout(x: Tensor, table: DeviceTable, *, p: float, inplace: bool, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """exact(x), torch's dropout in training, with the same random numbers. The packed bits of its mask are kept.

    p        probability that an element becomes zero, above 0 and below 1
    table    as `mask_table` gives it
    inplace  whether the output is written into x

    If x is so small that packed bits would take no less than torch's mask, the call is torch's own.
    """
    if _is_small(x, table):
        return exact(x)
    if inplace and not torch.compiler.is_compiling():
        check_overwritable("dropout", x)
    y, mask = _dropped(x.detach(), p)
    layout = Layout.of(mask)
    packed, _ = encode_checked(layout.flatten(mask), table)
    recipe = sharing.find(x)
    if recipe is not None and recipe.with_zeros is not None:
        recipe = recipe.with_zeros(x.detach())
    overwrites = inplace and not is_watched(x)
    y = _CodedDropout.apply(x, (y,), packed, (table, layout), overwrites)
    if recipe is not None:
        sharing.attach(y, _masked(recipe, packed, table, layout))  # type: ignore[arg-type]
    elif not inplace:
        sharing.note_source(y, x, partial(_masked, packed=packed, table=table, layout=layout))  # type: ignore[arg-type]
    sharing.note_made(y, (x,))
    return overwritten(x, y) if inplace and not overwrites else y  # type: ignore[arg-type, return-value]


def _is_small(x: Tensor, table: DeviceTable) -> bool:
    """Whether packed bits take no less than torch's mask. False for a compiler's symbols, whose values are not known."""
    n: Any = x.numel()
    of_torch = 1 if _draws_bits(x) else x.element_size()
    return isinstance(n, int) and table.packed_bytes(n) >= n * of_torch


def _draws_bits(x: Tensor) -> bool:
    """Whether torch's own dropout makes a mask of bytes, as on a GPU and in compiled code. Elsewhere its mask holds numbers."""
    return x.is_cuda or torch.compiler.is_compiling()


@lru_cache(maxsize=256)
def mask_table(p: float, dtype: torch.dtype, device: torch.device) -> DeviceTable:
    """The table that turns masks into bits, and bits into 0 or 1 / (1 - p), the factor of torch. On the CPU the factor is
    rounded to the dtype, as in torch's mask."""
    wide = at_least_float32(dtype)
    with unwatched():
        scale = torch.tensor(1 / (1 - p), dtype=torch.float64)
        if device.type == "cpu":
            scale = torch.ones(1, dtype=dtype).div_(1 - p)
        levels = torch.zeros(2, dtype=wide)
        levels[1] = scale.to(wide)
        tensors = torch.full((1,), 0.5, dtype=wide), torch.arange(2, dtype=torch.uint8), levels
        return DeviceTable(*(each.to(device) for each in tensors), bits=1)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x after dropout, by the operations that torch uses, and its mask, whose elements are 0 or above 0.5."""
    if _draws_bits(x):
        y, mask = torch.native_dropout(x, p, True)
        return y, mask.to(x.dtype)
    mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    return x * mask, mask


def _masked(recipe: sharing.Recipe, packed: Tensor, table: DeviceTable, layout: Layout) -> sharing.Recipe:
    """The recipe of a masked tensor, from the recipe of the tensor and the packed mask."""
    rebuild_all = recipe.rebuild

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        *of_tensor, packed = kept
        return times(packed, rebuild_all(of_tensor, dtype), table, layout)

    return sharing.Recipe((*recipe.kept, packed), rebuild, bits=recipe.bits, hides=recipe.hides)


class _CodedDropout(EagerFunction):
    """This operation is linear, so it is differentiable as often as torch's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, made: tuple[Tensor], packed: Tensor, decoding: tuple[DeviceTable, Layout], overwrites: bool
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.set_materialize_grads(False)
        ctx.decoding = decoding
        if overwrites:
            ctx.mark_dirty(x)
            return x.copy_(made[0])
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return (None,) * 5
        (packed,), (table, layout) = ctx.saved_tensors, ctx.decoding
        if torch.is_grad_enabled():
            wide = at_least_float32(grad.dtype)
            found = (grad.to(wide) * values(packed, layout, wide, table)).to(grad.dtype)
        else:
            found = times(packed, grad, table, layout)
        return found, None, None, None, None
