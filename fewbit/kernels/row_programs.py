"""The Triton programs for sums of rows and channels, and for the backward of norms. `fewbit.kernels.layers_cuda` calls them."""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fewbit import packing
from fewbit.kernels.layers_reference import HEADROOM, ROW_LANES
from fewbit.kernels.program_parts import (
    at_most,
    divide,
    finite,
    folded,
    largest_of,
    level_of,
    narrowed,
    number,
    positive,
    root,
    row_of,
    unit,
)
from fewbit.kernels.programs import _load_scalars

LANES = tl.constexpr(packing.LANES)
SUMS = tl.constexpr(ROW_LANES)
ROOM = tl.constexpr(HEADROOM)


@triton.jit(do_not_specialize=["rows", "inverse", "eps"])
def row_moments(
    x,
    moments,
    rows,
    row_size,
    inverse,
    eps,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    centered: tl.constexpr,
    count: tl.constexpr,
    tile: tl.constexpr,
):
    """moments (2, rows): the mean, or 0, and 1 / sqrt(mean square + eps). A program takes `count` rows.

    inverse, eps  bits of float64: 1 / row_size, and the eps
    tile          a `fewbit.kernels.layers_cuda.Tile`; dense: rows follow each other in x
    """
    wide: tl.constexpr = moments.dtype.element_ty
    row = tl.program_id(0) * count + tl.arange(0, count)
    sizes = (rows, row_size, inner, per_row, group, groups)
    strides = (outer_stride, channel_stride, inner_stride)
    share = number(inverse, wide)
    mean = tl.full([count], 0, wide)
    if centered:
        parts = tl.full([count, SUMS // tile.vector, tile.vector], 0, wide)
        for start in tl.range(0, row_size, SUMS, loop_unroll_factor=4):
            v, _, _ = _row_part(x, row, start, sizes, strides, count, tile)
            parts += v.to(wide) * share
        mean = folded(tl.reshape(parts, [count, SUMS]), SUMS)
    parts = tl.full([count, SUMS // tile.vector, tile.vector], 0, wide)
    for start in tl.range(0, row_size, SUMS, loop_unroll_factor=4):
        v, _, inside = _row_part(x, row, start, sizes, strides, count, tile)
        d = tl.where(inside, v.to(wide) - mean[:, None, None], 0.0)
        parts += d * d * share
    variance = folded(tl.reshape(parts, [count, SUMS]), SUMS)
    tl.store(moments + row, mean, mask=row < rows)
    tl.store(moments + rows + row, divide(1.0, root(variance + number(eps, wide))), mask=row < rows)


@triton.jit(do_not_specialize=["channels", "inverse"])
def inverse_magnitudes(magnitude, inverses, channels, inverse, block: tl.constexpr):
    """inverses (channels,): 1 / magnitude. Zero magnitudes count as the mean of all."""
    wide: tl.constexpr = magnitude.dtype.element_ty
    share = number(inverse, wide)
    lanes = tl.arange(0, SUMS)
    parts = tl.full([SUMS], 0, wide)
    for start in tl.range(0, channels, SUMS, loop_unroll_factor=4):
        parts += tl.load(magnitude + start + lanes, mask=start + lanes < channels, other=0) * share
    mean = folded(tl.reshape(parts, [1, SUMS]), SUMS)
    mean = tl.where(mean == 0, 1.0, mean)
    channel = tl.program_id(0) * block + tl.arange(0, block)
    m = tl.load(magnitude + channel, mask=channel < channels, other=0)
    tl.store(inverses + channel, divide(1.0, positive(tl.where(m == 0, mean, m))), mask=channel < channels)


@triton.jit(do_not_specialize=["rows"])
def row_scales(
    x,
    inverses,
    scales,
    rows,
    row_size,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    count: tl.constexpr,
    tile: tl.constexpr,
):
    """scales (2, rows): `HEADROOM` times the norm of x * inverses (channels,), and its inverse; `count` rows per program."""
    wide: tl.constexpr = scales.dtype.element_ty
    row = tl.program_id(0) * count + tl.arange(0, count)
    sizes = (rows, row_size, inner, per_row, group, groups)
    strides = (outer_stride, channel_stride, inner_stride)
    parts = tl.full([count, SUMS // tile.vector, tile.vector], 0, wide)
    for start in tl.range(0, row_size, SUMS, loop_unroll_factor=4):
        v, channel, inside = _row_part(x, row, start, sizes, strides, count, tile)
        scaled = finite(v.to(wide) * tl.load(inverses + channel, mask=inside, other=0))
        parts += scaled * scaled
    norm = root(folded(tl.reshape(parts, [count, SUMS]), SUMS))
    scale = positive(at_most(norm * ROOM, largest_of(wide) / 2))
    tl.store(scales + row, scale, mask=row < rows)
    tl.store(scales + rows + row, divide(1.0, scale), mask=row < rows)


@triton.jit
def _row_part(x, row, start, sizes, strides, count: tl.constexpr, tile: tl.constexpr):
    """SUMS elements of (count,) rows from `start` on: (count, SUMS // vector, vector), their channels, and which exist."""
    rows, row_size, inner, per_row, group, groups = sizes
    outer_stride, channel_stride, inner_stride = strides
    along = tl.arange(0, tile.vector)[None, None, :]
    k = start + tl.arange(0, SUMS // tile.vector)[None, :, None] * tile.vector
    row = row[:, None, None]
    inside = (k < row_size) & (row < rows)
    outer, channel, i = _places_of_row(row, k, inner, per_row, group, groups, tile)
    if tile.dense and tile.whole_rows:
        pointer = x + row.to(tl.int64) * row_size + (k + along)
    else:
        first = outer.to(tl.int64) * outer_stride + channel.to(tl.int64) * channel_stride + i.to(tl.int64) * inner_stride
        pointer = x + (first + along * (channel_stride if tile.along_channels else inner_stride))
    if tile.along_channels:
        channel = channel + along
    return tl.load(pointer, mask=inside, other=0), channel, inside


@triton.jit
def _places_of_row(row, k, inner, per_row, group, groups, tile: tl.constexpr):
    """(outer, channel, inner) of element number k of each row."""
    outer = (row // groups) * per_row
    if not tile.whole_rows:
        part = k // (group * inner)
        k -= part * (group * inner)
        outer = outer + part
    channel = k // inner
    i = k - channel * inner
    if tile.grouped:
        channel = (row % groups) * group + channel
    return outer, channel, i


@triton.jit(do_not_specialize=["rows", "inverse", "eps"])
def rows_backward(
    packed,
    grad,
    grad_x,
    parts,
    levels,
    vectors,
    scale,
    weight,
    rows,
    row_size,
    words,
    inverse,
    eps,
    channels,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    bits: tl.constexpr,
    centered: tl.constexpr,
    by_weight: tl.constexpr,
    by_bias: tl.constexpr,
    single: tl.constexpr,
    count: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
):
    """Backward of a norm along rows: `count` rows and `size` of their elements at a time, which are all if `single`.

    parts  (programs, by_weight + by_bias, channels): the sums of a program's rows for these gradients; `single` programs write
           all channels

    Rows in different lanes of the same words are processed one after another, so that the bytes are read once.
    """
    index: tl.constexpr = tl.int64 if tile.big else tl.int32
    wide: tl.constexpr = vectors.dtype.element_ty
    tensors = (packed, grad, grad_x, levels, vectors, scale, weight)
    numbers = (rows, row_size, words, number(inverse, wide), eps)
    sizes = (channels, inner, per_row, group, groups)
    strides = (outer_stride, channel_stride, inner_stride)
    table = _load_scalars(levels, 1 << bits if bits <= 2 else 0)
    slots = (rows + LANES - 1) // LANES  # rows per lane
    to_weight = tl.full([count, size // tile.vector, tile.vector], 0, wide)
    to_bias = tl.full([count, size // tile.vector, tile.vector], 0, wide)
    for turn in tl.range(tl.program_id(0) * count, slots * LANES, tl.num_programs(0) * count):
        turns = turn + tl.arange(0, count)
        row = ((turns % LANES) * slots + turns // LANES)[:, None, None]
        row = tl.where(turns[:, None, None] < slots * LANES, row, rows)
        of_row = tl.load(scale + row, mask=row < rows, other=0)
        unit_of_row = of_row
        if eps is not None:
            unit_of_row = unit(of_row, number(eps, wide))
        if single:
            own, g, v, element, inside = _row_backward(
                tensors, table, numbers, sizes, strides, row, 0, unit_of_row, bits, size, tile, index
            )
            if by_weight:
                to_weight += own * v
            if by_bias:
                to_bias += own
            found = _sum_of_row(g * v) * numbers[3]
            mean = _sum_of_row(g) * numbers[3]
            _store_row(grad_x, g, v, found, mean, of_row, element, inside, centered, tile)
        else:
            found = tl.full([count, 1, 1], 0, wide)
            mean = tl.full([count, 1, 1], 0, wide)
            for start in tl.range(0, row_size, size):
                _, g, v, element, inside = _row_backward(
                    tensors, table, numbers, sizes, strides, row, start, unit_of_row, bits, size, tile, index
                )
                found += _sum_of_row(g * v)
                mean += _sum_of_row(g)
            found, mean = found * numbers[3], mean * numbers[3]
            for start in tl.range(0, row_size, size):
                _, g, v, element, inside = _row_backward(
                    tensors, table, numbers, sizes, strides, row, start, unit_of_row, bits, size, tile, index
                )
                _store_row(grad_x, g, v, found, mean, of_row, element, inside, centered, tile)
    if by_weight or by_bias:
        along = tl.arange(0, size // tile.vector)[:, None] * tile.vector + tl.arange(0, tile.vector)[None, :]
        own = parts + tl.program_id(0) * ((by_weight + by_bias) * channels) + along
        if by_weight:
            tl.store(own, tl.sum(to_weight, 0), mask=along < channels)
        if by_bias:
            tl.store(own + by_weight * channels, tl.sum(to_bias, 0), mask=along < channels)


@triton.jit
def _row_backward(
    tensors,
    table,
    numbers,
    sizes,
    strides,
    row,
    start,
    unit_of_row,
    bits: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
    index: tl.constexpr,
):
    """From `start` on in rows: grad, grad * weight, the rebuilt values, the numbers of the elements, and which exist."""
    packed, grad, _, levels, vectors, _, weight = tensors
    rows, row_size, words, _, eps = numbers
    channels, inner, per_row, group, groups = sizes
    outer_stride, channel_stride, inner_stride = strides
    wide: tl.constexpr = vectors.dtype.element_ty
    along = tl.arange(0, tile.vector)[None, None, :]
    k = start + tl.arange(0, size // tile.vector)[None, :, None] * tile.vector
    inside = (k < row_size) & (row < rows)
    outer, channel, i = _places_of_row(row, k, inner, per_row, group, groups, tile)
    element = row.to(index) * row_size + k
    if not tile.whole_rows:
        element = (outer.to(index) * channels + channel) * inner + i
    if tile.dense:
        pointer = grad + (element + along)
    else:
        first = outer.to(tl.int64) * outer_stride + channel.to(tl.int64) * channel_stride + i.to(tl.int64) * inner_stride
        pointer = grad + (first + along * (channel_stride if tile.along_channels else inner_stride))
    g = tl.load(pointer, mask=inside, other=0).to(wide)
    of_channel = k < row_size
    if tile.grouped:
        of_channel = inside
    if tile.along_channels:
        channel = channel + along
    v = level_of(packed, element, along, inside, words, levels, table, bits)
    v = v * tl.load(vectors + channels + channel, mask=of_channel, other=0)
    v = v + tl.load(vectors + channel, mask=of_channel, other=0)
    if eps is not None:
        v = v * unit_of_row
    weighted = g
    if weight is not None:
        weighted = g * tl.load(weight + channel, mask=of_channel, other=0).to(wide)
    return g, weighted, v, element + along, inside


@triton.jit
def _sum_of_row(values):
    """The sums (count, 1, 1) of (count, groups, vector)."""
    return tl.sum(tl.sum(values, 2), 1)[:, None, None]


@triton.jit
def _store_row(grad_x, g, v, found, mean, of_row, element, inside, centered: tl.constexpr, tile: tl.constexpr):
    rest = g - v * found
    if centered:
        rest = rest - mean
    tl.store(grad_x + element, narrowed(rest * of_row, grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps"])
def channel_sums(
    packed,
    grad,
    parts,
    levels,
    vectors,
    scale,
    places,
    words,
    eps,
    channels,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    bits: tl.constexpr,
    count: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
):
    """parts (programs[1], 3, channels): sums over some places of grad * the rebuilt values, of grad, and of the rebuilt values.

    count  groups of places at a time; places, if groups lie along channels
    size   channels of a program; 1 if groups lie along places
    scale  (rows,); with an eps its unit is used instead
    """
    index: tl.constexpr = tl.int64 if tile.big else tl.int32
    wide: tl.constexpr = vectors.dtype.element_ty
    step: tl.constexpr = 1 if tile.along_channels else tile.vector  # places of a group
    width: tl.constexpr = size // tile.vector if tile.along_channels else 1  # groups along the channels
    along = tl.arange(0, tile.vector)[None, None, :]
    channel_start = tl.program_id(0) * size + tl.arange(0, width)[None, :, None] * tile.vector
    channel = channel_start
    if tile.along_channels:
        channel = channel + along
    table = _load_scalars(levels, 1 << bits if bits <= 2 else 0)
    spread = tl.load(vectors + channels + channel, mask=channel < channels, other=0)
    center = tl.load(vectors + channel, mask=channel < channels, other=0)
    by_value = tl.full([count, width, tile.vector], 0, wide)
    by_one = tl.full([count, width, tile.vector], 0, wide)
    of_value = tl.full([count, width, tile.vector], 0, wide)
    for begin in tl.range(tl.program_id(1).to(index) * (count * step), places, tl.num_programs(1) * (count * step)):
        place = begin + tl.arange(0, count)[:, None, None] * step
        outer = place // inner
        i = place - outer * inner
        element = (outer * channels + channel_start) * inner + i
        inside = (place < places) & (channel_start < channels)
        if tile.dense:
            pointer = grad + (element + along)
        else:
            first = outer.to(tl.int64) * outer_stride + channel_start.to(tl.int64) * channel_stride
            first += i.to(tl.int64) * inner_stride
            pointer = grad + (first + along * (channel_stride if tile.along_channels else inner_stride))
        g = tl.load(pointer, mask=inside, other=0).to(wide)
        v = level_of(packed, element, along, inside, words, levels, table, bits) * spread + center
        if eps is not None:
            row = row_of(outer, channel_start, per_row, group, groups)
            v = v * unit(tl.load(scale + row, mask=inside, other=0), number(eps, wide))
        by_value += g * v
        by_one += g
        of_value += tl.where(inside, v, 0.0)
    own = parts + tl.program_id(1) * (3 * channels) + channel
    tl.store(own, _over_places(by_value, tile), mask=channel < channels)
    tl.store(own + channels, _over_places(by_one, tile), mask=channel < channels)
    tl.store(own + 2 * channels, _over_places(of_value, tile), mask=channel < channels)


@triton.jit
def _over_places(values, tile: tl.constexpr):
    """Sums by channel, (1, groups, vector), of (count, groups, vector); (1, 1, 1) if groups lie along places."""
    total = tl.sum(values, 0, keep_dims=True)
    if not tile.along_channels:
        total = tl.sum(total, 2, keep_dims=True)
    return total


@triton.jit(do_not_specialize=["count", "size"])
def add_parts(parts, sums, count, size, block: tl.constexpr):
    """sums (size,) over the parts (count, size)."""
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    tl.store(sums + i, _added(parts, i, count, size, size, block), mask=i < size)


@triton.jit(do_not_specialize=["count", "channels", "inverse"])
def batch_norm_sums(parts, sums, means, count, channels, inverse, block: tl.constexpr):
    """sums (2, channels) of grad * v and of grad, from the parts (count, 3, channels) of `channel_sums`. v: the rebuilt values.

    means    (3, channels), to be filled with the means of grad * v, grad and v; v is then centered; or None
    inverse  1 / number of places; the bits of a float64
    """
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    by_value = _added(parts, i, count, channels, 3 * channels, block)
    by_one = _added(parts + channels, i, count, channels, 3 * channels, block)
    if means is not None:
        share = number(inverse, parts.dtype.element_ty)
        mean = _added(parts + 2 * channels, i, count, channels, 3 * channels, block) * share
        by_value = by_value - mean * by_one
        tl.store(means + i, by_value * share, mask=i < channels)
        tl.store(means + channels + i, by_one * share, mask=i < channels)
        tl.store(means + 2 * channels + i, mean, mask=i < channels)
    tl.store(sums + i, by_value, mask=i < channels)
    tl.store(sums + channels + i, by_one, mask=i < channels)


@triton.jit
def _added(parts, i, count, size, stride, block: tl.constexpr):
    """The sums (1, block) over the parts of elements i, which are below size."""
    total = tl.full([32, block], 0, parts.dtype.element_ty)
    for start in tl.range(0, count, 32):
        part = start + tl.arange(0, 32)[:, None]
        total += tl.load(parts + part * stride + i, mask=(part < count) & (i < size), other=0)
    return tl.sum(total, 0, keep_dims=True)
