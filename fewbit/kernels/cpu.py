"""The CPU backend: encode and decode compiled by numba, at about the speed of a copy.

Codes come without a search. With thresholds t and codes c, code(x) is the last code plus the sum of c[i] - c[i+1] over all
t[i] >= x; shifted to its lane, such a difference can be added to the packed word at once. Eight comparisons and additions a
pass over a chunk in the first-level cache vectorise fully, where a binary search or a table of codes would not. An even table
compares |x| with its upper half alone. Levels come from a tree of selections on the bits of the code, up to 4 bits; beyond,
from an array.

Half-width floats come as integers: bfloat16 as uint16, float16 as int16.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fewbit import packing
from fewbit.kernels.coder import Coder

Tensor = torch.Tensor
Array = np.ndarray
CHUNK = 2048  # words: their inputs, one lane at a time, and the words themselves stay in the first-level cache
_PARALLEL_WORDS = 1 << 19  # for each thread: with fewer it loses against torch's own threads, which spin on after an operation
_TREE_BITS = 4
_jit = njit(nogil=True, cache=True, error_model="numpy")


class Constants(NamedTuple):
    """A Coder in the form of the kernels.

    thresholds  (m,) padded to a multiple of 8        steps   (8, m) for each lane what a threshold >= x adds to the word
    start       word of eight times the last code     levels  (16,) or, beyond 4 bits, (2**bits,)
    fold        whether |x| is compared instead of x
    """

    thresholds: Array
    steps: Array
    start: Any
    levels: Array
    fold: bool

    @classmethod
    def of(cls, coder: Coder) -> Constants:
        thresholds, codes = coder.thresholds.cpu().numpy(), coder.codes.cpu().numpy().astype(np.int64)
        if coder.even:
            thresholds, codes = thresholds[thresholds.size // 2 :], codes[codes.size // 2 :]
        padding = -thresholds.size % 8
        differences = np.append(codes[:-1] - codes[1:], np.zeros(padding, np.int64))
        shifts = coder.bits * np.arange(packing.LANES)
        word = np.int32 if coder.bits <= 4 else np.int64
        # additions modulo 2**32 or 2**64: borrows from the lanes above cancel out once all of a lane's differences are in
        steps = np.stack([_wrapped(differences, int(shift), word) for shift in shifts])
        start = np.bitwise_or.reduce([_wrapped(codes[-1:], int(shift), word)[0] for shift in shifts])
        levels = np.zeros(2 ** max(coder.bits, _TREE_BITS), thresholds.dtype)
        levels[: coder.levels.numel()] = coder.levels.cpu().numpy()
        if coder.bits < _TREE_BITS:  # the tree looks at four bits, of which those above the code are the next lane's
            levels = np.tile(levels[: 2**coder.bits], 2 ** (_TREE_BITS - coder.bits))
        return cls(np.append(thresholds, np.full(padding, np.inf, thresholds.dtype)), steps, start, levels, coder.even)


def _wrapped(values: Array, shift: int, word: type) -> Array:
    size = 8 * np.dtype(word).itemsize
    unsigned = [(int(value) << shift) % (1 << size) for value in values]
    return np.array(unsigned, f"uint{size}").view(word)


def encode(x: Tensor, coder: Coder) -> Tensor:
    """As `fewbit.kernels.reference.encode`, for x on the CPU."""
    n, constants = x.numel(), coder.cpu_constants
    words = packing.words(n, coder.bits)
    packed = torch.empty(coder.bits * words, dtype=torch.uint8)
    thresholds, steps, start, _, fold = constants
    _in_threads(words, _encode, _array(x), thresholds, steps, start, fold, coder.bits, packed.numpy())
    return packed


def decode(packed: Tensor, grad: Tensor, coder: Coder) -> Tensor:
    """As `fewbit.kernels.reference.decode`, for tensors on the CPU."""
    words = packed.numel() // coder.bits
    product = torch.empty_like(grad)
    word = coder.cpu_constants.steps.dtype.type(0)
    levels = coder.cpu_constants.levels
    _in_threads(words, _decode, packed.numpy(), levels, word, _array(grad), coder.bits, _array(product))
    return product


def supports(tensor: Tensor) -> bool:
    """Whether these kernels can take the tensor: float16 only where the processor converts it."""
    return tensor.dtype != torch.float16 or _converts_half()


@cache
def _converts_half() -> bool:
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("f16c")) or platform.machine() in ("aarch64", "arm64")


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.float16 else tensor.numpy()


def _in_threads(words: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """kernel(*arguments, begin, end) over all words, in as many threads as torch would use."""
    threads = min(torch.get_num_threads(), words // _PARALLEL_WORDS)
    if threads < 2:
        kernel(*arguments, 0, words)
        return
    step = -(-words // (threads * CHUNK)) * CHUNK
    spans = [(begin, min(begin + step, words)) for begin in range(0, words, step)]
    others = [_pool(os.getpid()).submit(kernel, *arguments, *span) for span in spans[1:]]
    kernel(*arguments, *spans[0])
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: a forked child has none of its parent's and makes its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fewbit")


@_jit
def _encode(x, thresholds, steps, start, fold, bits, packed, begin, end):
    """Pack the words from begin to end."""
    n, word_count = x.size, packed.size // bits
    words = np.empty(CHUNK, steps.dtype)
    values = np.empty(CHUNK, thresholds.dtype)
    for first in range(begin, end, CHUNK):
        last = min(first + CHUNK, end)
        words[: last - first] = start
        for lane in range(8):
            a, b = min(lane * word_count + first, n), min(lane * word_count + last, n)
            _load(x[a:b], fold, values)
            _add_steps(values[: b - a], thresholds, steps[lane], words)
            _clear(words[b - a : last - first], lane * bits, bits)
        for plane in range(bits):
            _take_byte(words, 8 * plane, packed[plane * word_count + first : plane * word_count + last])


@_jit
def _load(x, fold, values):
    for i in range(np.uintp(x.size)):
        values[i] = _widen(x[i])  # type: ignore[call-arg]
    if fold:
        for i in range(np.uintp(x.size)):
            values[i] = abs(values[i])


@_jit
def _add_steps(values, thresholds, steps, words):
    """Add to words[i] the steps of all thresholds >= values[i], eight thresholds a pass."""
    word = words.dtype.type
    zero = word(0)
    for g in range(0, thresholds.size, 8):
        t0, t1, t2, t3 = thresholds[g], thresholds[g + 1], thresholds[g + 2], thresholds[g + 3]
        t4, t5, t6, t7 = thresholds[g + 4], thresholds[g + 5], thresholds[g + 6], thresholds[g + 7]
        s0, s1, s2, s3 = steps[g], steps[g + 1], steps[g + 2], steps[g + 3]
        s4, s5, s6, s7 = steps[g + 4], steps[g + 5], steps[g + 6], steps[g + 7]
        for i in range(np.uintp(values.size)):
            x = values[i]
            a = word((s0 if x <= t0 else zero) + (s1 if x <= t1 else zero))
            b = word((s2 if x <= t2 else zero) + (s3 if x <= t3 else zero))
            c = word((s4 if x <= t4 else zero) + (s5 if x <= t5 else zero))
            d = word((s6 if x <= t6 else zero) + (s7 if x <= t7 else zero))
            words[i] = word(words[i] + word(word(a + b) + word(c + d)))


@_jit
def _clear(words, shift, bits):
    """Code 0 in one lane, where the input has ended."""
    word = words.dtype.type
    mask = word(~(word((1 << bits) - 1) << word(shift)))
    for i in range(np.uintp(words.size)):
        words[i] = word(words[i] & mask)


@_jit
def _take_byte(words, shift, plane):
    shift = words.dtype.type(shift)
    for i in range(np.uintp(plane.size)):
        plane[i] = np.uint8(words[i] >> shift)


@_jit
def _decode(packed, levels, zero, grad, bits, product, begin, end):
    """Multiply the elements of the words from begin to end by their levels; `zero` is of the words' type."""
    n, word_count = grad.size, packed.size // bits
    words = np.empty(CHUNK, np.array([zero]).dtype)
    for first in range(begin, end, CHUNK):
        last = min(first + CHUNK, end)
        words[:] = zero
        for plane in range(bits):
            _put_byte(packed[plane * word_count + first : plane * word_count + last], 8 * plane, words)
        for lane in range(8):
            a, b = min(lane * word_count + first, n), min(lane * word_count + last, n)
            if bits <= 4:
                _multiply_by_tree(words, lane * bits, levels, grad[a:b], product[a:b])
            else:
                _multiply_by_lookup(words, lane * bits, (1 << bits) - 1, levels, grad[a:b], product[a:b])


@_jit
def _put_byte(plane, shift, words):
    word = words.dtype.type
    shift = word(shift)
    for i in range(np.uintp(plane.size)):
        words[i] = word(words[i] | word(word(plane[i]) << shift))


@_jit
def _multiply_by_tree(words, shift, levels, grad, product):
    word = words.dtype.type
    shift = word(shift)
    l0, l1, l2, l3, l4, l5, l6, l7 = levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]
    h0, h1, h2, h3, h4, h5, h6, h7 = (
        levels[8],
        levels[9],
        levels[10],
        levels[11],
        levels[12],
        levels[13],
        levels[14],
        levels[15],
    )
    for i in range(np.uintp(grad.size)):
        code = word(words[i] >> shift)
        bit0, bit1, bit2, bit3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
        low = (
            ((l7 if bit0 else l6) if bit1 else (l5 if bit0 else l4))
            if bit2
            else ((l3 if bit0 else l2) if bit1 else (l1 if bit0 else l0))
        )
        high = (
            ((h7 if bit0 else h6) if bit1 else (h5 if bit0 else h4))
            if bit2
            else ((h3 if bit0 else h2) if bit1 else (h1 if bit0 else h0))
        )
        product[i] = _narrow(_widen(grad[i]) * (high if bit3 else low), grad[i])  # type: ignore[call-arg]


@_jit
def _multiply_by_lookup(words, shift, mask, levels, grad, product):
    for i in range(np.uintp(grad.size)):
        level = levels[np.uintp((words[i] >> shift) & mask)]
        product[i] = _narrow(_widen(grad[i]) * level, grad[i])  # type: ignore[call-arg]


@intrinsic
def _widen(typing_context, value):
    """The float that `value` stands for: float32 for uint16 (bfloat16) and int16 (float16), else value itself."""

    def generate(context, builder, signature, arguments):
        (bits,) = arguments
        if value == types.uint16:
            return builder.bitcast(
                builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), ir.FloatType()
            )
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return (types.float32 if value in (types.uint16, types.int16) else value)(value), generate


@intrinsic
def _narrow(typing_context, value, like):
    """`value`, a float, rounded to nearest even to what `like` is: bfloat16 for uint16, float16 for int16, else unchanged."""

    def generate(context, builder, signature, arguments):
        number, _ = arguments
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))
        if like != types.uint16:
            return number
        integer = ir.IntType(32)
        bits = builder.bitcast(number, integer)
        odd = builder.and_(builder.lshr(bits, ir.Constant(integer, 16)), ir.Constant(integer, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(integer, 0x7FFF)))
        nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(
            builder.lshr(builder.select(nan, ir.Constant(integer, 0x7FC00000), rounded), ir.Constant(integer, 16)),
            ir.IntType(16),
        )

    return (like if like in (types.uint16, types.int16) else value)(value, like), generate
