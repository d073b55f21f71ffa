"""The loops of the CPU backend for the backward passes of norms.

Sums are taken over fixed blocks of rows, or over lines of channels. These partial sums are then added in order, so results do
not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fewbit.kernels.layer_loops import fields
from fewbit.kernels.llvm import advance, advance_ordered, pointer
from fewbit.kernels.loops import _CLAIMED, _DONE, _WORKERS, _array, _compile, _inlined
from fewbit.kernels.spans import (
    decode_levels,
    grid_of,
    load,
    multiply_channels,
    rebuild,
    segment,
    store_clamped,
    stretches,
    view_of,
)

ROW = 4096  # rows of up to this many elements are read once
_PARTS = 64  # accumulators of the sums of gradients


class BackwardBlock(ctypes.Structure):
    """The arguments of the backward passes: those of `fewbit.kernels.layer_loops.RebuildBlock`, with grad as x, and

    rows            number of rows of a norm along rows; for a norm of channels, the outer size
    rows_of_piece   rows per piece of work; for a norm of channels a piece also has only `channels_of_piece` channels
    row_size        elements of a row, or of a channel
    scale, weight   wide; scales of rows or channels; weights (channels,) or 0
    training        for norms of channels: whether the statistics depend on x; along rows: whether a mean is subtracted
    partial         wide; partial sums of the gradients of weight and bias, (pieces of rows, 2, channels); for a norm of
                    channels (…, 3, channels), with sums of x̂ too
    sums            (2, channels) wide: the gradients of weight and bias for a norm of channels; 0 if they are not wanted
    combined        (3, channels) wide: grad_x is combined[0] * level + combined[1] + combined[2] * grad
    """

    _fields_ = fields(
        *("center", "spread", "scale", "has_eps", "weight", "levels", "rows", "rows_of_piece", "channels_of_piece", "row_size"),
        *("training", "partial", "sums", "combined", "out", "out_kind"),
        numbers=("eps", "largest"),
    )


def backward_scratch(wide: str) -> int:
    """Bytes per thread: an int32 and three numbers for each element of a chunk, and four times `_PARTS` numbers."""
    return ROW * (4 + 3 * np.dtype(wide).itemsize) + 4 * _PARTS * np.dtype(wide).itemsize


def rows_backward(wide: str) -> Any:
    """The compiled backward pass of norms along rows: a CFunc that takes the address of a BackwardBlock."""
    values, size_of = np.dtype(wide).type, np.dtype(wide).itemsize
    scratch = backward_scratch(wide)

    def backward_of_rows(address):
        block = _array(address, 1)[0]
        words, bits, channels, rows, of_piece = block.words, block.bits, block.channels, block.rows, block.rows_of_piece
        grid, view, row_size, has_sums = grid_of(block), view_of(block), values(block.row_size), block.sums != 0
        packed = _array(pointer(block.packed), bits * words, np.uint8)
        levels = _array(pointer(block.levels), 1 << bits, values)
        center, spread = _array(pointer(block.center), channels, values), _array(pointer(block.spread), channels, values)
        weight = _array(pointer(block.weight), channels if block.weight else 0, values)
        scale = _array(pointer(block.scale), rows, values)
        partial = _array(pointer(block.partial), (block.pieces, 2, channels) if has_sums else (0, 2, channels), values)
        none, eps = scale[:0], values(block.eps)
        of_row = scale if block.has_eps else none
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        memory = block.scratch + advance(address, _WORKERS, 1) * scratch
        codes = _array(pointer(memory), ROW, np.int32)
        work = _array(pointer(memory + 4 * ROW), (3, ROW), values)
        ones, g, x = work[0], work[1], work[2]
        parts = _array(pointer(memory + (4 + 3 * size_of) * ROW), (4, _PARTS), values)
        of_rows, of_segments = parts[:2], parts[2:]
        ones[:] = 1
        while piece < block.pieces:
            if has_sums:
                partial[piece] = 0
            for row in range(piece * of_piece, min(rows, (piece + 1) * of_piece)):
                begin_of_row, number, size, step = stretches(row, grid)
                at_once = number == 1 and size <= ROW
                of_product, of_grad = values(0), values(0)
                of_rows[:] = 0
                for sweep in range(2):
                    for stretch in range(number):
                        for at in range(0, size, ROW):
                            begin, count = begin_of_row + stretch * step + at, min(ROW, size - at)
                            grad, x_hat = g[:count], x[:count]
                            if sweep == 0 or not at_once:
                                load(view, grid, begin, grad)
                                decode_levels(packed, words, bits, begin, levels, codes, ones, x_hat)
                                rebuild(x_hat, begin, grid, spread, center, none, none, of_row, eps, block.has_eps)
                                if sweep == 0 and has_sums:
                                    _add_to_channels(grad, x_hat, begin, grid, partial[piece], of_segments)
                                if weight.size:
                                    multiply_channels(grad, begin, grid, weight)
                            if sweep == 0:
                                _add_products(grad, x_hat, of_rows)
                            else:
                                _finish(grad, x_hat, of_product, of_grad, scale[row])
                                store_clamped(grad, values(block.largest), block.out, begin, block.out_kind)
                    if sweep == 0:
                        of_product = _in_halves(of_rows[0]) / row_size
                        of_grad = _in_halves(of_rows[1]) / row_size if block.training else values(0)
            if advance_ordered(address, _DONE, 1) == block.pieces - 1 and has_sums:
                _add_up(partial, _array(pointer(block.sums), (2, channels), values))
            piece = advance(address, _CLAIMED, 1)

    return _compile(backward_of_rows, BackwardBlock, wide)


def channel_sums(wide: str) -> Any:
    """The compiled sums of grad * level, of grad and of level by channel, and the factors of grad_x that follow from them: a
    CFunc that takes the address of a BackwardBlock."""
    values, size_of, scratch = np.dtype(wide).type, np.dtype(wide).itemsize, backward_scratch(wide)

    def sums_of_channels(address):
        block = _array(address, 1)[0]
        words, bits, channels, outer_size = block.words, block.bits, block.channels, block.rows
        grid, view, inner, of_piece = grid_of(block), view_of(block), block.inner, block.rows_of_piece
        width = block.channels_of_piece
        packed = _array(pointer(block.packed), bits * words, np.uint8)
        levels = _array(pointer(block.levels), 1 << bits, values)
        across = (channels + width - 1) // width
        partial = _array(pointer(block.partial), (block.pieces // across, 3, channels), values)
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        memory = block.scratch + advance(address, _WORKERS, 1) * scratch
        codes = _array(pointer(memory), ROW, np.int32)
        work = _array(pointer(memory + 4 * ROW), (3, ROW), values)
        ones, g, x = work[0], work[1], work[2]
        parts = _array(pointer(memory + (4 + 3 * size_of) * ROW), (3, _PARTS), values)
        ones[:] = 1
        while piece < block.pieces:
            down, first = piece // across, piece % across * width
            last = min(channels, first + width)
            partial[down, :, first:last] = 0
            for outer in range(down * of_piece, min(outer_size, (down + 1) * of_piece)):
                begin, end = (outer * channels + first) * inner, (outer * channels + last) * inner
                while begin < end:
                    count = min(ROW, end - begin)
                    load(view, grid, begin, g[:count])
                    decode_levels(packed, words, bits, begin, levels, codes, ones, x[:count])
                    _add_to_channels(g[:count], x[:count], begin, grid, partial[down], parts)
                    begin += count
            if advance_ordered(address, _DONE, 1) == block.pieces - 1:
                for down in range(1, partial.shape[0]):
                    for i in range(3):
                        _add(partial[0, i], partial[down, i])
                _of_sums(block, partial[0], values(block.row_size))
            piece = advance(address, _CLAIMED, 1)

    return _compile(sums_of_channels, BackwardBlock, wide)


@_inlined
def _add(totals, values):
    for i in range(np.uintp(values.size)):
        totals[i] += values[i]


@_inlined
def _in_halves(parts):
    half = parts.size // 2
    while half:
        _add(parts[:half], parts[half : 2 * half])
        half //= 2
    return parts[0]


@_inlined
def _add_values(values, parts):
    """Add value number k to part k % _PARTS."""
    at = 0
    while at + _PARTS <= values.size:
        _add(parts, values[at : at + _PARTS])
        at += _PARTS
    _add(parts[: values.size - at], values[at:])


@_inlined
def _add_products(grad, x_hat, parts):
    """Add number k of grad * x̂ and of grad to part k % _PARTS of each."""
    at = 0
    while at + _PARTS <= grad.size:
        _add_both(grad[at : at + _PARTS], x_hat[at : at + _PARTS], parts[0], parts[1])
        at += _PARTS
    _add_both(grad[at:], x_hat[at:], parts[0], parts[1])


@_inlined
def _add_both(grad, x_hat, of_products, of_grads):
    for i in range(np.uintp(grad.size)):
        of_products[i] += grad[i] * x_hat[i]
        of_grads[i] += grad[i]


@_inlined
def _add_to_channels(grad, x_hat, begin, grid, sums, parts):
    """Add grad * x̂, grad and, if there are three sums, x̂ to the sums of their channels. parts: scratch, (_PARTS,) for
    each."""
    at = 0
    while at < grad.size:
        _, channel, _, _, size = segment(begin + at, grid)
        size = min(size, grad.size - at)
        g, x, last = grad[at : at + size], x_hat[at : at + size], channel + size
        if grid[1] > 1:
            product, total = _sums(g, x, parts)
            sums[0, channel] += product
            sums[1, channel] += total
            if sums.shape[0] > 2:
                parts[2] = 0
                _add_values(x, parts[2])
                sums[2, channel] += _in_halves(parts[2])
        else:
            _add_both(g, x, sums[0, channel:last], sums[1, channel:last])
            if sums.shape[0] > 2:
                _add(sums[2, channel:last], x)
        at += size


@_inlined
def _sums(grad, x_hat, parts):
    """The sums of grad * x̂ and of grad."""
    if grad.size >= 2 * _PARTS:
        parts[:] = 0
        _add_products(grad, x_hat, parts)
        return _in_halves(parts[0]), _in_halves(parts[1])
    zero = grad.dtype.type(0)
    product, total = zero, zero
    for i in range(np.uintp(grad.size)):
        product += grad[i] * x_hat[i]
        total += grad[i]
    return product, total


@_inlined
def _finish(grad, x_hat, of_product, of_grad, scale):
    for i in range(np.uintp(grad.size)):
        grad[i] = (grad[i] - x_hat[i] * of_product - of_grad) * scale


@_inlined
def _add_up(partial, sums):
    """The sums of all pieces, in their order."""
    sums[:] = 0
    for piece in range(partial.shape[0]):
        for i in range(sums.shape[0]):
            _add(sums[i], partial[piece, i])


@_inlined
def _of_sums(block, found, count):
    """The gradients of weight and bias, and the factors of grad_x: see `layers_reference.channels_backward`.

    found  the sums (3, channels), in which each channel has `repeat` adjacent entries
    """
    repeat, zero = block.repeat, found.dtype.type(0)
    channels = block.channels // repeat
    center, spread = (
        _array(pointer(block.center), channels, found.dtype),
        _array(pointer(block.spread), channels, found.dtype),
    )
    scale = _array(pointer(block.scale), channels, found.dtype)
    weight = _array(pointer(block.weight), channels if block.weight else 0, found.dtype)
    sums, combined = (
        _array(pointer(block.sums), (2, channels), found.dtype),
        _array(pointer(block.combined), (3, channels), found.dtype),
    )
    for c in range(channels):
        of_product, of_grad, of_level = zero, zero, zero
        for i in range(c * repeat, (c + 1) * repeat):
            of_product, of_grad, of_level = of_product + found[0, i], of_grad + found[1, i], of_level + found[2, i]
        factor = scale[c] * weight[c] if weight.size else scale[c]
        if block.training:
            # (grad - mean grad - x̂ mean(grad x̂)) * factor, with x̂ = a * (level - its mean); NaN in marked channels
            mean, a = of_level / count, spread[c] + zero * center[c]
            by_weight = a * (of_product - mean * of_grad)
            by_level = a * by_weight * factor / -count
            combined[0, c], combined[1, c] = by_level, of_grad * factor / -count - by_level * mean
        else:
            by_weight = spread[c] * of_product + center[c] * of_grad
            combined[0, c], combined[1, c] = zero, zero
        combined[2, c] = factor
        sums[0, c], sums[1, c] = by_weight, of_grad
