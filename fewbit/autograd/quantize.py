"""Codes of values: what layers keep of a tensor, and how they rebuild the tensor from it.

Plain eager code calls the kernels directly. Watched code (see `fewbit.torch_internals`) calls them through operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fewbit import kernels
from fewbit.autograd import sharing, watched
from fewbit.autograd.layout import Arrangement, Layout
from fewbit.autograd.sharing import Recipe, as_it_is
from fewbit.kernels import DeviceTable, layer_ops, layers, ops
from fewbit.kernels.layers import LARGE_SAMPLE, Codes, Vectors
from fewbit.packing import packed_bytes
from fewbit.torch_internals import is_fake, is_watched

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How values become codes.

    table       table of a standard normal number
    stochastic  If true, a value between two levels goes to either at random, and its mean is the value (no bias between the
                outermost levels). By default it goes to the level of its interval, which has the least error.
    """

    table: DeviceTable
    stochastic: bool = False


def encode_checked(x: Tensor, table: DeviceTable) -> tuple[Tensor, bool]:
    """Packed codes (packed_bytes(n, bits),) uint8 of x (n,), and whether x is finite, as far as is known.

    Callers leave an x that is not finite to torch, so gradients lose only what they lose in torch. If it is not known, codes of
    a NaN or an infinity stand for an ordinary number.
    """
    return (watched.encode(x, table), True) if is_watched(x) else kernels.encode_checked(x, table)


def values(packed: Tensor, layout: Layout, dtype: torch.dtype, table: DeviceTable) -> Tensor:
    """The levels of the packed codes, as a tensor of that layout and dtype."""
    n = prod(layout.shape)  # layout.shape.numel() would turn a compiler's symbols into numbers
    source = ops if is_watched(packed) else kernels
    return layout.unflatten(source.values(packed, n, table, dtype))


def times(packed: Tensor, grad: Tensor, table: DeviceTable, layout: Layout | None) -> Tensor:
    """grad times the levels of the packed codes. layout: that of the codes, None if contiguous."""
    seen = is_watched(grad)
    if layout is None and grad.is_contiguous() and not seen:
        return kernels.decode(packed, grad, table)  # no views are needed
    layout = layout or Layout.contiguous(grad.shape)
    flat = layout.flatten(grad)
    return layout.unflatten(watched.decode(packed, flat, table) if seen else kernels.decode(packed, flat, table))


def of_layers(x: Tensor) -> Any:
    """`fewbit.kernels.layers`, or in watched code the same functions as operators."""
    return layer_ops if is_watched(x) else layers


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for computations whose result is rounded to `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype of a smaller range. Rebuilt numbers may lie outside of the range; they become its largest number. x may be
    overwritten."""
    if x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    return x.clamp_(-largest, largest).to(dtype)


def nan_if_not_finite(x: Tensor, channel: int) -> Tensor | None:
    """For each channel 0, or NaN if the channel is not finite. None if codes of x are made only if x is finite: in eager code
    on the CPU, and for fake tensors, which stand for it."""
    if x.device.type == "cpu" and (type(x) in (Tensor, torch.nn.Parameter) or is_fake(x)):
        return None
    by_channel = x.movedim(channel, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return 0 * by_channel.amax(1) + 0 * by_channel.amin(1)


def recipe_of(
    x: Tensor, quantizer: Quantizer, make: Callable[[Tensor, Quantizer], Recipe | None], is_own: bool = False
) -> Recipe | None:
    """What to keep of x, an input of an operation; None if x is seen not to be finite. The operation is then torch's own, so
    gradients lose only what they lose in torch.

    make    Makes a recipe of new codes, if x has no recipe and is not kept anyway. Later readers of x find this recipe.
    is_own  whether x is the operation's own output
    """
    recipe, table, stochastic = sharing.find(x), quantizer.table, quantizer.stochastic
    if recipe is not None and recipe.bits is not None and (stochastic or recipe.bits < table.bits):
        recipe = None  # another reader's codes have fewer bits than are asked for here, or rounding is stochastic
    if recipe is not None:
        return recipe if recipe.with_zeros is None else recipe.with_zeros(x.detach())
    source = None if is_own else sharing.source_of(x)
    if source is not None:
        of_source = recipe_of(source.tensor, quantizer, make)
        recipe = of_source and source.of_recipe(of_source)
        if recipe is not None and not stochastic:
            sharing.attach(x, recipe._replace(bits=table.bits))
        return recipe
    is_made = not x.requires_grad and sharing.is_made(x)
    if not is_own and (not (x.requires_grad or is_made) or sharing.is_kept_exactly(x)):
        return as_it_is(x)  # an x without a gradient that the model has not made is a batch, which the caller holds anyway
    recipe = make(x.detach(), quantizer)
    if recipe is not None and (x.grad_fn is not None or is_made) and not stochastic:
        # a leaf may outlive this pass, and its codes with it
        sharing.attach(x, recipe._replace(bits=table.bits))
    return recipe


def scaled(x: Tensor, quantizer: Quantizer, channel: int, marks: bool = True, sample: int = LARGE_SAMPLE) -> Recipe | None:
    """The recipe of codes of x, standardized by channel and scaled by row; None if x is seen not to be finite.

    x        floating-point, any shape and strides, without a graph
    channel  The dimension of the channels: -1 for linear layers, 1 for convolutions. Each index of the dimensions before it is
             a row: a token, or an image.
    marks    whether a channel that is not finite is rebuilt as NaN, in case this is not seen here
    sample   Number of places from which statistics are taken. A weight's gradient sums over all rows and needs a large sample.

    First, rows are scaled to one norm. In this norm channels count relative to their mean magnitude, so it evens out tokens of
    different size, and a channel far larger than all others does not spoil it. Then channels are standardized. This costs one
    number per row and two per channel. Scales of groups would cost more, and an outlier spoils the codes of its group. If x
    takes less than its codes would, it is kept as it is.

    Zeros stay zeros, and each channel keeps its mean over the sample. After a dropout, and in one-hot features, most numbers
    are zeros. Small errors of these would add up over all rows whose gradients have the same sign.
    """
    channel, table = channel % x.dim(), quantizer.table
    if x.dim() == 1 or is_small(x, prod(x.shape[:channel]) + 2 * x.shape[channel], table):
        return as_it_is(x)
    arrangement = Arrangement.of(x, channel)
    layout, grid = arrangement
    packed, row, vectors, finite = of_layers(x).encode_scaled(
        arrangement.view(x), grid._replace(sample=sample), table, quantizer.stochastic, marks
    )

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, row, vectors = kept
        codes = Codes(packed, grid, vectors, Vectors(), row, None, table)
        return layout.unflatten(of_layers(packed).decode(codes, dtype))

    return Recipe((packed, row, vectors), rebuild) if finite else None


def coded_by_shape(x: Tensor, quantizer: Quantizer) -> Recipe | None:
    """`scaled` for any tensor. The channels are dimension 1 of tensors with four or five dimensions, else the last one."""
    return scaled(x, quantizer, 1 if x.dim() in (4, 5) else -1) if x.dim() else as_it_is(x)


def is_small(x: Tensor, statistics: int, table: DeviceTable) -> bool:
    """Whether codes of x and this number of statistics would take as much as x. False for a compiler's symbols, whose values
    are not known."""
    if not isinstance(x.numel(), int):
        return False
    return packed_bytes(x.numel(), table.bits) + statistics * table.levels.element_size() >= x.numel() * x.element_size()


def has_many_zeros(x: Tensor) -> bool:
    """Whether many elements in a sample of x are 0, as after a dropout or in padded rows. Only for x on the CPU: for other
    devices the process would wait."""
    flat = Layout.of(x).flatten(x)
    sample = flat[:: max(1, flat.numel() // _LOOKED_AT)]
    return sample.numel() - int(torch.count_nonzero(sample)) >= _MANY_ZEROS * sample.numel()


_LOOKED_AT, _MANY_ZEROS = 4093, 1 / 64
