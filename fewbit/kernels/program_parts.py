"""Parts that the Triton programs for layers share: numbers, places, rows, the levels of single elements.

A group is `vector` elements that follow each other in packed order, in one row. They belong to one channel if `inner` is above
1, else to `vector` channels. Divisions find the place of a group, once per group; `vector` is chosen so that groups fit evenly.

Every operation is rounded by itself. Programs whose results have to equal those of `fewbit.kernels.layers_reference` bit for
bit are compiled without fused multiplication and addition.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.kernels.layers_reference import SMALLEST_UNIT
from fewbit.kernels.programs import _level

LEAST_UNIT = tl.constexpr(SMALLEST_UNIT)


@triton.jit
def number(bits, wide: tl.constexpr):
    """The float64 with these 64 bits, rounded to `wide`. Triton would pass a float as a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(wide)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(a):
    """The square root, correctly rounded."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def at_least(a, least):
    """The larger of the two; NaN where a is NaN."""
    return tl.where(a < least, least, a)


@triton.jit
def at_most(a, most):
    """The smaller of the two; NaN where a is NaN."""
    return tl.where(a > most, most, a)


@triton.jit
def finite(a):
    """a, or 0 where it is infinite or NaN."""
    return tl.where(tl.abs(a) < float("inf"), a, 0.0)


@triton.jit
def or_one(a):
    """a, or 1 where a is 0. The numbers that it divides are then 0 as well."""
    return tl.where(a == 0, 1.0, a)


@triton.jit
def positive(a):
    """a, or a small number to divide by where a is 0."""
    return at_least(a, 2.0**-511 if a.dtype == tl.float64 else 2.0**-63)


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """value in the dtype. Numbers beyond the dtype's range become its largest number."""
    return at_most(at_least(value, -largest_of(dtype)), largest_of(dtype)).to(dtype)


@triton.jit
def largest_of(dtype: tl.constexpr):
    """The largest number of the dtype."""
    if dtype == tl.float64:
        return (2.0 - 2.0**-52) * 2.0**1023
    elif dtype == tl.float32:
        return (2.0 - 2.0**-23) * 2.0**127
    elif dtype == tl.bfloat16:
        return (2.0 - 2.0**-7) * 2.0**127
    else:
        return 65504.0


@triton.jit
def unit(scale, eps):
    """`fewbit.kernels.layers_reference.unit` with an eps."""
    share = 1.0 - (eps * scale) * scale
    return tl.where(share > 0.5, 1.0, root(at_least(share, LEAST_UNIT)))


@triton.jit
def folded(parts, lanes: tl.constexpr):
    """The sums of (rows, lanes) along rows. Adjacent pairs are added until one number is left."""
    rows: tl.constexpr = parts.shape[0]
    if lanes == 1:
        return tl.reshape(parts, [rows])
    else:
        low, high = tl.split(tl.reshape(parts, [rows, lanes // 2, 2]))
        return folded(low + high, lanes // 2)


@triton.jit
def located(element, channels, inner):
    """(outer, channel, inner) of the elements with these numbers."""
    place = element // inner
    outer = place // channels
    return outer, place - outer * channels, element - place * inner


@triton.jit
def row_of(outer, channel, per_row, group, groups):
    """The rows of elements; `group` channels form a group."""
    return (outer // per_row) * groups + channel // group


@triton.jit
def level_of(packed, element, along, inside, words, levels, table, bits: tl.constexpr):
    """The levels of (..., vector) elements, in groups that start at these numbers (..., 1), read from the packed bytes.

    along   0, 1, … (vector,) in a shape that broadcasts
    inside  which groups exist
    table   the levels in registers, if there are at most four
    """
    lane = element // words
    shift = lane * bits
    word = element - lane * words + along
    code = tl.load(packed + (shift // 8) * words + word, mask=inside, other=0).to(tl.uint32)
    if 8 % bits != 0:  # the code may go on in the next byte
        following = tl.minimum(shift // 8 + 1, bits - 1)
        code |= tl.load(packed + following * words + word, mask=inside, other=0).to(tl.uint32) << 8
    return _level(code >> (shift % 8).to(tl.uint32), levels, table, bits)
