"""What the joint codes are compared with: group-wise min-max codes of saved inputs, and training on quantized activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

Tensor = torch.Tensor


def min_max_coded(model: nn.Module, bits: int = 4, group: int = 64) -> nn.Module:
    """A copy whose backward reads the inputs of every Linear, GELU and LayerNorm from a code of each, as most peers do.

    Each `group` neighbours of a row are rounded to the nearest of 2**bits even steps from their least to their greatest; every
    module codes its own input. Forward is exact, as are the means and deviations of norms, attention, and the gradients that
    linear layers pass down. Held are the values that the codes stand for, not packed codes: this is to compare errors.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, (nn.Linear, nn.GELU, nn.LayerNorm)):
            _code_input(module, partial(min_max, bits=bits, group=group))
    return copied


def min_max_bits(bits: int = 4, group: int = 64) -> float:
    """Bits an element of such a code, with the least value and the step of each group in 16 bits.

    >>> min_max_bits()
    4.5
    """
    return bits + 32 / group


def min_max(x: Tensor, bits: int, group: int) -> Tensor:
    """x (..., n) rounded to 2**bits even steps between the extremes of each `group` neighbours; n is a multiple of group.

    >>> min_max(torch.tensor([0.0, 0.9, 2.2, 3.0]), bits=2, group=4)
    tensor([0., 1., 2., 3.])
    """
    grouped = x.unflatten(-1, (-1, group))
    low = grouped.amin(-1, keepdim=True)
    step = (grouped.amax(-1, keepdim=True) - low) / (2**bits - 1)
    steps = ((grouped - low) / step.clamp_min(torch.finfo(x.dtype).tiny)).round()
    return (low + steps * step).flatten(-2)


class QuantizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose output is quantized for forward and backward alike; gradients pass straight through the rounding.

    The coding is the second method's own (uniform bins over three standard deviations to either side of the channel's mean,
    zero an edge between bins), so that this differs from it in one thing: here forward, too, sees the quantized values.
    """

    def __init__(self, channels: int, bits: int):
        super().__init__(channels)
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + (self._quantized(y) - y).detach()

    def _quantized(self, y: Tensor) -> Tensor:
        deviation = self.weight.abs().clamp_min(1e-6)[:, None, None]  # of the output's channels, whose means are the biases
        bins = 2**self.bits
        shift = (bins / 2 - (self.bias[:, None, None] / deviation * bins / 6).floor()).clamp_min(1)
        code = ((y / deviation * bins / 6).floor() + shift).clamp(0, bins - 1)
        return (code + 0.5 - shift) * 6 / bins * deviation


def _code_input(module: nn.Module, code: Callable[[Tensor], Tensor]) -> None:
    """What the module saves of its input's storage is from now on saved as its code."""
    exact = module.forward

    def forward(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()

        @torch.no_grad()
        def pack(saved: Tensor) -> Tensor:
            return code(saved) if saved.untyped_storage().data_ptr() == address else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return exact(x)

    module.forward = forward
