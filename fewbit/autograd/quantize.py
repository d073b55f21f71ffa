"""Values to codes and back: what layers keep of a tensor, and how they make it anew from that.

Codes are made and read by the kernels directly in plain eager code, and through operators where something looks on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod

import torch

from fewbit import kernels
from fewbit.autograd import watched
from fewbit.autograd.layout import Layout
from fewbit.autograd.sharing import Recipe, as_it_is
from fewbit.kernels import DeviceTable
from fewbit.packing import packed_bytes
from fewbit.torch_internals import is_empty, is_fake, is_watched

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


def affine(
    packed: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    table: DeviceTable,
    factor: Tensor,
    offset: Tensor,
    row: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """(level * factor + offset) * row + shift of the packed codes, computed in float32 at least and rounded once."""
    result = values(packed, layout, at_least_float32(dtype), table).mul_(factor).add_(offset)
    if row is not None:
        result.mul_(row)
    if shift is not None:
        result.add_(shift)
    return narrowed(result, dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which to compute what is then rounded to the dtype."""
    return torch.promote_types(dtype, torch.float32)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, which may be overwritten, in a dtype of a smaller range: what lies outside of it, as rebuilt numbers may, becomes its
    largest number."""
    if x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    return x.clamp_(-largest, largest).to(dtype)


def is_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are known to be finite: asked of the CPU alone, since for other devices the process would wait.

    Operations on what is not finite are left to torch, so that what is lost of a gradient is what torch loses. On other
    devices, and in compiled code, `finite_part` and `nan_if_not_finite` stand in for that.
    """
    for x in tensors:
        if x.device.type == "cpu" and not isfinite(x.detach().sum(dtype=_WIDE.get(x.dtype))):  # far faster than to look at each
            low, high = x.detach().aminmax()
            if not (isfinite(low) and isfinite(high)):
                return False
    return True


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16), torch.float32)


def _is_checked(x: Tensor) -> bool:
    """Whether `is_finite` has looked at x, which is then finite."""
    return x.device.type == "cpu" and (is_fake(x) or not is_watched(x))


def finite_part(x: Tensor) -> Tensor:
    """x, with 0 in the place of what is not finite: what statistics are taken of."""
    return x if _is_checked(x) else torch.nan_to_num(x, 0.0, 0.0, 0.0)


def nan_if_not_finite(x: Tensor, channel: int) -> Tensor | None:
    """For each channel 0, or NaN where it holds what is not finite; None where there is no such channel."""
    if _is_checked(x):
        return None
    by_channel = x.movedim(channel, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return 0 * by_channel.amax(1) + 0 * by_channel.amin(1)


def center_and_spread(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the numbers along `dims` lie: (x - center) / spread is like a standard normal number. Both of size 1 there.

    The spread is what the eighth moment of a normal number tells: (mean (x - center)⁸ / 105)^(1/8). It is the standard
    deviation of normal numbers, and more for those with heavier tails, which the outermost levels of a table for normal numbers
    would cut off: it leaves normal numbers their error and nearly halves that of products and of sparse numbers at 4 bits.
    Positive, also where x is constant. All numbers are finite.
    """
    if not dims or is_empty(x):
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

    x        floating-point, any shape and strides, without a graph
    channel  the dimension of the channels: -1 for linear layers, 1 for convolutions. Rows are all that has one place in the
             dimensions before it: a token, or an image.

    Channels are first brought to one mean magnitude, which takes up those that large models have far outside the range of all
    others; then rows to one norm, which takes up tokens that differ in size; then channels are standardized. All that costs a
    number a row and two a channel, less than the scales of groups do, whose codes an outlier spoils for its group. An x so
    small that it would take less is kept as it is.

    Zeros stay zeros, and each channel keeps its mean. Behind a dropout, and in one-hot features, most numbers are zeros: were
    they a little off, that would add up over all rows whose gradients share a sign.
    """
    channel, table = channel % x.dim(), quantizer.table
    others, within = [dim for dim in range(x.dim()) if dim != channel], tuple(range(channel, x.dim()))
    rows, channels = prod(x.shape[:channel]), x.shape[channel]
    if not others or is_small(x, rows + 2 * channels, table):
        return as_it_is(x)
    wide = finite_part(x.to(table.levels.dtype))
    absolute = wide.abs().div_(prod(x.shape) // channels)  # divided first: sums may be out of range
    magnitude = _positive(absolute.sum(others, keepdim=True)).clamp_max(torch.finfo(wide.dtype).max)
    smallest = absolute.amin(others, keepdim=True)
    del absolute
    even = wide / magnitude
    row = _positive(_HEADROOM * torch.linalg.vector_norm(even, dim=within, keepdim=True))
    even = even.div_(row)
    center, spread = center_and_spread(even, others)
    spread, sparse, level = with_zero_on_a_level(center, spread, smallest == 0, table)
    center = torch.where(sparse, -level * spread, center)
    normal = standardized(even, center, spread)
    layout = Layout.of(normal)
    packed = quantizer.encode(layout.flatten(normal))
    del normal
    if not quantizer.stochastic:  # which has no bias
        center, spread = with_means(even.mul_(row), packed, layout, table, center, spread, row, others, sparse)
    center, spread = center * magnitude, spread * magnitude
    bound = table.levels.abs().max() * spread + center.abs()
    largest = 0.999 * torch.finfo(wide.dtype).max  # some room for rounding
    shrink = (largest / row.amax() / bound).clamp_max(1)  # so that what is rebuilt is in range
    center, spread = center * shrink, spread * shrink
    center = torch.where(sparse, -level * spread, center)  # as the level of a zero is rounded

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, row, center, spread = kept
        return affine(packed, layout, dtype, table, spread, center, row)

    return Recipe((packed, row, center, spread), rebuild)


_HEADROOM = 16.0  # above all levels of a normal number: with rows this much larger no product in between is out of range


def is_small(x: Tensor, statistics: int, table: DeviceTable) -> bool:
    """Whether codes of x and so many statistics would take as much as x: not known of a compiler's symbols."""
    if not isinstance(x.numel(), int):
        return False
    return packed_bytes(x.numel(), table.bits) + statistics * table.levels.element_size() >= x.numel() * x.element_size()


def with_zero_on_a_level(
    center: Tensor, spread: Tensor, has_zeros: Tensor, table: DeviceTable
) -> tuple[Tensor, Tensor, Tensor]:
    """By channel: its spread; whether its zeros are to lie on a level, as they do with the center -level * spread; the level.

    Where 0 lies farther out than the outermost level, the spread grows until they meet; beyond twice as far zeros are given up.
    """
    low, high = table.levels.min(), table.levels.max()
    zero = -center / spread
    beyond = torch.where(zero < 0, zero / low, zero / high)
    sparse = has_zeros & (beyond <= 2) & (low < 0) & (high > 0)
    spread = torch.where(sparse, spread * beyond.clamp_min(1), spread)
    return spread, sparse, table.levels[table.codes[torch.bucketize(-center / spread, table.thresholds)].long()]


def with_zeros(recipe: Recipe, x: Tensor, channel: int) -> Recipe:
    """The recipe with zeros as zeros, nearly, where many numbers of x are 0, as behind a dropout or in padded rows.

    In each channel the numbers with the code of 0 are rebuilt as their mean. Looked for on the CPU alone, since for other
    devices the process would wait.
    """
    if not recipe.of_zero or x.device.type != "cpu" or is_watched(x):  # as it is, zeros may be zeros
        return recipe
    if x.numel() - torch.count_nonzero(x).item() < _MANY_ZEROS * x.numel():
        return recipe
    rebuild, of_zero, others = recipe.rebuild, recipe.of_zero, [dim for dim in range(x.dim()) if dim != channel % x.dim()]
    wide = at_least_float32(x.dtype)
    coded_so = rebuild(recipe.kept, wide) == of_zero
    number = coded_so.sum(others, keepdim=True)
    move = torch.where(number > 0, (x * coded_so).sum(others, keepdim=True, dtype=wide) / number - of_zero, 0)

    def moved(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        *of_recipe, move = kept
        values = rebuild(of_recipe, at_least_float32(dtype))
        return narrowed(values.add_((values == of_zero) * move), dtype)

    return Recipe((*recipe.kept, move), moved)


_MANY_ZEROS = 1 / 64  # of all numbers


def with_means(
    x: Tensor,
    packed: Tensor,
    layout: Layout,
    table: DeviceTable,
    center: Tensor,
    spread: Tensor,
    row: Tensor | None,
    others: list[int],
    sparse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Center and spread with which row * (spread * level + center) has the mean of x in each channel.

    row     as in `affine`; None for ones
    others  the dimensions that are not the channels'
    sparse  by channel, whether zeros lie on a level; None for nowhere

    Channels are moved. Sparse ones are stretched, which leaves zeros what they are: by less where the squared mean is below the
    doubt in it, since a mean that is small by chance says nothing of the size of numbers.
    """
    levels, ones = values(packed, layout, center.dtype, table), torch.ones_like(center)
    mean, level = (each.mean(others, keepdim=True) for each in (x, levels if row is None else levels.mul_(row)))
    unit = ones if row is None else row.mean(others, keepdim=True)
    found = spread * level + center * unit
    move = (mean - found) / _positive(unit)
    if sparse is None:
        return center + move, spread
    # the mean squared error of the best quantizer of a normal number (Panter and Dite, 1951), and that of a mean of so many
    doubt = (2.72 / 4**table.bits + center.numel() / prod(layout.shape)) * x.abs().mean(others, keepdim=True).square()
    stretch = torch.where(sparse, (mean * found + doubt) / _positive(found * found + doubt), 1)
    return center * stretch + torch.where(sparse, 0, move), spread * stretch


def _positive(scale: Tensor) -> Tensor:
    """The scale, or, where it is 0, something small to divide by."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)
