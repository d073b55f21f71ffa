"""Operations of LLVM for the loops of the CPU backend. numba has no names for them, or widens them.

numba compiles the kernels of a file anew if that file has changed, but not if this one has. After a change here, touch
`loops.py`, the files of layers and `recurrent_loops.py`. After a change of `loops.py`, touch the others.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba import types

_intrinsic: Any = numba.extending.intrinsic  # decorated functions are called without the typing context


@_intrinsic
def advance(typing_context, address, offset, step):
    """Advance the counter at that offset of the block and give its previous value, in one atomic operation."""

    def generate(context, builder, signature, arguments):
        counter = builder.gep(builder.bitcast(arguments[0], ir.IntType(8).as_pointer()), [arguments[1]])
        counter = builder.bitcast(counter, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, arguments[2], "monotonic")

    return types.int64(address, types.int64, types.int64), generate


@_intrinsic
def advance_ordered(typing_context, address, offset, step):
    """Like `advance`. Threads that see the counter advanced also see what the advancing thread wrote before."""

    def generate(context, builder, signature, arguments):
        counter = builder.gep(builder.bitcast(arguments[0], ir.IntType(8).as_pointer()), [arguments[1]])
        counter = builder.bitcast(counter, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, arguments[2], "acq_rel")

    return types.int64(address, types.int64, types.int64), generate


@_intrinsic
def pointer(typing_context, address):
    """The address, an int64, as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@_intrinsic
def shift_left(typing_context, number, shift):
    """number << shift, in the width of both."""
    return number(number, number), lambda context, builder, signature, arguments: builder.shl(*arguments)


@_intrinsic
def shift_right(typing_context, number, shift):
    """number >> shift, in the width of both, filled with zeros."""
    return number(number, number), lambda context, builder, signature, arguments: builder.lshr(*arguments)


@_intrinsic
def bits_or(typing_context, a, b):
    """a | b, in the width of both."""
    return a(a, a), lambda context, builder, signature, arguments: builder.or_(*arguments)


@_intrinsic
def bits_and(typing_context, a, b):
    """a & b, in the width of both."""
    return a(a, a), lambda context, builder, signature, arguments: builder.and_(*arguments)


@_intrinsic
def float_of(typing_context, pattern):
    """The float32 with the bit pattern of an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_intrinsic
def is_negative(typing_context, number):
    """Whether the integer is below 0."""

    def generate(context, builder, signature, arguments):
        return builder.icmp_signed("<", arguments[0], ir.Constant(arguments[0].type, 0))

    return types.boolean(number), generate


@_intrinsic
def widen(typing_context, value):
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


@_intrinsic
def narrow(typing_context, value, like):
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
