"""The loop of the CPU backend that computes from a sample how each channel is standardized, or its mean magnitude.

A block of channels is processed at once, vectorised along the channels. Its sample is in scratch memory as tiles of 16 places,
which is the number of accumulators in `fewbit.kernels.layers_reference`. Every pass is thus one loop over tiles of a fixed
size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fewbit.kernels.layer_loops import fields
from fewbit.kernels.llvm import advance, pointer
from fewbit.kernels.loops import _CLAIMED, _DONE, _WORKERS, _array, _compile, _encode_lane, _inlined
from fewbit.kernels.permutations import permuted_codes
from fewbit.kernels.spans import SMALLEST_UNIT, copy, drop_what_is_lost, grid_of, load_run, unit, view_of

PLACES = 16  # places of a tile: `layers_reference.SAMPLE_LANES`
_TILES = 14  # number of scratch tiles
_CENTER, _LARGEST, _SMALLEST, _SPREAD, _SPARSE, _LEVEL, _MIDDLE, _INVERSE, _ONTO, _MOVE, _ABOUT, _OF_LEVEL, _MEAN = range(13)
_NUMBERS = _MEAN + 6  # numbers of a channel


class SampleBlock(ctypes.Structure):
    """The arguments of `sampler`: those of `fewbit.kernels.layer_loops.EncodeBlock`, and

    pieces      number of blocks of `across` channels; `across` is a multiple of 16
    sampled     number of places in the sample
    magnitudes  (channels,) wide, to be filled; if 0, coding (3, channels) and vectors (vector_rows, channels) are filled
    row_weight  (rows,) wide; weight, bias (channels,) wide
    thresholds  as in EncodeBlock; the first `padding` are repetitions. interval_levels: levels of their intervals, one more;
                midpoints: between thresholds, one less; above: the next number above each threshold.
    permuted    as in EncodeBlock; permuted_levels: (16,), levels instead of codes
    factor_row, shift_row, move_row   rows of the vectors, or -1
    tiny        the spread of zeros
    by_sample   1 / sampled; usual: the spread of channels that are constant in the sample, or NaN; doubt: a factor of the
                squared mean size
    low, high, outermost   the lowest and the highest level, and the largest magnitude of a threshold
    """

    _fields_ = fields(
        *("across", "sampled", "places", "magnitudes", "shift", "scale", "by_row", "has_eps", "row_weight", "weight", "bias"),
        *(
            "by_sign",
            "keep_means",
            "fours",
            "twos",
            "padding",
            "thresholds",
            "interval_levels",
            "midpoints",
            "above",
            "permuted",
            "permuted_levels",
        ),
        *("coding", "vectors", "vector_rows", "factor_row", "shift_row", "move_row"),
        numbers=("eps", "tiny", "by_sample", "usual", "doubt", "low", "high", "outermost"),
    )


def width_of_block(channels: int) -> int:
    """Number of channels of a block: many adjacent ones, but few if other threads would have nothing to do."""
    return 16 if channels <= 16 else 32 if channels <= 64 else 64


def sample_scratch(wide: str, sampled: int, across: int) -> int:
    """Bytes per thread: the tiles of a block's sample, the scratch tiles, the block's numbers, and the outer indices."""
    tiles = -(-sampled // PLACES)
    return ((tiles + _TILES) * PLACES + _NUMBERS) * across * np.dtype(wide).itemsize + 8 * tiles * PLACES


def sampler(wide: str) -> Any:
    """The compiled kernel of magnitudes and standardize: a CFunc that takes the address of a SampleBlock."""
    values, size_of = np.dtype(wide).type, np.dtype(wide).itemsize

    def sample_of_channels(address):
        block = _array(address, 1)[0]
        channels, sampled, by_sample, across = block.channels, block.sampled, values(block.by_sample), block.across
        grid, view, tiles = grid_of(block), view_of(block), (block.sampled + PLACES - 1) // PLACES
        piece = advance(address, _CLAIMED, 1)
        if piece >= block.pieces:
            return
        of_first = block.n // block.inner if block.by_row else channels  # an upper bound of their number
        shift = _array(pointer(block.shift), of_first if block.shift else 0, values)
        scale = _array(pointer(block.scale), of_first if block.scale else 0, values)
        row_weight = _array(pointer(block.row_weight), block.n // block.inner if block.row_weight else 0, values)
        tile = PLACES * across
        size_of_scratch = ((tiles + _TILES) * tile + _NUMBERS * across) * size_of + 8 * tiles * PLACES
        memory = block.scratch + advance(address, _WORKERS, 1) * size_of_scratch
        u = _array(pointer(memory), tiles * tile, values)
        work = _array(pointer(memory + tiles * tile * size_of), (_TILES, tile), values)
        of_block = memory + (tiles + _TILES) * tile * size_of
        numbers = _array(pointer(of_block), (_NUMBERS, across), values)
        outers = _array(pointer(of_block + _NUMBERS * across * size_of), tiles * PLACES, np.int64)
        count = sampled * across
        while piece < block.pieces:
            first = piece * across
            width = min(across, channels - first)
            _gather(view, grid, block.places, sampled, first, width, across, outers, u[:count])
            if block.magnitudes:
                out = _array(pointer(block.magnitudes), channels, values)
                work[0] = 0
                for at in range(0, count, tile):
                    _add_magnitudes(u[at : min(at + tile, count)], by_sample, work[0])
                _in_pairs(work[0], across)
                copy(work[0, :width], out[first : first + width])
            else:
                has_eps = block.has_eps
                _first(u[:count], outers, grid, first, width, across, shift, scale, block.by_row, values(block.eps), has_eps)
                _standardize(block, u[:count], outers, grid, first, width, scale, row_weight, work, numbers)
            advance(address, _DONE, 1)
            piece = advance(address, _CLAIMED, 1)

    return _compile(sample_of_channels, SampleBlock, wide)


@_inlined
def _gather(view, grid, places, sampled, first, width, across, outers, u):
    """The sample (sampled, across) and its outer indices. Numbers that are not finite, and missing channels, are 0."""
    address, outer_stride, channel_stride, inner_stride, kind, _ = view
    u[:] = 0
    for k in range(sampled):
        place = k * places // sampled
        outer, within = place // grid[1], place % grid[1]
        outers[k] = outer
        offset = outer * outer_stride + first * channel_stride + within * inner_stride
        load_run(address, offset, channel_stride, kind, u[k * across : k * across + width])
    drop_what_is_lost(u)


@_inlined
def _first(u, outers, grid, first, width, across, shift, scale, by_row, eps, has_eps):
    """Turn v into u in place. Numbers that are not finite become 0."""
    number = u.dtype.type
    for at in range(0, u.size, across):
        c = 0
        while c < width:
            row, size = _rows_of(outers[at // across], first + c, grid)
            size = min(size, width - c)
            part = u[at + c : at + c + size]
            if by_row:
                s = shift[row] if shift.size else number(0)
                f = scale[row] if scale.size else number(1)
                if has_eps:
                    f = f / unit(f, eps, (number(1), number(SMALLEST_UNIT)))
                for i in range(np.uintp(size)):
                    part[i] = (part[i] - s) * f
            else:
                for i in range(size):
                    s = shift[first + c + i] if shift.size else number(0)
                    f = scale[first + c + i] if scale.size else number(1)
                    part[i] = (part[i] - s) * f
            c += size
    drop_what_is_lost(u)


@_inlined
def _rows_of(outer, channel, grid):
    """The row of a place, and the number of channels from this one on that share it."""
    _, _, per_row, groups, per_group = grid
    group = channel // per_group
    return outer // per_row * groups + group, (group + 1) * per_group - channel


@_inlined
def _standardize(block, u, outers, grid, first, width, scale, row_weight, work, numbers):
    """`layers_reference.standardize` for a block of channels with the sample u."""
    number = u.dtype.type
    by_sample, places, channels = number(block.by_sample), block.places, block.channels
    padding, of_thresholds = block.padding, 4 * block.fours + 2 * block.twos
    thresholds = _array(pointer(block.thresholds), of_thresholds, u.dtype)
    levels = _array(pointer(block.interval_levels), of_thresholds + 1, u.dtype)
    numbers[:] = 0
    _center_and_spread(u, by_sample, number(block.tiny), number(block.usual), work, numbers)
    for c in range(width):
        numbers[_LEVEL, c], numbers[_MIDDLE, c] = 1, numbers[_CENTER, c]
        if block.by_sign and of_thresholds - padding > 1:
            of_midpoints = of_thresholds - padding - 1
            midpoints = _array(pointer(block.midpoints), of_midpoints, u.dtype)
            above = _array(pointer(block.above), of_midpoints + 1, u.dtype)
            weight = _array(pointer(block.weight), channels, u.dtype)[first + c] if block.weight else number(1)
            bias = _array(pointer(block.bias), channels, u.dtype)[first + c] if block.bias else number(0)
            outermost = number(block.outermost)
            _put_zero_on_a_threshold(numbers, c, weight, bias, thresholds[padding:], midpoints, above, outermost)
        elif not block.by_sign and places > 1 and numbers[_SMALLEST, c] == 0:
            low, high = number(block.low), number(block.high)
            _put_zero_on_a_level(numbers, c, low, high, thresholds[padding:], levels[padding:])
        numbers[_INVERSE, c] = number(1) / numbers[_SPREAD, c]
    if block.keep_means and places > 1:
        _means(block, u, outers, grid, first, width, scale, row_weight, thresholds, levels, by_sample, work, numbers)
        for c in range(width):
            _keep_means(numbers, c, number(block.doubt))
    coding = _array(pointer(block.coding), (3, channels), u.dtype)
    vectors = _array(pointer(block.vectors), (block.vector_rows, channels), u.dtype)
    for c in range(width):
        at = first + c
        center, move, spread = numbers[_CENTER, c], numbers[_MOVE, c], numbers[_SPREAD, c]
        weight = _array(pointer(block.weight), channels, u.dtype)[at] if block.weight else number(1)
        coding[0, at], coding[1, at], coding[2, at] = numbers[_MIDDLE, c], numbers[_INVERSE, c], numbers[_ONTO, c]
        vectors[0, at], vectors[1, at] = center + move, spread
        bias = _array(pointer(block.bias), channels, u.dtype)[at] if block.bias else number(0)
        if block.factor_row > 1:
            offset = (center if block.by_sign else center + move) * weight
            vectors[block.factor_row - 1, at] = offset if block.shift_row >= 0 or not block.bias else offset + bias
            vectors[block.factor_row, at] = spread * weight
        if block.shift_row >= 0:
            vectors[block.shift_row, at] = bias
        if block.move_row >= 0:
            vectors[block.move_row, at] = move * weight


@_inlined
def _center_and_spread(u, by_sample, tiny, usual, work, numbers):
    """Center, spread and smallest magnitude of each channel."""
    totals, centers, largest, smallest = work[0], work[1], work[2], work[3]
    across, tile = numbers.shape[1], totals.size
    totals[:] = 0
    for at in range(0, u.size, tile):
        _add_values(u[at : min(at + tile, u.size)], by_sample, totals)
    _in_pairs(totals, across)
    copy(totals[:across], numbers[_CENTER])
    copy(totals[:across], numbers[_ABOUT])
    _tile(numbers[_CENTER], centers)
    largest[:], smallest[:] = 0, np.inf
    for at in range(0, u.size, tile):
        _extremes(u[at : min(at + tile, u.size)], centers, largest, smallest)
    half = tile // 2
    while half >= across:
        _join_extremes(largest[half : 2 * half], smallest[half : 2 * half], largest[:half], smallest[:half])
        half //= 2
    copy(smallest[:across], numbers[_SMALLEST])
    for c in range(across):
        numbers[_LARGEST, c] = largest[c]
        numbers[_SPREAD, c] = 1 if largest[c] == 0 else largest[c]
    _tile(numbers[_SPREAD], largest)
    totals[:] = 0
    for at in range(0, u.size, tile):
        _add_moments(u[at : min(at + tile, u.size)], centers, largest, by_sample, totals)
    _in_pairs(totals, across)
    for c in range(across):
        spread = np.sqrt(np.sqrt(np.sqrt(totals[c] * u.dtype.type(1.0 / 105.0)))) * numbers[_LARGEST, c]
        spread = tiny if u.dtype.type(1) / spread == np.inf else spread
        numbers[_SPREAD, c] = usual if numbers[_LARGEST, c] == 0 and usual == usual else spread


@_inlined
def _put_zero_on_a_level(numbers, c, low, high, thresholds, levels):
    """`layers_reference._with_zero_on_a_level` for one channel that has zeros."""
    center, spread = numbers[_CENTER, c], numbers[_SPREAD, c]
    zero = -center / spread
    beyond = zero / low if zero < 0 else zero / high
    is_sparse = beyond <= 2 and low < 0 and high > 0
    if is_sparse:
        spread = spread * (beyond if beyond > 1 else numbers.dtype.type(1))
    level = levels[_interval(thresholds, -center / spread)]
    numbers[_SPREAD, c], numbers[_LEVEL, c], numbers[_SPARSE, c] = spread, level, is_sparse
    if is_sparse:
        numbers[_CENTER, c] = numbers[_MIDDLE, c] = -level * spread


@_inlined
def _put_zero_on_a_threshold(numbers, c, weight, bias, thresholds, midpoints, above, outermost):
    """`layers_reference._with_zero_on_a_threshold` for one channel."""
    center, spread = numbers[_CENTER, c], numbers[_SPREAD, c]
    factor, offset, two = spread * weight, center * weight + bias, numbers.dtype.type(2)
    zero = -offset / factor
    size = abs(zero)
    if factor == 0 or not size <= two * outermost:
        return
    shrink = outermost / (size if size > outermost else outermost)
    nearest = _interval(midpoints, shrink * zero)
    edge = above[nearest] if factor < 0 else thresholds[nearest]
    numbers[_MIDDLE, c], numbers[_ONTO, c] = -bias / weight, edge
    spread = spread / shrink
    numbers[_SPREAD, c], numbers[_CENTER, c] = spread, numbers[_MIDDLE, c] - edge * spread


@_inlined
def _interval(thresholds, value):
    """The number of thresholds below the value; all for NaN."""
    low, high = 0, thresholds.size
    while low < high:
        middle = (low + high) // 2
        if thresholds[middle] >= value:
            high = middle
        else:
            low = middle + 1
    return low


@_inlined
def _means(block, u, outers, grid, first, width, scale, row_weight, thresholds, levels, by_sample, work, numbers):
    """The means for each channel of: the value u * w, level * w, w, the magnitude of the value, the square of the standardized
    deviation, and its product with the deviation of the level (see `layers_reference._of_gain_one`)."""
    z, level, w, middle, inverse, onto = work[0], work[1], work[2], work[3], work[4], work[5]
    about, of_level, totals = work[6], work[7], work[8:14]
    across, tile = numbers.shape[1], z.size
    rows = _array(pointer(block.permuted), 64 if block.permuted else 0, u.dtype)
    of_rows = _array(pointer(block.permuted_levels), 16, u.dtype)
    for c in range(across):
        is_sparse = numbers[_SPARSE, c] != 0
        numbers[_ABOUT, c] = 0 if is_sparse else numbers[_ABOUT, c]
        numbers[_OF_LEVEL, c] = numbers[_LEVEL, c] if is_sparse else 0
    _tile(numbers[_MIDDLE], middle)
    _tile(numbers[_INVERSE], inverse)
    _tile(numbers[_ONTO], onto)
    _tile(numbers[_ABOUT], about)
    _tile(numbers[_OF_LEVEL], of_level)
    totals[:] = 0
    w[:] = 1
    for at in range(0, u.size, tile):
        part = u[at : min(at + tile, u.size)]
        _standard_tile(part, middle, inverse, onto, z)
        rest = permuted_codes(z[: part.size], rows, of_rows, level)
        _encode_lane(z[rest : part.size], thresholds, levels, block.twos, level[rest:])
        if row_weight.size or block.has_eps:
            of_tile = outers[at // across : (at + part.size) // across]
            _weights(of_tile, grid, first, width, across, scale, row_weight, u.dtype.type(block.eps), w)
        _add_means(part, level, w, by_sample, totals[0], totals[1], totals[2], totals[3])
        _add_gains(part, level, about, inverse, of_level, by_sample, totals[4], totals[5])
    for i in range(6):
        _in_pairs(totals[i], across)
        copy(totals[i, :across], numbers[_MEAN + i])


@_inlined
def _weights(outers, grid, first, width, across, scale, row_weight, eps, w):
    """The factors that turn u into the value, for a tile; 0 for factors that are not finite."""
    number = w.dtype.type
    for k in range(outers.size):
        c = 0
        while c < width:
            row, size = _rows_of(outers[k], first + c, grid)
            size = min(size, width - c)
            weight = row_weight[row] if row_weight.size else unit(scale[row], eps, (number(1), number(SMALLEST_UNIT)))
            w[k * across + c : k * across + c + size] = weight if weight - weight == 0 else number(0)
            c += size


@_inlined
def _keep_means(numbers, c, doubt):
    """Set the spread to that of gain one. Then stretch it, or set the move, so that the channel keeps its mean."""
    number = numbers.dtype.type
    mean, mean_level, mean_weight, size = numbers[_MEAN, c], numbers[_MEAN + 1, c], numbers[_MEAN + 2, c], numbers[_MEAN + 3, c]
    gain = numbers[_MEAN + 4, c] / numbers[_MEAN + 5, c]
    if gain >= number(0.7) and gain <= number(2):
        numbers[_SPREAD, c] = gain * numbers[_SPREAD, c]
    spread, is_sparse = numbers[_SPREAD, c], numbers[_SPARSE, c] != 0
    center = -numbers[_LEVEL, c] * spread if is_sparse else numbers[_MIDDLE, c] - numbers[_ONTO, c] * spread
    found = spread * mean_level + center * mean_weight
    if is_sparse:
        one = number(1) if size == 0 else size
        relative, relative_found = mean / one, found / one
        spread = spread * ((relative * relative_found + doubt) / (relative_found * relative_found + doubt))
        numbers[_SPREAD, c], center = spread, -numbers[_LEVEL, c] * spread
    else:
        numbers[_MOVE, c] = (mean - found) / (number(1) if mean_weight == 0 else mean_weight)
    numbers[_CENTER, c] = center


@_inlined
def _tile(of_channels, tile):
    for at in range(0, tile.size, of_channels.size):
        copy(of_channels, tile[at : at + of_channels.size])


@_inlined
def _in_pairs(totals, across):
    """Sum the accumulators of each channel: adjacent pairs are added until one is left. The sum comes first."""
    half = PLACES // 2
    while half:
        for k in range(half):
            for c in range(across):
                totals[k * across + c] = totals[2 * k * across + c] + totals[(2 * k + 1) * across + c]
        half //= 2


@_inlined
def _add_values(values, factor, totals):
    for i in range(np.uintp(values.size)):
        totals[i] += values[i] * factor


@_inlined
def _add_magnitudes(values, factor, totals):
    for i in range(np.uintp(values.size)):
        totals[i] += abs(values[i]) * factor


@_inlined
def _extremes(u, center, largest, smallest):
    """The largest deviation, or NaN if any is NaN, and the smallest magnitude."""
    for i in range(np.uintp(u.size)):
        deviation, size = abs(u[i] - center[i]), abs(u[i])
        largest[i] = largest[i] if largest[i] >= deviation or largest[i] != largest[i] else deviation
        smallest[i] = size if size < smallest[i] else smallest[i]


@_inlined
def _join_extremes(other_largest, other_smallest, largest, smallest):
    for i in range(np.uintp(largest.size)):
        other = other_largest[i]
        largest[i] = largest[i] if largest[i] >= other or largest[i] != largest[i] else other
        smallest[i] = other_smallest[i] if other_smallest[i] < smallest[i] else smallest[i]


@_inlined
def _add_moments(u, center, largest, factor, totals):
    """Add the eighth powers of the deviations, in units of the largest one."""
    for i in range(np.uintp(u.size)):
        relative = (u[i] - center[i]) / largest[i]
        power = relative * relative
        power = power * power
        totals[i] += power * power * factor


@_inlined
def _standard_tile(u, middle, inverse, onto, z):
    for i in range(np.uintp(u.size)):
        z[i] = (u[i] - middle[i]) * inverse[i] + onto[i]


@_inlined
def _add_means(u, level, w, factor, of_value, of_level, of_weight, of_size):
    for i in range(np.uintp(u.size)):
        value = u[i] * w[i]
        of_value[i] += value * factor
        of_level[i] += level[i] * w[i] * factor
        of_weight[i] += w[i] * factor
        of_size[i] += abs(value) * factor


@_inlined
def _add_gains(u, level, about, inverse, of_level, factor, of_square, of_product):
    for i in range(np.uintp(u.size)):
        d = (u[i] - about[i]) * inverse[i]
        of_square[i] += d * d * factor
        of_product[i] += d * (level[i] - of_level[i]) * factor
