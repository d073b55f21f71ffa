"""The modules of layers: torch's classes and constructors, plus `bits`, `table` and `rounding`."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from fewbit.constants import DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import InputError
from fewbit.functional import exact_codes, layers
from fewbit.functional.layers import ADDED, Code
from fewbit.functional.operation import not_codable
from fewbit.nn.base import Coded
from fewbit.torch_internals import dynamo_is_loaded

Tensor = torch.Tensor


class CodedLayer(Coded):
    """Base of all these modules.

    bits      bits of one code; None for the table's bits, or 4 without a table
    table     the CodeTable given; None for the optimal one
    rounding  "nearest" or "stochastic"
    """

    bits: int | None
    table: CodeTable | None
    rounding: str
    coded_kind: ClassVar[str]  # kind of what it keeps, one of fewbit.constants.KINDS
    gate: str | None = None  # the activation that its table is for

    def __init__(self, *args: Any, **kwargs: Any):
        code = Code(**{each.name: kwargs.pop(each.name) for each in ADDED if each.name in kwargs})
        super().__init__(*args, **kwargs)
        self.bits, self.table, self.rounding = code.bits, code.table, code.rounding
        layers.check_code(type(self).__name__, code, self.gate)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Give the class a signature: torch's arguments (or those of its own constructor), then ours."""
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            own = inspect.signature(vars(cls)["__init__"].__get__(object())).parameters.values()
            cls.__signature__ = inspect.Signature([*(each for each in own if each.kind is not each.VAR_KEYWORD), *ADDED])
            return
        others = [each for each in cls.__mro__ if each not in (nn.Module, Coded) and not issubclass(each, CodedLayer)]
        torchs = [each for each in others if each.__module__.startswith("torch.nn")]
        if torchs or not cls.__name__.startswith("_"):
            inherited = inspect.signature(torchs[0]).parameters.values() if torchs else ()
            named = [each for each in inherited if each.kind is not each.VAR_KEYWORD]
            cls.__signature__ = inspect.Signature([*named, *ADDED])

    @property
    def code(self) -> Code:
        """The arguments that its function takes besides torch's."""
        return Code(self.bits, self.table, self.rounding, by_name=False)

    def extra_repr(self) -> str:
        own = f"table={self.table!r}" if self.table is not None else f"bits={self.bits or DEFAULT_LAYER_BITS}"
        rounding = "" if self.rounding == "nearest" else f"rounding={self.rounding!r}"
        return ", ".join(filter(None, (super().extra_repr(), own, rounding)))


class Linear(CodedLayer, nn.Linear):
    """torch.nn.Linear. The weight's gradient comes from codes of the input."""

    coded_kind = layers.linear.kind

    def forward(self, input: Tensor) -> Tensor:
        return layers.linear.with_code(self.code, input, self.weight, self.bias)


class _Convolution(CodedLayer):
    coded_kind = layers.conv1d.kind

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function, padding = layers.FUNCTIONS[f"conv{len(self.kernel_size)}d"], self.padding
        if self.padding_mode != "zeros":
            input = exact_codes.pad.quietly(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return function.with_code(self.code, input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d. The weight's gradient comes from codes of the input."""


class Conv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d. The weight's gradient comes from codes of the input."""


class Conv3d(_Convolution, nn.Conv3d):
    """torch.nn.Conv3d. The weight's gradient comes from codes of the input."""


class _TransposedConvolution(CodedLayer):
    coded_kind = layers.conv_transpose1d.kind

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        function = layers.FUNCTIONS[f"conv_transpose{dims}d"]
        options = self.stride, self.padding, output_padding, self.groups, self.dilation
        return function.with_code(self.code, input, self.weight, self.bias, *options)


class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d. The weight's gradient comes from codes of the input."""


class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d. The weight's gradient comes from codes of the input."""


class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d. The weight's gradient comes from codes of the input."""


class LayerNorm(CodedLayer, nn.LayerNorm):
    """torch.nn.LayerNorm, with codes of the normalized input."""

    coded_kind = layers.layer_norm.kind

    def forward(self, input: Tensor) -> Tensor:
        return layers.layer_norm.with_code(self.code, input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(CodedLayer, nn.RMSNorm):
    """torch.nn.RMSNorm, with codes of the normalized input."""

    coded_kind = layers.rms_norm.kind

    def forward(self, x: Tensor) -> Tensor:
        return layers.rms_norm.with_code(self.code, x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(CodedLayer, nn.GroupNorm):
    """torch.nn.GroupNorm, with codes of the normalized input."""

    coded_kind = layers.group_norm.kind

    def forward(self, input: Tensor) -> Tensor:
        return layers.group_norm.with_code(self.code, input, self.num_groups, self.weight, self.bias, self.eps)


class _BatchNorm(CodedLayer):
    coded_kind = layers.batch_norm.kind

    def forward(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):  # such as a proxy, whose trace would also leave out the changes of state
            raise InputError(not_codable("batch_norm", input))
        self._check_input_dim(input)
        averages = self.momentum is None and self.training and self.track_running_stats
        if averages and dynamo_is_loaded():  # the compiler would compile it anew for each number of batches
            forward: Any = torch.compiler.disable(_BatchNorm._forward)
            return forward(self, input)
        return self._forward(input)

    def _forward(self: Any, input: Tensor) -> Tensor:
        momentum = self.momentum or 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        return layers.batch_norm.with_code(self.code, input, *running, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, with codes of the normalized input."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, with codes of the normalized input."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, with codes of the normalized input."""


class GLU(CodedLayer, nn.GLU):
    """torch.nn.GLU, with codes of both halves of its input."""

    coded_kind = layers.glu.kind
    gate = layers.glu.gate

    def forward(self, input: Tensor) -> Tensor:
        return layers.glu.with_code(self.code, input, self.dim)


class SwiGLU(CodedLayer):
    """silu(gate) * up, with codes of both; see `fewbit.functional.swiglu`."""

    coded_kind = layers.swiglu.kind
    gate = layers.swiglu.gate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.swiglu.with_code(self.code, gate, up)


class GEGLU(CodedLayer):
    """gelu(gate) * up, with codes of both; see `fewbit.functional.geglu`."""

    coded_kind = layers.geglu.kind

    def __init__(self, approximate: str = "none", **code: Any):
        self.gate = layers.gelu_named(approximate)
        super().__init__(**code)
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.geglu.with_code(self.code, gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, {super().extra_repr()}"


class ReGLU(CodedLayer):
    """relu(gate) * up, with codes of both; see `fewbit.functional.reglu`."""

    coded_kind = layers.reglu.kind
    gate = layers.reglu.gate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return layers.reglu.with_code(self.code, gate, up)


CLASSES = {
    each.__name__: each
    for each in vars().copy().values()
    if isinstance(each, type) and issubclass(each, CodedLayer) and not each.__name__.startswith(("_", "Coded"))
}
