"""Normalization layers that keep codes of the normalized values, not their input.

With x̂ = (x - mean) / σ and y = w x̂ + b, backward reads x̂ and 1/σ. The normalized values need no scale: their mean is 0 and
their mean square 1, whatever x is. From the same codes the layers that read y make it anew, as w x̂ + b.

Where each channel has its own w and b, what is coded is x̂ + shift, with a shift that puts the x̂ at which y = 0 on the nearest
threshold. A ReLU that reads y then finds in its codes the sign of y, exactly, as in Chakrabarti and Moseley (NeurIPS 2019), who
shift uniform bins for that. The shift is less than half an interval, but for channels whose y is hardly ever positive; where y
is hardly ever negative, or never positive, there is none, since the values matter more there than a rare sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from fewbit.autograd.codes import Quantizer, values
from fewbit.autograd.handle import Recipe, attach
from fewbit.autograd.layout import Layout
from fewbit.autograd.once import once

Tensor = torch.Tensor
Needed = Sequence[bool]  # which gradients: of x, weight, bias
Statistics = tuple[Tensor, Tensor | None, Tensor]
_aten = torch.ops.aten
_FARTHEST = 3.0  # shift: y is then positive beyond some 5σ alone


class Normalization(Protocol):
    """An operation y = w x̂ + b. Statistics are of the dtype of the operation's own."""

    by_channel: bool  # whether w and b belong to dimension 1, instead of to the last ones

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor | None) -> Statistics:
        """y, exactly torch's, and the mean (None if not taken) and 1/σ in shapes that broadcast with x."""
        ...

    def backward(
        self, grad: Tensor, values: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor | None, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, those needed, with x̂ = values - shift and 1/σ = scale."""
        ...


class LayerNorm(NamedTuple):
    """Over the last dimensions, of shape `shape`."""

    shape: tuple[int, ...]
    eps: float
    by_channel: bool = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Statistics:
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)

    def backward(self, grad, values, shift, scale, weight, needed):
        mean, one = torch.zeros_like(scale), torch.ones_like(scale)
        bias = weight if needed[2] else None  # its shape and dtype
        grad_x, *others = _aten.native_layer_norm_backward(grad, values, self.shape, mean, one, weight, bias, needed)
        return grad_x.mul_(scale) if needed[0] else None, *others


class RMSNorm(NamedTuple):
    """Over the last dimensions, of shape `shape`; no mean is taken."""

    shape: tuple[int, ...]
    eps: float | None
    by_channel: bool = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Statistics:
        dims = tuple(range(-len(self.shape), 0))
        wide = x if x.dtype == torch.float64 else x.float()
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps  # as torch: of the dtype that it computes in
        scale = wide.square().mean(dims, keepdim=True).add_(eps).rsqrt_()
        return torch.nn.functional.rms_norm(x, self.shape, weight, self.eps), None, scale

    def backward(self, grad, values, shift, scale, weight, needed):
        dims, rows = tuple(range(-len(self.shape), 0)), tuple(range(grad.dim() - len(self.shape)))
        inner = grad if weight is None else grad * weight
        grad_x = torch.addcmul(inner, values, (inner * values).mean(dims, keepdim=True), value=-1).mul_(scale)
        return grad_x if needed[0] else None, (grad * values).sum(rows) if needed[1] else None, None


class GroupNorm(NamedTuple):
    """Over each of `groups` groups of channels."""

    groups: int
    eps: float
    by_channel: bool = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Statistics:
        y, mean, scale = torch.native_group_norm(x, weight, bias, *self._sizes(x), self.groups, self.eps)
        return y, self._by_channel(mean, x), self._by_channel(scale, x)

    def backward(self, grad, values, shift, scale, weight, needed):
        if shift is not None:
            values = (values - shift).to(grad.dtype)
        mean = grad.new_zeros(grad.shape[0], self.groups, dtype=scale.dtype)
        grad_x, *others = _aten.native_group_norm_backward(
            grad.contiguous(), values.contiguous(), mean, mean + 1, weight, *self._sizes(grad), self.groups, needed
        )
        return grad_x.mul_(scale) if needed[0] else None, *others

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2:].numel()

    def _by_channel(self, statistic: Tensor, x: Tensor) -> Tensor:
        repeated = statistic.reshape(x.shape[0], self.groups).repeat_interleave(x.shape[1] // self.groups, 1)
        return repeated.view(*x.shape[:2], *[1] * (x.dim() - 2))


class BatchNorm(NamedTuple):
    """Over all but the channels; by the running statistics where not `training`."""

    training: bool
    momentum: float
    eps: float
    by_channel: bool = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor | None) -> Statistics:
        running_mean, running_var = running
        y, mean, scale, *_ = torch._batch_norm_impl_index(  # type: ignore[attr-defined]
            x, weight, bias, running_mean, running_var, self.training, self.momentum, self.eps, torch.backends.cudnn.enabled
        )
        if not self.training:
            assert running_mean is not None, "torch has checked it"
            assert running_var is not None, "likewise"
            mean, scale = running_mean, (running_var + self.eps).rsqrt()
        return y, _along_channels(mean, x), _along_channels(scale, x)

    def backward(self, grad, values, shift, scale, weight, needed):
        scale = scale.flatten()
        shift = torch.zeros_like(scale) if shift is None else shift.flatten().to(scale.dtype)
        weight = scale if weight is None else weight * scale  # then the gradient of x is that for σ = 1
        return _aten.native_batch_norm_backward(
            grad, values, weight, shift, torch.ones_like(scale), shift, torch.ones_like(scale), self.training, 0.0, needed
        )


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

    others         what else the operation takes (running statistics), and last the Coder, of a standard normal number
    normalization  the operation
    exact          torch's function for it, where autocast may make that one compute in another dtype
    stochastic     as in `fewbit.autograd.codes.Quantizer`
    """
    *running, coder = others
    if exact is not None and torch.is_autocast_enabled(x.device.type):
        probe = x.detach() if normalization.by_channel else x.detach().unsqueeze(0)
        dtype = exact(probe[:0], weight, bias).dtype
        if dtype != x.dtype:
            x = x.to(dtype)
            weight, bias = (each if each is None else each.to(dtype) for each in (weight, bias))
    with torch.no_grad():
        wide = coder.levels.dtype
        # copies: weights may change, or be freed as in sharded training, before the readers' backward
        factor, offset = (
            each if each is None else _placed(each, x, normalization).to(wide, copy=True) for each in (weight, bias)
        )
        shift = None
        if normalization.by_channel and factor is not None and offset is not None:
            shift = _shift(factor, offset, coder.thresholds)
            offset = torch.addcmul(offset, factor, shift, value=-1)
    quantizer = Quantizer(coder, stochastic)
    y, _, packed, layout = _CodedNormalization.apply(x, weight, bias, shift, normalization, quantizer, *running)  # type: ignore[misc]

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        x_hat = values(kept[0], layout, dtype, coder)
        if len(kept) == 3:
            return torch.addcmul(kept[2], x_hat, kept[1]).to(dtype)
        return x_hat.mul_(kept[1]) if len(kept) == 2 else x_hat

    affine = [each for each in (factor, offset) if each is not None]
    return attach(y, Recipe((packed, *affine), rebuild, keeps_sign=shift is not None or weight is None))


class _CodedNormalization(torch.autograd.Function):
    """Its second output is the anchor of `once`; then come the codes and their layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        normalization: Normalization,
        quantizer: Quantizer,
        *running: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Layout]:
        y, mean, scale = normalization.forward(x, weight, bias, *running)
        x_hat = _normalized(x, mean, scale, shift)
        layout = Layout.of(x_hat)
        packed, anchor = quantizer.encode(layout.flatten(x_hat)), x.new_empty(0)
        ctx.save_for_backward(anchor, packed, scale, shift, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(packed)
        ctx.coded = normalization, layout, quantizer.coder, x.dtype
        return y, anchor, packed, layout

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, others = grads[0], (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *others
        anchor, packed, scale, shift, weight = ctx.saved_tensors
        normalization, layout, coder, dtype = ctx.coded
        x_hat = values(packed, layout, grad.dtype, coder)
        grad_x, *grads_affine = normalization.backward(grad, x_hat, shift, scale, weight, list(ctx.needs_input_grad[:3]))
        found = (None if grad_x is None else grad_x.to(dtype), *grads_affine)
        return *(each if each is None else once(each, grad, anchor) for each in found), *others


def _normalized(x: Tensor, mean: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
    """(x - mean) * scale + shift, in float32 at least."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    scale, offset = scale.to(wide), None if shift is None else shift.to(wide)
    if mean is not None:
        offset = torch.addcmul(torch.zeros_like(scale) if offset is None else offset, mean.to(wide), scale, value=-1)
    return x * scale if offset is None else torch.addcmul(offset, x.to(wide), scale)


def _placed(parameter: Tensor, x: Tensor, normalization: Normalization) -> Tensor:
    """The weight or bias in a shape that broadcasts with x."""
    return _along_channels(parameter, x) if normalization.by_channel else parameter


def _along_channels(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.detach().view(-1, *[1] * (x.dim() - 2))


def _shift(weight: Tensor, bias: Tensor, thresholds: Tensor) -> Tensor:
    """What is to be added to x̂ so that y = weight x̂ + bias is 0 on a threshold; 0 where y is hardly ever negative, and where
    y is never positive: that far outside, all codes would be one, and stand for an x̂ as far off."""
    zero = torch.where(weight == 0, 0, -bias / weight)
    nearest = torch.bucketize(zero, 0.5 * (thresholds[1:] + thresholds[:-1]))
    edge = thresholds[nearest]
    # an x̂ on the threshold has the code below it, where y is negative or, if the weight is, positive: but y is 0
    edge = torch.where(weight < 0, torch.nextafter(edge, torch.full_like(edge, torch.inf)), edge)
    shift = edge - zero
    return torch.where((weight == 0) | (shift * weight.sign() > 0.5) | ~(shift.abs() < _FARTHEST), 0, shift)
