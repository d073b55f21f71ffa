"""The reference backend: encode and decode in torch operations, on any device. Every other backend is held against it."""

from __future__ import annotations

import torch

from fewbit import packing

Tensor = torch.Tensor


def encode(x: Tensor, thresholds: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Packed codes of x, laid out as `fewbit.packing` specifies.

    x           (n,) contiguous, float16, bfloat16, float32 or float64
    thresholds  (m,) ascending, float64 if x is, else float32: the dtype in which x is compared
    codes       (m+1,) uint8, each below 2**bits
    Returns     (packed_bytes(n, bits),) uint8
    """
    n = x.numel()
    word_count = packing.words(n, bits)
    planes = torch.zeros(bits, word_count, dtype=torch.uint8, device=x.device)
    for lane in range(packing.LANES):
        start, stop = packing.lane_span(n, lane, word_count)
        if start == stop:
            break
        code = _code(x[start:stop].to(thresholds.dtype), thresholds, codes)
        for plane, shift in packing.fields(bits, lane):
            planes[plane, : stop - start] |= code << shift if shift >= 0 else code >> -shift
    return planes.view(-1)


def decode(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    """grad times the level of each element's code.

    packed  (packed_bytes(n, bits),) uint8 from `encode`
    levels  (K,) float64 if grad is, else float32: the dtype of the product, which is rounded once to grad's
    grad    (n,) contiguous
    Returns (n,) of grad's dtype
    """
    n = grad.numel()
    planes = packed.view(bits, -1)
    word_count = planes.shape[1]
    product = torch.empty_like(grad)
    for lane in range(packing.LANES):
        start, stop = packing.lane_span(n, lane, word_count)
        if start == stop:
            break
        code = _lane_code(planes[:, : stop - start], lane, bits)
        product[start:stop] = grad[start:stop].to(levels.dtype) * levels.index_select(0, code)
    return product


def _code(x: Tensor, thresholds: Tensor, codes: Tensor) -> Tensor:
    """Code of each x, uint8: the last interval's, plus the differences of the codes, modulo 256, at all thresholds >= x.

    A NaN is below no threshold and so takes the last interval's code.
    """
    code = codes[-1].expand(x.shape).clone()
    for threshold, difference in zip(thresholds, codes[:-1] - codes[1:], strict=True):
        code += (x <= threshold) * difference
    return code


def _lane_code(planes: Tensor, lane: int, bits: int) -> Tensor:
    """Codes of one lane, int32 (index_select takes no uint8)."""
    code = torch.zeros(planes.shape[1], dtype=torch.uint8, device=planes.device)
    for plane, shift in packing.fields(bits, lane):
        code |= planes[plane] >> shift if shift >= 0 else planes[plane] << -shift
    return (code & (2**bits - 1)).int()
