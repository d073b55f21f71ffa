"""How a tensor lies in memory. Codes follow memory, not the logical order, so that any dense tensor is read as it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Layout(NamedTuple):
    """The shape of a tensor, and its dimensions from the outermost in memory to the innermost."""

    shape: torch.Size
    order: tuple[int, ...]

    @classmethod
    def contiguous(cls, shape: torch.Size) -> Layout:
        """The usual one: the last dimension is the innermost."""
        return cls(shape, tuple(range(len(shape))))

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        if tensor.is_contiguous():  # also for shapes that depend on data, whose strides cannot be compared
            return cls.contiguous(tensor.shape)
        return cls(tensor.shape, tuple(memory_order(tensor.stride())))

    def flatten(self, tensor: Tensor) -> Tensor:
        """(n,): a tensor of this shape, in this order; no copy where it lies so."""
        return tensor.permute(self.order).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """What `flatten` made (n,) of, without a copy."""
        return flat.view([self.shape[dim] for dim in self.order]).permute(inverse(self.order))


def memory_order(strides: Sequence[int]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost.

    Sorted by insertion, since dynamo cannot sort by symbolic strides, but compares them.

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
