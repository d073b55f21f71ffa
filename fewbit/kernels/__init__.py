"""Encode, decode and a forward with codes: one backend per file, all under the contract of `fewbit.kernels.reference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType

import torch

from fewbit.kernels import reference
from fewbit.kernels.device_table import DeviceTable

__all__ = ["DeviceTable", "Formula", "decode", "encode", "forward", "values"]

Formula = tuple[str, Mapping[str, float]]  # name and parameters of a built-in activation, for backends that compute it
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def encode(x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """Packed codes (packed_bytes(n, bits),) uint8 of the n elements of x; see `fewbit.kernels.reference.encode`."""
    return _backend(x).encode(x, table)


def forward(
    x: torch.Tensor, table: DeviceTable, exact: Callable[[torch.Tensor], torch.Tensor], formula: Formula | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """exact(x) and the packed codes of a contiguous x: in one pass where there is a formula and the backend can compute it."""
    backend = _backend(x)
    if formula is not None and hasattr(backend, "forward") and backend.has_formula(formula[0]):
        return backend.forward(x, table, *formula)
    packed = backend.encode(x, table)
    return exact(x), packed


def decode(packed: torch.Tensor, grad: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """grad times the levels of the packed codes; see `fewbit.kernels.reference.decode`."""
    return _backend(grad).decode(packed, grad, table)


def values(packed: torch.Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> torch.Tensor:
    """The levels (n,) of the packed codes, as numbers of the dtype; see `fewbit.kernels.reference.values`."""
    backend = _on(packed.device, dtype) if type(packed) in _PLAIN else reference
    return backend.values(packed, n, table, dtype)


def _backend(tensor: torch.Tensor) -> ModuleType:
    """Compiled kernels for plain tensors on a CPU or CUDA device; torch operations for all else: subclasses, fake tensors."""
    return _on(tensor.device, tensor.dtype) if type(tensor) in _PLAIN else reference


@cache
def _on(device: torch.device, dtype: torch.dtype) -> ModuleType:
    if device.type == "cpu":
        from fewbit.kernels import cpu as backend  # here, since it loads numba
    elif device.type == "cuda":
        from fewbit.kernels import cuda as backend  # loads Triton on first use, where installed
    else:
        return reference
    return backend if backend.supports(device, dtype) else reference
