"""The loops of the CPU backend that compute scales and moments of rows.

Sums are taken in the order that `fewbit.kernels.layers_reference` specifies.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fewbit.kernels.layer_loops import fields
from fewbit.kernels.llvm import advance, pointer
from fewbit.kernels.loops import _CLAIMED, _DONE, _WORKERS, _array, _compile, _inlined
from fewbit.kernels.spans import drop_what_is_lost, grid_of, load, multiply_channels, stretches, view_of

LANES = 128  # `layers_reference.ROW_LANES`
ROW = 4096  # rows of up to this many elements are read once
_SQUARES, _VALUES, _DEVIATIONS = range(3)


class RowBlock(ctypes.Structure):
    """The arguments of `row_statistics`: those of `fewbit.kernels.layer_loops.EncodeBlock`, and

    pieces     number of pieces of `rows_of_piece` rows each; rows: number of all rows
    magnitude  (channels,) wide, if scales of rows are wanted; 0 for their moments
    out        (2, rows) wide
    smallest, largest   bounds of a scale
    by_row_size, by_channels   factors of the means; headroom: factor of scales
    """

    _fields_ = fields(
        *("rows", "rows_of_piece", "row_size", "magnitude", "out", "centered"),
        numbers=("eps", "smallest", "largest", "by_row_size", "by_channels", "headroom"),
    )


def row_scratch(wide: str, channels: int) -> int:
    """Bytes per thread: a chunk, the lanes, and a number for each channel."""
    return (ROW + LANES + -(-channels // 16) * 16) * np.dtype(wide).itemsize


def row_statistics(wide: str) -> Any:
    """The compiled kernel of row_scales and row_moments: a CFunc that takes the address of a RowBlock."""
    values, size_of = np.dtype(wide).type, np.dtype(wide).itemsize

    def statistics_of_rows(address):
        block = _array(address, 1)[0]
        channels, rows, of_piece = block.channels, block.rows, block.rows_of_piece
        grid, view, has_magnitude = grid_of(block), view_of(block), block.magnitude != 0
        smallest, largest, one = values(block.smallest), values(block.largest), values(1)
        out = _array(pointer(block.out), (2, rows), values)
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        size_of_scratch = (ROW + LANES + (channels + 15) // 16 * 16) * size_of
        memory = block.scratch + advance(address, _WORKERS, 1) * size_of_scratch
        v, lanes = _array(pointer(memory), ROW, values), _array(pointer(memory + ROW * size_of), LANES, values)
        inverse = _array(pointer(memory + (ROW + LANES) * size_of), channels if has_magnitude else 0, values)
        if has_magnitude:
            magnitude = _array(pointer(block.magnitude), channels, values)
            _inverse_magnitudes(magnitude, values(block.by_channels), smallest, lanes, inverse)
        while piece < block.pieces:
            for row in range(piece * of_piece, min(rows, (piece + 1) * of_piece)):
                mean, factor = values(0), values(block.by_row_size)
                if has_magnitude:
                    _add_row(_SQUARES, view, grid, row, inverse, mean, factor, v, lanes, False)
                    scale = values(block.headroom) * np.sqrt(_in_pairs(lanes))
                    scale = largest if scale > largest else scale
                    scale = smallest if scale < smallest else scale
                    out[0, row], out[1, row] = scale, one / scale
                else:
                    if block.centered:
                        _add_row(_VALUES, view, grid, row, inverse, mean, factor, v, lanes, False)
                        mean = _in_pairs(lanes)
                    _add_row(_DEVIATIONS, view, grid, row, inverse, mean, factor, v, lanes, block.centered)
                    out[0, row], out[1, row] = mean, one / np.sqrt(_in_pairs(lanes) + values(block.eps))
            advance(address, _DONE, 1)
            piece = advance(address, _CLAIMED, 1)

    return _compile(statistics_of_rows, RowBlock, wide)


@_inlined
def _add_row(kind, view, grid, row, inverse, mean, factor, v, lanes, is_loaded):
    """Sum the squares of v * inverse, v, or the squares of its deviations in lanes (see `_add_run`). `is_loaded`: v is loaded
    already."""
    lanes[:] = 0
    begin, number, size, step = stretches(row, grid)
    for stretch in range(number):
        for at in range(0, size, ROW):
            start, part = begin + stretch * step + at, v[: min(ROW, size - at)]
            if not is_loaded or number > 1 or size > ROW:
                load(view, grid, start, part)
            if kind == _SQUARES:
                drop_what_is_lost(part)
                multiply_channels(part, start, grid, inverse)
            _add_lanes(kind, part, stretch * size + at, mean, factor, lanes)


@_inlined
def _add_lanes(kind, values, start, mean, factor, lanes):
    """Add number k of the row to lane k % LANES. `values` are the numbers from `start` on."""
    at = min(values.size, -start % LANES)
    if at:
        _add_run(kind, lanes[start % LANES :], values[:at], mean, factor)
    while at + LANES <= values.size:
        _add_run(kind, lanes, values[at : at + LANES], mean, factor)
        at += LANES
    _add_run(kind, lanes, values[at:], mean, factor)


@_inlined
def _add_run(kind, totals, values, mean, factor):
    if kind == _SQUARES:
        for i in range(np.uintp(values.size)):
            totals[i] += values[i] * values[i]
    elif kind == _VALUES:
        for i in range(np.uintp(values.size)):
            totals[i] += values[i] * factor
    else:
        for i in range(np.uintp(values.size)):
            d = values[i] - mean
            totals[i] += d * d * factor


@_inlined
def _in_pairs(lanes):
    """The sum of the lanes: adjacent pairs are added until one number is left."""
    half = lanes.size // 2
    while half:
        for i in range(half):
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1]
        half //= 2
    return lanes[0]


@_inlined
def _inverse_magnitudes(magnitude, factor, smallest, lanes, inverse):
    """See `layers_reference.row_scales`."""
    lanes[:] = 0
    for i in range(np.uintp(magnitude.size)):
        inverse[i] = magnitude[i] * factor
    one = magnitude.dtype.type(1)
    _add_lanes(_VALUES, inverse, 0, one, one, lanes)
    mean = _in_pairs(lanes)
    mean = one if mean == 0 else mean
    for i in range(np.uintp(magnitude.size)):
        own = mean if magnitude[i] == 0 else magnitude[i]
        inverse[i] = one / (smallest if own < smallest else own)
