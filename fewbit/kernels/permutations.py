"""Look-ups in 16 float32 numbers for 16 elements at once, by an instruction of AVX-512 that LLVM does not find by itself.

They take a quarter of the time of trees of selections, and of comparisons with all thresholds. Processors without AVX-512 use
these instead.
"""

from __future__ import annotations

from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

WIDTH = 16
STEPS = (8, 4, 2, 1)  # steps of a binary search in 15 thresholds: at index i the next threshold is number i + step - 1
_target: Any = cpu_target.target_context
IS_SUPPORTED = "+avx512f" in _target.codegen().magic_tuple()[2].split(",")  # of what numba compiles for
_intrinsic: Any = numba.extending.intrinsic
_INTEGERS, _FLOATS, _BYTES = (ir.VectorType(each, WIDTH) for each in (ir.IntType(32), ir.FloatType(), ir.IntType(8)))


def permuted_levels(low: Any, high: Any, shift: int, bits: int, levels: Any, out: Any) -> int:
    """Fill the part of `out` that this method can, and return its number of elements. Arguments are as for `_take_levels`."""
    raise NotImplementedError("compiled code alone calls this")


def permuted_codes(x: Any, thresholds: Any, codes: Any, out: Any) -> int:
    """The same for codes. Thresholds and codes are as for `_take_codes`, or empty."""
    raise NotImplementedError("compiled code alone calls this")


@numba.extending.overload(permuted_levels, jit_options={"error_model": "numpy"})
def _levels_by_type(low, high, shift, bits, levels, out):
    def permuted(low, high, shift, bits, levels, out):
        end = out.size // WIDTH * WIDTH if bits <= 4 else 0
        for at in range(0, end, WIDTH):
            _take_levels(low, high, shift, levels, out, at)
        return end

    return permuted if IS_SUPPORTED and out.dtype == types.float32 else lambda low, high, shift, bits, levels, out: 0


@numba.extending.overload(permuted_codes, jit_options={"error_model": "numpy"})
def _codes_by_type(x, thresholds, codes, out):
    def permuted(x, thresholds, codes, out):
        end = x.size // WIDTH * WIDTH if thresholds.size else 0
        for at in range(0, end, WIDTH):
            _take_codes(x, thresholds, codes, out, at)
        return end

    return permuted if IS_SUPPORTED and x.dtype == types.float32 else lambda x, thresholds, codes, out: 0


@_intrinsic
def _take_levels(typing_context, low, high, shift, levels, out, at):
    """out[at : at + 16] = levels[(low + 256 * high >> shift) % 16], for bytes at : at + 16 of low and high."""

    def generate(context, builder, signature, arguments):
        low, high, shift, levels, out, at = arguments
        arrays = [_place(context, builder, signature.args[i], arguments[i], at) for i in (0, 1)]
        low, high = (builder.zext(_load(builder, each, _BYTES), _INTEGERS) for each in arrays)
        both = builder.or_(low, builder.shl(high, _repeat(builder, ir.Constant(ir.IntType(32), 8))))
        index = builder.lshr(both, _repeat(builder, builder.trunc(shift, ir.IntType(32))))
        table = _load(builder, _place(context, builder, signature.args[3], levels, None), _FLOATS)
        _store(builder, _permute(builder, table, index), _place(context, builder, signature.args[4], out, at))
        return context.get_dummy_value()

    return types.void(low, high, shift, levels, out, at), generate


@_intrinsic
def _take_codes(typing_context, x, thresholds, codes, out, at):
    """out[at : at + 16] = the codes of x[at : at + 16], by a binary search. thresholds are (64,), codes (16,).

    Step k at index i compares with element 16 * k + i, which is threshold number i + STEPS[k] - 1, or infinity beyond the last.
    Codes are those of the intervals, with the last one repeated: int32, or float32 levels instead.
    """

    def generate(context, builder, signature, arguments):
        x, thresholds, codes, out, at = arguments
        x = _load(builder, _place(context, builder, signature.args[0], x, at), _FLOATS)
        kind = _FLOATS if signature.args[2].dtype == types.float32 else _INTEGERS
        codes = _load(builder, _place(context, builder, signature.args[2], codes, None), kind)
        index = ir.Constant(_INTEGERS, [0] * WIDTH)
        for row, step in enumerate(STEPS):
            begin = ir.Constant(ir.IntType(64), WIDTH * row)
            ahead = _load(builder, _place(context, builder, signature.args[1], thresholds, begin), _FLOATS)
            is_above = builder.fcmp_unordered("ugt", x, _permute(builder, ahead, index))  # a NaN is above all thresholds
            index = builder.select(is_above, builder.or_(index, ir.Constant(_INTEGERS, [step] * WIDTH)), index)
        _store(builder, _permute(builder, codes, index), _place(context, builder, signature.args[3], out, at))
        return context.get_dummy_value()

    return types.void(x, thresholds, codes, out, at), generate


def _permute(builder: Any, table: Any, index: Any) -> Any:
    kind = "sf" if table.type == _FLOATS else "si"
    signature = ir.FunctionType(table.type, [table.type, _INTEGERS])
    name = f"llvm.x86.avx512.permvar.{kind}.512"
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, [table, index])


def _place(context: Any, builder: Any, array: Any, value: Any, at: Any) -> Any:
    """The address of an element of an array; of the first one if `at` is None."""
    begin = context.make_array(array)(context, builder, value).data
    return begin if at is None else builder.gep(begin, [at])


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def _repeat(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(_INTEGERS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTEGERS, [0] * WIDTH))
