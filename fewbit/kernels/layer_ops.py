"""The functions of `fewbit.kernels.layers` as torch operators, opaque to compilers, transforms and modes that look on."""

from __future__ import annotations

from typing import Any

import torch

from fewbit import packing
from fewbit.kernels import layers
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import Vectors, wide_dtype
from fewbit.kernels.ops import constants, device_table, operator

Tensor = torch.Tensor
_TABLE = "Tensor thresholds, Tensor codes, Tensor levels, int bits"
_CODED = "Tensor packed, SymInt[] grid, Tensor vectors, int[] where, Tensor? row, float? eps"


def encode_scaled(
    x: Tensor, grid: Grid, table: DeviceTable, stochastic: bool, marks: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """As `fewbit.kernels.layers.encode_scaled`."""
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
    """As `fewbit.kernels.layers.encode_normalized`."""
    *others, table, stochastic = arguments
    packed, own, of_readers, found = _encode_normalized(x, grid, *others, *constants(table), table.bits, stochastic)
    _, scale, eps, weight, bias, by_sign, _ = others
    has_others = Vectors.of(weight is not None, bias is not None, by_sign, eps is not None).number > 2
    return packed, own, of_readers if has_others else own, found if scale is None else scale, True


def _encode_normalized_now(x, grid, mean, scale, eps, weight, bias, by_sign, centered, *others):
    *table, stochastic = others
    options = mean, scale, eps, weight, bias, by_sign, centered
    packed, own, of_readers, found, _ = layers.encode_normalized(x, Grid(*grid), *options, device_table(*table), stochastic)
    # an operator returns no argument, and no result twice
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


def decode(
    packed: Tensor,
    grid: Grid,
    vectors: Tensor,
    where: Vectors,
    row: Tensor | None,
    eps: float | None,
    table: DeviceTable,
    dtype: torch.dtype,
    below: float = 1.0,
    above: float = 1.0,
) -> Tensor:
    """As `fewbit.kernels.layers.decode`."""
    return _decode(packed, grid, vectors, where, row, eps, *constants(table), table.bits, dtype, below, above)


def _decode_now(packed, grid, vectors, where, row, eps, thresholds, codes, levels, bits, dtype, below, above):
    table = device_table(thresholds, codes, levels, bits)
    return layers.decode(packed, Grid(*grid), vectors, Vectors(*where), row, eps, table, dtype, below, above)


def _fake_decode(packed, grid, vectors, where, row, eps, thresholds, codes, levels, bits, dtype, below, above):
    return packed.new_empty(Grid(*grid).n, dtype=dtype)


_decode = operator(
    f"decode_affine({_CODED}, {_TABLE}, ScalarType dtype, float below, float above) -> Tensor", _decode_now, _fake_decode
)


def times_slope(
    packed: Tensor,
    grad: Tensor,
    grid: Grid,
    vectors: Tensor,
    where: Vectors,
    row: Tensor | None,
    eps: float | None,
    table: DeviceTable,
    below: float,
    above: float,
) -> Tensor:
    """As `fewbit.kernels.layers.times_slope`."""
    return _times_slope(packed, grid, vectors, where, row, eps, grad, *constants(table), table.bits, below, above)


def _times_slope_now(packed, grid, vectors, where, row, eps, grad, thresholds, codes, levels, bits, below, above):
    table = device_table(thresholds, codes, levels, bits)
    grad = grad.contiguous()
    return layers.times_slope(packed, grad, Grid(*grid), vectors, Vectors(*where), row, eps, table, below, above)


def _fake_times_slope(packed, grid, vectors, where, row, eps, grad, *others):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


_times_slope = operator(
    f"times_slope({_CODED}, Tensor grad, {_TABLE}, float below, float above) -> Tensor", _times_slope_now, _fake_times_slope
)


def rows_backward(
    packed: Tensor,
    grad: Tensor,
    grid: Grid,
    vectors: Tensor,
    scale: Tensor,
    eps: float,
    weight: Tensor | None,
    table: DeviceTable,
    centered: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fewbit.kernels.layers.rows_backward`."""
    options = weight, *constants(table), table.bits, centered, has_bias
    grad_x, by_weight, by_bias = _rows_backward(packed, grad, grid, vectors, scale, eps, *options)
    return grad_x, None if weight is None else by_weight, by_bias if has_bias else None


def _rows_backward_now(packed, grad, grid, vectors, scale, eps, weight, *others):
    *table, centered, has_bias = others
    options = Grid(*grid), vectors, scale, eps, weight, device_table(*table), centered, has_bias
    found = layers.rows_backward(packed, grad, *options)
    return tuple((vectors if weight is None else weight).new_empty(0) if each is None else each for each in found)


def _fake_rows_backward(packed, grad, grid, vectors, scale, eps, weight, *others):
    channels = Grid(*grid).channels
    like = vectors if weight is None else weight
    by_weight, by_bias = (like.new_empty(channels if given else 0) for given in (weight is not None, others[-1]))
    return grad.new_empty(Grid(*grid).n), by_weight, by_bias


_rows_backward = operator(
    "rows_backward(Tensor packed, Tensor grad, SymInt[] grid, Tensor vectors, Tensor scale, float eps, Tensor? weight, "
    f"{_TABLE}, bool centered, bool has_bias) -> (Tensor, Tensor, Tensor)",
    _rows_backward_now,
    _fake_rows_backward,
)


def channels_backward(
    packed: Tensor,
    grad: Tensor,
    grid: Grid,
    vectors: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    table: DeviceTable,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fewbit.kernels.layers.channels_backward`."""
    return _channels_backward(packed, grad, grid, vectors, scale, weight, *constants(table), table.bits, training)


def _channels_backward_now(packed, grad, grid, vectors, scale, weight, *others):
    *table, training = others
    return layers.channels_backward(packed, grad, Grid(*grid), vectors, scale, weight, device_table(*table), training)


def _fake_channels_backward(packed, grad, grid, vectors, scale, weight, *others):
    like = scale if weight is None else weight
    return grad.new_empty(Grid(*grid).n), like.new_empty(scale.shape), like.new_empty(scale.shape)


_channels_backward = operator(
    "channels_backward(Tensor packed, Tensor grad, SymInt[] grid, Tensor vectors, Tensor scale, Tensor? weight, "
    f"{_TABLE}, bool training) -> (Tensor, Tensor, Tensor)",
    _channels_backward_now,
    _fake_channels_backward,
)


def gate_backward(
    packed: Tensor,
    packed_up: Tensor,
    grad: Tensor,
    grid: Grid,
    vectors: Tensor,
    row: Tensor,
    derivative: DeviceTable,
    value: DeviceTable,
    normal: DeviceTable,
) -> tuple[Tensor, Tensor]:
    """As `fewbit.kernels.layers.gate_backward`."""
    tables = *constants(derivative), *constants(value)[2:], *constants(normal), normal.bits
    return _gate_backward(packed, packed_up, grad, grid, vectors, row, derivative.bits, *tables)


def _gate_tables(bits, thresholds, codes, derivative, value, *normal):
    slopes, values = (device_table(thresholds, codes, levels, bits) for levels in (derivative, value))
    return slopes, values, device_table(*normal)


def _gate_backward_now(packed, packed_up, grad, grid, vectors, row, *tables):
    return layers.gate_backward(packed, packed_up, grad, Grid(*grid), vectors, row, *_gate_tables(*tables))


def _fake_gate_backward(packed, packed_up, grad, grid, *others):
    return grad.new_empty(Grid(*grid).n), grad.new_empty(Grid(*grid).n)


_OF_GATE = "int gate_bits, Tensor gate_thresholds, Tensor gate_codes"
_gate_backward = operator(
    "gate_backward(Tensor packed, Tensor packed_up, Tensor grad, SymInt[] grid, Tensor vectors, Tensor row, "
    f"{_OF_GATE}, Tensor slopes, Tensor values, {_TABLE}) -> (Tensor, Tensor)",
    _gate_backward_now,
    _fake_gate_backward,
)


def gate_value(
    packed: Tensor,
    packed_up: Tensor,
    grid: Grid,
    vectors: Tensor,
    row: Tensor,
    value: DeviceTable,
    normal: DeviceTable,
    dtype: torch.dtype,
) -> Tensor:
    """As `fewbit.kernels.layers.gate_value`."""
    tables = *constants(value), *constants(normal), normal.bits
    return _gate_value(packed, packed_up, grid, vectors, row, dtype, value.bits, *tables)


def _gate_value_now(packed, packed_up, grid, vectors, row, dtype, bits, thresholds, codes, values, *normal):
    tables = device_table(thresholds, codes, values, bits), device_table(*normal)
    return layers.gate_value(packed, packed_up, Grid(*grid), vectors, row, *tables, dtype)


def _fake_gate_value(packed, packed_up, grid, vectors, row, dtype, *others):
    return packed.new_empty(Grid(*grid).n, dtype=dtype)


_gate_value = operator(
    "gate_value(Tensor packed, Tensor packed_up, SymInt[] grid, Tensor vectors, Tensor row, ScalarType dtype, "
    f"{_OF_GATE}, Tensor values, {_TABLE}) -> Tensor",
    _gate_value_now,
    _fake_gate_value,
)


def _fake_codes(x: Tensor, grid: Grid, bits: int) -> Tensor:
    return x.new_empty(packing.packed_bytes(grid.n, bits), dtype=torch.uint8)
