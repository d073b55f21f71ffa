"""Values to codes and back: what layers keep of a tensor, and how they make it anew from that.

Codes are made and read by the kernels directly in plain eager code, and through operators where something looks on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from fewbit import kernels
from fewbit.autograd import watched
from fewbit.autograd.layout import Layout
from fewbit.autograd.sharing import Recipe, as_it_is
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import is_watched

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How values become codes.

    table       of a standard normal number
    stochastic  whether a value between two levels goes to either at random, so that its mean is the value (unbiased between
                the outermost levels), or, by default, to that of its interval, which has the least error
    """

    table: DeviceTable
    stochastic: bool = False

    def encode(self, x: Tensor) -> Tensor:
        """Packed codes of x (n,)."""
        return encode(self._round(x) if self.stochastic else x, self.table)

    def _round(self, x: Tensor) -> Tensor:
        levels = self.table.levels.sort().values  # a table of your own may have them in any order
        above = torch.bucketize(x.to(levels.dtype), levels).clamp(1, levels.numel() - 1)
        low, high = levels[above - 1], levels[above]
        return torch.where(torch.rand_like(low) * (high - low) < x - low, high, low)


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """Packed codes (packed_bytes(n, bits),) uint8 of x (n,)."""
    return watched.encode(x, table) if is_watched(x) else kernels.encode(x, table)


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """grad (n,) times the levels of the packed codes."""
    return watched.decode(packed, grad, table) if is_watched(grad) else kernels.decode(packed, grad, table)


def values(packed: Tensor, layout: Layout, dtype: torch.dtype, table: DeviceTable) -> Tensor:
    """The levels of the packed codes, as a tensor of that layout and dtype."""
    n = prod(layout.shape)  # its own numel() would make numbers of a compiler's symbols
    if is_watched(packed):
        return layout.unflatten(watched.decode(packed, torch.ones(n, dtype=dtype, device=packed.device), table))
    return layout.unflatten(kernels.values(packed, n, table, dtype))


def center_and_spread(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the numbers along `dims` lie: (x - center) / spread is like a standard normal number. Both of size 1 there.

    The spread is what the eighth moment of a normal number tells: (mean (x - center)⁸ / 105)^(1/8). It is the standard
    deviation of normal numbers, and more for those with heavier tails, which the outermost levels of a table for normal numbers
    would cut off: it leaves normal numbers their error and nearly halves that of products and of sparse numbers at 4 bits.
    Positive, also where x is constant.
    """
    if not dims or x.numel() == 0:
        one = x.new_ones([1 if dim in dims else size for dim, size in enumerate(x.shape)])
        return torch.zeros_like(one), one
    center = x.mean(tuple(dims), keepdim=True)
    centered = x - center
    largest = _positive(centered.abs().amax(tuple(dims), keepdim=True))  # whose eighth power may be out of range
    moment = centered.div_(largest).square_().square_().square_().mean(tuple(dims), keepdim=True)
    return center, _positive(moment.div_(105).pow_(1 / 8).mul_(largest))


def standardized(x: Tensor, center: Tensor, spread: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """(x - center) / spread + shift."""
    inverse = spread.reciprocal()
    return (x * inverse).add_(shift - center * inverse)  # addcmul takes three times as long for what broadcasts like these


def times(packed: Tensor, grad: Tensor, table: DeviceTable, layout: Layout) -> Tensor:
    """grad, in that layout, times the levels of the packed codes."""
    return layout.unflatten(decode(packed, layout.flatten(grad), table))


def scaled(x: Tensor, quantizer: Quantizer, channel: int) -> Recipe:
    """The recipe of codes of x, standardized by channel and scaled by row.

    x        floating-point, any shape and strides
    channel  the dimension of the channels: -1 for linear layers, 1 for convolutions. Rows are all that has one place in the
             dimensions before it: a token, or an image.

    Channels are first brought to one mean magnitude, which takes up those that large models have far outside the range of all
    others; then rows to one mean square, which takes up tokens that differ in size; then channels are standardized. All that
    costs a number a row and two a channel, less than the scales of groups do, whose codes an outlier spoils for its group.
    """
    if x.numel() == 0:
        return as_it_is(x)
    channel %= max(x.dim(), 1)
    others, within = [dim for dim in range(x.dim()) if dim != channel], tuple(range(channel, x.dim()))
    wide = x.to(quantizer.table.levels.dtype)
    magnitude = _positive(wide.abs().mean(others, keepdim=True) if others else wide.abs())
    even = wide / magnitude
    row = _positive(even.square().mean(within, keepdim=True).sqrt_())
    even = even.div_(row)
    center, spread = center_and_spread(even, others)
    normal = standardized(even, center, spread)
    layout, table = Layout.of(normal), quantizer.table

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, row, center, spread = kept
        return values(packed, layout, dtype, table).mul_(spread).add_(center).mul_(row)

    return Recipe((quantizer.encode(layout.flatten(normal)), row, center * magnitude, spread * magnitude), rebuild)


def _positive(scale: Tensor) -> Tensor:
    """The scale, or, where it is 0, something small to divide by."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)
