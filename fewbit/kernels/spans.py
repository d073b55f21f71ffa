"""Spans of a layer's elements in packed order. The CPU kernels for layers read, rebuild and write spans.

A span is in scratch memory, in float32 or float64 (called wide), for any dtype and strides of the tensor from which it is read.
All computations on it are loops over short, contiguous arrays. The elements of a segment of a span share a row and, if inner >
1, a channel. Numbers of rows and channels are then constant along the segment. If inner is 1, numbers of channels along a
segment are another contiguous array.

    grid   (channels, inner, per_row, groups, channels of a group), see `fewbit.kernels.grid`
    view   (address, strides of outer, channels and inner in elements, kind, whether it is contiguous) for a tensor
"""

from __future__ import annotations

import numpy as np
import torch

from fewbit.kernels.cpu import supports
from fewbit.kernels.llvm import narrow, pointer, widen
from fewbit.kernels.loops import _array, _inlined, _multiply, _put_byte
from fewbit.kernels.permutations import permuted_levels

HAS_HALF = supports(torch.device("cpu"), torch.float16)
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, **({torch.float16: 2} if HAS_HALF else {})}  # 0: wide
SMALLEST_UNIT = 2.0**-22  # as in `layers_reference`


@_inlined
def grid_of(block):
    """The grid in a block of arguments."""
    return block.channels, block.inner, block.per_row, block.groups, block.per_group


@_inlined
def view_of(block):
    """The view of the tensor in a block of arguments."""
    return block.x, block.outer_stride, block.channel_stride, block.inner_stride, block.kind, block.in_order


@_inlined
def of_channels(address, channels, repeat, memory, like):
    """The numbers at the address, (channels // repeat,) of like's dtype, each repeated. Address 0 gives an empty array.

    memory  an address with room for the repeated numbers
    """
    given = _array(pointer(address), channels // repeat if address else 0, like.dtype)
    if repeat == 1 or address == 0:
        return given
    repeated = _array(pointer(memory), channels, like.dtype)
    for c in range(given.size):
        for i in range(repeat):
            repeated[c * repeat + i] = given[c]
    return repeated


@_inlined
def segment(place, grid):
    """For the element with this number: its three indices, its row, and the number of elements from there in one segment."""
    channels, inner, per_row, groups, per_group = grid
    line, within = (place // inner, place % inner) if inner > 1 else (place, 0)
    outer, channel = line // channels, line % channels
    row, group = outer, 0
    if per_row > 1:
        row = outer // per_row
    if groups > 1:
        group = channel // per_group
        row = row * groups + group
    return outer, channel, within, row, inner - within if inner > 1 else (group + 1) * per_group - channel


@_inlined
def stretches(row, grid):
    """The place in packed order where the elements of a row begin, and the number, size and distance of their stretches."""
    channels, inner, per_row, groups, per_group = grid
    outer, group = row // groups * per_row, row % groups
    begin = (outer * channels + group * per_group) * inner
    if groups == 1:
        return begin, 1, per_row * channels * inner, 0
    return begin, per_row, per_group * inner, channels * inner


@_inlined
def load(view, grid, begin, out):
    """Read elements from number `begin` on into `out`, until it is full."""
    address, outer_stride, channel_stride, inner_stride, kind, in_order = view
    if in_order:
        load_run(address, begin, 1, kind, out)
        return
    at, stride = 0, inner_stride if grid[1] > 1 else channel_stride
    while at < out.size:
        outer, channel, within, _, size = segment(begin + at, grid)
        size = min(size, out.size - at)
        offset = outer * outer_stride + channel * channel_stride + within * inner_stride
        load_run(address, offset, stride, kind, out[at : at + size])
        at += size


@_inlined
def load_run(address, offset, stride, kind, out):
    """Read elements with one stride. The first is at that offset from the address."""
    if kind == 0:
        _widen_all(_array(pointer(address + out.itemsize * offset), out.size, out.dtype), stride, out)
    elif kind == 1:
        _widen_all(_array(pointer(address + 2 * offset), out.size, np.uint16), stride, out)
    elif HAS_HALF:
        _widen_all(_array(pointer(address + 2 * offset), out.size, np.int16), stride, out)


@_inlined
def _widen_all(source, stride, out):
    if stride == 1:
        for i in range(np.uintp(out.size)):
            out[i] = widen(source[i])
    else:
        step = np.uintp(stride)
        for i in range(np.uintp(out.size)):
            out[i] = widen(source[i * step])


@_inlined
def store(values, address, begin, kind):
    """Write a span to its place in a contiguous tensor, rounded to nearest."""
    if kind == 0:
        copy(values, _array(pointer(address + values.itemsize * begin), values.size, values.dtype))
    elif kind == 1:
        _narrow_all(values, _array(pointer(address + 2 * begin), values.size, np.uint16))
    elif HAS_HALF:
        _narrow_all(values, _array(pointer(address + 2 * begin), values.size, np.int16))


@_inlined
def copy(values, out):
    """out[:] = values, written as a loop because numba may allocate memory for the assignment."""
    for i in range(np.uintp(values.size)):
        out[i] = values[i]


@_inlined
def _narrow_all(values, out):
    for i in range(np.uintp(values.size)):
        out[i] = narrow(np.float32(values[i]), out[i])


@_inlined
def store_clamped(values, largest, address, begin, kind):
    """The same, with values clamped to the range from -largest to largest."""
    if kind == 0:
        _copy_clamped(values, largest, _array(pointer(address + values.itemsize * begin), values.size, values.dtype))
    elif kind == 1:
        _narrow_clamped(values, largest, _array(pointer(address + 2 * begin), values.size, np.uint16))
    elif HAS_HALF:
        _narrow_clamped(values, largest, _array(pointer(address + 2 * begin), values.size, np.int16))


@_inlined
def _copy_clamped(values, largest, out):
    for i in range(np.uintp(values.size)):
        value = values[i]
        value = largest if value > largest else value
        out[i] = -largest if value < -largest else value


@_inlined
def _narrow_clamped(values, largest, out):
    for i in range(np.uintp(values.size)):
        value = values[i]
        value = largest if value > largest else value
        value = -largest if value < -largest else value
        out[i] = narrow(np.float32(value), out[i])


@_inlined
def decode_levels(packed, words, bits, begin, levels, codes, ones, out):
    """The levels of the elements from number `begin` on, written into `out`.

    levels  (2**bits,), repeated up to 16
    codes   int32 scratch memory, as long as `out`
    ones    ones, as many as `out` holds
    """
    at = 0
    while at < out.size:
        lane, word = (begin + at) // words, (begin + at) % words
        size = min(words - word, out.size - at)
        shift, first = lane * bits % 8, lane * bits // 8 * words + word
        low, high = packed[first : first + size], packed[first : first + size]
        if shift + bits > 8:
            high = packed[first + words : first + words + size]
        rest = permuted_levels(low, high, shift, bits, levels, out[at : at + size])
        if rest < size:
            part = codes[: size - rest]
            part[:] = 0
            _put_byte(low[rest:], 0, 32, part)
            if shift + bits > 8:
                _put_byte(high[rest:], 8, 32, part)
            _multiply(part, shift, bits, levels, ones[: size - rest], out[at + rest : at + size])
        at += size


@_inlined
def unit(scale, eps, constants):
    """`layers_reference.unit` for one row. constants: 1 and `SMALLEST_UNIT`, of the scale's type."""
    one, smallest = constants
    share = one - (eps * scale) * scale
    if share > 0.5:
        return one
    return np.sqrt(smallest if share < smallest else share)


@_inlined
def rebuild(values, begin, grid, factor, offset, move, shift, row, eps, has_eps):
    """Turn levels in place into (level * factor + offset + move) * row + shift, as in `layers_reference`. Arrays may be
    empty."""
    number = values.dtype.type
    at = 0
    while at < values.size:
        _, channel, _, of_row, size = segment(begin + at, grid)
        size = min(size, values.size - at)
        part, last = values[at : at + size], channel + size
        scale = row[of_row] if row.size else number(1)
        if has_eps:
            scale = unit(scale, eps, (number(1), number(SMALLEST_UNIT)))
        if grid[1] > 1:
            _affine(part, factor[channel], offset[channel] + move[channel] if move.size else offset[channel], scale)
            if shift.size:
                _add_number(part, shift[channel])
        else:
            if move.size:
                _affine_moved(part, factor[channel:last], offset[channel:last], move[channel:last], scale)
            else:
                _affine_along(part, factor[channel:last], offset[channel:last], scale)
            if shift.size:
                _add(part, shift[channel:last])
        at += size


@_inlined
def _affine(values, factor, offset, scale):
    for i in range(np.uintp(values.size)):
        values[i] = (values[i] * factor + offset) * scale


@_inlined
def _affine_along(values, factor, offset, scale):
    for i in range(np.uintp(values.size)):
        values[i] = (values[i] * factor[i] + offset[i]) * scale


@_inlined
def _affine_moved(values, factor, offset, move, scale):
    for i in range(np.uintp(values.size)):
        values[i] = (values[i] * factor[i] + (offset[i] + move[i])) * scale


@_inlined
def _add(values, others):
    for i in range(np.uintp(values.size)):
        values[i] += others[i]


@_inlined
def _add_number(values, number):
    for i in range(np.uintp(values.size)):
        values[i] += number


@_inlined
def multiply(values, others):
    """Multiply values in place, element by element."""
    for i in range(np.uintp(values.size)):
        values[i] *= others[i]


@_inlined
def multiply_channels(values, begin, grid, factor):
    """Multiply each element in place by its channel's factor."""
    at = 0
    while at < values.size:
        _, channel, _, _, size = segment(begin + at, grid)
        size = min(size, values.size - at)
        if grid[1] > 1:
            _affine(values[at : at + size], factor[channel], values.dtype.type(0), values.dtype.type(1))
        else:
            multiply(values[at : at + size], factor[channel : channel + size])
        at += size


@_inlined
def drop_what_is_lost(values):
    """Set numbers that are not finite to 0, in place."""
    zero = values.dtype.type(0)
    for i in range(np.uintp(values.size)):
        values[i] = values[i] if values[i] - values[i] == 0 else zero
