"""Closed forms of the activations for the CUDA backend. They take the operations of torch's own CUDA kernels, in their order.

A formula takes a block x of any floating-point dtype and a tuple p of its constants, which `constants` prepares. It returns the
value in float32 (float64 for float64), the dtype in which torch computes. The caller rounds it once. If torch composes an
activation of several operations, each of them rounds, and so does the formula.

Elementary functions are those of libdevice, from which CUDA's own functions are compiled.
"""

# Triton compiles these functions: pyright cannot follow its types.
# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TANH_BETA = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_KAPPA = tl.constexpr(0.044715)
_SIXTH = tl.constexpr(0.1666666716337204)  # torch takes the single-precision sixth, for float64 too
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)


def constants(name: str, parameters: Mapping[str, float], dtype: torch.dtype) -> torch.Tensor:
    """The constants of the formula of that name, on the CPU: parameters, or what torch computes from them before its kernel
    runs.

    dtype    of the tensor
    Returns  float64 for float64, else float32
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if name in ("softshrink", "hardshrink", "threshold"):  # torch rounds their parameters to the tensor's dtype
        return torch.tensor(list(parameters.values()), dtype=dtype).to(wide)
    if name not in ("elu", "celu", "selu"):
        return torch.tensor(list(parameters.values()), dtype=wide)
    alpha = _SELU_ALPHA if name == "selu" else parameters["alpha"]
    scale = _SELU_SCALE if name == "selu" else 1.0
    rate = 1.0 / alpha if name == "celu" else 1.0
    rounded = torch.tensor([alpha, scale, rate], dtype=wide)
    return torch.stack([rounded[0] * rounded[1], rounded[1], rounded[2]])


@triton.jit
def _wide(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _rounded(value, x):
    """value, rounded as an operation of torch on tensors of x's dtype rounds its result."""
    return value.to(x.dtype).to(value.dtype)


@triton.jit
def _divide(a, b, x):
    """a / b, rounded to nearest for float32. For narrower x a faster division errs by at most 2 units of float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low, propagate_nan=_PROPAGATE), high, propagate_nan=_PROPAGATE)


@triton.jit
def _logistic(v, x):
    one = tl.full(v.shape, 1, v.dtype)
    return _divide(one, 1 + libdevice.exp(-v), x)


@triton.jit
def _gelu(x, p):
    v = _wide(x)
    return v * 0.5 * (1 + libdevice.erf(v * _SQRT_HALF))


@triton.jit
def _gelu_tanh(x, p):
    v = _wide(x)
    inner = _TANH_BETA * (v + _TANH_KAPPA * (v * v * v))
    return 0.5 * v * (1 + libdevice.tanh(inner))


@triton.jit
def _quick_gelu(x, p):
    v = _wide(x)
    return v * _rounded(_logistic(_rounded(v * 1.702, x), x), x)


@triton.jit
def _silu(x, p):
    v = _wide(x)
    return _divide(v, 1 + libdevice.exp(-v), x)


@triton.jit
def _mish(x, p):
    v = _wide(x)
    return v * libdevice.tanh(libdevice.log1p(libdevice.exp(v)))


@triton.jit
def _sigmoid(x, p):
    return _logistic(_wide(x), x)


@triton.jit
def _tanh(x, p):
    return libdevice.tanh(_wide(x))


@triton.jit
def _logsigmoid(x, p):
    v = _wide(x)
    return tl.minimum(v, 0.0) - libdevice.log1p(libdevice.exp(-tl.abs(v)))


@triton.jit
def _softplus(x, p):
    v = _wide(x)
    beta, threshold = p[0], p[1]
    z = v * beta
    return tl.where(z > threshold, v, _divide(libdevice.log1p(libdevice.exp(z)), beta, x))


@triton.jit
def _softsign(x, p):
    v = _wide(x)
    return _divide(v, _rounded(tl.abs(v) + 1, x), x)


@triton.jit
def _tanhshrink(x, p):
    v = _wide(x)
    return v - _rounded(libdevice.tanh(v), x)


@triton.jit
def _elu(x, p):
    v = _wide(x)
    negative, positive, rate = p[0], p[1], p[2]
    return tl.where(v > 0, v * positive, libdevice.expm1(v * rate) * negative)


@triton.jit
def _hardswish(x, p):
    v = _wide(x)
    return v * _clamp(v + 3, 0.0, 6.0) * _SIXTH


@triton.jit
def _hardsigmoid(x, p):
    return _clamp(_wide(x) + 3, 0.0, 6.0) * _SIXTH


@triton.jit
def _hardtanh(x, p):
    return _clamp(_wide(x), p[0], p[1])


@triton.jit
def _relu(x, p):
    return tl.maximum(_wide(x), 0.0, propagate_nan=_PROPAGATE)


@triton.jit
def _relu6(x, p):
    return _clamp(_wide(x), 0.0, 6.0)


@triton.jit
def _leaky_relu(x, p):
    v = _wide(x)
    return tl.where(v > 0, v, v * p[0])


@triton.jit
def _softshrink(x, p):
    v = _wide(x)
    lambd = p[0]
    return tl.where(v > lambd, v - lambd, tl.where(v < -lambd, v + lambd, tl.where(v == v, 0.0, v)))


@triton.jit
def _hardshrink(x, p):
    v = _wide(x)
    lambd = p[0]
    return tl.where((v >= -lambd) & (v <= lambd), 0.0, v)


@triton.jit
def _threshold(x, p):
    v = _wide(x)
    return tl.where(v <= p[0], p[1], v)


FORMULAS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
    "mish": _mish,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "logsigmoid": _logsigmoid,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanhshrink": _tanhshrink,
    "elu": _elu,
    "celu": _elu,
    "selu": _elu,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "hardtanh": _hardtanh,
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "softshrink": _softshrink,
    "hardshrink": _hardshrink,
    "threshold": _threshold,
}
