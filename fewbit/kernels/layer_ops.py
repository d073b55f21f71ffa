"""The functions of `fewbit.kernels.layers` as torch operators, which are opaque to compilers, transforms and modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fewbit import packing
from fewbit.kernels import layers
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import Codes, Vectors, wide_dtype
from fewbit.kernels.ops import constants, device_table, operator

Tensor = torch.Tensor
_TABLE = "Tensor thresholds, Tensor codes, Tensor levels, int bits"
_CODES = f"Tensor packed, SymInt[] grid, Tensor vectors, int[] where, Tensor? row, float? eps, {_TABLE}"
_PARTS = 10  # number of arguments of an operator for one Codes


def _parts(codes: Codes) -> tuple[Any, ...]:
    """Codes as arguments of operators."""
    *parts, table = codes
    return *parts, *constants(table), table.bits


def _codes(parts: Sequence[Any]) -> Codes:
    """Codes from these arguments of operators."""
    packed, grid, vectors, where, row, eps, *table = parts
    return Codes(packed, Grid(*grid), vectors, Vectors(*where), row, eps, device_table(*table))


def encode_scaled(
    x: Tensor, grid: Grid, table: DeviceTable, stochastic: bool, marks: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """See `fewbit.kernels.layers.encode_scaled`."""
    return *_encode_scaled(x, grid, *constants(table), table.bits, stochastic, marks), True


def _encode_scaled_now(x, grid, thresholds, codes, levels, bits, stochastic, marks):
    return layers.encode_scaled(x, Grid(*grid), device_table(thresholds, codes, levels, bits), stochastic, marks)[:3]


def _fake_encode_scaled(x, grid, thresholds, codes, levels, bits, stochastic, marks):
    grid, dtype = Grid(*grid), wide_dtype(x.dtype)
    return _fake_codes(x, grid, bits), x.new_empty(grid.rows, dtype=dtype), x.new_empty((2, grid.channels), dtype=dtype)


_encode_scaled = operator(
    f"encode_scaled(Tensor x, SymInt[] grid, {_TABLE}, bool stochastic, bool marks) -> (Tensor, Tensor, Tensor)",
    _encode_scaled_now,
    _fake_encode_scaled,
)


def encode_normalized(x: Tensor, grid: Grid, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """See `fewbit.kernels.layers.encode_normalized`."""
    *others, table, stochastic = arguments
    packed, own, of_readers, found = _encode_normalized(x, grid, *others, *constants(table), table.bits, stochastic)
    _, scale, eps, weight, bias, by_sign, _ = others
    has_others = Vectors.of(weight is not None, bias is not None, by_sign, eps is not None).number > 2
    return packed, own, of_readers if has_others else own, found if scale is None else scale, True


def _encode_normalized_now(x, grid, mean, scale, eps, weight, bias, by_sign, centered, *others):
    *table, stochastic = others
    options = mean, scale, eps, weight, bias, by_sign, centered
    packed, own, of_readers, found, _ = layers.encode_normalized(x, Grid(*grid), *options, device_table(*table), stochastic)
    # an operator may not return an argument, nor a result twice
    of_readers = own.new_empty(0) if of_readers is own else of_readers
    return packed, own, of_readers, found if scale is None else own.new_empty(0)


def _fake_encode_normalized(x, grid, mean, scale, eps, weight, bias, by_sign, centered, *others):
    grid, dtype, bits = Grid(*grid), wide_dtype(x.dtype), others[3]
    number = Vectors.of(weight is not None, bias is not None, by_sign, eps is not None).number
    own, of_readers = x.new_empty((2, grid.channels), dtype=dtype), x.new_empty((number - 2, grid.channels), dtype=dtype)
    if number == 2:
        of_readers = x.new_empty(0, dtype=dtype)
    return _fake_codes(x, grid, bits), own, of_readers, x.new_empty(grid.rows if scale is None else 0, dtype=dtype)


_encode_normalized = operator(
    "encode_normalized(Tensor x, SymInt[] grid, Tensor? mean, Tensor? scale, float? eps, Tensor? weight, Tensor? bias, "
    f"bool by_sign, bool centered, {_TABLE}, bool stochastic) -> (Tensor, Tensor, Tensor, Tensor)",
    _encode_normalized_now,
    _fake_encode_normalized,
)


def decode(codes: Codes, dtype: torch.dtype, below: float = 1.0, above: float = 1.0) -> Tensor:
    """See `fewbit.kernels.layers.decode`."""
    return _decode(*_parts(codes), dtype, below, above)


def _decode_now(*arguments):
    return layers.decode(_codes(arguments[:_PARTS]), *arguments[_PARTS:])


def _fake_decode(packed, grid, *others):
    return packed.new_empty(Grid(*grid).n, dtype=others[-3])


_decode = operator(f"decode_affine({_CODES}, ScalarType dtype, float below, float above) -> Tensor", _decode_now, _fake_decode)


def times_slope(codes: Codes, grad: Tensor, below: float, above: float) -> Tensor:
    """See `fewbit.kernels.layers.times_slope`."""
    return _times_slope(*_parts(codes), grad, below, above)


def _times_slope_now(*arguments):
    grad, *slopes = arguments[_PARTS:]
    return layers.times_slope(_codes(arguments[:_PARTS]), grad.contiguous(), *slopes)


def _fake_times_slope(*arguments):
    return torch.empty_like(arguments[_PARTS], memory_format=torch.contiguous_format)


_times_slope = operator(
    f"times_slope({_CODES}, Tensor grad, float below, float above) -> Tensor", _times_slope_now, _fake_times_slope
)


def rows_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `fewbit.kernels.layers.rows_backward`."""
    grad_x, by_weight, by_bias = _rows_backward(*_parts(codes), grad, scale, weight, centered, has_bias)
    return grad_x, None if weight is None else by_weight, by_bias if has_bias else None


def _rows_backward_now(*arguments):
    grad, scale, weight, *options = arguments[_PARTS:]
    found = layers.rows_backward(_codes(arguments[:_PARTS]), grad, scale, weight, *options)
    return tuple((scale if weight is None else weight).new_empty(0) if each is None else each for each in found)


def _fake_rows_backward(packed, grid, *others):
    grad, scale, weight, _, has_bias = others[_PARTS - 2 :]
    like, grid = scale if weight is None else weight, Grid(*grid)
    by_weight, by_bias = (like.new_empty(grid.channels if given else 0) for given in (weight is not None, has_bias))
    return grad.new_empty(grid.n), by_weight, by_bias


_rows_backward = operator(
    f"rows_backward({_CODES}, Tensor grad, Tensor scale, Tensor? weight, bool centered, bool has_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _rows_backward_now,
    _fake_rows_backward,
)


def channels_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fewbit.kernels.layers.channels_backward`."""
    return _channels_backward(*_parts(codes), grad, scale, weight, training)


def _channels_backward_now(*arguments):
    return layers.channels_backward(_codes(arguments[:_PARTS]), *arguments[_PARTS:])


def _fake_channels_backward(packed, grid, *others):
    grad, scale, weight, _ = others[_PARTS - 2 :]
    like = scale if weight is None else weight
    return grad.new_empty(Grid(*grid).n), like.new_empty(scale.shape), like.new_empty(scale.shape)


_channels_backward = operator(
    f"channels_backward({_CODES}, Tensor grad, Tensor scale, Tensor? weight, bool training) -> (Tensor, Tensor, Tensor)",
    _channels_backward_now,
    _fake_channels_backward,
)


def gate_backward(
    up: Codes, packed: Tensor, grad: Tensor, derivative: DeviceTable, value: DeviceTable
) -> tuple[Tensor, Tensor]:
    """See `fewbit.kernels.layers.gate_backward`."""
    return _gate_backward(*_parts(up), packed, grad, *constants(derivative), *constants(value)[2:], derivative.bits)


def _gate_backward_now(*arguments):
    packed, grad, thresholds, codes, *levels, bits = arguments[_PARTS:]
    tables = (device_table(thresholds, codes, each, bits) for each in levels)
    return layers.gate_backward(_codes(arguments[:_PARTS]), packed, grad, *tables)


def _fake_gate_backward(packed_up, grid, *others):
    grad = others[_PARTS - 1]
    return grad.new_empty(Grid(*grid).n), grad.new_empty(Grid(*grid).n)


_OF_GATE = "Tensor gate_thresholds, Tensor gate_codes"
_gate_backward = operator(
    f"gate_backward({_CODES}, Tensor gate, Tensor grad, {_OF_GATE}, Tensor slopes, Tensor values, int gate_bits) "
    "-> (Tensor, Tensor)",
    _gate_backward_now,
    _fake_gate_backward,
)


def gate_value(up: Codes, packed: Tensor, value: DeviceTable, dtype: torch.dtype) -> Tensor:
    """See `fewbit.kernels.layers.gate_value`."""
    return _gate_value(*_parts(up), packed, *constants(value), value.bits, dtype)


def _gate_value_now(*arguments):
    packed, *table, dtype = arguments[_PARTS:]
    return layers.gate_value(_codes(arguments[:_PARTS]), packed, device_table(*table), dtype)


def _fake_gate_value(packed_up, grid, *others):
    return packed_up.new_empty(Grid(*grid).n, dtype=others[-1])


_gate_value = operator(
    f"gate_value({_CODES}, Tensor gate, {_OF_GATE}, Tensor values, int gate_bits, ScalarType dtype) -> Tensor",
    _gate_value_now,
    _fake_gate_value,
)


def _fake_codes(x: Tensor, grid: Grid, bits: int) -> Tensor:
    return x.new_empty(packing.packed_bytes(grid.n, bits), dtype=torch.uint8)
