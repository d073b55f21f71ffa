"""The registry holds one frozen record per activation, with all facts about it.

The functional API, the modules, the command line, the shipped tables and the tests all derive from `names()` and `get()`.
`get()` also knows two kinds of records without functions or modules in fewbit. `IDENTITY` is f(x) = x; its value tables
quantize x itself. `UNLISTED` are activations that torch lacks but models use; `convert` finds them, and no tables are shipped.
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbit.errors import ActivationError
from fewbit.record import Activation, Array, DerivativeShape, finite_number, from_callable

if TYPE_CHECKING:
    import torch


def names() -> list[str]:
    """Names of all registered activations, in order of registration. Each has a function and a module in fewbit."""
    return list(_REGISTRY)


def get(activation: str | Activation | Callable[..., Any], /, **parameters: float) -> Activation:
    """The record of `activation`, with `parameters` replacing its defaults.

    activation  a registered name, "identity", a record, one of `fewbit.functional`, or a pointwise function on tensors

    Raises ActivationError for an unknown name (it suggests the nearest), an unknown parameter, or a parameter that is
    not a finite number.
    """
    record = getattr(activation, "record", activation)  # functions of fewbit.functional carry their record
    if callable(record) and not isinstance(record, Activation):
        return from_callable(record, parameters=parameters)  # type: ignore[arg-type]
    elif not isinstance(record, Activation):
        record = _look_up(record)
    return record.with_parameters(**parameters) if parameters else record


def _look_up(name: str) -> Activation:
    known = {**UNLISTED, **SHIPPED, **_REGISTRY}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "fewbit.register() adds your own"
    raise ActivationError(f"unknown activation {name!r}; {hint} (`fewbit list` shows all)")


def built_in(name: str) -> Activation | None:
    """The built-in record of a name; None for other names, and if a user registered another function under the name."""
    record = SHIPPED.get(name)
    return record if record is not None and _look_up(name) == record else None


def register(
    name: str,
    function: Callable[..., torch.Tensor],
    derivative: Callable[..., Array] | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    jumps: tuple[float, ...] = (),
    kinks: tuple[float, ...] = (),
    even: bool = False,
    module: str | None = None,
    overwrite: bool = False,
) -> Activation:
    """Add your own activation. From then on `fewbit.functional.NAME` and `fewbit.nn.Name` exist.

    name        a Python identifier; "identity" is always taken
    function    A pointwise function on tensors: function(x, **parameters) returns a tensor of x's shape. In compiled code it
                must use no other tensors than x. Its parameters are numbers.
    derivative  f'(x, **parameters) on float64 arrays. Without it, torch differentiates `function` in float64.
    parameters  names and default values of numeric parameters; by default the arguments of `function` with numeric defaults
    jumps       points where f' jumps
    kinks       points where f' has a corner
    even        whether f'(-x) = f'(x)
    module      name of the module class; by default the name in CamelCase
    overwrite   whether to replace an activation of the same name, instead of raising
    Returns     the record of the activation

    Raises ActivationError if the name is taken or is not an identifier, or if the function is not pointwise.

    >>> import fewbit
    >>> snake = fewbit.register("snake", lambda x: x + x.sin() ** 2, overwrite=True)
    >>> round(float(snake.df(0.0)), 3)
    1.0
    """
    if not isinstance(name, str) or not callable(function) or not isinstance(parameters or {}, Mapping):
        raise ActivationError(
            "register takes a name, a function on tensors, and parameters as a mapping from name to default; got "
            f"{name!r}, {function!r}, {parameters!r}"
        )
    if not _is_name(name):
        raise ActivationError(f"the name of an activation must be a Python identifier without leading underscore, got {name!r}")
    if name in TAKEN:
        raise ActivationError(f"fewbit.functional.{name} exists and is not an activation; choose another name")
    _check_names(name, parameters or {})
    record = from_callable(function, derivative, parameters=parameters, name=name)
    _check_parameters(record)
    if name == IDENTITY.name:
        raise ActivationError(f"{name!r} stands for f(x) = x, whose tables quantize x itself; choose another name")
    if name in _REGISTRY and not overwrite:
        raise ActivationError(f"an activation {name!r} exists; pass overwrite=True to replace it")
    replaced = _REGISTRY[name].module if name in _REGISTRY else None
    module = module or replaced or "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if module != replaced:
        _check_module(name, module)
    places = {
        what: tuple(finite_number(name, what, each) for each in given) for what, given in (("jumps", jumps), ("kinks", kinks))
    }
    record = replace(record, module=module, shape=DerivativeShape(**places, even=bool(even)))
    _REGISTRY[name] = record
    return record


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)


def _check_names(activation: str, parameters: Mapping[str, float]) -> None:
    """Raise ActivationError for a parameter that cannot be passed by name."""
    for name in parameters:
        if not _is_name(name):
            raise ActivationError(
                f"{activation}: the name of a parameter must be a Python identifier without leading underscore, got {name!r}"
            )


def _check_parameters(record: Activation) -> None:
    """Raise ActivationError for parameters whose names have another use in functions, designs or modules."""
    import torch

    _check_names(record.name, record.parameters)  # these include the function's own parameters
    used = RESERVED | {*dir(torch.nn.Module()), *torch.nn.Module.__annotations__}  # modules hold parameters as attributes
    if taken := sorted(used & {*record.parameters}):
        raise ActivationError(
            f"{record.name}: a parameter cannot have the name of an argument that all activations take, or of an attribute "
            f"that all modules have: {taken}; rename it in the function"
        )


def _check_module(name: str, module: Any) -> None:
    """Raise ActivationError for a name that no class can have, or that another class of fewbit has."""
    if not _is_name(module):
        raise ActivationError(
            f"{name}: the name of a module must be a Python identifier without leading underscore, got {module!r}; give "
            "another one as module="
        )
    others = {record.module: other for other, record in _REGISTRY.items()}
    if module in others or module in TAKEN_MODULES:
        whose = f"the module of {others[module]}" if module in others else "a layer"
        raise ActivationError(f"{name}: fewbit.nn.{module} is {whose}; give another name as module=")


# The records. At a jump each derivative takes the side that torch's backward takes: if torch tests `x > 0`, so does the record.

_SIXTH = float(np.float32(1 / 6))  # torch's hardsigmoid backward uses the single-precision sixth, in float64 too
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_GELU_LEAST = -0.7517915246935645  # where gelu is least
_TANH_GELU = 0.7978845608028654  # sqrt(2 / pi), as in torch's tanh approximation, with 0.044715 below


def _cdf(x: Array) -> Array:
    from scipy.special import ndtr  # imported here because scipy.special takes 0.3 s, and `fewbit --help` does not need it

    return ndtr(x)


def _pdf(x: Array) -> Array:
    return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(_TANH_GELU * (x + 0.044715 * x**3)))


def _gelu_tanh_derivative(x: Array) -> Array:
    t = np.tanh(_TANH_GELU * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _TANH_GELU * (1 + 3 * 0.044715 * x * x)


def _swish_derivative(x: Array, beta: float = 1.0) -> Array:
    """Derivative of x·sigmoid(beta·x)."""
    s = _sigmoid(beta * x)
    return s + beta * x * s * (1 - s)


def _mish_derivative(x: Array) -> Array:
    t = np.tanh(np.logaddexp(0.0, x))
    return t + x * (1 - t * t) * _sigmoid(x)


def _elu(x: Array, alpha: float, scale: float = 1.0, rate: float = 1.0) -> Array:
    return scale * np.where(x > 0, x, alpha * np.expm1(rate * np.minimum(x, 0.0)))


def _elu_derivative(x: Array, alpha: float, scale: float = 1.0, rate: float = 1.0) -> Array:
    return scale * np.where(x > 0, 1.0, alpha * rate * np.exp(rate * np.minimum(x, 0.0)))


def _torch_gelu(x: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    return functional.gelu(x)


def _torch_softplus(x: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    return functional.softplus(x)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1.702 * x).sigmoid()  # torch has no such function; CLIP and its ports compute this form


def _clipped_gelu(x: Array, min: float, max: float) -> Array:
    return np.clip(x * _cdf(x), min, max)


def _clipped_gelu_derivative(x: Array, min: float, max: float) -> Array:
    y = x * _cdf(x)
    return np.where((y >= min) & (y <= max), _cdf(x) + x * _pdf(x), 0.0)


def _clipped_gelu_shape(min: float, max: float) -> DerivativeShape:
    """f' jumps where gelu crosses a bound. gelu falls from 0 to its least value and rises from there, so both parts are
    searched."""
    from scipy.optimize import brentq

    jumps = []
    for bound in (min, max):
        branches = ((-40.0, _GELU_LEAST), (_GELU_LEAST, abs(bound) + 1.0))
        ends = [[end * float(_cdf(np.array(end))) - bound for end in branch] for branch in branches]
        found = [branch for branch, (left, right) in zip(branches, ends, strict=True) if left * right < 0]
        jumps += [brentq(lambda x, bound=bound: x * float(_cdf(np.array(x))) - bound, *branch) for branch in found]
    return DerivativeShape(jumps=tuple(jumps))


_SMOOTH = DerivativeShape()
_EVEN = DerivativeShape(even=True)
_JUMP_AT_0 = DerivativeShape(jumps=(0.0,))


def _clip_shape(min_val: float, max_val: float) -> DerivativeShape:
    return DerivativeShape(jumps=(min_val, max_val), even=min_val == -max_val)


def _record(
    name: str,
    module: str,
    f: Callable[..., Array],
    df: Callable[..., Array],
    shape: DerivativeShape | Callable[..., DerivativeShape] = _SMOOTH,
    torch_function: str | Callable[..., torch.Tensor] | None = None,
    options: Mapping[str, str] | None = None,
    **parameters: float,
) -> Activation:
    function = torch_function or f"torch.nn.functional.{name}"
    return Activation(name, f, df, function, module, parameters, options or {}, shape)


_GELU = "torch.nn.functional.gelu"

# Names that `register` refuses. Tests compare these lists with the names in use.
# Names that parameters cannot have:
RESERVED = frozenset(
    {"input", "inplace", "bits", "table", "shared"}  # what drop-ins take
    | {"activation", "weight", "coding", "channels", "balance", "levels", "domain", "cells"}  # what designs take
    | {"name", "record", "record_at", "record_of", "table_channels", "coded_kind"}  # what modules of activations have
)
# Names that activations cannot have, because functions and modules of fewbit.functional have them:
_CONVOLUTIONS = tuple(f"{name}{dims}d" for name in ("conv", "conv_transpose") for dims in (1, 2, 3))
_NORMS = "layer_norm", "rms_norm", "group_norm", "batch_norm"
_RECURRENT = "lstm", "gru", "rnn_tanh", "rnn_relu"
TAKEN = frozenset(
    {
        "linear",
        *_CONVOLUTIONS,
        *_NORMS,
        "glu",
        "swiglu",
        "geglu",
        "reglu",
        "scaled_dot_product_attention",
        *_RECURRENT,
        *(f"{name}_cell" for name in _RECURRENT),
        "operation",
        "activations",
        "layers",
        "recurrent",
    }
)
# Names that modules of activations cannot have, because layers have them:
TAKEN_MODULES = frozenset(
    {"Linear", *(f"{name}{dims}d" for name in ("Conv", "ConvTranspose", "BatchNorm") for dims in (1, 2, 3))}
    | {"LayerNorm", "RMSNorm", "GroupNorm", "GLU", "SwiGLU", "GEGLU", "ReGLU"}
    | {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"}
)
_REGISTRY: dict[str, Activation] = {
    record.name: record
    for record in (
        _record("gelu", "GELU", lambda x: x * _cdf(x), lambda x: _cdf(x) + x * _pdf(x), options={"approximate": "none"}),
        _record("gelu_tanh", "GELU", _gelu_tanh, _gelu_tanh_derivative, torch_function=_GELU, options={"approximate": "tanh"}),
        _record(
            "quick_gelu",
            "QuickGELU",
            lambda x: x * _sigmoid(1.702 * x),
            lambda x: _swish_derivative(x, 1.702),
            torch_function=_quick_gelu,
        ),
        _record("silu", "SiLU", lambda x: x * _sigmoid(x), _swish_derivative),
        _record("mish", "Mish", lambda x: x * np.tanh(np.logaddexp(0.0, x)), _mish_derivative),
        _record("sigmoid", "Sigmoid", _sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x), _EVEN, torch_function="torch.sigmoid"),
        _record("tanh", "Tanh", np.tanh, lambda x: 4 * _sigmoid(2 * x) * _sigmoid(-2 * x), _EVEN, torch_function="torch.tanh"),
        _record("logsigmoid", "LogSigmoid", lambda x: -np.logaddexp(0.0, -x), lambda x: _sigmoid(-x)),
        _record(
            "softplus",
            "Softplus",
            lambda x, beta, threshold: np.where(beta * x > threshold, x, np.logaddexp(0.0, beta * x) / beta),
            lambda x, beta, threshold: np.where(beta * x > threshold, 1.0, _sigmoid(beta * x)),
            lambda beta, threshold: DerivativeShape(jumps=(threshold / beta,)),
            beta=1.0,
            threshold=20.0,
        ),
        _record(
            "softsign",
            "Softsign",
            lambda x: x / (1 + np.abs(x)),
            lambda x: (1 + np.abs(x)) ** -2.0,
            DerivativeShape(kinks=(0.0,), even=True),
        ),
        _record("tanhshrink", "Tanhshrink", lambda x: x - np.tanh(x), lambda x: np.tanh(x) ** 2, _EVEN),
        _record(
            "elu",
            "ELU",
            _elu,
            _elu_derivative,
            lambda alpha: DerivativeShape(kinks=(0.0,)) if alpha == 1 else _JUMP_AT_0,
            alpha=1.0,
        ),
        _record(
            "celu",
            "CELU",
            lambda x, alpha: _elu(x, alpha, rate=1 / alpha),
            lambda x, alpha: _elu_derivative(x, alpha, rate=1 / float(np.float32(alpha))),  # torch's backward rounds alpha so
            DerivativeShape(kinks=(0.0,)),
            alpha=1.0,
        ),
        _record(
            "selu",
            "SELU",
            lambda x: _elu(x, _SELU_ALPHA, _SELU_SCALE),
            lambda x: _elu_derivative(x, _SELU_ALPHA, _SELU_SCALE),
            _JUMP_AT_0,
        ),
        _record(
            "hardswish",
            "Hardswish",
            lambda x: x * np.clip(x + 3, 0, 6) / 6,
            lambda x: np.where(x <= -3, 0.0, np.where(x < 3, x / 3 + 0.5, 1.0)),
            DerivativeShape(jumps=(-3.0, 3.0)),
        ),
        _record(
            "hardsigmoid",
            "Hardsigmoid",
            lambda x: np.clip(x + 3, 0, 6) / 6,
            lambda x: np.where((x > -3) & (x < 3), _SIXTH, 0.0),
            _clip_shape(-3.0, 3.0),
        ),
        _record(
            "hardtanh",
            "Hardtanh",
            lambda x, min_val, max_val: np.clip(x, min_val, max_val),
            lambda x, min_val, max_val: np.where((x > min_val) & (x < max_val), 1.0, 0.0),
            _clip_shape,
            min_val=-1.0,
            max_val=1.0,
        ),
        _record("relu", "ReLU", lambda x: np.maximum(x, 0.0), lambda x: np.where(x > 0, 1.0, 0.0), _JUMP_AT_0),
        _record(
            "relu6",
            "ReLU6",
            lambda x: np.clip(x, 0.0, 6.0),
            lambda x: np.where((x > 0) & (x < 6), 1.0, 0.0),
            _clip_shape(0.0, 6.0),
        ),
        _record(
            "leaky_relu",
            "LeakyReLU",
            lambda x, negative_slope: np.where(x > 0, x, negative_slope * x),
            lambda x, negative_slope: np.where(x > 0, 1.0, negative_slope),
            _JUMP_AT_0,
            negative_slope=0.01,
        ),
        _record(
            "softshrink",
            "Softshrink",
            lambda x, lambd: np.where(np.abs(x) > lambd, x - np.copysign(lambd, x), 0.0),
            lambda x, lambd: np.where(np.abs(x) > lambd, 1.0, 0.0),
            lambda lambd: _clip_shape(-lambd, lambd),
            lambd=0.5,
        ),
        _record(
            "hardshrink",
            "Hardshrink",
            lambda x, lambd: np.where(np.abs(x) > lambd, x, 0.0),
            lambda x, lambd: np.where(np.abs(x) > lambd, 1.0, 0.0),
            lambda lambd: _clip_shape(-lambd, lambd),
            lambd=0.5,
        ),
        _record(
            "threshold",
            "Threshold",
            lambda x, threshold, value: np.where(x > threshold, x, value),
            lambda x, threshold, value: np.where(x > threshold, 1.0, 0.0),
            lambda threshold, value: DerivativeShape(jumps=(threshold,)),
            threshold=0.0,
            value=0.0,
        ),
    )
}
UNLISTED: Mapping[str, Activation] = MappingProxyType(
    {
        record.name: record
        for record in (
            _record(
                "relu_squared",
                "ReLUSquared",
                lambda x: np.maximum(x, 0.0) ** 2,
                lambda x: 2 * np.maximum(x, 0.0),
                DerivativeShape(kinks=(0.0,)),
                torch_function=lambda x: x.relu().square(),
            ),
            _record(
                "clipped_gelu",
                "ClippedGELU",
                _clipped_gelu,
                _clipped_gelu_derivative,
                _clipped_gelu_shape,
                torch_function=lambda x, min, max: _torch_gelu(x).clip(min, max),
                min=-10.0,
                max=10.0,
            ),
            _record(
                "laplace",
                "Laplace",
                lambda x, mu, sigma: _cdf((x - mu) / sigma),
                lambda x, mu, sigma: _pdf((x - mu) / sigma) / sigma,
                torch_function=lambda x, mu, sigma: 0.5 * (1 + ((x - mu) / (sigma * 2**0.5)).erf()),
                mu=0.707107,
                sigma=0.282095,
            ),
            _record(
                "sqrt_softplus",
                "SqrtSoftplus",
                lambda x: np.sqrt(np.where(x > 20, x, np.logaddexp(0.0, x))),
                lambda x: np.where(x > 20, 1.0, _sigmoid(x)) / (2 * np.sqrt(np.where(x > 20, x, np.logaddexp(0.0, x)))),
                DerivativeShape(jumps=(20.0,)),
                torch_function=lambda x: _torch_softplus(x).sqrt(),
            ),
        )
    }
)
BUILT_IN: Mapping[str, Activation] = MappingProxyType(dict(_REGISTRY))  # does not change when users replace activations
IDENTITY = _record("identity", "Identity", np.positive, np.ones_like, _EVEN, torch_function="torch.positive")
SHIPPED: Mapping[str, Activation] = MappingProxyType({**BUILT_IN, IDENTITY.name: IDENTITY})  # one table file each
