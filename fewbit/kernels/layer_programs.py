"""The Triton programs for layers that go through packed codes word by word. `fewbit.kernels.layers_cuda` calls them.

As in `fewbit.kernels.programs`, a program handles all eight lanes of `block` words, and full programs run a body without masks.
The words of a program are a tile (block // vector, vector) of groups, see `fewbit.kernels.program_parts`.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.kernels.program_parts import divide, located, narrowed, number, row_of, unit
from fewbit.kernels.programs import LANES, _level, _load_scalars, rung_of, start_word, with_code


@triton.jit(do_not_specialize=["n", "eps"])
def encode(
    x,
    packed,
    thresholds,
    codes,
    shift,
    scale,
    coding,
    vectors,
    n,
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
    search: tl.constexpr,
    by_row: tl.constexpr,
    center: tl.constexpr,
    offset: tl.constexpr,
    tile: tl.constexpr,
):
    """Packed codes of z, and NaN in the vectors for channels in which some z is not finite.

    shift, scale    (rows,), (channels,) or None
    eps             see `fewbit.kernels.layers_reference.First`; the bits of a float64, or None
    search          a `fewbit.kernels.cuda.Search`
    center, offset  rows of the vectors in which channels are marked; -1 for none
    tile            a `fewbit.kernels.layers_cuda.Tile`
    """
    index: tl.constexpr = tl.int64 if tile.big else tl.int32
    first = tl.program_id(0).to(index) * tile.block
    tensors = (x, shift, scale, coding, eps)
    sizes = (n, words, channels, inner, per_row, group, groups)
    strides = (outer_stride, channel_stride, inner_stride)
    if tile.full or (LANES - 1) * words.to(index) + first + tile.block <= n:
        encode_block(
            tensors, packed, thresholds, codes, vectors, sizes, strides, first, search, by_row, center, offset, tile, False
        )
    else:
        encode_block(
            tensors, packed, thresholds, codes, vectors, sizes, strides, first, search, by_row, center, offset, tile, True
        )


@triton.jit
def encode_block(
    tensors,
    packed,
    thresholds,
    codes,
    vectors,
    sizes,
    strides,
    first,
    search: tl.constexpr,
    by_row: tl.constexpr,
    center: tl.constexpr,
    offset: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
):
    """The words from `first` on."""
    bits: tl.constexpr = search.bits
    words = sizes[1]
    table = (_load_scalars(thresholds, search.scalars), ())  # layers have no ladders
    zeros = tl.full([tile.block // tile.vector, tile.vector], 0, tl.uint32 if bits <= 4 else tl.uint64)
    word = start_word(zeros, (), search)
    largest = tl.full(word.shape, 0, thresholds.dtype.element_ty)
    if search.depth:
        for lane in tl.range(LANES):
            z, _, inside = _standard(tensors, sizes, strides, first, lane, by_row, tile, masked)
            word = with_code(word, z, inside, lane, thresholds, codes, table, search, masked)
            largest = tl.maximum(largest, tl.abs(z), propagate_nan=tl.PropagateNan.ALL)
    else:
        for lane in tl.static_range(LANES):
            z, _, inside = _standard(tensors, sizes, strides, first, lane, by_row, tile, masked)
            word = with_code(word, z, inside, lane, thresholds, codes, table, search, masked)
            largest = tl.maximum(largest, tl.abs(z), propagate_nan=tl.PropagateNan.ALL)
    at = first + _numbers(tile)
    for plane in tl.static_range(bits):
        pointer, byte = packed + plane * words.to(at.dtype) + at, (word >> (8 * plane)).to(tl.uint8)
        if masked:
            tl.store(pointer, byte, mask=at < words)
        else:
            tl.store(pointer, byte)
    if center >= 0:  # noqa: SIM102 (a compile-time condition; joined with `and`, the second one would always be evaluated)
        if tl.max((~(largest < float("inf"))).to(tl.int32)) != 0:
            _mark_lost(tensors, vectors, sizes, strides, first, by_row, center, offset, tile, masked)


@triton.jit
def _mark_lost(
    tensors,
    vectors,
    sizes,
    strides,
    first,
    by_row: tl.constexpr,
    center: tl.constexpr,
    offset: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
):
    """Write NaN in two rows of the vectors for channels in which some z of these words is not finite."""
    channels = sizes[2]
    for lane in tl.range(LANES):
        z, channel, _ = _standard(tensors, sizes, strides, first, lane, by_row, tile, masked)
        lost, channel = tl.broadcast(~(tl.abs(z) < float("inf")), channel)
        nan = tl.full(lost.shape, float("nan"), vectors.dtype.element_ty)
        tl.store(vectors + center * channels + channel, nan, mask=lost)
        if offset != center:
            tl.store(vectors + offset * channels + channel, nan, mask=lost)


@triton.jit
def _numbers(tile: tl.constexpr):
    """0, 1, … as a tile (block // vector, vector)."""
    return tl.arange(0, tile.block // tile.vector)[:, None] * tile.vector + tl.arange(0, tile.vector)[None, :]


@triton.jit
def _places(sizes, first, lane, tile: tl.constexpr):
    """For the groups of a lane (…, 1): the number of the first element, whether the group exists, outer, channel, inner,
    row."""
    n, words, channels, inner, per_row, group, groups = sizes
    word = first + tl.arange(0, tile.block // tile.vector)[:, None] * tile.vector
    element = word + lane * words.to(word.dtype)
    outer, channel, i = located(element, channels, inner)
    return element, (element < n) & (word < words), outer, channel, i, row_of(outer, channel, per_row, group, groups)


@triton.jit
def _load(pointer, inside, masked: tl.constexpr):
    if masked:
        return tl.load(pointer, mask=inside, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _standard(tensors, sizes, strides, first, lane, by_row: tl.constexpr, tile: tl.constexpr, masked: tl.constexpr):
    """z of one lane, the channels of its elements in a shape that broadcasts, and which elements exist."""
    x, shift, scale, coding, eps = tensors
    channels = sizes[2]
    outer_stride, channel_stride, inner_stride = strides
    wide: tl.constexpr = coding.dtype.element_ty
    element, inside, outer, channel, i, row = _places(sizes, first, lane, tile)
    along = tl.arange(0, tile.vector)[None, :]
    if tile.dense:
        pointer = x + (element + along)
    else:
        start = outer.to(tl.int64) * outer_stride + channel.to(tl.int64) * channel_stride + i.to(tl.int64) * inner_stride
        pointer = x + (start + along * (channel_stride if tile.along_channels else inner_stride))
    u = _load(pointer, inside, masked).to(wide)
    if tile.along_channels:
        channel = channel + along
    of_first = row if by_row else channel
    if shift is not None:
        u = u - _load(shift + of_first, inside, masked)
    if scale is not None:
        factor = _load(scale + of_first, inside, masked)
        if eps is not None:
            factor = divide(factor, unit(factor, number(eps, wide)))
        u = u * factor
    middle = _load(coding + channel, inside, masked)
    inverse = _load(coding + channels + channel, inside, masked)
    onto = _load(coding + 2 * channels + channel, inside, masked)
    return (u - middle) * inverse + onto, channel, inside


@triton.jit(do_not_specialize=["n", "eps", "below", "above"])
def decode(
    packed,
    other,
    grad,
    product,
    product_other,
    levels,
    derivative,
    value,
    vectors,
    row_scale,
    sums,
    scale,
    weight,
    n,
    words,
    eps,
    below,
    above,
    channels,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    kind: tl.constexpr,
    bits: tl.constexpr,
    other_bits: tl.constexpr,
    ladder: tl.constexpr,
    where: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute a product of the rebuilt values v = (level * factor + offset [+ move]) * unit of the row + shift.

    kind        "values"         v
                "sloped values"  v times `above` where v is positive, else `below`; both are bits of a float64
                "slopes"         grad times these slopes
                "batch norm"     (grad - sums[1] - (v - sums[2]) * sums[0]) * scale * weight; without sums grad * scale * weight
                "gated"          v * the value of the codes `other`
                "gradients"      v * grad * the derivative of `other`, and in product_other grad * the value of `other`
    row_scale   (rows,) or None; with an eps (the bits of a float64) its unit is used instead
    sums        (3, channels): means of grad * (v - its mean), of grad and of v; or None
    where       a `fewbit.kernels.layers_reference.Vectors`
    grad        read by its strides; for "slopes" in packed order
    ladder      whether `derivative` and `value` have a row for each rung; `other` holds the rung
    """
    index: tl.constexpr = tl.int64 if tile.big else tl.int32
    first = tl.program_id(0).to(index) * tile.block
    if ladder:
        rung = rung_of(other, words, other_bits)
        value += rung * (1 << other_bits)
        if derivative is not None:
            derivative += rung * (1 << other_bits)
    tensors = (packed, other, grad, product, product_other, levels, derivative, value, vectors, row_scale, sums, scale, weight)
    numbers = (eps, below, above)
    sizes = (n, words, channels, inner, per_row, group, groups)
    strides = (outer_stride, channel_stride, inner_stride)
    if tile.full or (LANES - 1) * words.to(index) + first + tile.block <= n:
        decode_block(tensors, numbers, sizes, strides, first, kind, bits, other_bits, where, tile, False)
    else:
        decode_block(tensors, numbers, sizes, strides, first, kind, bits, other_bits, where, tile, True)


@triton.jit
def decode_block(
    tensors,
    numbers,
    sizes,
    strides,
    first,
    kind: tl.constexpr,
    bits: tl.constexpr,
    other_bits: tl.constexpr,
    where: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
):
    """The words from `first` on."""
    packed, other, grad, product, product_other, levels, derivative, value, vectors, row_scale, sums, scale, weight = tensors
    wide: tl.constexpr = vectors.dtype.element_ty
    words, channels = sizes[1], sizes[2]
    at = first + _numbers(tile)
    along = tl.arange(0, tile.vector)[None, :]
    word = _words(packed, at, words, bits, masked)
    table = _load_scalars(levels, 1 << bits if bits <= 2 else 0)
    if other is not None:
        other_word = _words(other, at, words, other_bits, masked)
        value_table = _load_scalars(value, 1 << other_bits if other_bits <= 2 else 0)
    if derivative is not None:
        derivative_table = _load_scalars(derivative, 1 << other_bits if other_bits <= 2 else 0)
    for lane in tl.static_range(LANES):
        element, inside, outer, channel, i, row = _places(sizes, first, lane, tile)
        channel_start = channel
        if tile.along_channels:
            channel = channel + along
        v = _level(word >> (lane * bits), levels, table, bits)
        v = v * _load(vectors + where.factor * channels + channel, inside, masked)
        offset = _load(vectors + where.offset * channels + channel, inside, masked)
        if (kind == "values" or kind == "sloped values") and where.move >= 0:
            offset = offset + _load(vectors + where.move * channels + channel, inside, masked)
        v = v + offset
        if row_scale is not None:
            of_row = _load(row_scale + row, inside, masked)
            if numbers[0] is not None:
                of_row = unit(of_row, number(numbers[0], wide))
            v = v * of_row
        if where.shift >= 0:
            v = v + _load(vectors + where.shift * channels + channel, inside, masked)
        if grad is not None:
            if tile.dense:
                pointer = grad + (element + along)
            else:
                outer_stride, channel_stride, inner_stride = strides
                start = outer.to(tl.int64) * outer_stride + channel_start.to(tl.int64) * channel_stride
                start += i.to(tl.int64) * inner_stride
                pointer = grad + (start + along * (channel_stride if tile.along_channels else inner_stride))
            g = _load(pointer, inside, masked).to(wide)
        if kind == "slopes":
            v = g * tl.where(v > 0, number(numbers[2], wide), number(numbers[1], wide))
            v = v.to(product.dtype.element_ty)
        elif kind == "batch norm":
            factor = _load(scale + channel, inside, masked)
            if weight is not None:
                factor = factor * _load(weight + channel, inside, masked).to(wide)
            rest = g
            if sums is not None:
                d = v - _load(sums + 2 * channels + channel, inside, masked)
                rest = g - _load(sums + channels + channel, inside, masked) - d * _load(sums + channel, inside, masked)
            v = narrowed(rest * factor, product.dtype.element_ty)
        elif kind == "gated":
            v = _level(other_word >> (lane * other_bits), value, value_table, other_bits) * v
            v = narrowed(v, product.dtype.element_ty)
        elif kind == "gradients":
            slope = _level(other_word >> (lane * other_bits), derivative, derivative_table, other_bits)
            f = _level(other_word >> (lane * other_bits), value, value_table, other_bits)
            v = narrowed((v * g) * slope, product.dtype.element_ty)
            _store(product_other + (element + along), narrowed(g * f, product_other.dtype.element_ty), inside, masked)
        else:
            if kind == "sloped values":
                v = v * tl.where(v > 0, number(numbers[2], wide), number(numbers[1], wide))
            v = narrowed(v, product.dtype.element_ty)
        _store(product + (element + along), v, inside, masked)


@triton.jit
def _words(packed, at, words, bits: tl.constexpr, masked: tl.constexpr):
    """The packed words at these numbers."""
    word = tl.full(at.shape, 0, tl.uint32 if bits <= 4 else tl.uint64)
    for plane in tl.static_range(bits):
        word |= _load(packed + plane * words.to(at.dtype) + at, at < words, masked).to(word.dtype) << (8 * plane)
    return word


@triton.jit
def _store(pointer, value, inside, masked: tl.constexpr):
    if masked:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)
