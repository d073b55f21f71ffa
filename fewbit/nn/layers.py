"""The modules of layers: torch's classes and constructors, plus what `fewbit.layers` takes: `bits`, `table` and `rounding`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fewbit import layers
from fewbit.constants import DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable

Tensor = torch.Tensor


class CodedLayer(nn.Module):
    """Base of all these modules.

    bits      of one code, or None for the table's, or else 4
    table     the CodeTable given, or None for the optimal one
    rounding  "nearest" or "stochastic"
    """

    bits: int | None
    table: CodeTable | None
    rounding: str
    gate: str | None = None  # the activation that its table is for

    def __init__(
        self, *args: Any, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest", **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.bits, self.table, self.rounding = bits, table, rounding
        layers.check_code(type(self).__name__, layers.Code(bits, table, rounding), self.gate)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Show torch's arguments and then ours as those of the constructor, if it is this one."""
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            cls.__signature__ = inspect.signature(vars(cls)["__init__"].__get__(object()))
            return
        ours = [each for each in inspect.signature(CodedLayer.__init__).parameters.values() if each.kind is each.KEYWORD_ONLY]
        others = [each for each in cls.__mro__ if each is not nn.Module and not issubclass(each, CodedLayer)]
        torchs = [each for each in others if each.__module__.startswith("torch.nn")]
        if torchs:
            cls.__signature__ = inspect.Signature([*inspect.signature(torchs[0]).parameters.values(), *ours])

    @property
    def code(self) -> dict[str, Any]:
        """What the functions of `fewbit.layers` take besides torch's own arguments."""
        return {"bits": self.bits, "table": self.table, "rounding": self.rounding}

    def extra_repr(self) -> str:
        own = f"table={self.table!r}" if self.table is not None else f"bits={self.bits or DEFAULT_LAYER_BITS}"
        rounding = "" if self.rounding == "nearest" else f"rounding={self.rounding!r}"
        return ", ".join(filter(None, (super().extra_repr(), own, rounding)))


class Linear(CodedLayer, nn.Linear):
    """torch.nn.Linear; the weight's gradient is made from codes of the input."""

    def forward(self, input: Tensor) -> Tensor:
        return layers.linear(input, self.weight, self.bias, **self.code)


class _Convolution(CodedLayer):
    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function, padding = getattr(layers, f"conv{weight.dim() - 2}d"), self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return function(input, weight, bias, self.stride, padding, self.dilation, self.groups, **self.code)


class Conv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d; the weight's gradient is made from codes of the input."""


class Conv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d; the weight's gradient is made from codes of the input."""


class Conv3d(_Convolution, nn.Conv3d):
    """torch.nn.Conv3d; the weight's gradient is made from codes of the input."""


class _TransposedConvolution(CodedLayer):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = self.weight.dim() - 2
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        function = getattr(layers, f"conv_transpose{dims}d")
        options = self.stride, self.padding, output_padding, self.groups, self.dilation
        return function(input, self.weight, self.bias, *options, **self.code)


class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d; the weight's gradient is made from codes of the input."""


class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d; the weight's gradient is made from codes of the input."""


class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d; the weight's gradient is made from codes of the input."""


class LayerNorm(CodedLayer, nn.LayerNorm):
    """torch.nn.LayerNorm, with codes of the normalized input."""

    def forward(self, input: Tensor) -> Tensor:
        return layers.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **self.code)


class RMSNorm(CodedLayer, nn.RMSNorm):
    """torch.nn.RMSNorm, with codes of the normalized input."""

    def forward(self, x: Tensor) -> Tensor:
        return layers.rms_norm(x, self.normalized_shape, self.weight, self.eps, **self.code)


class GroupNorm(CodedLayer, nn.GroupNorm):
    """torch.nn.GroupNorm, with codes of the normalized input."""

    def forward(self, input: Tensor) -> Tensor:
        return layers.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **self.code)


class _BatchNorm(CodedLayer):
    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = self.momentum or 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        return layers.batch_norm(input, *running, self.weight, self.bias, training, momentum, self.eps, **self.code)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, with codes of the normalized input."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, with codes of the normalized input."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, with codes of the normalized input."""


class GLU(CodedLayer, nn.GLU):
    """torch.nn.GLU, from codes of both halves of its input."""

    gate = "sigmoid"

    def forward(self, input: Tensor) -> Tensor:
        return layers.glu(input, self.dim, **self.code)


class SwiGLU(CodedLayer):
    """silu(gate) * up, from codes of both; see `fewbit.functional.swiglu`."""

    gate = "silu"

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.swiglu(gate, up, **self.code)


class GEGLU(CodedLayer):
    """gelu(gate) * up, from codes of both; see `fewbit.functional.geglu`."""

    def __init__(self, approximate: str = "none", **code: Any):
        self.gate = layers.gelu_named(approximate)
        super().__init__(**code)
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.geglu(gate, up, self.approximate, **self.code)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, {super().extra_repr()}"


class ReGLU(CodedLayer):
    """relu(gate) * up, from codes of both; see `fewbit.functional.reglu`."""

    gate = "relu"

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.reglu(gate, up, **self.code)


CLASSES = {
    each.__name__: each
    for each in vars().copy().values()
    if isinstance(each, type) and issubclass(each, CodedLayer) and not each.__name__.startswith(("_", "Coded"))
}
