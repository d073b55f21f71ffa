"""Written by tools/stubs.py."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewbit.design.table import CodeTable

def gelu(
    input: Tensor,
    approximate: str = "none",
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def gelu_tanh(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def quick_gelu(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def silu(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def mish(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def sigmoid(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def tanh(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def logsigmoid(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def softsign(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def tanhshrink(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def elu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def celu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def selu(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def hardswish(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def hardsigmoid(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def hardtanh(
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def relu(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def relu6(
    input: Tensor, inplace: bool = False, *, bits: int | None = None, table: CodeTable | None = None, shared: bool = False
) -> Tensor: ...
def leaky_relu(
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def softshrink(
    input: Tensor,
    lambd: float = 0.5,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def hardshrink(
    input: Tensor,
    lambd: float = 0.5,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def threshold(
    input: Tensor,
    threshold: float = 0.0,
    value: float = 0.0,
    inplace: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
) -> Tensor: ...
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-05,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def glu(
    input: Tensor, dim: int = -1, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest"
) -> Tensor: ...
def swiglu(
    gate: Tensor, up: Tensor, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest"
) -> Tensor: ...
def geglu(
    gate: Tensor,
    up: Tensor,
    approximate: str = "none",
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def reglu(
    gate: Tensor, up: Tensor, *, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest"
) -> Tensor: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Tensor: ...
def lstm(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: bool,
    batch_first: bool,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> tuple[Tensor, ...]: ...
def gru(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: bool,
    batch_first: bool,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> tuple[Tensor, ...]: ...
def rnn_tanh(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: bool,
    batch_first: bool,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> tuple[Tensor, ...]: ...
def rnn_relu(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: bool,
    batch_first: bool,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> tuple[Tensor, ...]: ...
def lstm_cell(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Any: ...
def gru_cell(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Any: ...
def rnn_tanh_cell(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Any: ...
def rnn_relu_cell(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    bits: int | None = None,
    table: CodeTable | None = None,
    rounding: str = "nearest",
) -> Any: ...
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor: ...
def max_pool1d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any: ...
def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any: ...
def max_pool3d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any: ...
def adaptive_max_pool1d(input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False) -> Any: ...
def adaptive_max_pool2d(input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False) -> Any: ...
def adaptive_max_pool3d(input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False) -> Any: ...
def avg_pool1d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor: ...
def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor: ...
def avg_pool3d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor: ...
def adaptive_avg_pool1d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor: ...
def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor: ...
def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor: ...
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor: ...
def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor: ...
def __getattr__(name: str) -> Callable[..., Tensor]: ...  # those of fewbit.register
