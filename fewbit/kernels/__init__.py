"""Encode, decode, and a forward with codes: one backend per file. `fewbit.kernels.reference` specifies what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch

from fewbit.kernels import reference
from fewbit.kernels.device_table import DeviceTable

__all__ = ["DeviceTable", "Formula", "backend", "decode", "encode", "encode_checked", "values"]

Formula = tuple[str, Mapping[str, float]]  # name and parameters of a built-in activation, for backends that compute it
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def encode(x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """Packed codes (table.packed_bytes(n),) uint8 of the n elements of x; see `fewbit.kernels.reference.encode`."""
    return backend(x).encode(x, table)


def encode_checked(x: torch.Tensor, table: DeviceTable) -> tuple[torch.Tensor, bool]:
    """The same, and whether all of x is finite. This is checked only on the CPU, in the same pass; elsewhere it is True."""
    return backend(x).encode_checked(x, table)


def decode(packed: torch.Tensor, grad: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """grad times the levels of the packed codes; see `fewbit.kernels.reference.decode`."""
    return backend(grad).decode(packed, grad, table)


def values(packed: torch.Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> torch.Tensor:
    """The levels (n,) of the packed codes, as numbers of the dtype; see `fewbit.kernels.reference.values`."""
    found = _on(packed.device, dtype) if type(packed) in _PLAIN else reference
    return found.values(packed, n, table, dtype)


def backend(tensor: torch.Tensor) -> ModuleType:
    """Compiled kernels for plain tensors on a CPU or CUDA device; torch operations for other tensors (subclasses, fake
    tensors)."""
    return _on(tensor.device, tensor.dtype) if type(tensor) in _PLAIN else reference


@cache
def _on(device: torch.device, dtype: torch.dtype) -> ModuleType:
    if device.type == "cpu":
        from fewbit.kernels import cpu as found  # imported here because it loads numba
    elif device.type == "cuda":
        from fewbit.kernels import cuda as found  # it loads Triton on first use, if installed
    else:
        return reference
    return found if found.supports(device, dtype) else reference
