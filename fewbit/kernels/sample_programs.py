"""The Triton programs that read a sample of the input. `fewbit.kernels.layers_cuda` calls them.

A program goes through the sample of its channels in tiles (channels, 16). Element number k is in lane k % 16 of tile k // 16.
Sums add the tiles in order, then the lanes in pairs. Each sum is a loop that reads the sample again; from the second sum on it
comes from caches. A few turns of the loop are unrolled, so that several loads run at once. (With all turns unrolled and the
sample in registers, Triton takes minutes to compile.)
"""

# Triton compiles these functions: pyright cannot follow its types, and Triton no starred expressions (RUF005).
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.kernels.layers_reference import SAMPLE_LANES
from fewbit.kernels.program_parts import (
    at_least,
    divide,
    finite,
    folded,
    number,
    or_one,
    positive,
    root,
    row_of,
    unit,
)

SIDE = tl.constexpr(SAMPLE_LANES)
UNROLLED = tl.constexpr(4)


@triton.jit(do_not_specialize=["sampled", "apart", "rest", "inverse"])
def magnitudes(
    x,
    found,
    channels,
    sampled,
    apart,
    rest,
    inverse,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    block: tl.constexpr,
    big: tl.constexpr,
):
    """found (channels,): the mean of |x|. The arguments are those of `standardize`."""
    wide: tl.constexpr = found.dtype.element_ty
    channel = tl.program_id(0) * block + tl.arange(0, block)
    strides = (outer_stride, channel_stride, inner_stride)
    sizes = (channels, sampled, apart, rest, inner)
    share = number(inverse, wide)
    total = tl.full([block, SIDE], 0, wide)
    for start in tl.range(0, sampled, SIDE, loop_unroll_factor=UNROLLED):
        v, _, _ = _sample_tile(x, channel, start, sizes, strides, wide, big)
        total += tl.abs(v) * share
    tl.store(found + channel, folded(total, SIDE), mask=channel < channels)


@triton.jit(do_not_specialize=["last", "size", "apart", "rest"])
def tell_rung(x, packed, last, size, apart, rest, bounds: tl.constexpr, middle: tl.constexpr, double: tl.constexpr):
    """Write the rung of a ladder that x takes to byte `last`, as `fewbit.kernels.reference` specifies; one program.

    x       in packed order; `size` of its elements are read: number k * apart + k * rest // size
    bounds  bounds between the fourth moments of neighbouring rungs; `middle`: the rung if all elements are 0
    """
    wide: tl.constexpr = tl.float64 if double else tl.float32
    total = tl.full([1, SIDE], 0, wide)
    for start in tl.range(0, size, SIDE, loop_unroll_factor=8):
        v, _, _ = _sample_tile(x, tl.full([1], 0, tl.int32), start, (1, size, apart, rest, 1), (1, 0, 0), wide, True)
        square = v * v
        total += square * square
    total = folded(total, SIDE)
    rung = tl.full([1], 0, tl.int32)
    for i in tl.static_range(len(bounds)):
        rung += (total > size.to(wide) * bounds[i]).to(tl.int32)
    rung = tl.where(total > 0, rung, middle)
    tl.store(packed + last + tl.arange(0, 1), rung.to(tl.uint8))


@triton.jit
def _sample_tile(x, channel, start, sizes, strides, wide: tl.constexpr, big: tl.constexpr):
    """The sample from `start` on, with 0 for numbers that are not finite; the outer indices of its elements; which exist."""
    channels, sampled, apart, rest, inner = sizes
    outer_stride, channel_stride, inner_stride = strides
    k = start + tl.arange(0, SIDE)[None, :]
    place = k.to(tl.int64 if big else tl.int32) * apart + (k * rest) // sampled
    outer = place // inner
    first = outer.to(tl.int64) * outer_stride + (place - outer * inner).to(tl.int64) * inner_stride
    channel = channel[:, None]
    inside = (k < sampled) & (channel < channels)
    pointer = x + (first + channel.to(tl.int64) * channel_stride)
    return finite(tl.load(pointer, mask=inside, other=0).to(wide)), outer, inside


@triton.jit
def _first_tile(
    x,
    shift,
    scale,
    row_weight,
    channel,
    start,
    sizes,
    rows,
    strides,
    eps,
    by_row: tl.constexpr,
    wide: tl.constexpr,
    big: tl.constexpr,
):
    """u and the weights of its rows from `start` on, both 0 for numbers that are not finite or missing; and which exist."""
    per_row, group, groups = rows
    v, outer, inside = _sample_tile(x, channel, start, sizes, strides, wide, big)
    row = row_of(outer, channel[:, None], per_row, group, groups)
    of_first = row if by_row else channel[:, None]
    has_first = inside if by_row else channel[:, None] < sizes[0]
    w = tl.where(inside, 1.0, tl.full(v.shape, 0, wide))
    if shift is not None:
        v = v - tl.load(shift + of_first, mask=has_first, other=0)
    if scale is not None:
        factor = tl.load(scale + of_first, mask=has_first, other=0)
        if eps is not None:
            of_row = unit(factor, number(eps, wide))
            factor = divide(factor, of_row)
            w = tl.where(inside, finite(of_row), 0.0)
        v = v * factor
    if row_weight is not None:
        w = finite(tl.load(row_weight + row, mask=inside, other=0))
    return tl.where(inside, finite(v), 0.0), w, inside


@triton.jit(do_not_specialize=["sampled", "apart", "rest", "inverse", "usual", "doubt", "eps"])
def standardize(
    x,
    coding,
    vectors,
    shift,
    scale,
    row_weight,
    weight,
    bias,
    bounds,
    results,
    middles,
    edges,
    ends,
    channels,
    sampled,
    apart,
    rest,
    inverse,
    usual,
    doubt,
    eps,
    inner,
    per_row,
    group,
    groups,
    outer_stride,
    channel_stride,
    inner_stride,
    by_row: tl.constexpr,
    by_sign: tl.constexpr,
    has_others: tl.constexpr,
    is_partial: tl.constexpr,
    keep_means: tl.constexpr,
    where: tl.constexpr,
    depth: tl.constexpr,
    block: tl.constexpr,
    big: tl.constexpr,
):
    """`fewbit.kernels.layers_reference.standardize`. A program takes `block` channels.

    apart, rest             number k of the sample is place k * apart + k * rest // sampled
    inverse, usual, doubt, eps  bits of float64: 1 / sampled; the spread of channels about which nothing is known; the share of
                            the squared mean size by which a mean may be off; see `fewbit.kernels.layers_reference.First`
    bounds, results         those of `fewbit.kernels.layers_cuda.SampleTable`, as are middles, edges and ends
    by_sign                 whether y = 0 lies on a threshold; there are then at least two thresholds
    has_others, is_partial  whether channels have more than one place, and more places than the sample
    where                   a `fewbit.kernels.layers_reference.Vectors`
    """
    wide: tl.constexpr = coding.dtype.element_ty
    channel = tl.program_id(0) * block + tl.arange(0, block)
    known = channel < channels
    strides = (outer_stride, channel_stride, inner_stride)
    sizes = (channels, sampled, apart, rest, inner)
    share = number(inverse, wide)

    rows = (per_row, group, groups)
    total = tl.full([block, SIDE], 0, wide)
    for start in tl.range(0, sampled, SIDE, loop_unroll_factor=UNROLLED):
        u, _, _ = _first_tile(x, shift, scale, row_weight, channel, start, sizes, rows, strides, eps, by_row, wide, big)
        total += u * share
    center = folded(total, SIDE)
    largest, zeros = tl.full([block, SIDE], 0, wide), tl.full([block, SIDE], 0, tl.int32)
    for start in tl.range(0, sampled, SIDE, loop_unroll_factor=UNROLLED):
        u, _, inside = _first_tile(x, shift, scale, row_weight, channel, start, sizes, rows, strides, eps, by_row, wide, big)
        largest = _larger(largest, tl.where(inside, tl.abs(u - center[:, None]), 0.0))
        zeros |= ((u == 0) & inside).to(tl.int32)
    largest = tl.reduce(largest, 1, _larger)
    has_zeros = tl.max(zeros, 1) != 0
    divisor = or_one(largest)[:, None]
    total = tl.full([block, SIDE], 0, wide)
    for start in tl.range(0, sampled, SIDE, loop_unroll_factor=UNROLLED):
        u, _, inside = _first_tile(x, shift, scale, row_weight, channel, start, sizes, rows, strides, eps, by_row, wide, big)
        relative = divide(tl.where(inside, u - center[:, None], 0.0), divisor)
        power = relative * relative
        power = power * power
        total += power * power * share
    moment = folded(total, SIDE) * (1 / 105)
    spread = root(root(root(moment))) * largest
    spread = tl.where(divide(1.0, spread) == float("inf"), positive(spread), spread)
    if is_partial:
        spread = tl.where(largest == 0, number(usual, wide), spread)

    w = tl.full([block], 1, wide)
    if weight is not None:
        w = tl.load(weight + channel, mask=known, other=0).to(wide)
    b = tl.full([block], 0, wide)
    if bias is not None:
        b = tl.load(bias + channel, mask=known, other=0).to(wide)

    mean_of_u = center
    middle = center
    onto = tl.full([block], 0, wide)
    sparse = tl.full([block], 0, tl.int1)
    level = tl.full([block], 1, wide)
    if by_sign:
        middle, onto, spread, center = _with_zero_on_a_threshold(
            center, spread, w, b, bias, weight, middles, edges, ends, depth
        )
    elif has_others and where.move < 0:
        at = tl.full([block], 0, tl.int32)
        low, high = tl.load(ends + at), tl.load(ends + 1 + at)
        zero = divide(-center, spread)
        beyond = tl.where(zero < 0, divide(zero, low), divide(zero, high))
        sparse = has_zeros & (beyond <= 2) & (low < 0) & (high > 0)
        spread = tl.where(sparse, spread * at_least(beyond, 1.0), spread)
        level = looked_up(divide(-center, spread), bounds, results, depth)
        center = tl.where(sparse, -level * spread, center)
        middle = center
    inverse_spread = divide(1.0, spread)
    tl.store(coding + channel, middle, mask=known)
    tl.store(coding + channels + channel, inverse_spread, mask=known)
    tl.store(coding + 2 * channels + channel, onto, mask=known)

    move = tl.full([block], 0, wide)
    if keep_means and has_others:
        mean, size = tl.full([block, SIDE], 0, wide), tl.full([block, SIDE], 0, wide)
        mean_level, mean_weight = tl.full([block, SIDE], 0, wide), tl.full([block, SIDE], 0, wide)
        square, product = tl.full([block, SIDE], 0, wide), tl.full([block, SIDE], 0, wide)
        about, about_level = tl.where(sparse, 0.0, mean_of_u), tl.where(sparse, level, 0.0)
        for start in tl.range(0, sampled, SIDE, loop_unroll_factor=UNROLLED):
            u, of_row, inside = _first_tile(
                x, shift, scale, row_weight, channel, start, sizes, rows, strides, eps, by_row, wide, big
            )
            z = (u - middle[:, None]) * inverse_spread[:, None] + onto[:, None]
            q = looked_up(z, bounds, results, depth)
            value = u * of_row
            mean += value * share
            size += tl.abs(value) * share
            mean_level += tl.where(inside, q, 0.0) * of_row * share
            mean_weight += of_row * share
            d = tl.where(inside, (u - about[:, None]) * inverse_spread[:, None], 0.0)
            square += d * d * share
            product += d * tl.where(inside, q - about_level[:, None], 0.0) * share
        mean, size = folded(mean, SIDE), folded(size, SIDE)
        mean_level, mean_weight = folded(mean_level, SIDE), folded(mean_weight, SIDE)
        gain = divide(folded(square, SIDE), folded(product, SIDE))
        spread = tl.where((gain >= 0.7) & (gain <= 2.0), gain * spread, spread)
        center = tl.where(sparse, -level * spread, middle - onto * spread)
        found = spread * mean_level + center * mean_weight
        doubts = number(doubt, wide)
        relative, relative_found = divide(mean, or_one(size)), divide(found, or_one(size))
        stretch = divide(relative * relative_found + doubts, relative_found * relative_found + doubts)
        move = tl.where(sparse, 0.0, divide(mean - found, or_one(mean_weight)))
        spread = spread * tl.where(sparse, stretch, 1.0)
        center = tl.where(sparse, -level * spread, center)

    own = center + move
    tl.store(vectors + where.center * channels + channel, own, mask=known)
    tl.store(vectors + where.spread * channels + channel, spread, mask=known)
    if where.factor != where.spread:
        offset = own
        if where.move >= 0:
            offset = center
        offset = offset * w
        if bias is not None and where.shift < 0:
            offset = offset + b
        tl.store(vectors + where.offset * channels + channel, offset, mask=known)
        tl.store(vectors + where.factor * channels + channel, spread * w, mask=known)
    if where.shift >= 0:
        tl.store(vectors + where.shift * channels + channel, b, mask=known)
    if where.move >= 0:
        tl.store(vectors + where.move * channels + channel, move * w, mask=known)


@triton.jit
def _larger(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _with_zero_on_a_threshold(center, spread, w, b, bias, weight, middles, edges, ends, depth: tl.constexpr):
    """See the function of that name in `fewbit.kernels.layers_reference`."""
    factor, offset = spread, center
    if weight is not None:
        factor, offset = spread * w, center * w
    if bias is not None:
        offset = offset + b
    outermost = tl.load(ends + 2)
    zero = tl.where(factor == 0, float("inf"), divide(-offset, factor))
    near = tl.abs(zero) <= 2 * outermost
    zero = tl.where(near, zero, 0.0)
    far = at_least(tl.abs(zero), outermost)
    shrink = tl.where(near, divide(outermost, far), 1.0)
    edge = looked_up(shrink * zero, middles, edges, depth)
    edge = tl.where(factor < 0, next_after(edge), edge)
    middle = tl.full(center.shape, -0.0, center.dtype)
    if bias is not None:
        middle = -b
    if weight is not None:
        middle = divide(middle, w)
    spread = divide(spread, shrink)
    return (
        tl.where(near, middle, center),
        tl.where(near, edge, 0.0),
        spread,
        tl.where(near, middle - edge * spread, center),
    )


@triton.jit
def next_after(a):
    """The next larger number. Infinity and NaN stay as they are."""
    whole: tl.constexpr = tl.int64 if a.dtype == tl.float64 else tl.int32
    bits = a.to(whole, bitcast=True)
    following = tl.where(a > 0, bits + 1, tl.where(a < 0, bits - 1, 1)).to(a.dtype, bitcast=True)
    return tl.where(a < float("inf"), following, a)


@triton.jit
def looked_up(z, bounds, results, depth: tl.constexpr):
    """The entry of results (2**depth,) for the interval of each z between bounds (2**depth - 1,). NaN is above all bounds."""
    at = tl.full(z.shape, 0, tl.int32)
    for level in tl.static_range(depth):
        half = 1 << (depth - 1 - level)
        at = tl.where(z <= tl.load(bounds + at + (half - 1)), at, at + half)
    return tl.load(results + at)
