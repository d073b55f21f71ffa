"""The order of a tensor's elements in memory. Codes follow this order, so any dense tensor is read without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from fewbit.kernels.grid import Grid

Tensor = torch.Tensor


class Layout(NamedTuple):
    """The shape of a tensor, and its dimensions from the outermost in memory to the innermost."""

    shape: torch.Size
    order: tuple[int, ...]

    @classmethod
    def contiguous(cls, shape: torch.Size) -> Layout:
        """The usual one: the last dimension is the innermost."""
        return cls(shape, tuple(range(len(shape))))

    @property
    def is_contiguous(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        if tensor.is_contiguous():  # this also works for shapes that depend on data, whose strides cannot be compared
            return cls.contiguous(tensor.shape)
        return cls(tensor.shape, tuple(memory_order(tensor.stride())))

    def flatten(self, tensor: Tensor) -> Tensor:
        """(n,): the elements of a tensor of this shape, in this order. No copy is made if they are in this order in memory."""
        return (tensor if self.is_contiguous else tensor.permute(self.order)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The inverse of `flatten`, without a copy."""
        if self.is_contiguous:
            return flat.view(self.shape)
        return flat.view([self.shape[dim] for dim in self.order]).permute(inverse(self.order))


class Arrangement(NamedTuple):
    """The order in which the elements of a tensor are packed, and the channels and rows to which they belong."""

    layout: Layout
    grid: Grid

    @classmethod
    def of(cls, x: Tensor, channel: int, groups: int = 1) -> Arrangement:
        """Channels are in the dimension `channel`, in `groups` groups. Each index of the dimensions before it, with each group,
        is a row. The dimensions after it belong to the row. Images may have their channels last in memory."""
        layout, shape = Layout.of(x), x.shape
        if channel == 1 and x.dim() > 2 and (layout.order[0], layout.order[-1]) == (0, 1):
            places = prod(shape[2:])
            return cls(layout, Grid(shape[0] * places, shape[1], 1, places, groups))
        if layout.order[: channel + 1] != tuple(range(channel + 1)):
            layout = Layout.contiguous(shape)
        return cls(layout, Grid(prod(shape[:channel]), shape[channel], prod(shape[channel + 1 :]), 1, groups))

    @classmethod
    def of_last(cls, shape: torch.Size, dims: int) -> Arrangement:
        """Each element of the last `dims` dimensions is a channel, each index of the other dimensions a row."""
        return cls(Layout.contiguous(shape), Grid(prod(shape[: len(shape) - dims]), prod(shape[len(shape) - dims :])))

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as (outer, channels, inner). It is copied only if its order in memory is another."""
        return (tensor if self.layout.is_contiguous else tensor.permute(self.layout.order)).reshape(self.grid[:3])


def memory_order(strides: Sequence[int]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost.

    This is an insertion sort, because dynamo cannot sort by symbolic strides but can compare them.

    >>> memory_order((12, 1, 4))
    [0, 2, 1]
    """
    order: list[int] = []
    for dim, stride in enumerate(strides):
        place = len(order)
        while place and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, dim)
    return order


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`.

    >>> inverse([2, 0, 1])
    [1, 2, 0]
    """
    undone = [0] * len(order)
    for position, dim in enumerate(order):
        undone[dim] = position
    return undone
