"""Kernels for layers: one backend per file. `fewbit.kernels.layers_reference` specifies what they compute.

`fewbit.kernels.layer_ops` offers the functions below as torch operators.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch

from fewbit import kernels
from fewbit.kernels import cuda
from fewbit.kernels import layers_reference as reference
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import LARGE_SAMPLE, SAMPLE, Grid
from fewbit.kernels.layers_reference import Codes, First, Vectors

__all__ = ["LARGE_SAMPLE", "SAMPLE", "Codes", "Grid", "Vectors"]

Tensor = torch.Tensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def encode_scaled(
    x: Tensor, grid: Grid, table: DeviceTable, stochastic: bool, marks: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Codes of x, standardized by channel and scaled by row.

    x           (outer, channels, inner), any strides
    table       table of a standard normal number
    stochastic  whether a value between two levels goes to either at random, so that its mean is the value
    marks       whether a channel that is not finite is rebuilt as NaN

    Returns     packed codes; scales of rows (rows,) and vectors (2, channels), from which `decode` rebuilds x; and whether all
                is finite, as far as is known
    """
    backend = backend_of(x)
    scales = backend.row_scales(x, grid, backend.magnitudes(x, grid))
    row, first = scales[0].clone(), First(None, scales[1], True)
    coding, vectors, where = backend.standardize(x, grid, first, row, table, None, None, False, not stochastic)
    packed, finite = _encode(x, grid, first, coding, table, vectors, where if marks else None, stochastic)
    return packed, row, vectors, finite


def encode_normalized(
    x: Tensor,
    grid: Grid,
    mean: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    by_sign: bool,
    centered: bool,
    table: DeviceTable,
    stochastic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Codes of x̂ = (x - mean) * scale, standardized by channel.

    mean, scale   wide; (rows,), or (channels,) without `eps`. With an eps both may be None, and are then computed here.
    eps           that of scale = 1 / sqrt(variance + eps); None if mean and scale belong to channels
    weight, bias  (channels,) of y = weight * x̂ + bias
    by_sign       whether codes tell the sign of y
    centered      whether a mean is subtracted

    Returns       Packed codes; the first two vectors of `Vectors.of` (2, channels), which rebuild x̂; the others (k, channels),
                  which rebuild y (if there are none, the first two again); the scale; and whether all is finite, as far as is
                  known.
    """
    backend, by_row = backend_of(x), eps is not None
    if scale is None:
        moments = backend.row_moments(x, grid, eps, centered)
        # σ is infinite for a row with infinities, about which codes can tell nothing
        mean, scale = (moments[0] if centered else None), torch.where(moments[1] == 0, torch.nan, moments[1])
    assert scale is not None, "found here or given"
    first = First(mean, scale, by_row, eps)
    coding, vectors, where = backend.standardize(x, grid, first, None, table, weight, bias, by_sign, not stochastic)
    marked = None if by_row else where._replace(offset=where.center)  # layers that read y check it themselves
    packed, finite = _encode(x, grid, first, coding, table, vectors, marked, stochastic)
    if len(vectors) == 2:
        return packed, vectors, vectors, scale, finite
    return packed, vectors[:2].clone(), vectors[2:].clone(), scale, finite


def _encode(
    x: Tensor,
    grid: Grid,
    first: First,
    coding: Tensor,
    table: DeviceTable,
    vectors: Tensor,
    where: Vectors | None,
    random: bool,
) -> tuple[Tensor, bool]:
    if not random:
        return backend_of(x).encode(x, grid, first, coding, table, vectors, where)
    z = reference.standard(x, grid, first, coding)
    reference.mark(z, vectors, where)
    finite = z.device.type != "cpu" or bool(z.isfinite().all() and vectors.isfinite().all())
    levels = table.levels.sort().values  # a table of your own may have them in any order
    above = torch.bucketize(z, levels).clamp(1, levels.numel() - 1)
    low, high = levels[above - 1], levels[above]
    rounded = torch.where(torch.rand_like(low) * (high - low) < z - low, high, low)
    return kernels.encode(rounded.reshape(-1), table), finite


def decode(codes: Codes, *arguments: Any) -> Tensor:
    """See `fewbit.kernels.layers_reference.decode`."""
    return backend_of(codes.packed).decode(codes, *arguments)


def times_slope(codes: Codes, *arguments: Any) -> Tensor:
    """See `fewbit.kernels.layers_reference.times_slope`."""
    return backend_of(codes.packed).times_slope(codes, *arguments)


def rows_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As in the reference, but the gradients of weight and bias have the dtype of the weight, if there is one."""
    backend = backend_of(codes.packed)
    grad_x, by_weight, by_bias = backend.rows_backward(codes, grad, scale, weight, centered, has_bias)
    if weight is None:
        return grad_x, by_weight, by_bias
    return grad_x, by_weight.to(weight.dtype), None if by_bias is None else by_bias.to(weight.dtype)


def channels_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As in the reference, but the gradients of weight and bias have the dtype of the weight, if there is one."""
    grad_x, by_weight, by_bias = backend_of(codes.packed).channels_backward(codes, grad, scale, weight, training)
    return grad_x, *((by_weight, by_bias) if weight is None else (by_weight.to(weight.dtype), by_bias.to(weight.dtype)))


def gate_backward(up: Codes, *arguments: Any) -> tuple[Tensor, Tensor]:
    """See `fewbit.kernels.layers_reference.gate_backward`."""
    return backend_of(up.packed).gate_backward(up, *arguments)


def gate_value(up: Codes, *arguments: Any) -> Tensor:
    """See `fewbit.kernels.layers_reference.gate_value`."""
    return backend_of(up.packed).gate_value(up, *arguments)


def backend_of(tensor: Tensor) -> Any:
    """Compiled kernels for plain tensors on a CPU or CUDA device; torch operations for other tensors (subclasses, fake
    tensors)."""
    return _on(tensor.device) if type(tensor) in _PLAIN else reference


@cache
def _on(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        from fewbit.kernels import layers_cpu  # imported here because it loads numba

        return layers_cpu
    if device.type == "cuda" and cuda.supports(device, torch.float32):
        from fewbit.kernels import layers_cuda  # it loads Triton on first use

        return layers_cuda
    return reference
