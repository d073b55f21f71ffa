"""The layout of packed codes. Every kernel backend follows this specification to the byte.

n elements of b bits are packed into W words of eight lanes. W is ceil(n / 8) rounded up to a whole number of granules.
Lane j of word i holds element j·W + i, so each lane is one contiguous stretch of the input. The eight codes of a word make a
number of 8b bits, with lane 0 in the lowest bits. Its b bytes, lowest first, go to b planes of W bytes each:

    byte p·W + i  =  bits 8p to 8p + 7 of  sum over j of  code(j·W + i) << (j·b)

Lanes past the end of the input hold code 0. The granule is 128 words up to 4 bits, and 64 words for more bits. Lanes and
planes thus start on vector boundaries, and the padding stays below 512 bytes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

LANES = 8


class Field(NamedTuple):
    """Place of a part of a lane's code: byte plane `plane` holds the code shifted left by `shift` bits (right if negative)."""

    plane: int
    shift: int


def words(n: int, bits: int) -> int:
    """Number of words for n elements.

    >>> words(1, 3), words(1024, 3), words(1025, 3)
    (128, 128, 256)
    """
    granule = 128 if bits <= 4 else 64
    return -(-n // (LANES * granule)) * granule


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of the packed codes of n elements: at least ceil(n·bits / 8), at most 512 more.

    >>> packed_bytes(1 << 20, 3) == (1 << 20) * 3 // 8
    True
    """
    return bits * words(n, bits)


def lane_span(n: int, lane: int, word_count: int) -> tuple[int, int]:
    """First and past-the-last element of a lane. The span is empty for lanes past the end.

    >>> [lane_span(300, lane, 128) for lane in (0, 2, 3)]
    [(0, 128), (256, 300), (300, 300)]
    """
    return min(lane * word_count, n), min((lane + 1) * word_count, n)


@cache
def fields(bits: int, lane: int) -> tuple[Field, ...]:
    """The one or two byte planes that a lane's code touches.

    >>> fields(3, 2)
    (Field(plane=0, shift=6), Field(plane=1, shift=-2))
    """
    first, last = lane * bits // 8, ((lane + 1) * bits - 1) // 8
    return tuple(Field(plane, lane * bits - 8 * plane) for plane in range(first, last + 1))
