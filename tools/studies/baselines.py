"""The methods that joint codes are compared with.

They are group-wise min-max codes of saved inputs, training on quantized activations, and training entirely in 8 bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def min_max_coded(model: nn.Module, bits: int = 4, group: int = 64) -> nn.Module:
    """A copy in which every Linear, GELU and LayerNorm codes its own input, as in most related methods. Backward reads the
    codes.

    Each group of `group` neighbours in a row is rounded to 2**bits even steps from its smallest to its largest value. Forward
    is exact, and so are the means and deviations of norms, attention, and the gradients that linear layers pass down. The copy
    holds decoded values, not packed codes: it only serves to compare errors.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, (nn.Linear, nn.GELU, nn.LayerNorm)):
            _code_input(module, partial(min_max, bits=bits, group=group))
    return copied


def min_max_bits(bits: int = 4, group: int = 64) -> float:
    """Bits for each element of such a code, with the smallest value and the step of each group in 16 bits.

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
    """BatchNorm2d whose output is quantized for both forward and backward. Gradients pass straight through the rounding.

    The coding is that of the second method: uniform bins over three standard deviations on both sides of the channel's mean,
    with zero as an edge of bins. So only one thing differs from that method: here forward also sees the quantized values.
    """

    def __init__(self, channels: int, bits: int):
        super().__init__(channels)
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + (self._quantized(y) - y).detach()

    def _quantized(self, y: Tensor) -> Tensor:
        deviation = self.weight.abs().clamp_min(1e-6)[:, None, None]  # of the output, whose means are the biases
        bins = 2**self.bits
        shift = (bins / 2 - (self.bias[:, None, None] / deviation * bins / 6).floor()).clamp_min(1)
        code = ((y / deviation * bins / 6).floor() + shift).clamp(0, bins - 1)
        return (code + 0.5 - shift) * 6 / bins * deviation


def eight_bit_trained(model: nn.Module, bits: int = 8) -> nn.Module:
    """A copy that is trained in 8 bits: "Scalable methods for 8-bit training of neural networks", Banner et al., NeurIPS 2018.

    Convolutions and linear layers read quantized inputs and weights, and give their input a quantized gradient (see
    `bifurcated`). Every BatchNorm2d becomes a `RangeBatchNorm2d`. All other parts stay. Quantized values are held in full
    precision: the copy only serves to compare final losses. `eight_bit_bytes` computes what would be kept.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, RangeBatchNorm2d.of(child, bits))
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            _bifurcate(module, nn.functional.linear, bits)
        elif isinstance(module, nn.Conv2d):
            _bifurcate(module, module._conv_forward, bits)
    return copied


@torch.no_grad()
def eight_bit_bytes(model: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """The computed number of bytes that 8-bit training of a model would keep for backward.

    They are 8 bits for each element of the inputs of convolutions, linear layers and batch norms, each tensor once; 2 bits for
    each choice of max pooling; and 1 bit for each element of a dropout mask, and of the signs of a ReLU whose output no layer
    reads.
    """
    values: dict[int, Tensor] = {}  # by address; the tensors are held so that no address is used twice
    signs: dict[int, Tensor] = {}
    others: list[int] = []  # bits

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            values[inputs[0].data_ptr()] = inputs[0]
        elif isinstance(module, nn.ReLU):
            signs[output.data_ptr()] = output
        elif isinstance(module, (nn.MaxPool2d, nn.Dropout)):
            others.append(output.numel() * (2 if isinstance(module, nn.MaxPool2d) else 1))

    handles = [each.register_forward_hook(note) for each in model.modules()]
    model(*batch)
    for handle in handles:
        handle.remove()
    others += [each.numel() for address, each in signs.items() if address not in values]
    return sum(each.numel() for each in values.values()) + sum(others) // 8


class RangeBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses the range of each channel instead of its deviation. Its input and its output's gradient are
    quantized.

    The running statistics are the mean and `channel_scale`.
    """

    bits = 8

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, bits: int = 8) -> RangeBatchNorm2d:
        """A range batch norm with the parameters, statistics and settings of this norm."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made.load_state_dict(norm.state_dict())
        made.bits = bits
        return made.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        x = rounded(input, self.bits)
        if self.training or self.running_mean is None or self.running_var is None:
            mean, scale = x.mean((0, 2, 3)), channel_scale(x)
            self._follow(mean.detach(), scale.detach())
        else:
            mean, scale = self.running_mean, self.running_var
        y = (x - mean[:, None, None]) / (scale + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return gradient_rounded(y, self.bits)

    def _follow(self, mean: Tensor, scale: Tensor) -> None:
        if self.running_mean is not None and self.running_var is not None:
            share = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(scale, share)


def channel_scale(x: Tensor) -> Tensor:
    """The range of each channel of x (n, c, h, w), divided by 2 sqrt(2 ln(n h w)): (c,). For normal numbers this is about the
    deviation.

    The paper does not have the factor 2 and leaves it to the weight. With the factor, the network begins as with batch norm,
    and trains better.
    """
    return (x.amax((0, 2, 3)) - x.amin((0, 2, 3))) / (2 * math.sqrt(2 * math.log(x.numel() / x.shape[1])))


def even_steps(x: Tensor, bits: int, stochastic: bool = False) -> Tensor:
    """x on 2**bits even steps from its smallest to its largest value. It is rounded to the nearest step, or with `stochastic`
    to one of the two steps around it at random, which is right on average.

    >>> even_steps(torch.tensor([0.0, 0.9, 2.2, 3.0]), bits=2)
    tensor([0., 1., 2., 3.])
    """
    low, high = torch.aminmax(x)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    steps = (x - low) / step
    return low + step * ((steps + torch.rand_like(steps)).floor().clamp_max(2**bits - 1) if stochastic else steps.round())


def rounded(x: Tensor, bits: int) -> Tensor:
    """`even_steps` of x; the gradient passes straight through."""
    return x + (even_steps(x.detach(), bits) - x).detach()


def gradient_rounded(x: Tensor, bits: int) -> Tensor:
    """x itself. Its gradient is rounded to even steps at random."""
    return _GradientRounded.apply(x, bits)


def bifurcated(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """layer(x, weight, bias), which is linear in x and in weight, with two gradients of its output.

    The gradient of x is computed from a quantized one, rounded at random. The gradients of weight and bias are computed from
    the exact one.
    """
    of_weight = layer(x.detach(), weight, bias)
    of_input = gradient_rounded(layer(x, weight.detach(), None), bits)
    return of_weight + (of_input - of_input.detach())


class _GradientRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return even_steps(gradient, ctx.bits, stochastic=True), None


def _bifurcate(module: nn.Module, layer: Callable[..., Tensor], bits: int) -> None:
    """layer: the function that the module computes from its input, its weight and its bias"""
    parameters = dict(module.named_parameters())

    def forward(x: Tensor) -> Tensor:
        return bifurcated(layer, rounded(x, bits), rounded(parameters["weight"], bits), parameters.get("bias"), bits)

    module.forward = forward


def _code_input(module: nn.Module, code: Callable[[Tensor], Tensor]) -> None:
    """From now on the module saves its input, and all else in the same storage, as decoded codes."""
    exact = module.forward

    def forward(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()

        @torch.no_grad()
        def pack(saved: Tensor) -> Tensor:
            return code(saved) if saved.untyped_storage().data_ptr() == address else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return exact(x)

    module.forward = forward
