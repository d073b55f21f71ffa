"""The loops of the CPU backend for layers: they encode standardized values, and rebuild values from codes.

As in `fewbit.kernels.loops`, a kernel takes one block of arguments, claims pieces of its work from a counter until none are
left, and allocates nothing. Each kernel exists for float32 and for float64. Other dtypes are widened when they are read and
rounded when they are written, see `fewbit.kernels.spans`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fewbit.kernels.llvm import advance, pointer
from fewbit.kernels.loops import (
    _CLAIMED,
    _DONE,
    _WORKERS,
    _array,
    _compile,
    _encode_lane,
    _inlined,
    _join,
    _take_byte,
)
from fewbit.kernels.permutations import permuted_codes
from fewbit.kernels.spans import (
    SMALLEST_UNIT,
    decode_levels,
    grid_of,
    load,
    multiply,
    of_channels,
    rebuild,
    segment,
    store,
    store_clamped,
    unit,
    view_of,
)

CHUNK = 1024  # words, or elements of a row, that are processed at once; they stay in the first-level cache
_INTEGERS = ("claimed", "workers", "done", "scratch", "pieces")
_GRID = ("n", "channels", "inner", "per_row", "groups", "per_group", "repeat")
_VIEW = ("x", "outer_stride", "channel_stride", "inner_stride", "kind", "in_order")
_CODES = ("packed", "words", "bits")
PREFIX = (*_INTEGERS, *_GRID, *_VIEW, *_CODES)
DECODE, SLOPE, GATE_VALUE, GATE_BACKWARD, COMBINE = range(5)
_LOST = 8 * len(PREFIX)


def fields(*names: str, numbers: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """The fields of a block: the common ones, these integers and addresses, and these float64 numbers."""
    return [(name, ctypes.c_int64) for name in (*PREFIX, *names)] + [(name, ctypes.c_double) for name in numbers]


class EncodeBlock(ctypes.Structure):
    """The arguments of an encoder. Addresses are those of contiguous memory, or 0 for None.

    claimed      pieces claimed so far; workers: threads that have claimed some; done: pieces done. All are 0 at first.
    scratch      scratch memory, `encoder_scratch` bytes for each thread that claims a piece
    pieces       number of pieces of `CHUNK` words each
    n … in_order the grid and the view of x, see `fewbit.kernels.spans`; `repeat` adjacent channels share their numbers, so
                 arrays of channels below have (channels // repeat,) entries
    lost         0; becomes positive if a z, the coding or a vector is not finite
    shift, scale wide; for rows if `by_row`, else for channels; with `has_eps` scales are divided by their units
    coding       (3, channels) wide; vectors: `vector_size` numbers, which are (rows, channels)
    center       row of the vectors in which channels with a z that is not finite are marked, or -1; `offset` is another one, or
                 the same
    thresholds   4 * fours + 2 * twos, wide; codes: integers of their width, one more. Both as in `fewbit.kernels.cpu.Encoding`.
    permuted     (64,) and permuted_codes (16,), for `permuted_codes` of `fewbit.kernels.permutations`, or 0
    """

    _fields_ = fields(
        *("lost", "shift", "scale", "by_row", "has_eps", "coding", "vectors", "vector_size", "center", "offset"),
        *("thresholds", "codes", "fours", "twos", "permuted", "permuted_codes"),
        numbers=("eps",),
    )


class RebuildBlock(ctypes.Structure):
    """The arguments of `rebuilder`: those of `EncodeBlock` that it has too, and

    mode     DECODE, SLOPE, GATE_VALUE or GATE_BACKWARD for the function of `layers_reference`, whose grad is x; or COMBINE for
             grad * move + level * factor + offset
    factor, offset, move, shift   (channels,) wide
    row      (rows,) wide
    levels   (2**bits,) wide; slopes and values are those of gate's code in `packed_gate`, with `gate_words` and `gate_bits`
    out, out_kind, largest   the product, and the number to which it is clamped
    other    the second product of GATE_BACKWARD
    """

    _fields_ = fields(
        *("mode", "factor", "offset", "move", "shift", "row", "has_eps", "levels", "out", "out_kind"),
        *("packed_gate", "gate_words", "gate_bits", "slopes", "values", "other"),
        numbers=("eps", "largest", "below", "above"),
    )


def encoder_scratch(wide: str, repeated: int) -> int:
    """Bytes per thread: two int32, four codes and an element for each word of a chunk, and five numbers for each repeated
    channel."""
    return CHUNK * (8 + 5 * np.dtype(wide).itemsize) + 5 * repeated * np.dtype(wide).itemsize


def rebuilder_scratch(wide: str, repeated: int) -> int:
    """Bytes per thread: an int32, a one and three numbers for each element of a chunk, and four numbers for each repeated
    channel."""
    return CHUNK * (4 + 4 * np.dtype(wide).itemsize) + 4 * repeated * np.dtype(wide).itemsize


def encoder(wide: str) -> Any:
    """The compiled encoder for "float32" or "float64": a numba CFunc that takes the address of an EncodeBlock."""
    values, size_of = np.dtype(wide).type, np.dtype(wide).itemsize
    integer = np.dtype(f"int{8 * size_of}").type
    exponent = integer(0x7F800000 if wide == "float32" else 0x7FF << 52)

    def encode_layer(address):
        block = _array(address, 1)[0]
        n, words, bits, twos, channels, repeat = block.n, block.words, block.bits, block.twos, block.channels, block.repeat
        grid, view, given = grid_of(block), view_of(block), block.channels // block.repeat
        packed = _array(pointer(block.packed), bits * words, np.uint8)
        thresholds = _array(pointer(block.thresholds), 4 * block.fours + 2 * twos, values)
        table = _array(pointer(block.codes), 4 * block.fours + 2 * twos + 1, integer)
        rows = _array(pointer(block.permuted), 64 if block.permuted else 0, values)
        of_rows = _array(pointer(block.permuted_codes), 16, integer)
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        if piece == 0:
            lost = _any_lost(_array(pointer(block.vectors), block.vector_size, integer), exponent)
            if lost or _any_lost(_array(pointer(block.coding), 3 * given, integer), exponent):
                advance(address, _LOST, 1)
        own = CHUNK * (8 + 5 * size_of)
        memory = block.scratch + advance(address, _WORKERS, 1) * (own + (5 * channels * size_of if repeat > 1 else 0))
        joined = _array(pointer(memory), (2, CHUNK), np.int32)
        codes = _array(pointer(memory + 8 * CHUNK), (4, CHUNK), integer)
        z = _array(pointer(memory + (8 + 4 * size_of) * CHUNK), CHUNK, values)
        patterns = _array(pointer(memory + (8 + 4 * size_of) * CHUNK), CHUNK, integer)
        behind, number = memory + own, channels * size_of
        middle, inverse = block.coding, block.coding + given * size_of
        coding = (
            of_channels(middle, channels, repeat, behind, z),
            of_channels(inverse, channels, repeat, behind + number, z),
            of_channels(inverse + given * size_of, channels, repeat, behind + 2 * number, z),
        )
        if block.by_row:
            rows_at_most = n // block.inner
            shift = _array(pointer(block.shift), rows_at_most if block.shift else 0, values)
            scale = _array(pointer(block.scale), rows_at_most if block.scale else 0, values)
        else:
            shift = of_channels(block.shift, channels, repeat, behind + 3 * number, z)
            scale = of_channels(block.scale, channels, repeat, behind + 4 * number, z)
        while piece < block.pieces:
            first = piece * CHUNK
            size = min(CHUNK, words - first)
            for lane in range(8):
                begin, end = min(lane * words + first, n), min(lane * words + first + size, n)
                part = z[: end - begin]
                load(view, grid, begin, part)
                _standard(part, begin, grid, shift, scale, block.by_row, values(block.eps), block.has_eps, coding)
                if _any_lost(patterns[: end - begin], exponent):
                    advance(address, _LOST, 1)
                    if block.center >= 0:
                        vectors = _array(pointer(block.vectors), (block.vector_size // given, given), values)
                        _mark(part, begin, grid, repeat, vectors[block.center], vectors[block.offset])
                rest = permuted_codes(part, rows, of_rows, codes[lane % 4])
                _encode_lane(part[rest:], thresholds, table, twos, codes[lane % 4, rest:])
                codes[lane % 4, end - begin : size] = 0
                if lane % 4 == 3:
                    _join(codes[0], codes[1], codes[2], codes[3], bits, joined[lane // 4, :size])
            for plane in range(bits):
                begin = plane * words + first
                _take_byte(joined[0], joined[1], 8 * plane, 4 * bits, packed[begin : begin + size])
            advance(address, _DONE, 1)
            piece = advance(address, _CLAIMED, 1)

    return _compile(encode_layer, EncodeBlock, wide)


def rebuilder(wide: str) -> Any:
    """The compiled kernel of decode, times_slope, gate_value and gate_backward: a CFunc that takes the address of a
    RebuildBlock."""
    values, size_of = np.dtype(wide).type, np.dtype(wide).itemsize

    def rebuild_layer(address):
        block = _array(address, 1)[0]
        n, words, bits, channels, repeat, mode = block.n, block.words, block.bits, block.channels, block.repeat, block.mode
        grid, view, largest = grid_of(block), view_of(block), values(block.largest)
        packed = _array(pointer(block.packed), bits * words, np.uint8)
        levels = _array(pointer(block.levels), 1 << bits, values)
        row = _array(pointer(block.row), n // block.inner if block.row else 0, values)  # an upper bound of their number
        gate_words, gate_bits = block.gate_words, block.gate_bits
        packed_gate = _array(pointer(block.packed_gate), gate_bits * gate_words, np.uint8)
        slopes = _array(pointer(block.slopes), 1 << gate_bits, values)
        table = _array(pointer(block.values), 1 << gate_bits, values)
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        own, number = CHUNK * (4 + 4 * size_of), channels * size_of
        memory = block.scratch + advance(address, _WORKERS, 1) * (own + (4 * number if repeat > 1 else 0))
        codes = _array(pointer(memory), CHUNK, np.int32)
        work = _array(pointer(memory + 4 * CHUNK), (4, CHUNK), values)
        ones, a, b, c = work[0], work[1], work[2], work[3]  # unpacking would lose their stride of 1
        ones[:] = 1
        behind = memory + own
        factor = of_channels(block.factor, channels, repeat, behind, ones)
        offset = of_channels(block.offset, channels, repeat, behind + number, ones)
        move = of_channels(block.move, channels, repeat, behind + 2 * number, ones)
        shift = of_channels(block.shift, channels, repeat, behind + 3 * number, ones)
        while piece < block.pieces:
            first = piece * CHUNK
            size = min(CHUNK, words - first)
            for lane in range(8):
                begin, end = min(lane * words + first, n), min(lane * words + first + size, n)
                made, other, grad = a[: end - begin], b[: end - begin], c[: end - begin]
                decode_levels(packed, words, bits, begin, levels, codes, ones, made)
                if mode == COMBINE:
                    load(view, grid, begin, grad)
                    _combine(made, grad, begin, grid, factor, offset, move)
                    store_clamped(made, largest, block.out, begin, block.out_kind)
                    continue
                rebuild(made, begin, grid, factor, offset, move, shift, row, values(block.eps), block.has_eps)
                if mode in (SLOPE, GATE_BACKWARD):
                    load(view, grid, begin, grad)
                if mode == SLOPE:
                    _by_sign(grad, made, values(block.below), values(block.above))
                    store(grad, block.out, begin, block.out_kind)
                    continue
                if mode == DECODE and not block.below == block.above == 1:
                    _by_sign(made, made, values(block.below), values(block.above))
                if mode == GATE_VALUE:
                    decode_levels(packed_gate, gate_words, gate_bits, begin, table, codes, ones, other)
                    multiply(made, other)
                elif mode == GATE_BACKWARD:
                    decode_levels(packed_gate, gate_words, gate_bits, begin, table, codes, ones, other)
                    multiply(other, grad)
                    store_clamped(other, largest, block.other, begin, block.out_kind)
                    decode_levels(packed_gate, gate_words, gate_bits, begin, slopes, codes, ones, other)
                    multiply(made, grad)
                    multiply(made, other)
                store_clamped(made, largest, block.out, begin, block.out_kind)
            advance(address, _DONE, 1)
            piece = advance(address, _CLAIMED, 1)

    return _compile(rebuild_layer, RebuildBlock, wide)


@_inlined
def _combine(values, grad, begin, grid, factor, offset, of_grad):
    """Turn levels in place into grad * of_grad + level * factor + offset. These three belong to channels."""
    at = 0
    while at < values.size:
        channel, size = segment(begin + at, grid)[1], segment(begin + at, grid)[4]
        size = min(size, values.size - at)
        part, g, last = values[at : at + size], grad[at : at + size], channel + size
        if grid[1] > 1:
            a, b, c = of_grad[channel], factor[channel], offset[channel]
            for i in range(np.uintp(size)):
                part[i] = g[i] * a + part[i] * b + c
        else:
            _combine_along(part, g, of_grad[channel:last], factor[channel:last], offset[channel:last])
        at += size


@_inlined
def _combine_along(values, grad, of_grad, factor, offset):
    for i in range(np.uintp(values.size)):
        values[i] = grad[i] * of_grad[i] + values[i] * factor[i] + offset[i]


@_inlined
def _standard(z, begin, grid, shift, scale, by_row, eps, has_eps, coding):
    """Turn u into z in place, see `layers_reference.standard`."""
    number = z.dtype.type
    middle, inverse, onto = coding
    at = 0
    while at < z.size:
        _, channel, _, row, size = segment(begin + at, grid)
        size = min(size, z.size - at)
        part, last, of = z[at : at + size], channel + size, row if by_row else channel
        if grid[1] > 1 or by_row:
            s = shift[of] if shift.size else number(0)
            f = scale[of] if scale.size else number(1)
            if has_eps:
                f = f / unit(f, eps, (number(1), number(SMALLEST_UNIT)))
            if grid[1] > 1:
                _standard_segment(part, s, f, middle[channel], inverse[channel], onto[channel])
            else:
                _standard_row(part, s, f, middle[channel:last], inverse[channel:last], onto[channel:last])
        else:
            if shift.size:
                _subtract(part, shift[channel:last])
            if scale.size:
                multiply(part, scale[channel:last])
            _standard_row(part, number(0), number(1), middle[channel:last], inverse[channel:last], onto[channel:last])
        at += size


@_inlined
def _standard_segment(z, shift, scale, middle, inverse, onto):
    for i in range(np.uintp(z.size)):
        z[i] = ((z[i] - shift) * scale - middle) * inverse + onto


@_inlined
def _standard_row(z, shift, scale, middle, inverse, onto):
    for i in range(np.uintp(z.size)):
        z[i] = ((z[i] - shift) * scale - middle[i]) * inverse[i] + onto[i]


@_inlined
def _subtract(values, others):
    for i in range(np.uintp(values.size)):
        values[i] -= others[i]


@_inlined
def _any_lost(patterns, exponent):
    """Whether any float is infinite or NaN: its pattern has all bits of the exponent."""
    largest = exponent - exponent
    for i in range(np.uintp(patterns.size)):
        of_one = patterns[i] & exponent
        largest = of_one if of_one > largest else largest
    return largest == exponent


@_inlined
def _mark(z, begin, grid, repeat, center, offset):
    """Write NaN for channels in which some z is not finite."""
    for i in range(z.size):
        if not np.isfinite(z[i]):
            channel = segment(begin + i, grid)[1] // repeat
            center[channel] = np.nan
            offset[channel] = np.nan


@_inlined
def _by_sign(grad, values, below, above):
    for i in range(np.uintp(grad.size)):
        grad[i] *= above if values[i] > 0 else below
