"""Normalization layers that keep codes of the normalized values instead of their input.

With x̂ = (x - mean) / σ and y = w x̂ + b, backward reads x̂ and σ. Before coding, x̂ is also standardized by channel: after a
layer norm, trained networks have channels that are always far from 0, or far larger than all others. Layers that read y rebuild
it from the same codes.

In norms over tokens or images, a padded token or image is constant. Its x̂ is 0 or nearly 0. Its 1/σ = 1/√ε is some hundred
times that of others, and backward multiplies gradients by it. An error of x̂ of the usual size would be multiplied too.
Therefore, if the variance is below ε, x̂ is coded in units of its root mean square, which follows from 1/σ.

If w and b belong to channels of images, the coded numbers are shifted so that y = 0 lies on a threshold. A ReLU that reads y
then finds the exact sign of y in the codes, as in Chakrabarti and Moseley (NeurIPS 2019), who shift uniform bins. The shift is
less than half an interval. If y = 0 lies beyond the outermost threshold, the channel is shrunk, by half at most, until y = 0
lies on that threshold. If y = 0 lies farther out, y hardly ever changes its sign, and the rare sign is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fewbit.autograd import watched
from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Arrangement
from fewbit.autograd.quantize import Quantizer, at_least_float32, is_small, of_layers
from fewbit.autograd.sharing import BySign, Recipe, attach, is_kept_exactly
from fewbit.kernels.layers import Codes, Vectors
from fewbit.torch_internals import EagerFunction, batch_norm_with_statistics, memory_format_of, not_a_view

Tensor = torch.Tensor


class Normalized(NamedTuple):
    """The exact output y of the operation, the mean (None if none is taken), and 1/σ, by row or by channel. Mean and 1/σ are
    None if the operation does not return them, or only in low precision."""

    y: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Normalization:
    """An operation y = w x̂ + b.

    by_channel      whether w and b belong to dimension 1 instead of the last dimensions; codes then tell the sign of y
    by_row          whether σ belongs to tokens, images or groups of their channels, instead of channels
    centered        whether a mean is subtracted
    may_be_repeated whether another forward pass changes nothing, because there are no running statistics to update
    """

    by_channel: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    centered: ClassVar[bool] = True

    @property
    def may_be_repeated(self) -> bool:
        return True

    def epsilon(self, dtype: torch.dtype) -> float | None:
        """The ε of σ = sqrt(variance + ε) for an x of that dtype; None if σ belongs to channels."""
        raise NotImplementedError

    def arrangement(self, x: Tensor) -> Arrangement:
        raise NotImplementedError

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Any) -> Normalized:
        raise NotImplementedError


@dataclass(frozen=True)
class _OverLastDimensions(Normalization):
    """A norm over the last dimensions, of shape `shape`."""

    shape: tuple[int, ...]
    eps: float | None

    def epsilon(self, dtype: torch.dtype) -> float:  # the default is that of torch: the eps of the dtype in which it computes
        return torch.finfo(at_least_float32(dtype)).eps if self.eps is None else self.eps

    def arrangement(self, x: Tensor) -> Arrangement:
        return Arrangement.of_last(x.shape, len(self.shape))


@dataclass(frozen=True)
class LayerNorm(_OverLastDimensions):
    """The output has mean 0 and variance 1."""

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Normalized:
        y, mean, scale = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)  # type: ignore[arg-type]
        return Normalized(y) if _is_coarse(scale) else Normalized(y, mean.flatten(), scale.flatten())


def _is_coarse(scale: Tensor) -> bool:
    """Whether a statistic has too low a precision for its uses: the unit of rows, and the signs of y."""
    return scale.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RMSNorm(_OverLastDimensions):
    """The output has mean square 1. No mean is subtracted."""

    centered: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Normalized:
        return Normalized(torch.nn.functional.rms_norm(x, self.shape, weight, self.eps))


@dataclass(frozen=True)
class GroupNorm(Normalization):
    """A norm over each of `groups` groups of channels."""

    groups: int
    eps: float
    by_channel: ClassVar[bool] = True

    def epsilon(self, dtype: torch.dtype) -> float:
        return self.eps

    def arrangement(self, x: Tensor) -> Arrangement:
        return Arrangement.of(x, 1, self.groups)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Normalized:
        # torch's own function does the same before it calls this one
        dense = x.contiguous(memory_format=memory_format_of(x) if x.device.type == "cpu" else torch.contiguous_format)
        sizes = x.shape[0], x.shape[1], x.shape[2:].numel()
        y, mean, scale = torch.native_group_norm(dense, weight, bias, *sizes, self.groups, self.eps)
        return Normalized(y) if _is_coarse(scale) else Normalized(y, mean.flatten(), scale.flatten())


@dataclass(frozen=True)
class BatchNorm(Normalization):
    """A norm over all dimensions except the channels. If not `training`, it uses the running statistics."""

    training: bool
    eps: float
    by_channel: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    @property
    def may_be_repeated(self) -> bool:
        return not self.training

    def epsilon(self, dtype: torch.dtype) -> None:
        return None

    def arrangement(self, x: Tensor) -> Arrangement:
        return Arrangement.of(x, 1)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Any) -> Normalized:
        running_mean, running_var, momentum = running
        y, mean, scale, *_ = batch_norm_with_statistics(
            x, weight, bias, running_mean, running_var, self.training, momentum, self.eps, torch.backends.cudnn.enabled
        )
        if not self.training:
            assert running_mean is not None, "torch has checked it"
            assert running_var is not None, "likewise"
            mean, scale = running_mean, (running_var + self.eps).rsqrt()
        wide = at_least_float32(x.dtype)
        return Normalized(y, mean.detach().to(wide), scale.detach().to(wide))


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

    The call is torch's own if x takes less than its codes and statistics, if the operation that made x keeps it anyway, if x is
    seen not to be finite, or if its statistics are out of range.

    others         further arguments of the operation (running statistics and their momentum), and last the DeviceTable of a
                   standard normal number
    normalization  the operation
    exact          torch's function for it
    autocasts      whether autocast may make `exact` compute in another dtype
    stochastic     as in `fewbit.autograd.quantize.Quantizer`
    """
    *running, table = others
    arrangement = normalization.arrangement(x)
    grid = arrangement.grid
    if is_small(x, 2 * grid.channels + normalization.by_row * grid.rows, table) or is_kept_exactly(x):
        return exact(x, weight, bias, *running)
    if autocasts and watched.is_autocast(x):
        probe = x.detach() if normalization.by_channel else x.detach().unsqueeze(0)
        dtype = exact(probe[:0], *(each if each is None else each.detach() for each in (weight, bias))).dtype
        if dtype != x.dtype:
            x = x.to(dtype)
            weight, bias = (each if each is None else each.to(dtype) for each in (weight, bias))
    y, _, packed, vectors, scale, finite = _CodedNormalization.apply(  # type: ignore[misc]
        x, weight, bias, normalization, arrangement, Quantizer(table, stochastic), *running
    )
    if not finite and normalization.may_be_repeated:
        return exact(x, weight, bias, *running)
    where = Vectors.of(weight is not None, bias is not None, normalization.by_channel, normalization.by_row).of_readers
    eps, layout = normalization.epsilon(x.dtype), arrangement.layout

    def codes(packed: Tensor, vectors: Tensor, scale: Tensor | None = None) -> Codes:
        return Codes(packed, grid, vectors, where, scale, eps, table)

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype, *slopes: float) -> Tensor:
        return layout.unflatten(of_layers(kept[0]).decode(codes(*kept), dtype, *slopes))

    def times(kept: Sequence[Tensor], grad: Tensor, *slopes: float) -> Tensor:
        flat = layout.flatten(grad)
        return layout.unflatten(of_layers(flat).times_slope(codes(*kept), flat, *slopes))

    if not finite:  # the forward pass cannot be repeated; layers that read y make their own codes and see this
        return y
    kept = (packed, vectors, scale) if normalization.by_row else (packed, vectors)
    by_sign = BySign(rebuild, times) if normalization.by_channel and not stochastic else None
    return attach(y, Recipe(kept, rebuild, by_sign, hides=not normalization.by_row))


class _CodedNormalization(EagerFunction):
    """The outputs are y, the anchor of `differentiable_once`, the codes, the vectors that turn levels into x̂ and y (see
    `fewbit.kernels.layers_reference.Vectors`), 1/σ, and whether all is finite."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalization: Normalization,
        arrangement: Arrangement,
        quantizer: Quantizer,
        *running: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
        y, mean, scale = normalization.forward(x, weight, bias, *running)
        grid, eps, table = arrangement.grid, normalization.epsilon(x.dtype), quantizer.table
        by_sign, centered = normalization.by_channel, normalization.centered
        packed, own, of_readers, scale, finite = of_layers(x).encode_normalized(
            arrangement.view(x), grid, mean, scale, eps, _flat(weight), _flat(bias), by_sign, centered, table,
            quantizer.stochastic,
        )  # fmt: skip
        anchor = x.new_empty(0)
        ctx.save_for_backward(anchor, packed, own, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(packed, of_readers, scale)
        ctx.coded = normalization, arrangement, table, eps, (x.dtype, None if bias is None else (bias.shape, bias.dtype))
        return not_a_view(y), anchor, packed, of_readers, scale, finite

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, others = grads[0], (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *others
        anchor, packed, vectors, scale, weight = ctx.saved_tensors
        normalization, (layout, grid), table, eps, (dtype, of_bias) = ctx.coded
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        given = grad.permute(layout.order).reshape(grid[:3])
        codes = Codes(packed, grid, vectors, Vectors(), scale if normalization.by_row else None, eps, table)
        kernels, arguments = of_layers(grad), (codes, given, scale, _flat(weight))
        if normalization.by_row:
            grad_x, by_weight, by_bias = kernels.rows_backward(*arguments, normalization.centered, needs_bias)
        else:
            grad_x, by_weight, by_bias = kernels.channels_backward(*arguments, normalization.training)
        found = (
            layout.unflatten(grad_x).to(dtype) if needs_x else None,
            by_weight.view(weight.shape).to(weight.dtype) if needs_weight else None,
            by_bias.view(of_bias[0]).to(of_bias[1]) if needs_bias else None,
        )
        return *(each if each is None else differentiable_once(each, grad, anchor) for each in found), *others


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().reshape(-1)
