"""Written by tools/stubs.py."""

from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.design.table import CodeTable

class GELU(torch.nn.GELU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        approximate: str = "none",
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class QuickGELU(torch.nn.Module):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class SiLU(torch.nn.SiLU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Mish(torch.nn.Mish):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Sigmoid(torch.nn.Sigmoid):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Tanh(torch.nn.Tanh):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class LogSigmoid(torch.nn.LogSigmoid):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Softplus(torch.nn.Softplus):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        beta: float = 1.0,
        threshold: float = 20.0,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Softsign(torch.nn.Softsign):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Tanhshrink(torch.nn.Tanhshrink):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ELU(torch.nn.ELU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class CELU(torch.nn.CELU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class SELU(torch.nn.SELU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Hardswish(torch.nn.Hardswish):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Hardsigmoid(torch.nn.Hardsigmoid):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Hardtanh(torch.nn.Hardtanh):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        min_val: float = -1.0,
        max_val: float = 1.0,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReLU(torch.nn.ReLU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReLU6(torch.nn.ReLU6):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class LeakyReLU(torch.nn.LeakyReLU):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        negative_slope: float = 0.01,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Softshrink(torch.nn.Softshrink):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        lambd: float = 0.5,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Hardshrink(torch.nn.Hardshrink):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        lambd: float = 0.5,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Threshold(torch.nn.Threshold):
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool
    def __init__(
        self,
        threshold: float = 0.0,
        value: float = 0.0,
        inplace: bool = False,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        shared: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Linear(torch.nn.Linear):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Conv1d(torch.nn.Conv1d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Conv2d(torch.nn.Conv2d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class Conv3d(torch.nn.Conv3d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: str | int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ConvTranspose1d(torch.nn.ConvTranspose1d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] = 0,
        output_padding: int | tuple[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor: ...

class ConvTranspose2d(torch.nn.ConvTranspose2d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor: ...

class ConvTranspose3d(torch.nn.ConvTranspose3d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        output_padding: int | tuple[int, int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor: ...

class LayerNorm(torch.nn.LayerNorm):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-05,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class RMSNorm(torch.nn.RMSNorm):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, x: Tensor) -> Tensor: ...

class GroupNorm(torch.nn.GroupNorm):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-05,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class BatchNorm1d(torch.nn.BatchNorm1d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class BatchNorm2d(torch.nn.BatchNorm2d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class BatchNorm3d(torch.nn.BatchNorm3d):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class GLU(torch.nn.GLU):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self, dim: int = -1, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest"
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class SwiGLU(torch.nn.Module):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(self, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest") -> None: ...
    def forward(self, gate: Tensor, up: Tensor) -> Tensor: ...

class GEGLU(torch.nn.Module):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self, approximate: str = "none", *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest"
    ) -> None: ...
    def forward(self, gate: Tensor, up: Tensor) -> Tensor: ...

class ReGLU(torch.nn.Module):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(self, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest") -> None: ...
    def forward(self, gate: Tensor, up: Tensor) -> Tensor: ...

class LSTM(torch.nn.LSTM):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class GRU(torch.nn.GRU):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class RNN(torch.nn.RNN):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class LSTMCell(torch.nn.LSTMCell):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class GRUCell(torch.nn.GRUCell):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class RNNCell(torch.nn.RNNCell):
    bits: int | None
    table: CodeTable | None
    rounding: str
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int | None = None,
        table: CodeTable | None = None,
        rounding: str = "nearest",
    ) -> None: ...
    def forward(self, input: Any, hx: Any = None) -> Any: ...

class Dropout(torch.nn.Dropout):
    def __init__(self, p: float = 0.5, inplace: bool = False) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class MaxPool1d(torch.nn.MaxPool1d):
    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class MaxPool2d(torch.nn.MaxPool2d):
    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class MaxPool3d(torch.nn.MaxPool3d):
    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None, return_indices: bool = False) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None, return_indices: bool = False) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None, return_indices: bool = False) -> None: ...
    def forward(self, input: Tensor) -> Any: ...

class AvgPool1d(torch.nn.AvgPool1d):
    def __init__(
        self,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] | None = None,
        padding: int | tuple[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class AvgPool2d(torch.nn.AvgPool2d):
    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class AvgPool3d(torch.nn.AvgPool3d):
    def __init__(
        self,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] | None = None,
        padding: int | tuple[int, int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    def __init__(self, output_size: int | tuple[int | None, ...] | None) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReflectionPad1d(torch.nn.ReflectionPad1d):
    def __init__(self, padding: int | tuple[int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReflectionPad2d(torch.nn.ReflectionPad2d):
    def __init__(self, padding: int | tuple[int, int, int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReflectionPad3d(torch.nn.ReflectionPad3d):
    def __init__(self, padding: int | tuple[int, int, int, int, int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReplicationPad1d(torch.nn.ReplicationPad1d):
    def __init__(self, padding: int | tuple[int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReplicationPad2d(torch.nn.ReplicationPad2d):
    def __init__(self, padding: int | tuple[int, int, int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

class ReplicationPad3d(torch.nn.ReplicationPad3d):
    def __init__(self, padding: int | tuple[int, int, int, int, int, int]) -> None: ...
    def forward(self, input: Tensor) -> Tensor: ...

def __getattr__(name: str) -> Any: ...  # those of fewbit.register
