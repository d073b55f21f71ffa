"""Pooling and padding with exact codes: they keep no input, of which backward only needs the shape, and no 64-bit indices.

torch's own operators compute forward and backward. Backward gets a stand-in for the input. The place of a maximum is kept
relative to its window, in the fewest bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import encode_checked, values
from fewbit.constants import MAX_BITS
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import EagerFunction, memory_format_of, not_a_view, unwatched

Tensor = torch.Tensor
Integers = tuple[int, ...]


class Pooling(NamedTuple):
    """One of torch's operators that are linear in x, or choose among its elements, with the operator of its backward.

    forward    function of x and the arguments
    backward   Function of the gradient, x, the arguments and, for maxima, their indices. It reads only the shape, dtype, device
               and memory format of x.
    arguments  arguments of both
    """

    forward: Callable[..., Any]
    backward: Callable[..., Tensor]
    arguments: tuple

    def grad(self, grad: Tensor, of_x: tuple[torch.Size, torch.memory_format], *indices: Tensor) -> Tensor:
        """The gradient of an x of that shape and memory format."""
        return self.backward(grad, _stand_in(grad, *of_x), *self.arguments, *indices)


def _stand_in(grad: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """A tensor of this shape with arbitrary numbers. It takes no memory in the usual memory format. Other formats need memory,
    because torch chooses the order of its computation by the format."""
    if memory_format == torch.contiguous_format:
        return grad.new_empty(1).expand(shape)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def without_input(x: Tensor, *, pooling: Pooling) -> Tensor:
    """The output of an operator whose backward needs only the shape of x."""
    return _WithoutInput.apply(x, pooling)  # type: ignore[return-value]


class _WithoutInput(EagerFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: Pooling) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.pooling, ctx.of_x = pooling, (x.shape, memory_format_of(x))
        return not_a_view(pooling.forward(x, *pooling.arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return None if grad is None else ctx.pooling.grad(grad, ctx.of_x), None


class Windows(NamedTuple):
    """The windows of a pooling, with one number for each dimension of the plane.

    Window i begins at (i · step - back) // parts. It has at most `places` places, with the distance `apart` between them.
    """

    step: Integers
    back: Integers
    parts: Integers
    places: Integers
    apart: Integers

    @classmethod
    def strided(cls, kernel: Integers, stride: Integers, padding: Integers, dilation: Integers) -> Windows:
        """The windows of max_pool."""
        return cls(stride, padding, (1,) * len(kernel), kernel, dilation)

    @classmethod
    def adaptive(cls, plane: Integers, output: Integers) -> Windows:
        """The windows of adaptive_max_pool from planes of one size to planes of another."""
        places = (_most_places(*sizes) for sizes in zip(plane, output, strict=True))
        ones = (1,) * len(plane)
        return cls(plane, (0,) * len(plane), output, tuple(places), ones)

    def first(self, plane: Integers, output: Integers, device: torch.device) -> Tensor:
        """The index in the plane of the first place of each window: (*output). It may lie outside of the plane."""
        found = torch.zeros((), dtype=torch.int64, device=device)
        for step, back, parts, number, stride in zip(*self[:3], output, _strides(plane), strict=True):
            starts = (torch.arange(number, device=device) * step - back).div(parts, rounding_mode="floor")
            found = found.unsqueeze(-1) + starts * stride
        return found

    def most(self, plane: Integers) -> int:
        """The distance of the last place of a window from its first one."""
        return sum((n - 1) * apart * stride for n, apart, stride in zip(*self[3:], _strides(plane), strict=True))

    def distances(self, plane: Integers) -> tuple[int, ...]:
        """The distances of all places of a window from the first one, as differences of indices in the plane.

        >>> Windows.strided((2, 2), (2, 2), (0, 0), (1, 1)).distances((8, 8))
        (0, 1, 8, 9)
        """
        steps = [apart * stride for apart, stride in zip(self.apart, _strides(plane), strict=True)]
        places = product(*(range(n) for n in self.places))
        return tuple(sorted({sum(map(int.__mul__, place, steps)) for place in places}))


@lru_cache(maxsize=1024)
def _most_places(size: int, output: int) -> int:
    return max((-(-(i + 1) * size // output) - i * size // output for i in range(output)), default=0)


def _strides(plane: Integers) -> Integers:
    return tuple(prod(plane[dim + 1 :]) for dim in range(len(plane)))


def max_pooled(x: Tensor, *, pooling: Pooling, dims: int, windows: Windows | None, with_indices: bool) -> Any:
    """The maxima, with their indices if these are asked for. The place of each maximum in its window is kept for backward.
    Indices that are asked for are kept as they are, because functions that read them, such as max_unpool, keep them too.

    dims     number of dimensions of a plane, which are the last ones of x
    windows  None for those of adaptive_max_pool
    """
    y, indices = _CodedMaxPool.apply(x, pooling, dims, windows, with_indices)  # type: ignore[misc]
    return (y, indices) if with_indices else y


class _CodedMaxPool(EagerFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pooling: Pooling, dims: int, windows: Windows | None, with_indices: bool
    ) -> tuple[Tensor, Tensor | None]:
        y, indices = pooling.forward(x, *pooling.arguments)
        kept, ctx.restore = (indices, _as_it_is) if with_indices else _coded(indices, tuple(x.shape[-dims:]), windows)
        ctx.save_for_backward(kept)
        ctx.set_materialize_grads(False)
        ctx.pooling, ctx.of_x = pooling, (x.shape, memory_format_of(x))
        if not with_indices:
            return not_a_view(y), None
        ctx.mark_non_differentiable(indices)
        return not_a_view(y), indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        (kept,) = ctx.saved_tensors
        return ctx.pooling.grad(grad, ctx.of_x, ctx.restore(kept)), *(None,) * 4


def _coded(indices: Tensor, plane: Integers, windows: Windows | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is kept of indices (*, *output) in the plane, and a function that restores the indices from it.

    The smaller of two forms is kept: packed codes of the distances from the first place of each window, or the indices in fewer
    bytes. `indices` may be overwritten.
    """
    output, device = tuple(indices.shape[-len(plane) :]), indices.device
    windows = windows or Windows.adaptive(plane, output)
    dtype = _narrowest(prod(plane) + windows.most(plane))
    table = _table_of(windows, plane, device)
    if table is None or table.packed_bytes(indices.numel()) >= indices.numel() * dtype.itemsize:
        return indices.to(dtype), _in_64_bits
    distances = indices.sub_(windows.first(plane, output, device)).to(torch.float32)
    layout = Layout.of(distances)
    packed, _ = encode_checked(layout.flatten(distances), table)

    def restore(packed: Tensor) -> Tensor:
        distances = values(packed, layout, torch.float32, table).to(torch.int64)
        return distances.add_(windows.first(plane, output, packed.device))

    return packed, restore


def _as_it_is(indices: Tensor) -> Tensor:
    return indices


def _in_64_bits(indices: Tensor) -> Tensor:
    return indices.to(torch.int64)


def _narrowest(most: int) -> torch.dtype:
    """The narrowest integer dtype that holds `most`."""
    return next(each for each in (torch.uint8, torch.int16, torch.int32, torch.int64) if torch.iinfo(each).max >= most)


@lru_cache(maxsize=256)
def _table_of(windows: Windows, plane: Integers, device: torch.device) -> DeviceTable | None:
    """The table of the distances in the windows; None if there are more than 8 bits can hold, or if they are so large that
    float32 has no halves between them."""
    if prod(windows.places) > 2**MAX_BITS or windows.most(plane) >= 2**23:
        return None
    distances = windows.distances(plane)
    bits = max(1, (len(distances) - 1).bit_length())
    with unwatched():
        levels = torch.tensor(distances, dtype=torch.float32)
        codes = torch.arange(len(distances), dtype=torch.uint8)
        tensors = (levels[:-1] + 0.5, codes, levels)
        return DeviceTable(*(each.to(device) for each in tensors), bits=bits)
