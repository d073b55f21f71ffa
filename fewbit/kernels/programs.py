"""The Triton programs of the CUDA backend. They take pointers, sizes and compile-time plans; `fewbit.kernels.cuda` calls them.

A program handles all eight lanes of `block` words. All programs except the last ones are full and run a body without masks,
which they choose by a branch. With masks, accesses would not be 128 bits wide if n is not a multiple of 16.

Codes are added up in the packed words themselves. A word starts with the code of an x that is above no threshold of the run
(see `Search`). Every comparison then adds, under a predicate, a constant shifted to the lane. Borrows from the lanes above
cancel once all constants of a lane are added.
"""

# Triton compiles these functions: pyright cannot follow its types, and Triton no starred expressions (RUF005).
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from fewbit import packing

LANES = tl.constexpr(packing.LANES)


@triton.jit(do_not_specialize=["n"])
def encode(
    x,
    y,
    packed,
    thresholds,
    codes,
    constants,
    n,
    words,
    search: tl.constexpr,
    formula: tl.constexpr,
    count: tl.constexpr,
    block: tl.constexpr,
):
    """Packed codes of x and, with a formula, y = formula(x).

    search   a `fewbit.kernels.cuda.Search`
    formula  One of `fewbit.kernels.formulas`, which reads `count` constants, or None. It is not in a tuple with its count,
             because keys of Triton's kernel cache include the source of functions that are arguments, but not inside tuples.
    """
    first = tl.program_id(0).to(tl.int64) * block
    if (LANES - 1) * words.to(tl.int64) + first + block <= n:
        encode_block(x, y, packed, thresholds, codes, constants, n, words, first, search, formula, count, block, False)
    else:
        encode_block(x, y, packed, thresholds, codes, constants, n, words, first, search, formula, count, block, True)


@triton.jit(do_not_specialize=["n"])
def decode(packed, grad, levels, product, n, words, bits: tl.constexpr, ladder: tl.constexpr, block: tl.constexpr):
    """product = grad times the levels of the packed codes, or the levels themselves if grad is None."""
    first = tl.program_id(0).to(tl.int64) * block
    if ladder:
        levels += rung_of(packed, words, bits) * (1 << bits)
    if (LANES - 1) * words.to(tl.int64) + first + block <= n:
        decode_block(packed, grad, levels, product, n, words, first, bits, block, False)
    else:
        decode_block(packed, grad, levels, product, n, words, first, bits, block, True)


@triton.jit
def encode_block(
    x,
    y,
    packed,
    thresholds,
    codes,
    constants,
    n,
    words,
    first,
    search: tl.constexpr,
    formula: tl.constexpr,
    count: tl.constexpr,
    block: tl.constexpr,
    masked: tl.constexpr,
):
    """The words from `first` on."""
    bits: tl.constexpr = search.bits
    if search.ladder:
        thresholds, codes = at_rung(packed, words, thresholds, codes, search)
    tensors = (x, y, thresholds, codes)
    sizes = (n, words, first)
    changes = _load_scalars(codes, search.changes)
    scalars = ((_load_scalars(thresholds, search.scalars), changes), _load_scalars(constants, count))
    word = start_word(tl.full([block], 0, tl.uint32 if bits <= 4 else tl.uint64), changes, search)
    if search.depth:  # a loop; if it were unrolled, the loads of all lanes would take too many registers
        for lane in tl.range(LANES):
            word = _encode_lane(word, lane, tensors, sizes, scalars, search, formula, block, masked)
    else:
        for lane in tl.static_range(LANES):
            word = _encode_lane(word, lane, tensors, sizes, scalars, search, formula, block, masked)
    for plane in tl.static_range(bits):
        begin = first + plane * words.to(tl.int64)
        _store(packed + begin, (word >> (8 * plane)).to(tl.uint8), _left(words - first, block), block, masked)


@triton.jit
def _encode_lane(
    word, lane, tensors, sizes, scalars, search: tl.constexpr, formula: tl.constexpr, block: tl.constexpr, masked: tl.constexpr
):
    """The word with the codes of one lane. With a formula, the lane's y is written too."""
    x, y, thresholds, codes = tensors
    n, words, first = sizes
    table, parameters = scalars
    begin = first + lane * words.to(tl.int64)
    left = _left(tl.minimum(n - begin, words - first), block)
    value = _load(x + begin, left, block, masked)
    wide = value.to(thresholds.dtype.element_ty)
    word = with_code(word, wide, tl.arange(0, block) < left, lane, thresholds, codes, table, search, masked)
    if formula is not None:
        _store(y + begin, formula(value, parameters).to(y.dtype.element_ty), left, block, masked)
    return word


@triton.jit
def rung_of(packed, words, bits: tl.constexpr):
    """The number of the rung, which comes after the packed codes of a ladder."""
    return tl.load(packed + bits * words.to(tl.int64)).to(tl.int32)


@triton.jit
def at_rung(packed, words, thresholds, codes, search: tl.constexpr):
    """The addresses of the rung's thresholds and codes."""
    rung = rung_of(packed, words, search.bits)
    return thresholds + rung * search.widths[0], codes + rung * search.widths[1]


@triton.jit
def start_word(zeros, changes, search: tl.constexpr):
    """Words to which `with_code` adds codes. changes: those of the rung of a ladder."""
    if search.changes:
        return zeros + changes[0].to(zeros.dtype)
    else:
        return zeros + search.start


@triton.jit
def with_code(word, x, inside, lane, thresholds, codes, table, search: tl.constexpr, masked: tl.constexpr):
    """The word with the codes of x in that lane. In a masked body, elements that are not `inside` get code 0.

    table  the thresholds in registers, and the changes of a ladder's rung
    """
    if search.fold:
        x = tl.abs(x)
    if search.depth:
        code = _look_up(x, thresholds, codes, search)
        if masked:
            code = tl.where(inside, code, 0)
        word |= code.to(word.dtype) << (lane * search.bits)
    else:
        word = _add_code(word, x, table, search, lane * search.bits)
        if masked:
            keep = search.all_ones - (((1 << search.bits) - 1) << (lane * search.bits))
            word = tl.where(inside, word, word & keep)
    return word


@triton.jit
def decode_block(packed, grad, levels, product, n, words, first, bits: tl.constexpr, block: tl.constexpr, masked: tl.constexpr):
    """The words from `first` on."""
    table = _load_scalars(levels, 1 << bits if bits <= 2 else 0)
    word = tl.full([block], 0, tl.uint32 if bits <= 4 else tl.uint64)
    for plane in tl.static_range(bits):
        begin = first + plane * words.to(tl.int64)
        word |= _load(packed + begin, _left(words - first, block), block, masked).to(word.dtype) << (8 * plane)
    for lane in tl.static_range(LANES):
        begin = first + lane * words.to(tl.int64)
        left = _left(tl.minimum(n - begin, words - first), block)
        level = _level(word >> (lane * bits), levels, table, bits)
        if grad is not None:
            level = _load(grad + begin, left, block, masked).to(levels.dtype.element_ty) * level
        _store(product + begin, level.to(product.dtype.element_ty), left, block, masked)


@triton.jit
def _left(count, block: tl.constexpr):
    """The number of a block's elements that exist, as an int32."""
    return tl.minimum(tl.maximum(count, 0), block).to(tl.int32)


@triton.jit
def _load(pointer, left, block: tl.constexpr, masked: tl.constexpr):
    i = tl.arange(0, block)
    if masked:
        return tl.load(pointer + i, mask=i < left, other=0)
    else:
        return tl.load(pointer + i)


@triton.jit
def _store(pointer, value, left, block: tl.constexpr, masked: tl.constexpr):
    i = tl.arange(0, block)
    if masked:
        tl.store(pointer + i, value, mask=i < left)
    else:
        tl.store(pointer + i, value)


@triton.jit
def _load_scalars(pointer, count: tl.constexpr):
    values = ()
    for i in tl.static_range(count):
        values = values + (tl.load(pointer + i),)
    return values


@triton.jit
def _add_code(word, x, table, search: tl.constexpr, shift: tl.constexpr):
    """word plus, in the lane that starts at bit `shift`, the difference between the code of x and the start code."""
    thresholds, changes = table
    below = ()  # for the run's thresholds on the way down, whether x <= threshold; false for NaN
    height: tl.constexpr = search.height
    others: tl.constexpr = len(search.extras)
    for level in tl.static_range(height):
        below = below + (x <= _node(thresholds, below, 0, 0, height),)
        word = tl.where(below[level], word, word + ((search.step << (height - 1 - level + shift)) & search.all_ones))
    for i in tl.static_range(others):
        below_other = x <= thresholds[(1 << height) - 1 + i]
        if search.changes:
            word = tl.where(below_other, word + (changes[1 + i].to(word.dtype) << shift), word)
        else:
            word = tl.where(below_other, word + ((search.extras[i] << shift) & search.all_ones), word)
    return word


@triton.jit
def _node(table, below, base: tl.constexpr, level: tl.constexpr, height: tl.constexpr):
    """The threshold to compare next: the middle of the part of the table to which the comparisons so far lead.

    base, level  the current subtree, which starts at table[base] after `level` comparisons
    """
    half: tl.constexpr = 1 << (height - 1 - level)
    if level == len(below):
        return table[base + half - 1]
    else:
        low = _node(table, below, base, level + 1, height)
        high = _node(table, below, base + half, level + 1, height)
        return tl.where(below[level], low, high)


@triton.jit
def _look_up(x, thresholds, codes, search: tl.constexpr):
    """Code of x, by a binary search in memory. The search carries the address of the part of the table that is left."""
    depth: tl.constexpr = search.depth
    part = thresholds + tl.full(x.shape, 0, tl.int32)
    for level in tl.static_range(depth):
        half = 1 << (depth - 1 - level)
        part = tl.where(x <= tl.load(part + (half - 1)), part, part + half)
    passed = (part.to(tl.int64) - thresholds.to(tl.int64)).to(tl.uint32) // (x.dtype.primitive_bitwidth // 8)
    return tl.load(codes + passed)


@triton.jit
def _level(code, levels, table, bits: tl.constexpr):
    """The level of each code, whose lowest `bits` bits count. If the table is in registers, selections find it."""
    if bits == 1:
        return tl.where((code & 1) != 0, table[1], table[0])
    elif bits == 2:
        odd = (code & 1) != 0
        return tl.where((code & 2) != 0, tl.where(odd, table[3], table[2]), tl.where(odd, table[1], table[0]))
    else:
        return tl.load(levels + (code & ((1 << bits) - 1)).to(tl.uint32))
