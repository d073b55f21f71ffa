"""The reference backend: encode and decode in torch operations, on any device. Every other backend is held against it."""

from __future__ import annotations

import torch

from fewbit import packing
from fewbit.kernels.device_table import DeviceTable

Tensor = torch.Tensor


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """Packed codes of x, laid out as `fewbit.packing` specifies.

    x        (*) of n elements, contiguous; float16, bfloat16, float32 or float64
    table    on x's device; its thresholds are float64 if x is, else float32
    Returns  (packed_bytes(n, bits),) uint8
    """
    x, n, bits = x.reshape(-1), x.numel(), table.bits
    word_count = packing.words(n, bits)
    planes = torch.zeros(bits, word_count, dtype=torch.uint8, device=x.device)
    for lane in range(packing.LANES):
        start, stop = packing.lane_span(n, lane, word_count)
        if start == stop:
            break
        code = _code(x[start:stop].to(table.thresholds.dtype), table)
        for plane, shift in packing.fields(bits, lane):
            planes[plane, : stop - start] |= code << shift if shift >= 0 else code >> -shift
    return planes.view(-1)


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """grad times the level of each element's code.

    packed   (packed_bytes(n, bits),) uint8 from `encode`
    grad     (*) of n elements, contiguous
    table    the one that encoded; the product is of its levels' dtype, then rounded once to grad's
    Returns  (*), of grad's shape and dtype
    """
    n, bits, levels = grad.numel(), table.bits, table.levels
    planes = packed.view(bits, -1)
    word_count = planes.shape[1]
    shape, grad = grad.shape, grad.reshape(-1)
    product = torch.empty_like(grad)
    for lane in range(packing.LANES):
        start, stop = packing.lane_span(n, lane, word_count)
        if start == stop:
            break
        code = _lane_code(planes[:, : stop - start], lane, bits)
        product[start:stop] = grad[start:stop].to(levels.dtype) * levels.index_select(0, code)
    return product.view(shape)


def values(packed: Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> Tensor:
    """The levels of n packed codes: (n,) of the dtype."""
    return decode(packed, torch.ones(n, dtype=dtype, device=packed.device), table)


def _code(x: Tensor, table: DeviceTable) -> Tensor:
    """Code of each x, uint8: the last interval's, plus the differences of the codes, modulo 256, at all thresholds >= x.

    A NaN is below no threshold and so takes the last interval's code.
    """
    code = table.codes[-1].expand(x.shape).clone()
    for threshold, difference in zip(table.thresholds, table.codes[:-1] - table.codes[1:], strict=True):
        code += (x <= threshold) * difference
    return code


def _lane_code(planes: Tensor, lane: int, bits: int) -> Tensor:
    """Codes of one lane, int32 (index_select takes no uint8)."""
    code = torch.zeros(planes.shape[1], dtype=torch.uint8, device=planes.device)
    for plane, shift in packing.fields(bits, lane):
        code |= planes[plane] >> shift if shift >= 0 else planes[plane] << -shift
    return (code & (2**bits - 1)).int()
