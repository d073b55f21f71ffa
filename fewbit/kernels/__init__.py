"""Encode and decode: one backend per file, all under the contract of `fewbit.kernels.reference`."""

from __future__ import annotations

from types import ModuleType

import torch

from fewbit.kernels import reference
from fewbit.kernels.coder import Coder

__all__ = ["Coder", "decode", "encode"]


def encode(x: torch.Tensor, coder: Coder) -> torch.Tensor:
    """Packed codes (packed_bytes(n, bits),) uint8 of x (n,); see `fewbit.kernels.reference.encode`."""
    return _backend(x).encode(x, coder)


def decode(packed: torch.Tensor, grad: torch.Tensor, coder: Coder) -> torch.Tensor:
    """grad (n,) times the levels of the packed codes; see `fewbit.kernels.reference.decode`."""
    return _backend(grad).decode(packed, grad, coder)


def _backend(tensor: torch.Tensor) -> ModuleType:
    """Compiled kernels for plain tensors on a CPU or CUDA device; torch operations for all else: subclasses, tracing."""
    if type(tensor) is not torch.Tensor or torch.compiler.is_compiling():
        return reference
    if tensor.device.type == "cpu":
        from fewbit.kernels import cpu as backend  # here, since it loads numba
    elif tensor.device.type == "cuda":
        from fewbit.kernels import cuda as backend  # loads Triton on first use, where installed
    else:
        return reference
    return backend if backend.supports(tensor) else reference
