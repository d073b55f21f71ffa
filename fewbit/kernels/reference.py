"""The reference backend: encode and decode in torch operations, on any device. Tests compare every other backend with it.

The choice of the rung of a ladder is also specified to the last bit. R = min(n, SAMPLE) of the n elements are read: element
floor(k·n / R) for k < R, as a float v in the dtype of comparisons, or 0 if it is not finite. Their fourth moment measures the
spread. In it tails count much, because values far beyond the outermost levels suffer most from coding. With s = v·v, the
products s·s, each rounded, are summed in a fixed order: product k is added to accumulator k mod 16, in ascending order of k.
The accumulators are then added in pairs, 0 + 1, 2 + 3, and so on, until one is left. No product is fused with a sum. The rung
is the number of `BOUNDS` that, times R, are below the sum, or `MIDDLE` if the sum is 0. It is kept in one byte after the packed
codes.
"""

from __future__ import annotations

import torch

from fewbit import packing
from fewbit.kernels.device_table import BOUNDS, MIDDLE, SAMPLE, DeviceTable

Tensor = torch.Tensor


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """Packed codes of x, laid out as `fewbit.packing` specifies.

    x        (*) of n elements, contiguous; float16, bfloat16, float32 or float64
    table    on x's device; its thresholds are float64 if x is, else float32
    Returns  (table.packed_bytes(n),) uint8
    """
    if not table.is_ladder:
        return _encode(x, table)
    rung = rung_of(x, table)
    thresholds, codes, levels = (
        each.index_select(0, rung).squeeze(0) for each in (table.thresholds, table.codes, table.levels)
    )
    return torch.cat([_encode(x, DeviceTable(thresholds, codes, levels, table.bits)), rung.to(torch.uint8)])


def encode_checked(x: Tensor, table: DeviceTable) -> tuple[Tensor, bool]:
    """The same, and True: this backend does not check whether x is finite."""
    return encode(x, table), True


def has_formula(name: str) -> bool:
    """Whether there is a `forward` that computes the built-in activation of that name together with the codes."""
    return False


def rung_of(x: Tensor, table: DeviceTable) -> Tensor:
    """The number of the rung of a ladder for x (*): (1,) int64, on x's device."""
    x, size = x.reshape(-1), min(x.numel(), SAMPLE)
    dtype, lanes = table.thresholds.dtype, 16
    sums = torch.zeros(lanes, dtype=dtype, device=x.device)
    if size:
        sample = x[torch.arange(size, device=x.device) * x.numel() // size].to(dtype)
        square = torch.where(sample.isfinite(), sample, 0).square()
        for row in torch.nn.functional.pad(square * square, (0, -size % lanes)).view(-1, lanes):
            sums = sums + row
    while sums.numel() > 1:
        sums = sums[0::2] + sums[1::2]
    bounds = torch.tensor([bound * size for bound in BOUNDS], dtype=dtype, device=x.device)
    return torch.where(sums > 0, (bounds < sums).sum(0, keepdim=True), MIDDLE)


def _encode(x: Tensor, table: DeviceTable) -> Tensor:
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

    packed   (table.packed_bytes(n),) uint8 from `encode`
    grad     (*) of n elements, contiguous
    table    the table that encoded; products have its levels' dtype and are rounded once to grad's
    Returns  (*), of grad's shape and dtype
    """
    n, bits, levels = grad.numel(), table.bits, table.levels
    if table.is_ladder:
        packed, rung = packed[:-1], packed[-1:].int()
        levels = levels.index_select(0, rung).squeeze(0)
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
    """Code of each x, uint8: the last interval's code plus the differences of codes, modulo 256, at all thresholds >= x.

    A NaN is below no threshold, so it takes the last interval's code.
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
