"""Normalization layers that keep codes of the normalized values, not their input.

With x̂ = (x - mean) / σ and y = w x̂ + b, backward reads x̂ and 1/σ. The numbers that are coded are standardized by channel
besides: trained networks have channels that are always far from 0, or far larger than all others, in what a layer norm makes of
each token. From the same codes the layers that read y make it anew.

Where w and b belong to the channels of images, the numbers are moved so that y = 0 lies on a threshold. A ReLU that reads y
then finds in its codes the sign of y, exactly, as in Chakrabarti and Moseley (NeurIPS 2019), who move uniform bins for that.
The way is less than half an interval; a channel whose y changes its sign beyond the outermost threshold is shrunk until that
is there, by half at most. Farther out, where y hardly ever changes its sign, the rare sign is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import Quantizer, center_and_spread, standardized, values
from fewbit.autograd.sharing import Recipe, attach
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import batch_norm_with_statistics, memory_format_of

Tensor = torch.Tensor
Needed = Sequence[bool]  # which gradients: of x, weight, bias
Normalized = tuple[Tensor, Tensor | None, Tensor]
_aten = torch.ops.aten


class Normalization(Protocol):
    """An operation y = w x̂ + b. The mean and 1/σ have the dtype of the operation's own statistics."""

    by_channel: bool  # whether w and b belong to dimension 1, instead of to the last ones

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Any) -> Normalized:
        """y, exactly as the operation gives it, and the mean (None if not taken) and 1/σ in shapes that broadcast with x."""
        ...

    def backward(
        self, grad: Tensor, x_hat: Tensor, scale: Tensor, weight: Tensor | None, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, those needed, with scale = 1/σ."""
        ...


class LayerNorm(NamedTuple):
    """Over the last dimensions, of shape `shape`."""

    shape: tuple[int, ...]
    eps: float
    by_channel: bool = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        y, mean, scale = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        if weight is not None and weight.dtype != x.dtype:  # the dtype of its statistics then, but of no fake ones
            mean, scale = mean.to(weight.dtype), scale.to(weight.dtype)
        return y, mean, scale

    def backward(self, grad, x_hat, scale, weight, needed):
        mean, one = torch.zeros_like(scale), torch.ones_like(scale)
        # of the bias, shape and dtype alone are looked at
        bias = None if not needed[2] else grad.new_empty(self.shape) if weight is None else weight
        grad_x, *others = _aten.native_layer_norm_backward(grad, x_hat, self.shape, mean, one, weight, bias, needed)
        return grad_x.mul_(scale) if needed[0] else None, *others


def _divided_by_rms(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square; float32 in and out."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _cast_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # Llama
    return weight * _divided_by_rms(x.to(torch.float32), eps).to(x.dtype)


def _cast_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # OLMo 2, GPT-OSS, and Gemma with its own weight
    return (weight * _divided_by_rms(x.to(torch.float32), eps)).to(x.dtype)


def _cast_to_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # T5
    hidden = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    return weight * (hidden.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else hidden)


# How models compute RMS norms themselves over the last dimension, as functions of x, weight and eps. They differ in where they
# round.
WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cast first": _cast_first,
    "cast last": _cast_last,
    "cast to weight": _cast_to_weight,
}


class RMSNorm(NamedTuple):
    """Over the last dimensions, of shape `shape`; no mean is taken. Computed as torch does, or in one of `WAYS`."""

    shape: tuple[int, ...]
    eps: float | None
    own: Callable[[Tensor, Any, Any], Tensor] | None = None
    by_channel: bool = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        dims = tuple(range(-len(self.shape), 0))
        wide = x if x.dtype == torch.float64 else x.float()
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps  # as torch: of the dtype that it computes in
        scale = wide.square().mean(dims, keepdim=True).add_(eps).rsqrt_()
        if self.own is not None:
            return self.own(x, weight, eps), None, scale
        return torch.nn.functional.rms_norm(x, self.shape, weight, self.eps), None, scale

    def backward(self, grad, x_hat, scale, weight, needed):
        dims, rows = tuple(range(-len(self.shape), 0)), tuple(range(grad.dim() - len(self.shape)))
        wide = torch.promote_types(grad.dtype, torch.float32)  # as torch and others compute, to whatever they round y
        grad, x_hat = grad.to(wide), x_hat.to(wide)
        inner = grad if weight is None else grad * weight
        grad_x = torch.addcmul(inner, x_hat, (inner * x_hat).mean(dims, keepdim=True), value=-1).mul_(scale)
        by_weight = grad * x_hat if needed[1] else None
        if by_weight is not None and rows:  # else there is one row: sum(()) would sum all
            by_weight = by_weight.sum(rows)
        return grad_x if needed[0] else None, by_weight, None


class GroupNorm(NamedTuple):
    """Over each of `groups` groups of channels."""

    groups: int
    eps: float
    by_channel: bool = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        # torch's own function does the same before it calls this one
        dense = x.contiguous(memory_format=memory_format_of(x) if x.device.type == "cpu" else torch.contiguous_format)
        y, mean, scale = torch.native_group_norm(dense, weight, bias, *self._sizes(x), self.groups, self.eps)
        if scale.dtype in (torch.float16, torch.bfloat16):  # too coarse for the signs of y
            variance, mean = torch.var_mean(x.float().reshape(x.shape[0], self.groups, -1), -1, correction=0)
            scale = (variance + self.eps).rsqrt_()
        return y, self._by_channel(mean, x), self._by_channel(scale, x)

    def backward(self, grad, x_hat, scale, weight, needed):
        mixed = weight is not None and weight.dtype != grad.dtype
        dtype = scale.dtype if mixed or grad.is_cuda else grad.dtype  # of its statistics, as the operation wants them
        mean = grad.new_zeros(grad.shape[0], self.groups, dtype=dtype)
        grad_x, *others = _aten.native_group_norm_backward(
            grad.contiguous(), x_hat.contiguous(), mean, mean + 1, weight, *self._sizes(grad), self.groups, needed
        )
        return grad_x.mul_(scale) if needed[0] else None, *others

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], prod(x.shape[2:])

    def _by_channel(self, statistic: Tensor, x: Tensor) -> Tensor:
        repeated = statistic.reshape(x.shape[0], self.groups).repeat_interleave(x.shape[1] // self.groups, 1)
        return repeated.view(*x.shape[:2], *[1] * (x.dim() - 2))


class BatchNorm(NamedTuple):
    """Over all but the channels; by the running statistics where not `training`."""

    training: bool
    eps: float
    by_channel: bool = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Any) -> Normalized:
        running_mean, running_var, momentum = running
        y, mean, scale, *_ = batch_norm_with_statistics(
            x, weight, bias, running_mean, running_var, self.training, momentum, self.eps, torch.backends.cudnn.enabled
        )
        if not self.training:
            assert running_mean is not None, "torch has checked it"
            assert running_var is not None, "likewise"
            mean, scale = running_mean, (running_var + self.eps).rsqrt()
        return y, _along_channels(mean, x), _along_channels(scale, x)

    def backward(self, grad, x_hat, scale, weight, needed):
        scale = scale.flatten()
        weight = scale if weight is None else weight * scale  # then the gradient of x is that for σ = 1
        mean, one = torch.zeros_like(scale), torch.ones_like(scale)
        return _aten.native_batch_norm_backward(grad, x_hat, weight, mean, one, mean, one, self.training, 0.0, needed)


def coded_normalization(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *others: Any,
    normalization: Normalization,
    exact: Callable[..., Tensor] | None = None,
    stochastic: bool = False,
) -> Tensor:
    """normalization(x, weight, bias), with codes of x̂ for backward and for the coded layers that read the result.

    others         what else the operation takes (running statistics and their momentum), and last the DeviceTable of a
                   standard normal number
    normalization  the operation
    exact          torch's function for it, where autocast may make that one compute in another dtype
    stochastic     as in `fewbit.autograd.quantize.Quantizer`
    """
    *running, table = others
    if exact is not None and watched.is_autocast(x):
        probe = x.detach() if normalization.by_channel else x.detach().unsqueeze(0)
        dtype = exact(probe[:0], weight, bias).dtype
        if dtype != x.dtype:
            x = x.to(dtype)
            weight, bias = (each if each is None else each.to(dtype) for each in (weight, bias))
    y, _, packed, center, spread, layout = _CodedNormalization.apply(  # type: ignore[misc]
        x, weight, bias, normalization, Quantizer(table, stochastic), *running
    )
    with torch.no_grad():  # w x̂ + b with x̂ = spread * level + center
        factor, offset = _composed(weight, bias, center, spread, normalization)
    signs = normalization.by_channel and table.thresholds.numel() > 1 and not stochastic
    wide = factor.dtype if signs else None  # in which no sign is lost

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, factor, offset = kept
        return _affine(packed, factor, offset, layout, wide or dtype, table).to(dtype)

    return attach(y, Recipe((packed, factor, offset), rebuild, keeps_sign=signs))


class _CodedNormalization(torch.autograd.Function):
    """Its second output is the anchor of `differentiable_once`; then come the codes, what turns their levels into x̂, and their
    layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalization: Normalization,
        quantizer: Quantizer,
        *running: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Layout]:
        y, mean, scale = normalization.forward(x, weight, bias, *running)
        x_hat = _normalized(x, mean, scale)
        center, spread = center_and_spread(x_hat, _all_but_channels(x_hat, normalization))
        if normalization.by_channel and quantizer.table.thresholds.numel() > 1:
            composed = _composed(weight, bias, center, spread, normalization)
            shrink, shift = _to_a_threshold(*composed, quantizer.table.thresholds)
            spread = spread / shrink
            normal = standardized(x_hat, center, spread, shift)
            center = torch.addcmul(center, spread, shift, value=-1)
        else:
            normal = standardized(x_hat, center, spread)
        layout = Layout.of(normal)
        packed, anchor = quantizer.encode(layout.flatten(normal)), x.new_empty(0)
        ctx.save_for_backward(anchor, packed, center, spread, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(packed, center, spread)
        ctx.coded = normalization, layout, quantizer.table, x.dtype
        return y, anchor, packed, center, spread, layout

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, others = grads[0], (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *others
        anchor, packed, center, spread, scale, weight = ctx.saved_tensors
        normalization, layout, table, dtype = ctx.coded
        x_hat = _affine(packed, spread, center, layout, grad.dtype, table)
        grad_x, *grads_affine = normalization.backward(grad, x_hat, scale, weight, list(ctx.needs_input_grad[:3]))
        found = (None if grad_x is None else grad_x.to(dtype), *grads_affine)
        return *(each if each is None else differentiable_once(each, grad, anchor) for each in found), *others


def _normalized(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    """(x - mean) * scale, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = scale.to(wide)
    return x * scale if mean is None else (x * scale).sub_(mean.to(wide) * scale)


def _all_but_channels(x_hat: Tensor, normalization: Normalization) -> list[int]:
    """The dimensions along which w and b stay the same."""
    if normalization.by_channel:
        return [0, *range(2, x_hat.dim())]
    return list(range(x_hat.dim() - len(normalization.shape)))  # type: ignore[attr-defined]


def _composed(
    weight: Tensor | None, bias: Tensor | None, center: Tensor, spread: Tensor, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Factor and offset of w x̂ + b in a z with x̂ = spread z + center: new tensors, since weights may change, or be freed as
    in sharded training, before what reads y runs its backward."""
    if weight is not None:
        weight = weight.to(center.dtype).view_as(center)
        center, spread = center * weight, spread * weight
    if bias is not None:
        center = center + bias.to(center.dtype).view_as(center)
    return spread, center


def _affine(packed: Tensor, factor: Tensor, offset: Tensor, layout: Layout, dtype: torch.dtype, table: DeviceTable) -> Tensor:
    return values(packed, layout, dtype, table).mul_(factor).add_(offset)


def _along_channels(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.detach().view(-1, *[1] * (x.dim() - 2))


def _to_a_threshold(factor: Tensor, offset: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """shrink and shift, with which the z where factor z + offset = 0 comes to lie on the threshold next to it.

    1 and 0 for a z beyond twice the outermost threshold. There are two thresholds or more.
    """
    zero, outermost = torch.where(factor == 0, torch.inf, -offset / factor), thresholds.abs().max()
    near = zero.abs() <= 2 * outermost
    zero = torch.where(near, zero, 0)
    shrink = torch.where(near, outermost / zero.abs().maximum(outermost), 1)
    edge = thresholds[torch.bucketize(shrink * zero, 0.5 * (thresholds[1:] + thresholds[:-1]))]
    # a z on the threshold has the code below it, where y is negative or, if the factor is, positive: but y is 0
    edge = torch.where(factor < 0, torch.nextafter(edge, torch.full_like(edge, torch.inf)), edge)
    return shrink, torch.where(near, edge - shrink * zero, 0)
