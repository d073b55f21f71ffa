"""Layers with codes for backward: torch's functions and signatures, plus

    bits      bits of one code, 1 to 8; 4 if no table is given
    table     a CodeTable of your own, with the channel "value", for a standard normal number (`fewbit.design("identity", …)`)
    rounding  "nearest" has the least error. "stochastic" has no bias between the outermost levels; it uses torch's random
              numbers.

The output equals torch's, bit for bit. Codes are made only if a gradient needs them. Otherwise the layers are torch's own
operations, as they are under transforms of `torch.func`, in forward-mode differentiation and in exported programs. If the input
comes from another layer of fewbit and has codes already, a layer keeps those; `fewbit.autograd.sharing` describes how.

All raise InputError (an input that cannot be coded, padding, double backward), DesignError (bits, rounding), TableError (a
table of something else) and ActivationError (no such gelu).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fewbit import activations, resolve
from fewbit.autograd import attention, gated, norm
from fewbit.autograd.linear import Convolution, Linear, coded_linear, numbers, padded
from fewbit.design.table import CodeTable
from fewbit.errors import DesignError, InputError
from fewbit.functional.activations import bound_record
from fewbit.functional.operation import Operation, run
from fewbit.kernels import DeviceTable
from fewbit.record import Activation
from fewbit.resolve import JOINT
from fewbit.torch_internals import check_batch_size

Tensor = torch.Tensor
FINER = 1  # codes of queries and keys have this many bits more than codes of values
ROUNDINGS = ("nearest", "stochastic")
FUNCTIONS: dict[str, Any] = {}  # all functions of this module and of `fewbit.functional.recurrent`, by name


class Code(NamedTuple):
    """The arguments that fewbit adds to a layer's, and whether the user called fewbit's function by name (`operation.run`)."""

    bits: int | None = None
    table: CodeTable | None = None
    rounding: str = "nearest"
    by_name: bool = True

    def run(self, make: Callable[..., Operation], options: tuple, operands: tuple) -> Any:
        """make(*options) with this code, on the operands."""
        return run(make, (self.rounding, *options), operands, self.bits, self.table, self.by_name)


# keyword arguments of functions and modules, after torch's arguments
ADDED = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Code.__annotations__[name].__forward_arg__
    )
    for name, default in Code._field_defaults.items()
    if name != "by_name"
]


_ADDED_DOC = """\
    bits      bits of one code, 1 to 8; 4 if no table is given
    table     a CodeTable of your own, instead of bits
    rounding  "nearest" has the least error, "stochastic" has no bias

    Raises InputError (an input that cannot be coded, double backward), DesignError (bits, rounding), TableError (a table of
    something else).
    """


def layer(kind: str, gate: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function of a Code and torch's arguments into one of torch's arguments, `bits`, `table` and `rounding`.

    kind  kind of what the layer keeps, one of fewbit.constants.KINDS
    gate  name of the activation that its table is for, if there is one

    The new function has the attributes `kind` and `gate`, and `with_code`, the function that was given.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def called(
            *args: Any, bits: int | None = None, table: CodeTable | None = None, rounding: str = "nearest", **kwargs: Any
        ):
            return function(Code(bits, table, rounding), *args, **kwargs)

        signature = inspect.signature(function)
        _, *torchs = signature.parameters.values()
        called.__signature__ = signature.replace(parameters=[*torchs, *ADDED])  # type: ignore[attr-defined]
        called.with_code, called.kind, called.gate = function, kind, gate  # type: ignore[attr-defined]
        called.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n{_ADDED_DOC}"
        called.__module__ = "fewbit.functional"
        FUNCTIONS[called.__name__] = called
        return called

    return decorate


@layer("linear")
def linear(code: Code, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear. The weight's gradient comes from codes of the input. All else is exact.

    input (*, in), weight (out, in), bias (out,) -> (*, out). If the weight needs no gradient, nothing of the input is kept. If
    the operation that made the input keeps it anyway, the input is kept uncoded. Chakrabarti and Moseley, NeurIPS 2019,
    section 3.
    """
    return code.run(_linear, (), (input, weight, bias))


def _convolution(dims: int) -> Any:
    def convolution(
        code: Code,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        dilation = numbers(dilation, dims)
        if isinstance(padding, str):
            if padding == "same" and set(numbers(stride, dims)) != {1}:
                if not code.by_name:
                    return getattr(functional, name)(input, weight, bias, stride, padding, dilation, groups)  # raises its own
                raise InputError(f"padding='same' needs stride=1, got stride={stride}; give the padding in integers")
            input, padding = padded(input, weight, padding, dilation)
        options = numbers(stride, dims), numbers(padding, dims), dilation, False, (0,) * dims, groups
        return _run_batched(name, dims, options, input, weight, bias, code)

    name = f"conv{dims}d"
    return _named(convolution, name)


def _transposed_convolution(dims: int) -> Any:
    def convolution(
        code: Code,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        sizes = numbers(stride, dims), numbers(padding, dims), numbers(dilation, dims)
        options = (*sizes, True, numbers(output_padding, dims), groups)
        return _run_batched(name, dims, options, input, weight, bias, code)

    name = f"conv_transpose{dims}d"
    return _named(convolution, name)


def _named(function: Callable[..., Tensor], name: str) -> Any:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"torch.nn.functional.{name}. The weight's gradient comes from codes of the input. All else is exact.\n\n"
        "    input (batch, in, *) or (in, *), weight (out, in / groups, *), or (in, out / groups, *) if transposed,\n"
        "    bias (out,) -> (batch, out, *) or (out, *). Chakrabarti and Moseley, NeurIPS 2019, section 3.\n"
    )
    return layer("linear")(function)


conv1d, conv2d, conv3d = (_convolution(dims) for dims in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_transposed_convolution(dims) for dims in (1, 2, 3))


@layer("norm")
def layer_norm(
    code: Code,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm. Backward, and layers that read the output, use codes of the normalized input.

    input (*, *normalized_shape), weight and bias (*normalized_shape) -> (*, *normalized_shape)
    """
    return code.run(_layer_norm, (tuple(normalized_shape), eps), (input, weight, bias))


@layer("norm")
def rms_norm(
    code: Code, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm. Backward, and layers that read the output, use codes of the normalized input.

    input (*, *normalized_shape), weight (*normalized_shape) -> (*, *normalized_shape)
    """
    return code.run(_rms_norm, (tuple(normalized_shape), eps), (input, weight, None))


@layer("norm")
def group_norm(
    code: Code, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """torch.nn.functional.group_norm. Backward, and layers that read the output, use codes of the normalized input.

    input (batch, channels, *), weight and bias (channels,) -> (batch, channels, *)

    If a ReLU with shared codes follows, it finds its exact derivative in the same codes.
    """
    if isinstance(input, Tensor):
        if input.dim() < 2:
            return functional.group_norm(input, num_groups, weight, bias, eps)  # raises torch's own error
        check_batch_size([input.size(0) * input.size(1) // num_groups, num_groups, *input.size()[2:]])
    return code.run(_group_norm, (num_groups, eps), (input, weight, bias))


@layer("norm")
def batch_norm(
    code: Code,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm. Backward, and layers that read the output, use codes of the normalized input.

    input (batch, channels, *), all vectors (channels,) -> (batch, channels, *)

    If a ReLU with shared codes follows, it finds its exact derivative in the same codes (Chakrabarti and Moseley, NeurIPS 2019,
    section 3.2). Running statistics are updated as in torch.
    """
    if training:
        check_batch_size(input.size())
    return code.run(_batch_norm, (bool(training), eps), (input, weight, bias, running_mean, running_var, momentum))


@layer("product", gate="sigmoid")
def glu(code: Code, input: Tensor, dim: int = -1) -> Tensor:
    """torch.nn.functional.glu: the first half of the input along `dim` times the sigmoid of the second half.

    Backward uses codes of both halves. (…, 2n, …) -> (…, n, …)

    table  a joint table of your own for sigmoid, with the channels "derivative" and "value"
    """
    return code.run(_glu, (dim,), (input,))


@layer("product", gate="silu")
def swiglu(code: Code, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Backward uses codes of both. Layers that read the product compute it again from these codes.

    gate, up  (*), of one shape, or of shapes that broadcast
    table     a joint table of your own for silu, with the channels "derivative" and "value"

    Shazeer, "GLU variants improve transformer", 2020, equation 6.
    """
    return code.run(_gated, ("swiglu", swiglu.gate), (gate, up))


@layer("product")
def geglu(code: Code, gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, coded like `swiglu`. `approximate` is as in torch.nn.functional.gelu."""
    return code.run(_gated, ("geglu", gelu_named(approximate)), (gate, up))


def gelu_named(approximate: str) -> str:
    """The name of the gelu for this value of torch's argument `approximate`."""
    return bound_record(activations.get("gelu"), {"approximate": approximate}).name


@layer("product", gate="relu")
def reglu(code: Code, gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up, coded like `swiglu`."""
    return code.run(_gated, ("reglu", reglu.gate), (gate, up))


@layer("attention")
def scaled_dot_product_attention(
    code: Code,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention. Backward uses codes of query, key and value.

    query (batch, …, queries, channels), key (batch, …, keys, channels), value (batch, …, keys, values) -> (batch, …, queries,
    values); attn_mask broadcasts to (batch, …, queries, keys). Nothing else is kept. Backward runs torch's operation again
    on the tensors rebuilt from codes, with the same random numbers. Codes of query and key have one bit more than those of
    value, because errors in them change the gradients most.
    """
    options = (dropout_p, is_causal, scale, enable_gqa)
    return code.run(_attention, options, (query, key, value, attn_mask))


# Functions that make the operations. They take the rounding, then the options.


def operation(
    name: str, rounding: str, exact: Callable[..., Any], coded: Callable[..., Any], gate: Activation | None = None
) -> Operation:
    """The operation of a layer. If there is a `gate`, the layer takes its joint tables, then the table of a normal number."""
    _check_rounding(rounding)
    coded = partial(coded, stochastic=rounding == "stochastic")
    if gate is None:
        return Operation(name, exact, coded, coded, activations.IDENTITY, ("value",))
    return Operation(name, exact, coded, coded, gate, JOINT, values=True)


def check_code(name: str, code: Code, gate: str | None) -> None:
    """Raise DesignError or TableError if the layer `name` cannot take this code. `gate` is the activation of its table."""
    _check_rounding(code.rounding)
    record, channels = activations.get(gate or activations.IDENTITY), JOINT if gate else ("value",)
    resolve.check(name, record, channels, code.bits, code.table)


def _check_rounding(rounding: Any) -> None:
    if rounding not in ROUNDINGS:
        raise DesignError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")


def _linear(rounding: str) -> Operation:
    return operation("linear", rounding, Linear(), partial(coded_linear, product=Linear()))


def _convolution_at(rounding: str, name: str, *options: Any) -> Operation:
    convolution = Convolution(*options)
    return operation(name, rounding, convolution, partial(coded_linear, product=convolution))


def _norm(name: str, rounding: str, normalization: Any, exact: Callable[..., Tensor], autocasts: bool = True) -> Operation:
    coded = partial(norm.coded_normalization, normalization=normalization, exact=exact, autocasts=autocasts)
    return operation(name, rounding, exact, coded)


def _layer_norm(rounding: str, shape: tuple[int, ...], eps: float) -> Operation:
    def exact(x: Tensor, weight: Any, bias: Any) -> Tensor:
        return functional.layer_norm(x, shape, weight, bias, eps)

    return _norm("layer_norm", rounding, norm.LayerNorm(shape, eps), exact)


def _rms_norm(rounding: str, shape: tuple[int, ...], eps: float | None) -> Operation:
    def exact(x: Tensor, weight: Any, _: None) -> Tensor:
        return functional.rms_norm(x, shape, weight, eps)

    return _norm("rms_norm", rounding, norm.RMSNorm(shape, eps), exact)


def _group_norm(rounding: str, groups: int, eps: float) -> Operation:
    def exact(x: Tensor, weight: Any, bias: Any) -> Tensor:
        return functional.group_norm(x, groups, weight, bias, eps)

    return _norm("group_norm", rounding, norm.GroupNorm(groups, eps), exact)


def _batch_norm(rounding: str, training: bool, eps: float) -> Operation:
    def exact(x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float) -> Tensor:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return _norm("batch_norm", rounding, norm.BatchNorm(training, eps), exact, autocasts=False)


def _gated(rounding: str, name: str, gate: str) -> Operation:
    record = activations.get(gate)
    forward = record.forward

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return forward(gate) * up

    return operation(name, rounding, exact, partial(gated.coded_gate, exact=exact), record)


def _attention(rounding: str, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> Operation:
    def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    coded = partial(attention.coded_attention, exact=exact, is_random=dropout_p > 0)
    return replace(operation("scaled_dot_product_attention", rounding, exact, coded), finer=FINER)


def _glu(rounding: str, dim: int) -> Operation:
    def exact(input: Tensor) -> Tensor:
        return functional.glu(input, dim)

    def coded(input: Tensor, *tables: DeviceTable, stochastic: bool) -> Tensor:
        up, gate = input.tensor_split(2, dim)  # an odd size is split too: `exact` raises torch's error for it
        return gated.coded_gate(gate, up, *tables, exact=lambda *_: exact(input), channel=dim, stochastic=stochastic)

    return operation("glu", rounding, exact, coded, activations.get(glu.gate))


def _run_batched(name: str, dims: int, options: tuple, input: Tensor, weight: Tensor, bias: Any, code: Code) -> Tensor:
    """Run a convolution on (batch, channels, *), or on (channels, *), which torch takes too."""
    if isinstance(input, Tensor) and input.dim() == dims + 1:
        return code.run(_convolution_at, (name, *options), (input.unsqueeze(0), weight, bias)).squeeze(0)
    return code.run(_convolution_at, (name, *options), (input, weight, bias))
