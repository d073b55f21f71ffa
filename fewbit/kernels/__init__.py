"""Encode, decode and a forward with codes: one backend per file, all under the contract of `fewbit.kernels.reference`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch

from fewbit.kernels import reference
from fewbit.kernels.device_table import DeviceTable

__all__ = ["DeviceTable", "Formula", "decode", "encode", "encode_checked", "forward", "has_formula", "values"]

Formula = tuple[str, Mapping[str, float]]  # name and parameters of a built-in activation, for backends that compute it
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def encode(x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """Packed codes (table.packed_bytes(n),) uint8 of the n elements of x; see `fewbit.kernels.reference.encode`."""
    return _backend(x).encode(x, table)


def encode_checked(x: torch.Tensor, table: DeviceTable) -> tuple[torch.Tensor, bool]:
    """The same, and whether all of x is finite, as far as that can be told in the same pass: on the CPU; elsewhere True."""
    backend = _backend(x)
    return backend.encode_checked(x, table) if hasattr(backend, "encode_checked") else (backend.encode(x, table), True)


def has_formula(x: torch.Tensor, formula: Formula) -> bool:
    """Whether `forward` can compute the activation of a contiguous x."""
    backend = _backend(x)
    return hasattr(backend, "forward") and backend.has_formula(formula[0])


def forward(x: torch.Tensor, table: DeviceTable, formula: Formula) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of a contiguous x, within one unit in the last place, and its packed codes, in one pass."""
    return _backend(x).forward(x, table, *formula)


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
