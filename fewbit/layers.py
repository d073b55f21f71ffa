"""Layers whose backward reads codes: torch's functions and signatures, plus

    bits      of one code, 1 to 8; 4 if no table is given
    table     a CodeTable of your own, with the channel "value", for a standard normal number (`fewbit.design("identity", …)`)
    rounding  "nearest", which has the least error, or "stochastic", without bias between the outermost levels, by torch's
              random numbers

The output is torch's own, bit for bit. Codes are made where a gradient needs them: else, under transforms of `torch.func`, in
forward-mode differentiation and in exported programs the layers are torch's own operations. Layers that read what another coded
layer made keep the same codes; `fewbit.autograd.handle` tells how they find them.

All raise InputError (dtype, padding, double backward), DesignError (bits, rounding), TableError (a table of something else) and
ActivationError (no such gelu).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fewbit import activations, coders, drop_in
from fewbit.autograd import gated, norm, switch, traced
from fewbit.autograd.linear import Convolution, Linear, TransposedLinear, coded_product
from fewbit.constants import DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, InputError
from fewbit.kernels import Coder
from fewbit.record import Activation

Tensor = torch.Tensor
_ROUNDINGS = ("nearest", "stochastic")
FUNCTIONS: dict[str, Callable[..., Tensor]] = {}  # all that this module offers, by name


class Code(NamedTuple):
    """What every layer takes besides torch's own arguments."""

    bits: int | None = None
    table: CodeTable | None = None
    rounding: str = "nearest"


def _layer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of a Code and of torch's arguments as one of torch's arguments, `bits`, `table` and `rounding`."""

    @wraps(function)
    def layer(*args: Any, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest", **kwargs: Any):
        return function(Code(bits, table, rounding), *args, **kwargs)

    _, *torchs = inspect.signature(function).parameters.values()
    ours = list(inspect.signature(layer, follow_wrapped=False).parameters.values())[1:-1]
    layer.__signature__ = inspect.Signature([*torchs, *ours], return_annotation=Tensor)  # type: ignore[attr-defined]
    FUNCTIONS[layer.__name__] = layer
    return layer


@_layer
def linear(code: Code, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear; the weight's gradient is made from codes of the input, all else is exact.

    input (*, in), weight (out, in), bias (out,) -> (*, out). A weight that needs no gradient keeps nothing of the input, and
    an input that the operation which made it keeps anyway is kept as it is. Chakrabarti and Moseley, NeurIPS 2019, section 3.
    """
    return _run("linear", (), (input, weight, bias), code)


def _convolution(dims: int) -> Callable[..., Tensor]:
    def convolution(code: Code, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        dilation = _each(dilation, dims)
        if isinstance(padding, str):
            if padding == "same" and set(_each(stride, dims)) != {1}:
                raise InputError(f"padding='same' needs stride=1, got stride={stride}; give the padding in integers")
            input, padding = _padded(input, weight, padding, dilation)
        options = _each(stride, dims), _each(padding, dims), dilation, False, (0,) * dims, groups
        return _run_batched(dims, options, input, weight, bias, code)

    return _named(convolution, f"conv{dims}d")


def _transposed_convolution(dims: int) -> Callable[..., Tensor]:
    def convolution(
        code: Code, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ) -> Tensor:
        sizes = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
        return _run_batched(dims, (*sizes, True, _each(output_padding, dims), groups), input, weight, bias, code)

    return _named(convolution, f"conv_transpose{dims}d")


def _named(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"torch.nn.functional.{name}; the weight's gradient is made from codes of the input, all else is exact."
    return _layer(function)


conv1d, conv2d, conv3d = (_convolution(dims) for dims in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_transposed_convolution(dims) for dims in (1, 2, 3))


@_layer
def layer_norm(code: Code, input: Tensor, normalized_shape: Sequence[int], weight=None, bias=None, eps=1e-5) -> Tensor:
    """torch.nn.functional.layer_norm, with codes of the normalized input for backward and for layers that read the output."""
    return _run("layer_norm", (tuple(normalized_shape), eps), (input, weight, bias), code)


@_layer
def rms_norm(code: Code, input: Tensor, normalized_shape: Sequence[int], weight=None, eps: float | None = None) -> Tensor:
    """torch.nn.functional.rms_norm, with codes of the normalized input for backward and for layers that read the output."""
    return _run("rms_norm", (tuple(normalized_shape), eps), (input, weight, None), code)


@_layer
def group_norm(code: Code, input: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """torch.nn.functional.group_norm, with codes of the normalized input for backward and for layers that read the output.

    Where the output goes through a ReLU of shared codes, that one finds its derivative in the same codes, exactly.
    """
    return _run("group_norm", (num_groups, eps), (input, weight, bias), code)


@_layer
def batch_norm(
    code: Code, input: Tensor, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor:
    """torch.nn.functional.batch_norm, with codes of the normalized input for backward and for layers that read the output.

    Where the output goes through a ReLU of shared codes, that one finds its derivative in the same codes, exactly (Chakrabarti
    and Moseley, NeurIPS 2019, section 3.2). Running statistics are updated as torch does.
    """
    if training:
        functional._verify_batch_size(input.size())  # type: ignore[attr-defined]
    return _run("batch_norm", (bool(training), momentum, eps), (input, weight, bias, running_mean, running_var), code)


@_layer
def glu(code: Code, input: Tensor, dim: int = -1) -> Tensor:
    """torch.nn.functional.glu: the first half of the input along `dim` times the sigmoid of the second, from codes of both.

    table  a joint table of your own for sigmoid, with the channels "derivative" and "value"
    """
    return _run("glu", (dim,), (input,), code)


@_layer
def swiglu(code: Code, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, from codes of both, from which the layers that read the product make it anew.

    gate, up  (*), of one shape or shapes that broadcast
    table     a joint table of your own for silu, with the channels "derivative" and "value"

    Shazeer, "GLU variants improve transformer", 2020, equation 6.
    """
    return _run("swiglu", ("silu",), (gate, up), code)


@_layer
def geglu(code: Code, gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, as `swiglu`; `approximate` as in torch.nn.functional.gelu."""
    return _run("geglu", (gelu_named(approximate),), (gate, up), code)


def gelu_named(approximate: str) -> str:
    """The name of the gelu with that value of torch's argument."""
    return drop_in.bound_record(activations.get("gelu"), {"approximate": approximate}).name


@_layer
def reglu(code: Code, gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up, as `swiglu`."""
    return _run("reglu", ("relu",), (gate, up), code)


def gated_unit(
    maker: type[drop_in.RecordMaker],
    values: dict[str, Any],
    gate: Tensor,
    up: Tensor,
    *,
    bits: int | None,
    table: CodeTable | None,
) -> Tensor:
    """activation(gate) * up, as `swiglu`, for the activation that a class makes of these values."""
    return _run("gated_unit", (maker, tuple(values.items())), (gate, up), Code(bits, table))


def written_rms_norm(way: str, input: Tensor, weight: Tensor, eps: float, code: Code) -> Tensor:
    """As `rms_norm` over the last dimension, computed in one of the ways of `fewbit.autograd.norm.WRITTEN`; weight (size,)."""
    return _run("written_rms_norm", (way, tuple(weight.shape), eps), (input, weight, None), code)


def transposed_linear(input: Tensor, weight: Tensor, bias: Tensor, code: Code) -> Tensor:
    """As `linear`, of a weight (in, out), computed by torch.addmm."""
    return _run("transposed_linear", (), (input, weight, bias), code)


class Operation(NamedTuple):
    """A layer at certain options.

    exact    torch's own operation, on the operands
    coded    the same with codes: takes the operands, then the coders, and `stochastic`
    gate     the activation of which it needs the two joint coders, before that of a standard normal number
    """

    exact: Callable[..., Tensor]
    coded: Callable[..., Tensor]
    gate: Activation | None = None


def _product(product: Any) -> Operation:
    return Operation(product, partial(coded_product, product=product))


def _norm(normalization: Any, exact: Callable[..., Tensor], autocasts: bool = True) -> Operation:
    return Operation(exact, partial(norm.coded_normalization, normalization=normalization, exact=exact if autocasts else None))


def _layer_norm(shape: tuple[int, ...], eps: float) -> Operation:
    return _norm(norm.LayerNorm(shape, eps), lambda x, weight, bias: functional.layer_norm(x, shape, weight, bias, eps))


def _rms_norm(shape: tuple[int, ...], eps: float | None) -> Operation:
    return _norm(norm.RMSNorm(shape, eps), lambda x, weight, _: functional.rms_norm(x, shape, weight, eps))


def _written_rms_norm(way: str, shape: tuple[int, ...], eps: float) -> Operation:
    written = norm.WRITTEN[way]
    return _norm(norm.RMSNorm(shape, eps, written), lambda x, weight, _: written(x, weight, eps), autocasts=False)


def _group_norm(groups: int, eps: float) -> Operation:
    return _norm(norm.GroupNorm(groups, eps), lambda x, weight, bias: functional.group_norm(x, groups, weight, bias, eps))


def _batch_norm(training: bool, momentum: float, eps: float) -> Operation:
    def exact(x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Tensor:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return _norm(norm.BatchNorm(training, momentum, eps), exact, autocasts=False)


def _gated(name: str) -> Operation:
    return _gated_by(activations.get(name))


def _gated_unit(maker: type[drop_in.RecordMaker], values: tuple[tuple[str, Any], ...]) -> Operation:
    return _gated_by(maker.record_at(dict(values)))


def _gated_by(activation: Activation) -> Operation:
    forward = activation.forward

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return forward(gate) * up

    return Operation(exact, partial(gated.coded_gate, exact=exact), activation)


def _glu(dim: int) -> Operation:
    def exact(input: Tensor) -> Tensor:
        return functional.glu(input, dim)

    def coded(input: Tensor, *coders: Coder, stochastic: bool) -> Tensor:
        up, gate = input.tensor_split(2, dim)  # of a size that cannot be halved, too, of which exact complains
        return gated.coded_gate(gate, up, *coders, exact=lambda *_: exact(input), channel=dim, stochastic=stochastic)

    return Operation(exact, coded, activations.get("sigmoid"))


_OPERATIONS: dict[str, Callable[..., Operation]] = {
    "linear": lambda: _product(Linear()),
    "transposed_linear": lambda: _product(TransposedLinear()),
    "convolution": lambda *options: _product(Convolution(*options)),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "written_rms_norm": _written_rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "swiglu": _gated,
    "geglu": _gated,
    "reglu": _gated,
    "gated_unit": _gated_unit,
    "glu": _glu,
}


class _Prepared(NamedTuple):
    exact: Callable[..., Tensor]
    coded: Callable[..., Tensor]
    coders: tuple[Coder, ...]


def _run(name: str, options: tuple, operands: tuple[Tensor | None, ...], code: Code) -> Tensor:
    """The operation of that name in `_OPERATIONS`: exact, with codes where a gradient is asked for."""
    x = operands[0]
    drop_in.check_input(name, x)
    assert x is not None, "checked above"
    if code.bits is not None:
        check_bits(code.bits, DesignError)
    if torch.compiler.is_compiling():
        from fewbit.autograd import compiled  # here, since it loads dynamo

        options, bits = drop_in.fixed(options), drop_in.fixed(code.bits)
        found = compiled.constant(_constants, name, options, bits, code.table, code.rounding, x.dtype, x.device)
        return compiled.layer(list(operands), found.tensors, found.bits, found.name, switch.is_exact())
    exact, coded, given = _prepare(name, options, code, x.dtype, x.device)
    if switch.is_exact() or not traced.wants_codes(operands):
        return exact(*operands)
    return coded(*operands, *given)


@lru_cache(maxsize=1024)
def _prepare(name: str, options: tuple, code: Code, dtype: torch.dtype, device: torch.device) -> _Prepared:
    operation = _OPERATIONS[name](*options)
    check_code(name, code, operation.gate)
    bits = code.bits or (code.table.bits if code.table else DEFAULT_LAYER_BITS)
    given = [coders.value_coder(bits, None if operation.gate else code.table, dtype, device)]
    if operation.gate:
        given = [*coders.joint_coders(operation.gate, bits, code.table, dtype, device), *given]
    return _Prepared(operation.exact, partial(operation.coded, stochastic=code.rounding == "stochastic"), tuple(given))


def check_code(name: str, code: Code, gate: str | Activation | None = None) -> None:
    """Raise DesignError or TableError for a code that the layer of that name, whose table is for `gate`, cannot take."""
    if code.rounding not in _ROUNDINGS:
        raise DesignError(f"rounding must be one of {_ROUNDINGS}, got {code.rounding!r}")
    coders.check_arguments(name, code.bits, code.table, coders.JOINT if gate else ("value",))
    coders.check_table_of(activations.get(gate or "identity"), code.table)


def _constants(name: str, options: tuple, bits: Any, table: Any, rounding: str, dtype: Any, device: Any) -> Any:
    """What `compiled` needs; a Code in its parts, since dynamo takes no named tuple for a constant."""
    from fewbit.autograd.compiled import LayerConstants

    return LayerConstants(*_prepare(name, options, Code(bits, table, rounding), dtype, device), name)


def _run_batched(dims: int, options: tuple, input: Tensor, weight: Tensor, bias: Tensor | None, code: Code) -> Tensor:
    """A convolution of (batch, channels, *), or, as torch allows, of (channels, *)."""
    if isinstance(input, Tensor) and input.dim() == dims + 1:
        return _run("convolution", options, (input.unsqueeze(0), weight, bias), code).squeeze(0)
    return _run("convolution", options, (input, weight, bias), code)


def _each(number: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each dimension.

    >>> _each(1, 2), _each((1, 2), 2), _each([3], 2)
    ((1, 1), (1, 2), (3, 3))
    """
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return numbers * dims if len(numbers) == 1 else numbers


def _padded(input: Tensor, weight: Tensor, padding: str, dilation: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the padding, the same on both sides, for padding="same" or "valid"."""
    if padding not in ("same", "valid"):
        raise InputError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    missing = [step * (size - 1) * (padding == "same") for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(each % 2 for each in missing):  # as torch does: one more behind
        input = functional.pad(input, [part for each in reversed(missing) for part in (0, each % 2)])
    return input, tuple(each // 2 for each in missing)
