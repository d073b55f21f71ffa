"""Normalization layers that keep codes of the normalized values, not their input.

With x̂ = (x - mean) / σ and y = w x̂ + b, backward reads x̂ and σ. The numbers that are coded are standardized by channel
besides: trained networks have channels that are always far from 0, or far larger than all others, in what a layer norm makes of
each token. From the same codes the layers that read y make it anew.

Where a norm is taken of tokens or images, a padded one is constant: its x̂ is 0, or nearly, and its 1/σ = 1/√ε, some hundred
times that of others, by which the next norm multiplies gradients. An error of x̂ of the usual size would be multiplied, too. So
where the variance is below ε, x̂ is coded in units of its root mean square. That follows from the variance, which is kept in the
place of 1/σ.

Where w and b belong to the channels of images, the numbers are moved so that y = 0 lies on a threshold. A ReLU that reads y
then finds in its codes the sign of y, exactly, as in Chakrabarti and Moseley (NeurIPS 2019), who move uniform bins for that.
The way is less than half an interval; a channel whose y changes its sign beyond the outermost threshold is shrunk until that
is there, by half at most. Farther out, where y hardly ever changes its sign, the rare sign is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import (
    Quantizer,
    affine,
    center_and_spread,
    finite_part,
    is_finite,
    is_small,
    nan_if_not_finite,
    standardized,
    with_means,
    with_zero_on_a_level,
)
from fewbit.autograd.sharing import Recipe, attach, is_kept_exactly
from fewbit.torch_internals import batch_norm_with_statistics, is_watched, memory_format_of, not_a_view

Tensor = torch.Tensor
Needed = Sequence[bool]  # which gradients: of x, weight, bias
Normalized = tuple[Tensor, Tensor | None, Tensor]
_aten = torch.ops.aten


class Normalization(Protocol):
    """An operation y = w x̂ + b."""

    @property
    def by_channel(self) -> bool:
        """Whether w and b belong to dimension 1, instead of to the last ones."""
        ...

    @property
    def eps(self) -> float | None: ...

    @property
    def may_be_repeated(self) -> bool:
        """Whether another forward pass changes nothing: no running statistics."""
        ...

    def statistics(self, shape: Sequence[int]) -> int:
        """How many are kept of an x of that shape: two a channel, and a variance for each σ that is not a channel's."""
        ...

    def root_mean_square(self, x_hat: Tensor) -> Tensor | None:
        """That of all numbers that share a σ, in the shape of 1/σ; None where these are a channel."""
        ...

    def along(self, statistic: Tensor, shape: Sequence[int]) -> Tensor:
        """The mean, 1/σ, or what is made of them, as it broadcasts with an x of that shape."""
        ...

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Any) -> Normalized:
        """y, exactly as the operation gives it, and the mean (None if not taken) and 1/σ."""
        ...

    def backward(
        self, grad: Tensor, x_hat: Tensor, scale: Tensor, weight: Tensor | None, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, those needed, with scale = 1/σ along x."""
        ...


@dataclass(frozen=True)
class _OverLastDimensions:
    """A norm over the last dimensions, of shape `shape`."""

    shape: tuple[int, ...]
    eps: float | None
    by_channel: ClassVar[bool] = False
    may_be_repeated: ClassVar[bool] = True

    def statistics(self, shape: Sequence[int]) -> int:
        return 2 * prod(self.shape) + prod(shape[: -len(self.shape)])

    def root_mean_square(self, x_hat: Tensor) -> Tensor:
        return _root_mean_square(x_hat, len(self.shape))

    def along(self, statistic: Tensor, shape: Sequence[int]) -> Tensor:
        return statistic


@dataclass(frozen=True)
class LayerNorm(_OverLastDimensions):
    """Of mean 0 and variance 1."""

    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)

    def backward(self, grad, x_hat, scale, weight, needed):
        mean = torch.zeros_like(scale, dtype=_dtype_of_statistics(grad, scale, weight))
        one = torch.ones_like(mean)
        # of the bias, shape and dtype alone are looked at
        bias = None if not needed[2] else grad.new_empty(self.shape) if weight is None else weight
        grad_x, *others = _aten.native_layer_norm_backward(grad, x_hat, self.shape, mean, one, weight, bias, needed)
        return grad_x.mul_(scale) if needed[0] else None, *others


def _dtype_of_statistics(grad: Tensor, scale: Tensor, weight: Tensor | None) -> torch.dtype:
    """In which torch's operation wants mean and 1/σ."""
    mixed = weight is not None and weight.dtype != grad.dtype
    return scale.dtype if mixed or grad.is_cuda else grad.dtype


def _root_mean_square(x_hat: Tensor, dims: int) -> Tensor:
    """Over that many last dimensions, which stay, of size 1."""
    over = tuple(range(-dims, 0))
    return torch.linalg.vector_norm(x_hat, dim=over, keepdim=True) / prod(x_hat.shape[-dims:]) ** 0.5


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


@dataclass(frozen=True)
class RMSNorm(_OverLastDimensions):
    """Of mean square 1; no mean is taken. Computed as torch does, or in one of `WAYS`."""

    own: Callable[[Tensor, Any, Any], Tensor] | None = None

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        dims = tuple(range(-len(self.shape), 0))
        wide = x if x.dtype == torch.float64 else x.float()
        scale = wide.square().mean(dims, keepdim=True).add_(_epsilon(self.eps, wide.dtype)).rsqrt_()
        if self.own is not None:
            return self.own(x, weight, self.eps), None, scale
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
    may_be_repeated: bool = True

    def statistics(self, shape: Sequence[int]) -> int:
        return 2 * shape[1] + shape[0] * self.groups

    def root_mean_square(self, x_hat: Tensor) -> Tensor:
        return _root_mean_square(x_hat.reshape(x_hat.shape[0], self.groups, -1), 1).squeeze(-1)

    def along(self, statistic: Tensor, shape: Sequence[int]) -> Tensor:
        repeated = statistic.reshape(shape[0], self.groups).repeat_interleave(shape[1] // self.groups, 1)
        return repeated.view(*shape[:2], *[1] * (len(shape) - 2))

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
        # torch's own function does the same before it calls this one
        dense = x.contiguous(memory_format=memory_format_of(x) if x.device.type == "cpu" else torch.contiguous_format)
        y, mean, scale = torch.native_group_norm(dense, weight, bias, *self._sizes(x), self.groups, self.eps)
        if scale.dtype in (torch.float16, torch.bfloat16):  # too coarse for the signs of y
            variance, mean = torch.var_mean(x.float().reshape(x.shape[0], self.groups, -1), -1, correction=0)
            scale = (variance + self.eps).rsqrt_()
        return y, mean, scale

    def backward(self, grad, x_hat, scale, weight, needed):
        mean = grad.new_zeros(grad.shape[0], self.groups, dtype=_dtype_of_statistics(grad, scale, weight))
        grad_x, *others = _aten.native_group_norm_backward(
            grad.contiguous(), x_hat.contiguous(), mean, mean + 1, weight, *self._sizes(grad), self.groups, needed
        )
        return grad_x.mul_(scale) if needed[0] else None, *others

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], prod(x.shape[2:])


class BatchNorm(NamedTuple):
    """Over all but the channels; by the running statistics where not `training`."""

    training: bool
    eps: float
    by_channel: bool = True

    @property
    def may_be_repeated(self) -> bool:
        return not self.training

    def statistics(self, shape: Sequence[int]) -> int:
        return 2 * shape[1]

    def root_mean_square(self, x_hat: Tensor) -> None:
        return None

    def along(self, statistic: Tensor, shape: Sequence[int]) -> Tensor:
        return statistic

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
    exact: Callable[..., Tensor],
    autocasts: bool,
    stochastic: bool = False,
) -> Tensor:
    """normalization(x, weight, bias), with codes of x̂ for backward and for the coded layers that read the result.

    An x that would take less than its codes and statistics is left to torch, and so is one that the operation which made it
    keeps anyway, and one of which statistics are out of range.

    others         what else the operation takes (running statistics and their momentum), and last the DeviceTable of a
                   standard normal number
    normalization  the operation
    exact          torch's function for it
    autocasts      whether autocast may make that one compute in another dtype
    stochastic     as in `fewbit.autograd.quantize.Quantizer`
    """
    *running, table = others
    if is_small(x, normalization.statistics(x.shape), table) or is_kept_exactly(x):
        return exact(x, weight, bias, *running)
    if autocasts and watched.is_autocast(x):
        probe = x.detach() if normalization.by_channel else x.detach().unsqueeze(0)
        dtype = exact(probe[:0], *(each if each is None else each.detach() for each in (weight, bias))).dtype
        if dtype != x.dtype:
            x = x.to(dtype)
            weight, bias = (each if each is None else each.to(dtype) for each in (weight, bias))
    y, _, packed, center, spread, variance, move, layout = _CodedNormalization.apply(  # type: ignore[misc]
        x, weight, bias, normalization, Quantizer(table, stochastic), *running
    )
    if normalization.may_be_repeated and not is_watched(x) and not is_finite(spread if variance is None else variance):
        return exact(x, weight, bias, *running)
    weight, bias = (each if each is None else each.detach() for each in (weight, bias))
    eps, has_signs = _epsilon(normalization.eps, center.dtype), move is not None
    moves = (_composed(weight, None, center, move)[0],) if has_signs else ()
    if variance is None:
        kept = packed, *_composed(weight, bias, center, spread), *moves
    else:
        shift = () if bias is None else (bias.to(center.dtype).view_as(center).clone(),)
        kept = packed, *_composed(weight, None, center, spread), *moves, variance, *shift

    def signs(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, factor, offset, *rows = kept
        if has_signs:
            _, *rows = rows
        if not rows:
            return affine(packed, layout, dtype, table, factor, offset)
        variance, *shift = rows
        unit = normalization.along(_unit(variance, eps), layout.shape)
        return affine(packed, layout, dtype, table, factor, offset, unit, *shift)

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, factor, offset, move, *rows = kept
        return signs((packed, factor, offset + move, move, *rows), dtype)

    return attach(y, Recipe(kept, rebuild, signs) if has_signs else Recipe(kept, signs))


class _CodedNormalization(torch.autograd.Function):
    """Its second output is the anchor of `differentiable_once`; then come the codes, what turns their levels into x̂ (center and
    spread by channel, and the variance of each row, if there are rows), by how much centers that keep signs miss the means, and
    the layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalization: Normalization,
        quantizer: Quantizer,
        *running: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Layout]:
        y, mean, scale = normalization.forward(x, weight, bias, *running)
        mean, table = None if mean is None else normalization.along(mean, x.shape), quantizer.table
        x_hat = _normalized(x, mean, normalization.along(scale, x.shape))
        eps, size = _epsilon(normalization.eps, x_hat.dtype), normalization.root_mean_square(x_hat)
        variance = unit = None
        if size is not None:
            variance = torch.where((scale == 0) & (size == 0), torch.inf, (size / scale).square())
            unit = normalization.along(_unit(variance, eps), x.shape)
            x_hat = x_hat.div_(torch.where(unit == 0, 1, unit))
        known, others = finite_part(x_hat), _all_but_channels(x_hat, normalization)
        center, spread = center_and_spread(known, others)
        sparse, level, shift = None, None, 0.0
        if normalization.by_channel and table.thresholds.numel() > 1:
            shrink, shift = _to_a_threshold(*_composed(weight, bias, center, spread), table.thresholds)
            spread = spread / shrink
        elif others and not normalization.by_channel:
            spread, sparse, level = with_zero_on_a_level(center, spread, known.abs().amin(others, keepdim=True) == 0, table)
            center = torch.where(sparse, -level * spread, center)
        normal = standardized(x_hat, center, spread, shift)
        center, layout = center - spread * shift, Layout.of(normal)
        packed, anchor = quantizer.encode(layout.flatten(normal)), x.new_empty(0)
        own_center, move = center, None
        if others and not quantizer.stochastic:
            row = None if unit is None else finite_part(unit)
            coded = known if row is None else known * row
            moved = with_means(coded, packed, layout, table, center, spread, row, others, sparse)
            if sparse is None or level is None:  # what others read may have to keep signs
                own_center = moved[0]
                move = own_center - center
            else:
                center, spread = moved
                own_center = center = torch.where(sparse, -level * spread, center)
        lost = nan_if_not_finite(x_hat, 1) if variance is None else None  # else the variance of its row tells
        own_center = own_center if lost is None else own_center + lost.view_as(center)
        ctx.save_for_backward(anchor, packed, own_center, spread, scale if variance is None else variance, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (packed, center, spread, variance, move) if each is not None))
        ctx.coded = normalization, layout, table, x.dtype, None if variance is None else eps
        return not_a_view(y), anchor, packed, center, spread, variance, move, layout

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, others = grads[0], (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *others
        anchor, packed, center, spread, scale, weight = ctx.saved_tensors
        normalization, layout, table, dtype, eps = ctx.coded
        unit = None
        if eps is not None:  # the variance was kept
            unit, scale = normalization.along(_unit(scale, eps), grad.shape), (scale + eps).rsqrt_()
        x_hat = affine(packed, layout, grad.dtype, table, spread, center, unit)
        scale = normalization.along(scale, grad.shape)
        grad_x, *grads_affine = normalization.backward(grad, x_hat, scale, weight, list(ctx.needs_input_grad[:3]))
        found = (None if grad_x is None else grad_x.to(dtype), *grads_affine)
        return *(each if each is None else differentiable_once(each, grad, anchor) for each in found), *others


def _epsilon(eps: float | None, dtype: torch.dtype) -> float:
    """As torch: where none is given, that of the dtype that it computes in."""
    return torch.finfo(dtype).eps if eps is None else eps


def _unit(variance: Tensor, eps: float) -> Tensor:
    """In units of what x̂ is coded: the root mean square that the variance gives it, or 1 where that is ordinary."""
    return torch.where(variance > eps, 1, (variance / (variance + eps)).sqrt_())


def _normalized(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    """(x - mean) * scale, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = scale.to(wide)
    return x * scale if mean is None else (x - mean.to(wide)).mul_(scale)


def _all_but_channels(x_hat: Tensor, normalization: Normalization) -> list[int]:
    """The dimensions along which w and b stay the same."""
    if normalization.by_channel:
        return [0, *range(2, x_hat.dim())]
    return list(range(x_hat.dim() - len(normalization.shape)))  # type: ignore[attr-defined]


def _composed(weight: Tensor | None, bias: Tensor | None, center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset of w x̂ + b in a z with x̂ = spread z + center: new tensors, since weights may change, or be freed as
    in sharded training, before what reads y runs its backward."""
    if weight is not None:
        weight = weight.to(center.dtype).view_as(center)
        center, spread = center * weight, spread * weight
    if bias is not None:
        center = center + bias.to(center.dtype).view_as(center)
    return spread, center


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
