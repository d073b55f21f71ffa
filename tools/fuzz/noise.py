"""Noise in what the exact network keeps for backward: how an error of a code's size changes gradients, see check.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import fewbit
from fewbit import activations

Tensor = torch.Tensor
ACTIVATIONS = {*(each.replace("_", "") for each in activations.names()), "glu", "specialexpit"}  # torch's names, without _


def noise_of(bits: int) -> float:
    """The error of a code of these bits for a standard normal number."""
    errors = fewbit.load_table("identity", bits, channels="value").errors
    assert errors is not None, "shipped and designed tables know theirs"
    return float(errors[0]) ** 0.5


@contextmanager
def noisy(seed: int, size: float, leave_out: Collection[int]) -> Iterator[None]:
    """In this context everything kept for backward gets noise of this size, and so do derivatives of activations.

    leave_out  addresses of storages that get no noise, such as parameters
    """
    noise = _Noise(seed)
    around = _AroundActivations(noise, size)

    def pack(kept: Tensor) -> Tensor:
        kept, place = kept.detach(), kept.untyped_storage().data_ptr()
        if not kept.is_floating_point() or place in leave_out:
            return kept
        some = noise(kept, size)
        return (kept * (1 + some) + (some if place in around.outputs else 0)).to(kept.dtype)

    with around, torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        yield


class _Noise:
    """Standard normal noise from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor, size: float) -> Tensor:
        """Noise of x's shape, of that size or of the resolution of x's dtype."""
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x.device)
        return noise * max(size, torch.finfo(x.dtype).eps)


class _AroundActivations(TorchFunctionMode):
    """In this context derivatives of activations get noise, and the addresses of their outputs are recorded."""

    def __init__(self, noise: _Noise, size: float):
        super().__init__()
        self.noise, self.size = noise, size
        self.outputs: dict[int, Tensor] = {}  # address -> the tensor, which is held so that no other gets its address

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        is_activation = getattr(func, "__name__", "").replace("_", "") in ACTIVATIONS
        slope = _Slope.apply(args[0], self.noise, self.size) if is_activation else None
        result = func(*args, **(kwargs or {}))
        if slope is not None and result.requires_grad:
            result = result + slope if result.shape == slope.shape else result  # a glu's is not
            self.outputs[result.untyped_storage().data_ptr()] = result.detach()
        return result


class _Slope(torch.autograd.Function):
    """Zeros whose derivative is noise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: _Noise, size: float) -> Tensor:
        ctx.slope = noise(x, size)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0] * ctx.slope).to(grads[0].dtype), None, None
