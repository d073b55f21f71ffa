"""The loops of the CPU backend, compiled by numba. Each takes one block of arguments and can share its work with other threads.

A kernel claims chunks of words from a counter in its block, atomically, until none are left. Many threads may call it on one
block and thus split the work; the bytes written do not depend on the split. Blocks hold addresses and counts. Calls therefore
cost little, and any runtime that can call a C function can run a kernel.

Kernels allocate nothing, because numba swallows errors in a function that is called from C. The caller provides scratch memory,
and the block tells how many words are done.

Every loop over words is simple enough to be vectorised. This needs operations that keep the width of their operands: numba
itself would widen shifts of int32 to int64, which halves the speed. Half-width floats are compared as 16-bit integers. Flipping
the lower bits of the negative ones gives integers the order of the floats.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba.extending
import numpy as np
from numba import from_dtype, njit, types

from fewbit.compiling import callback
from fewbit.kernels import device_table
from fewbit.kernels.llvm import (
    advance,
    bits_and,
    bits_or,
    float_of,
    is_negative,
    narrow,
    pointer,
    shift_left,
    shift_right,
    widen,
)

INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0 << 48}  # patterns
_BFLOAT16_INFINITY = INFINITY["bfloat16"]
_ONES = {"uint16": 0x3F80, "int16": 0x3C00}  # the pattern of 1 in bfloat16 and float16
CHUNK = 4096  # words; one lane of their inputs and its codes fits into the first-level cache, or nearly
_inlined = njit(error_model="numpy")
_array: Any = numba.carray  # type: ignore[attr-defined]
_COUNTERS = ("claimed", "workers", "done", "infinite")
_COMMON = (*_COUNTERS, "scratch", "words", "bits", "packed", "n", "x", "rungs")
_CLAIMED, _WORKERS, _DONE, _INFINITE = 0, 8, 16, 24  # offsets of the counters in a block
_LANES = 16  # accumulators of a sample's sum
_SAMPLE, _MIDDLE, _BOUNDS = device_table.SAMPLE, device_table.MIDDLE, device_table.BOUNDS
TABLE = 5  # numbers that describe a table to an encoder


class EncodeBlock(ctypes.Structure):
    """The arguments of an encoder: counts, and addresses of contiguous memory.

    claimed   words claimed so far; workers: threads that have claimed some; done: words done. All are 0 at first.
    infinite  number of chunks in which an x is not finite; counted if `checked`
    scratch   scratch memory: `encoder_scratch` bytes per word of a chunk, for each thread that claims a chunk
    x         n floats, or the bit patterns of half-width floats
    rungs     number of rungs of the table; for several, a byte after the codes holds the number of the chosen rung
    tables    for each rung `TABLE` int64: the address of its thresholds (4 * fours + 2 * twos, of x's type) and of its codes
              (one more), both as in `fewbit.kernels.cpu.Encoding`; fours, twos, and whether |x| is compared
    infinity  the bit pattern of infinity
    """

    _fields_ = [(name, ctypes.c_int64) for name in (*_COMMON, "tables", "infinity", "checked")]


class DecodeBlock(ctypes.Structure):
    """The arguments of a decoder. x is the incoming gradient of n elements, or 0 for ones. The product has n elements too.
    levels are (rungs, 2**bits)."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_COMMON, "levels", "product")]


def encoder_scratch(element: str, wide: bool) -> int:
    """Bytes of scratch memory of an encoder per word of a chunk: two words, four codes and an element."""
    return 2 * (4 if wide else 2) + 5 * np.dtype(element).itemsize


def decoder_scratch(element: str) -> int:
    """The same for a decoder: one word and one element."""
    return 4 + np.dtype(element).itemsize


def encoder(element: str, wide: bool) -> Any:
    """The compiled encoder for float32, float64 or, as int16, half-width floats.

    wide     Whether the codes of four lanes take more than 16 bits. Half-width floats need this for more than 4 bits per
             element; for others it is always true.
    Returns  a numba CFunc that takes the address of an EncodeBlock
    """
    values, word, halves = np.dtype(element).type, np.int32 if wide else np.int16, element == "int16"
    code = pattern = np.dtype(f"int{8 * np.dtype(element).itemsize}").type
    widened = np.float64 if element == "float64" else np.float32
    size_of_code, size_of_half, size_of_word = np.dtype(code).itemsize, np.dtype(word).itemsize, encoder_scratch(element, wide)

    def encode(address):
        block = _array(address, 1)[0]
        n, word_count, bits = block.n, block.words, block.bits
        x, patterns = _array(pointer(block.x), n, values), _array(pointer(block.x), n, pattern)
        packed = _array(pointer(block.packed), bits * word_count + 1, np.uint8)
        first = advance(address, _CLAIMED, CHUNK)
        if first >= word_count:
            return
        chunk = min(CHUNK, word_count)
        memory = block.scratch + advance(address, _WORKERS, 1) * chunk * size_of_word
        rung = 0
        if block.rungs > 1:
            sums, sample = _array(pointer(memory), _LANES, widened), min(n, _SAMPLE)
            _sum_fourth_powers(x, sample, block.infinity, sums)
            rung = _rung(sums, sample)
            packed[bits * word_count] = rung  # every thread writes the same number
        of_rung = _array(pointer(block.tables), (block.rungs, TABLE), np.int64)[rung]
        size, twos, fold = 4 * of_rung[2] + 2 * of_rung[3], of_rung[3], of_rung[4]
        thresholds, table = _array(pointer(of_rung[0]), size, values), _array(pointer(of_rung[1]), size + 1, code)
        words = _array(pointer(memory), (2, chunk), word)
        codes = _array(pointer(memory + 2 * chunk * size_of_half), (4, chunk), code)
        scratch = _array(pointer(memory + chunk * (2 * size_of_half + 4 * size_of_code)), chunk, values)
        while first < word_count:
            size = min(CHUNK, word_count - first)
            for lane in range(8):
                begin, end = min(lane * word_count + first, n), min(lane * word_count + first + size, n)
                if block.checked and _is_infinite(patterns[begin:end], pattern(block.infinity)):
                    advance(address, _INFINITE, 1)
                if halves:
                    _order(x[begin:end], fold, block.infinity, scratch)
                    _encode_lane(scratch[: end - begin], thresholds, table, twos, codes[lane % 4])
                elif fold:
                    _magnitudes(x[begin:end], scratch)
                    _encode_lane(scratch[: end - begin], thresholds, table, twos, codes[lane % 4])
                else:
                    _encode_lane(x[begin:end], thresholds, table, twos, codes[lane % 4])
                codes[lane % 4, end - begin : size] = 0
                if lane % 4 == 3:
                    _join(codes[0], codes[1], codes[2], codes[3], bits, words[lane // 4, :size])
            for plane in range(bits):
                begin = plane * word_count + first
                _take_byte(words[0], words[1], 8 * plane, 4 * bits, packed[begin : begin + size])
            advance(address, _DONE, size)
            first = advance(address, _CLAIMED, CHUNK)

    return _compile(encode, EncodeBlock, f"{element}_{'wide' if wide else 'narrow'}")


def decoder(element: str) -> Any:
    """The compiled decoder for gradients of float32, float64, bfloat16 (as uint16) or float16 (as int16).

    Returns a numba CFunc that takes the address of a DecodeBlock.
    """
    values = np.dtype(element).type
    wide = np.float64 if element == "float64" else np.float32
    one, size_of_word = values(_ONES.get(element, 1)), decoder_scratch(element)

    def decode(address):
        block = _array(address, 1)[0]
        n, word_count, bits = block.n, block.words, block.bits
        has_grad = block.x != 0
        grad = _array(pointer(block.x), n if has_grad else 0, values)
        product = _array(pointer(block.product), n, values)
        packed = _array(pointer(block.packed), bits * word_count + 1, np.uint8)
        first = advance(address, _CLAIMED, CHUNK)
        if first >= word_count:
            return
        rung = min(packed[bits * word_count], block.rungs - 1) if block.rungs > 1 else 0
        levels = _array(pointer(block.levels), (block.rungs, 1 << bits), wide)[rung]
        chunk = min(CHUNK, word_count)
        memory = block.scratch + advance(address, _WORKERS, 1) * chunk * size_of_word
        words, ones = _array(pointer(memory), chunk, np.int32), _array(pointer(memory + 4 * chunk), chunk, values)
        if not has_grad:
            ones[:] = one
        while first < word_count:
            size = min(CHUNK, word_count - first)
            for lane in range(8):
                if lane % 4 == 0:
                    words[:size] = 0
                    for plane in range(bits):
                        begin = plane * word_count + first
                        _put_byte(packed[begin : begin + size], 8 * plane - lane * bits, 4 * bits, words)
                begin, end = min(lane * word_count + first, n), min(lane * word_count + first + size, n)
                factors = grad[begin:end] if has_grad else ones[: end - begin]
                _multiply(words, lane % 4 * bits, bits, levels, factors, product[begin:end])
            advance(address, _DONE, size)
            first = advance(address, _CLAIMED, CHUNK)

    return _compile(decode, DecodeBlock, element)


def _compile(kernel: Any, block: type[ctypes.Structure], variant: str) -> Any:
    # Each variant needs its own name. Variants of one name share an index on disk, in which numba numbers them. If two
    # processes add a variant at once, both may take the same number, and a third process could get the kernel of another dtype.
    kernel.__qualname__ += f".{variant}"
    signature = types.void(types.CPointer(from_dtype(np.dtype(block))))
    return callback(signature, error_model="numpy")(kernel)


@_inlined
def _sum_fourth_powers(x, sample, infinity, sums):
    """The sums (16,) that give the rung, as `fewbit.kernels.reference` specifies, over `sample` elements of x."""
    one, lanes, size, sample = np.uintp(1), np.uintp(_LANES), np.uintp(x.size), np.uintp(sample)  # unsigned is twice as fast
    step, rest, at, behind = size // sample, size % sample, np.uintp(0), np.uintp(0)
    sums[:] = 0
    for k in range(sample):
        value = _finite(x[at], infinity)
        square = value * value
        sums[k % lanes] += square * square
        at, behind = at + step, behind + rest
        if behind >= sample:
            at, behind = at + one, behind - sample


def _finite(value: Any, infinity: Any) -> Any:
    """The float, or its magnitude if it is given as a half-width pattern; 0 if it is not finite."""


@numba.extending.overload(_finite)
def _finite_by_type(value, infinity):
    zero = np.float64(0) if value == types.float64 else np.float32(0)

    def of_float(value, infinity):
        return value if abs(value) < np.inf else zero

    def of_pattern(value, infinity):  # without operations on half-width floats, which not all processors have
        magnitude = np.int32(value & 0x7FFF) if value & 0x7FFF < infinity else np.int32(0)
        shift, scale = (16, np.float32(1.0)) if infinity == _BFLOAT16_INFINITY else (13, np.float32(2.0**112))
        return float_of(np.int32(magnitude << shift)) * scale

    return of_float if isinstance(value, types.Float) else of_pattern


@_inlined
def _rung(sums, sample):
    """The number of the rung for these sums. Overwrites the sums."""
    pairs = _LANES // 2
    while pairs:
        for i in range(pairs):
            sums[i] = sums[2 * i] + sums[2 * i + 1]
        pairs //= 2
    if not sums[0] > 0:
        return _MIDDLE
    rung = 0
    for bound in _BOUNDS:
        rung += sample * bound < sums[0]
    return rung


@_inlined
def _is_infinite(patterns, infinity):
    """Whether one of the floats with these patterns is not finite. It takes a maximum, which vectorises."""
    number = patterns.dtype.type
    largest, mask = number(0), shift_right(number(-1), number(1))
    for i in range(np.uintp(patterns.size)):
        magnitude = bits_and(patterns[i], mask)
        largest = magnitude if magnitude > largest else largest
    return largest >= infinity


@_inlined
def _encode_lane(x, thresholds, table, twos, codes):
    """The code of each x. It starts as the last code, and the code of every interval whose upper threshold is not below x
    overwrites it."""
    codes[: x.size] = table[thresholds.size]
    at = thresholds.size
    for _ in range(twos):
        at -= 2
        _overwrite_two(x, thresholds[at : at + 2], table[at : at + 2], codes)
    while at > 0:
        at -= 4
        _overwrite_four(x, thresholds[at : at + 4], table[at : at + 4], codes)


@_inlined
def _overwrite_two(x, thresholds, table, codes):
    """Overwrite for two thresholds at once. One alone would become a masked store, which does not exist for 16 bits."""
    t0, t1, c0, c1 = thresholds[0], thresholds[1], table[0], table[1]
    for i in range(np.uintp(x.size)):
        value, code = x[i], codes[i]
        code = c1 if value <= t1 else code
        codes[i] = c0 if value <= t0 else code


@_inlined
def _overwrite_four(x, thresholds, table, codes):
    """Overwrite for four thresholds at once, the largest first. 16 vector registers hold four with their codes."""
    t0, t1, t2, t3 = thresholds[0], thresholds[1], thresholds[2], thresholds[3]
    c0, c1, c2, c3 = table[0], table[1], table[2], table[3]
    for i in range(np.uintp(x.size)):
        value, code = x[i], codes[i]
        code = c3 if value <= t3 else code
        code = c2 if value <= t2 else code
        code = c1 if value <= t1 else code
        codes[i] = c0 if value <= t0 else code


@_inlined
def _join(codes0, codes1, codes2, codes3, bits, words):
    word = words.dtype.type
    shift1, shift2, shift3 = word(bits), word(2 * bits), word(3 * bits)
    for i in range(np.uintp(words.size)):
        low = bits_or(word(codes0[i]), shift_left(word(codes1[i]), shift1))
        high = bits_or(shift_left(word(codes2[i]), shift2), shift_left(word(codes3[i]), shift3))
        words[i] = bits_or(low, high)


@_inlined
def _take_byte(low, high, shift, split, plane):
    """The byte at `shift` of a number that has the bits of `low` up to `split`, and the bits of `high` from there on."""
    word = low.dtype.type
    if shift + 8 <= split:
        right = word(shift)
        for i in range(np.uintp(plane.size)):
            plane[i] = np.uint8(shift_right(low[i], right))
    elif shift >= split:
        right = word(shift - split)
        for i in range(np.uintp(plane.size)):
            plane[i] = np.uint8(shift_right(high[i], right))
    else:
        right, left = word(shift), word(split - shift)
        for i in range(np.uintp(plane.size)):
            plane[i] = np.uint8(bits_or(shift_right(low[i], right), shift_left(high[i], left)))


@_inlined
def _put_byte(plane, shift, width, words):
    """Add a byte's bits, at `shift`, to words of `width` bits. Bits that fall outside may or may not be lost."""
    word = words.dtype.type
    if 0 <= shift < width:
        left = word(shift)
        for i in range(np.uintp(plane.size)):
            words[i] = bits_or(words[i], shift_left(word(plane[i]), left))
    elif -8 < shift < 0:
        right = word(-shift)
        for i in range(np.uintp(plane.size)):
            words[i] = bits_or(words[i], shift_right(word(plane[i]), right))


@_inlined
def _multiply(words, shift, bits, levels, grad, product):
    """product = grad times the level of the code at `shift`, by a tree of selections up to 4 bits, else by a look-up."""
    if bits > 4:
        mask = (1 << bits) - 1
        for i in range(np.uintp(grad.size)):
            level = levels[np.uintp((words[i] >> shift) & mask)]
            product[i] = narrow(widen(grad[i]) * level, grad[i])
    elif bits == 4:
        _multiply_by_tree4(words, shift, levels, grad, product)
    elif bits == 3:
        _multiply_by_tree3(words, shift, levels, grad, product)
    else:
        _multiply_by_tree2(words, shift, bits, levels, grad, product)


@_inlined
def _multiply_by_tree2(words, shift, bits, levels, grad, product):
    left0, left1 = np.int32(31 - shift), np.int32(32 - shift - bits)  # for 1 bit, the same bit twice
    l0, l1, l2, l3 = levels[0], levels[bits - 1], levels[2 * (bits - 1)], levels[2 * bits - 1]
    for i in range(np.uintp(grad.size)):
        bit0, bit1 = is_negative(shift_left(words[i], left0)), is_negative(shift_left(words[i], left1))
        product[i] = narrow(widen(grad[i]) * _one_of_four(bit0, bit1, l0, l1, l2, l3), grad[i])


@_inlined
def _multiply_by_tree3(words, shift, levels, grad, product):
    left0, left1, left2 = np.int32(31 - shift), np.int32(30 - shift), np.int32(29 - shift)
    l0, l1, l2, l3, l4, l5, l6, l7 = levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]
    for i in range(np.uintp(grad.size)):
        bit0, bit1 = is_negative(shift_left(words[i], left0)), is_negative(shift_left(words[i], left1))
        low, high = _one_of_four(bit0, bit1, l0, l1, l2, l3), _one_of_four(bit0, bit1, l4, l5, l6, l7)
        level = high if is_negative(shift_left(words[i], left2)) else low
        product[i] = narrow(widen(grad[i]) * level, grad[i])


@_inlined
def _multiply_by_tree4(words, shift, levels, grad, product):
    left0, left1, left2, left3 = np.int32(31 - shift), np.int32(30 - shift), np.int32(29 - shift), np.int32(28 - shift)
    l0, l1, l2, l3, l4, l5, l6, l7 = levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]
    h0, h1, h2, h3, h4, h5, h6 = levels[8], levels[9], levels[10], levels[11], levels[12], levels[13], levels[14]
    h7 = levels[15]
    for i in range(np.uintp(grad.size)):
        bit0, bit1 = is_negative(shift_left(words[i], left0)), is_negative(shift_left(words[i], left1))
        bit2 = is_negative(shift_left(words[i], left2))
        low = _one_of_four(bit0, bit1, l4, l5, l6, l7) if bit2 else _one_of_four(bit0, bit1, l0, l1, l2, l3)
        high = _one_of_four(bit0, bit1, h4, h5, h6, h7) if bit2 else _one_of_four(bit0, bit1, h0, h1, h2, h3)
        level = high if is_negative(shift_left(words[i], left3)) else low
        product[i] = narrow(widen(grad[i]) * level, grad[i])


@_inlined
def _one_of_four(bit0, bit1, l0, l1, l2, l3):
    return (l3 if bit0 else l2) if bit1 else (l1 if bit0 else l0)


@_inlined
def _magnitudes(x, magnitudes):
    for i in range(np.uintp(x.size)):
        magnitudes[i] = abs(x[i])


@_inlined
def _order(patterns, fold, infinity, ordered):
    """Integers in the order of the floats with these patterns, or of their magnitudes. A NaN is the largest."""
    flip, largest, negative_infinity = np.int16(0x7FFF), np.int16(0x7FFF), np.int16(infinity - 0x8000)
    if fold:  # the magnitude of a NaN's pattern is already above that of infinity
        for i in range(np.uintp(patterns.size)):
            ordered[i] = patterns[i] & flip
    else:
        for i in range(np.uintp(patterns.size)):
            pattern = patterns[i]
            ascending = pattern ^ flip if pattern < 0 else pattern
            ordered[i] = largest if negative_infinity < pattern < 0 else ascending
