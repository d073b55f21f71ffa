"""Codes of values: what the layers keep of a tensor, and how they make it anew from that.

Codes are made and read by the kernels directly in plain eager code, and through operators where something looks on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbit import kernels
from fewbit.autograd import traced
from fewbit.autograd.handle import Recipe
from fewbit.autograd.layout import Layout
from fewbit.kernels import Coder

Tensor = torch.Tensor
_MEAN_MAGNITUDE = (2 / torch.pi) ** 0.5  # of a standard normal number


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How values become codes.

    coder       of a standard normal number
    stochastic  whether a value between two levels goes to either at random, so that its mean is the value (unbiased between
                the outermost levels), or, by default, to that of its interval, which has the least error
    """

    coder: Coder
    stochastic: bool = False

    def encode(self, x: Tensor) -> Tensor:
        """Packed codes of x (n,)."""
        return encode(self._round(x) if self.stochastic else x, self.coder)

    def _round(self, x: Tensor) -> Tensor:
        levels = self.coder.levels
        above = torch.bucketize(x.to(levels.dtype), levels).clamp(1, levels.numel() - 1)
        low, high = levels[above - 1], levels[above]
        return torch.where(torch.rand_like(low) * (high - low) < x - low, high, low)


def encode(x: Tensor, coder: Coder) -> Tensor:
    """Packed codes (packed_bytes(n, bits),) uint8 of x (n,)."""
    return traced.encode(x, coder) if traced.is_watched(x) else kernels.encode(x, coder)


def decode(packed: Tensor, grad: Tensor, coder: Coder) -> Tensor:
    """grad (n,) times the levels of the packed codes."""
    return traced.decode(packed, grad, coder) if traced.is_watched(grad) else kernels.decode(packed, grad, coder)


def values(packed: Tensor, layout: Layout, dtype: torch.dtype, coder: Coder) -> Tensor:
    """The levels of the packed codes, as a tensor of that layout and dtype."""
    n = layout.shape.numel()
    if traced.is_watched(packed):
        return layout.unflatten(traced.decode(packed, torch.ones(n, dtype=dtype, device=packed.device), coder))
    return layout.unflatten(kernels.values(packed, n, coder, dtype))


def standardized(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """x, center and spread along `dims`: ((x - center) / spread, center, spread), the latter of size 1 there.

    The spread is the mean magnitude as a standard normal number has it: single outliers move it less than a mean square. It is
    positive, also where x is constant.
    """
    if not dims or x.numel() == 0:
        return x, torch.zeros_like(x[:1]), torch.ones_like(x[:1])
    center = x.mean(tuple(dims), keepdim=True)
    centered = x - center
    spread = _mean_magnitude(centered, dims)
    return centered.div_(spread), center, spread


def scaled(x: Tensor, quantizer: Quantizer, channel: int) -> Recipe:
    """The recipe of codes of x, standardized by channel, and then scaled by row.

    x        floating-point, any shape and strides
    channel  the dimension of the channels: -1 for linear layers, 1 for convolutions. Rows are all that has one place in the
             dimensions before it: a token, or an image.

    A center and a spread for each channel, over all rows, take up the channels that large models have far outside the range of
    all others; a scale for each row the tokens that differ in size. Together they cost a number a row and two a channel, less
    than the scales of groups do, whose codes an outlier spoils for its whole group.
    """
    channel %= max(x.dim(), 1)
    normal, center, spread = standardized(x.to(quantizer.coder.levels.dtype), [dim for dim in range(x.dim()) if dim != channel])
    row = _mean_magnitude(normal, range(channel, x.dim()))
    normal = normal / row
    layout, coder = Layout.of(normal), quantizer.coder

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, center, spread, row = kept
        return torch.addcmul(center.to(dtype), values(packed, layout, dtype, coder).mul_(row), spread.to(dtype))

    return Recipe((quantizer.encode(layout.flatten(normal)), center, spread, row), rebuild)


def _mean_magnitude(x: Tensor, dims: Sequence[int]) -> Tensor:
    """That of the numbers along `dims`, relative to a standard normal number's; positive, of x's number of dimensions."""
    mean = x.abs().mean(tuple(dims), keepdim=True)
    return (mean / _MEAN_MAGNITUDE).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
