"""The CPU backend: encode and decode compiled by numba (`fewbit bench --parts` compares their time with that of a copy).

Encoding does not search. It goes through the intervals from the highest to the lowest; if x is not above an interval's upper
threshold, the interval's code overwrites the code so far. This takes a comparison and a selection per threshold and vectorises
fully, unlike a binary search. For an even table only the upper half of the thresholds is compared, with |x|. Decoding takes
levels from a tree of selections by the code's bits for up to 4 bits, and from an array for more.
"""

from __future__ import annotations

import platform
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import binding

from fewbit import packing
from fewbit.kernels import loops, reference
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.system import Kernel, in_huge_pages
from fewbit.torch_internals import is_zero

Tensor = torch.Tensor
Array = np.ndarray
_HALVES = {torch.bfloat16: "uint16", torch.float16: "int16"}  # integer types that stand for the two dtypes in kernels


class Encoding(NamedTuple):
    """A table in the form that an encoder of one dtype takes.

    kernel  the compiled encoder
    block   those of its arguments that are the same in each call
    tables  (rungs, 5) int64: for each rung the addresses of its two arrays, the number of passes of four and of two thresholds,
            and whether |x| is compared
    arrays  the two arrays of each rung: thresholds in the order of `_sortable`, the smallest first, padded by repetition to
            fill passes of four or two; and the codes of their intervals
    """

    kernel: Kernel
    block: loops.EncodeBlock
    tables: Array
    arrays: list[Array]


class Decoding(NamedTuple):
    """A table in the form that a decoder of one dtype takes: the compiled decoder, those of its arguments that are the same in
    each call, and the levels to which these point."""

    kernel: Kernel
    block: loops.DecodeBlock
    levels: Tensor


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.reference.encode` for x on the CPU."""
    return encode_checked(x, table, checked=False)[0]


def encode_checked(x: Tensor, table: DeviceTable, checked: bool = True) -> tuple[Tensor, bool]:
    """The packed codes, and whether all of x is finite, if `checked`."""
    (x, address), (kernel, common, tables, _) = _in_memory(x), _encoding(table, x.dtype)
    n, bits, is_ladder = x.numel(), table.bits, len(tables) > 1
    if n == 0 and is_ladder:  # without words, kernels do not write the rung either
        return reference.encode(x, table), True
    words = packing.words(n, bits)
    packed = table.codes.new_empty(bits * words + is_ladder)  # uint8 like the codes; passing a dtype takes longer
    block = loops.EncodeBlock.from_buffer_copy(common)
    block.words, block.packed, block.n, block.x, block.checked = words, packed.data_ptr(), n, address, checked
    kernel.run(block, n)
    return packed, not block.infinite


has_formula = reference.has_formula


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.reference.decode` for tensors on the CPU."""
    decoding = _decoding(table, grad.dtype)
    if decoding is None:
        return reference.decode(packed, grad, table)
    grad, address = _in_memory(grad)
    return _decode(packed, address, in_huge_pages(torch.empty_like(grad)), decoding)


def values(packed: Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> Tensor:
    """`fewbit.kernels.reference.values` for tensors on the CPU."""
    decoding = _decoding(table, dtype)
    if decoding is None:
        return reference.values(packed, n, table, dtype)
    return _decode(packed, 0, torch.empty(n, dtype=dtype), decoding)


def _decode(packed: Tensor, grad: int, product: Tensor, decoding: Decoding) -> Tensor:
    """Fill the product. grad is an address, or 0 for a gradient of ones."""
    n, block = product.numel(), loops.DecodeBlock.from_buffer_copy(decoding.block)
    words = (packed.numel() - (block.rungs > 1)) // block.bits
    block.words, block.packed, block.n, block.x, block.product = words, packed.data_ptr(), n, grad, product.data_ptr()
    decoding.kernel.run(block, n)
    return product


def _in_memory(tensor: Tensor) -> tuple[Tensor, int]:
    """A contiguous tensor with the same numbers, resolved for reading from memory, and its address."""
    address = tensor.data_ptr()
    if tensor.is_contiguous() and not tensor.is_neg() and (address or not is_zero(tensor)):
        return tensor, address
    tensor = tensor.clone(memory_format=torch.contiguous_format).resolve_neg()
    return tensor, tensor.data_ptr()


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels can take tensors of the dtype. They take float16 only if the processor can convert it."""
    converts_half = binding.get_host_cpu_features().get("f16c") or platform.machine() in ("aarch64", "arm64")
    return dtype != torch.float16 or bool(converts_half)


@lru_cache(maxsize=512)
def _encoding(table: DeviceTable, dtype: torch.dtype) -> Encoding:
    described, arrays = zip(*(_rung(each, dtype) for each in table.rungs), strict=True)
    tables, arrays = np.array(described, np.int64), [array for pair in arrays for array in pair]
    wide = arrays[0].itemsize > 2 or table.bits > 4
    infinity = loops.INFINITY[str(dtype).removeprefix("torch.")]
    block = loops.EncodeBlock(bits=table.bits, rungs=len(tables), tables=tables.ctypes.data, infinity=infinity)
    return Encoding(_encoder(arrays[0].dtype.name, wide), block, tables, arrays)


def _rung(table: DeviceTable, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[Array, Array]]:
    """The entries of `Encoding.tables` for a single table, and its arrays."""
    thresholds, codes, fold = table.thresholds.cpu(), table.codes.cpu(), table.is_even
    if fold:
        thresholds, codes = thresholds[thresholds.numel() // 2 :], codes[codes.numel() // 2 :]
    ordered = _sortable(thresholds, dtype)
    fours, rest = divmod(ordered.size, 4)
    fours, twos, padding = ((fours, 0, 0), (fours, 1, 1), (fours, 1, 0), (fours + 1, 0, 1))[rest]
    # the repeated threshold comes first; it gives the code of the first interval again
    ordered = np.concatenate([np.repeat(ordered[:1], padding), ordered])
    of_intervals = np.concatenate([np.repeat(codes.numpy()[:1], padding), codes.numpy()]).astype(f"int{8 * ordered.itemsize}")
    return (ordered.ctypes.data, of_intervals.ctypes.data, fours, twos, fold), (ordered, of_intervals)


def _sortable(thresholds: Tensor, dtype: torch.dtype) -> Array:
    """Thresholds for comparisons: for half-width inputs as integers, else unchanged. The result of x <= t is the same.

    A threshold is rounded down to a half-width float. The bit pattern of this float is then ordered as in `loops`.
    """
    if dtype not in _HALVES:
        return thresholds.to(dtype).numpy()
    rounded = thresholds.to(dtype)
    patterns = rounded.view(torch.int16).to(torch.int32)
    ordered = torch.where(patterns < 0, patterns ^ 0x7FFF, patterns) - (rounded.float() > thresholds).int()
    return torch.where(thresholds == 0, 0, ordered).to(torch.int16).numpy()  # -0 <= 0 and 0 <= -0


@lru_cache(maxsize=256)
def padded_levels(table: DeviceTable) -> Tensor:
    """The levels (rungs, 2**bits). Levels past a table's own are zero."""
    levels = table.levels.cpu()
    return torch.nn.functional.pad(levels, (0, 2**table.bits - levels.shape[-1])).view(len(table.rungs), -1)


@lru_cache(maxsize=512)
def _decoding(table: DeviceTable, dtype: torch.dtype) -> Decoding | None:
    """The decoding of a table; None if the kernels cannot take it because its levels have another dtype, which is rare."""
    if (dtype == torch.float64) != (table.levels.dtype == torch.float64):
        return None
    levels = padded_levels(table)
    return Decoding(_decoder(dtype), loops.DecodeBlock(bits=table.bits, rungs=len(levels), levels=levels.data_ptr()), levels)


@cache
def _encoder(element: str, wide: bool) -> Kernel:
    return Kernel(loops.encoder(element, wide), loops.encoder_scratch(element, wide))


@cache
def _decoder(dtype: torch.dtype) -> Kernel:
    element = _HALVES.get(dtype) or str(dtype).removeprefix("torch.")
    return Kernel(loops.decoder(element), loops.decoder_scratch(element))
