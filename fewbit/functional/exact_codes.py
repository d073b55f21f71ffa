"""Dropout, pooling and padding with exact codes for backward: torch's functions and signatures.

Outputs and gradients equal torch's, bit for bit, and have the same higher derivatives. Less is kept for backward:

    dropout                         one bit per element, instead of a number
    max_pool, adaptive_max_pool     the place of each maximum in its window, in the fewest bits, instead of the input and an
                                    index of 64 bits. If indices are returned, they are kept instead of the input.
    avg_pool, adaptive_avg_pool,    nothing, instead of the input
    pad by "reflect", "replicate",
    interpolate by "area"

The functions are torch's own operations if no gradient is needed, under transforms of `torch.func`, in forward-mode
differentiation and in exported programs. max_pool is torch's own in compiled code too: torch's compiler keeps few bits there.

All raise InputError for an input that cannot be coded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch.nn import functional

from fewbit import resolve
from fewbit.autograd import pooling
from fewbit.autograd.dropout import coded_dropout, mask_table
from fewbit.autograd.linear import numbers
from fewbit.autograd.pooling import Pooling, Windows
from fewbit.autograd.watched import is_autocast
from fewbit.functional.operation import Operation, run
from fewbit.kernels import DeviceTable

Tensor = torch.Tensor
FUNCTIONS: dict[str, Any] = {}  # all that this module offers, by name
aten = torch.ops.aten


def _exact_code(function: Callable[..., Any]) -> Any:
    """Turn a function of `by_name` and torch's arguments into a public function of torch's arguments.

    The public function passes by_name=True (see `operation.run`). Its attribute `quietly` is the function with by_name=False.
    """

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(True, *args, **kwargs)

    signature = inspect.signature(function)
    _, *torchs = signature.parameters.values()
    called.__signature__ = signature.replace(parameters=torchs)  # type: ignore[attr-defined]
    called.quietly = partial(function, False)  # type: ignore[attr-defined]
    called.__module__ = "fewbit.functional"
    FUNCTIONS[called.__name__] = called
    return called


def _named(function: Callable[..., Any], name: str, kept: str) -> Any:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"torch.nn.functional.{name}, bit for bit. It keeps {kept} for backward."
    return _exact_code(function)


@_exact_code
def dropout(by_name: bool, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch.nn.functional.dropout, bit for bit, with the same random numbers. It keeps one bit per element for backward.

    input (*), any shape and strides -> (*). If the input has a code, layers of fewbit that read the output keep that code and
    these bits, and make no code of their own.
    """
    if not (training and isinstance(p, (int, float)) and 0 < p < 1):
        return functional.dropout(input, p, training, inplace)  # it keeps nothing, or raises its own error
    return run(_dropout, (float(p), bool(inplace)), (input,), by_name=by_name)


def _dropout(p: float, inplace: bool) -> Operation:
    exact = partial(functional.dropout, p=p, training=True, inplace=inplace)
    coded = partial(coded_dropout, p=p, inplace=inplace, exact=exact)
    return Operation("dropout", exact, coded, coded, masks=True, tables=partial(_mask_tables, p))


def _mask_tables(p: float, dtype: torch.dtype, device: torch.device) -> tuple[DeviceTable]:
    found = mask_table(p, dtype, device)
    resolve.in_use.add(found)
    return (found,)


def _max_pool(dims: int) -> Any:
    name = f"max_pool{dims}d"

    def max_pool(
        by_name: bool,
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        exact = partial(
            getattr(functional, name),
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
        sizes = _sizes(dims, input, kernel_size, kernel_size if stride is None else stride, padding, dilation)
        casts = (
            dims == 3 and isinstance(input, Tensor) and is_autocast(input)
        )  # autocast may run max_pool3d in float32, if no indices are asked for
        if sizes is None or casts or torch.compiler.is_compiling():
            return exact(input)
        return run(_max_pool_of, (name, sizes, bool(ceil_mode), bool(return_indices)), (input,), by_name=by_name)

    return _named(max_pool, name, "the place of each maximum in its window")


def _max_pool_of(name: str, sizes: tuple[tuple[int, ...], ...], ceil_mode: bool, with_indices: bool) -> Operation:
    exact = _with_arguments(getattr(functional, name), *sizes, ceil_mode, with_indices)
    sizes, dims = _of_planes(sizes, (1, 1, 0, 1)), max(2, len(sizes[0]))
    forward, backward = (getattr(aten, f"max_pool{dims}d_with_indices{end}") for end in ("", "_backward"))
    coded = partial(
        pooling.max_pooled,
        pooling=Pooling(forward, backward, (*sizes, ceil_mode)),
        dims=dims,
        windows=Windows.strided(*sizes),
        with_indices=with_indices,
    )
    return _operation(name, exact, coded)


def _adaptive_max_pool(dims: int) -> Any:
    name = f"adaptive_max_pool{dims}d"

    def adaptive_max_pool(
        by_name: bool, input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
    ) -> Any:
        size = _output_size(dims, input, output_size)
        if size is None or torch.compiler.is_compiling():
            return getattr(functional, name)(input, output_size, return_indices)
        return run(_adaptive_max_pool_of, (name, size, bool(return_indices)), (input,), by_name=by_name)

    return _named(adaptive_max_pool, name, "the place of each maximum in its window")


def _adaptive_max_pool_of(name: str, size: tuple[int, ...], with_indices: bool) -> Operation:
    exact = _with_arguments(getattr(functional, name), size, with_indices)
    (size,), dims = _of_planes((size,), (1,)), max(2, len(size))
    backward = getattr(aten, f"adaptive_max_pool{dims}d_backward")
    found = Pooling(getattr(aten, f"adaptive_max_pool{dims}d"), lambda grad, x, _, indices: backward(grad, x, indices), (size,))
    coded = partial(pooling.max_pooled, pooling=found, dims=dims, windows=None, with_indices=with_indices)
    return _operation(name, exact, coded)


def _avg_pool(dims: int) -> Any:
    name = f"avg_pool{dims}d"

    def avg_pool(
        by_name: bool,
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        sizes = _sizes(dims, input, kernel_size, kernel_size if stride is None else stride, padding)
        if sizes is None:
            exact = _with_arguments(getattr(functional, name), kernel_size, stride, padding, ceil_mode, count_include_pad)
            return exact(input) if dims == 1 else exact(input, divisor_override)
        options = bool(ceil_mode), bool(count_include_pad), divisor_override
        return run(_avg_pool_of, (name, sizes, options), (input,), by_name=by_name)

    def avg_pool1d(
        by_name: bool,
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> Tensor:
        return avg_pool(by_name, input, kernel_size, stride, padding, ceil_mode, count_include_pad)

    return _named(avg_pool1d if dims == 1 else avg_pool, name, "nothing")


def _avg_pool_of(name: str, sizes: tuple[tuple[int, ...], ...], options: tuple) -> Operation:
    exact = _with_arguments(getattr(functional, name), *sizes, *(options[:2] if len(sizes[0]) == 1 else options))
    sizes = _of_planes(sizes, (1, 1, 0))
    own = f"avg_pool{len(sizes[0])}d"
    found = Pooling(getattr(functional, own), getattr(aten, f"{own}_backward"), (*sizes, *options))
    return _operation(name, exact, partial(pooling.without_input, pooling=found))


def _adaptive_avg_pool(dims: int) -> Any:
    name = f"adaptive_avg_pool{dims}d"

    def adaptive_avg_pool(by_name: bool, input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
        size = _output_size(dims, input, output_size)
        if size is None or set(size) == {1}:  # torch computes a mean, which keeps nothing
            return getattr(functional, name)(input, output_size)
        return run(_adaptive_avg_pool_of, (name, size), (input,), by_name=by_name)

    return _named(adaptive_avg_pool, name, "nothing")


def _adaptive_avg_pool_of(name: str, size: tuple[int, ...]) -> Operation:
    exact = _with_arguments(getattr(functional, name), size)
    (size,) = _of_planes((size,), (1,))
    own = f"adaptive_avg_pool{len(size)}d"
    backward = getattr(aten, f"_{own}_backward")
    found = Pooling(getattr(functional, own), lambda grad, x, _: backward(grad, x), (size,))
    return _operation(name, exact, partial(pooling.without_input, pooling=found))


max_pool1d, max_pool2d, max_pool3d = map(_max_pool, (1, 2, 3))
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = map(_adaptive_max_pool, (1, 2, 3))
avg_pool1d, avg_pool2d, avg_pool3d = map(_avg_pool, (1, 2, 3))
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = map(_adaptive_avg_pool, (1, 2, 3))
_PADDINGS = {"reflect": "reflection", "replicate": "replication"}  # operators of the modes in which torch keeps the input


@_exact_code
def pad(by_name: bool, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """torch.nn.functional.pad, bit for bit. It keeps nothing for backward."""
    dims = len(pad) // 2
    sizes = _sizes(2 * dims, None, pad)
    is_slow = torch.are_deterministic_algorithms_enabled() and isinstance(input, Tensor) and input.is_cuda
    if (
        mode not in _PADDINGS
        or value is not None
        or dims not in (1, 2, 3)
        or sizes is None
        or is_slow
        or not _fits(dims, input)
    ):
        return functional.pad(input, pad, mode, value)
    return run(_pad, (sizes[0], mode), (input,), by_name=by_name)


def _pad(sizes: tuple[int, ...], mode: str) -> Operation:
    exact = _with_arguments(functional.pad, sizes, mode)
    backward = getattr(aten, f"{_PADDINGS[mode]}_pad{len(sizes) // 2}d_backward")
    found = Pooling(lambda x, sizes: functional.pad(x, sizes, mode), backward, (sizes,))
    return _operation("pad", exact, partial(pooling.without_input, pooling=found))


@_exact_code
def interpolate(
    by_name: bool,
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """torch.nn.functional.interpolate, bit for bit. It keeps nothing for backward."""
    options = size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    if mode != "area" or not isinstance(input, Tensor) or torch.compiler.is_compiling():
        return functional.interpolate(input, *options)
    output = functional.interpolate(torch.empty(input.shape, device="meta"), *options)  # only its size is used
    return FUNCTIONS[f"adaptive_avg_pool{input.dim() - 2}d"].quietly(input, output.shape[2:])


def _operation(name: str, exact: Callable[..., Any], coded: Callable[..., Any]) -> Operation:
    """The operation of a function on planes. One-dimensional functions run on planes of one line, as in torch."""
    if name.endswith("1d"):
        coded = partial(_of_lines, coded)
    return Operation(name, exact, coded, coded)


def _of_lines(coded: Callable[[Tensor], Any], x: Tensor) -> Any:
    found = coded(x.unsqueeze(-2))
    return tuple(each.squeeze(-2) for each in found) if isinstance(found, tuple) else found.squeeze(-2)


def _of_planes(sizes: tuple[tuple[int, ...], ...], others: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sizes for planes. One-dimensional sizes become those of planes with one line; `others` are for the added dimension."""
    return tuple((other, *each) if len(each) == 1 else each for each, other in zip(sizes, others, strict=True))


def _with_arguments(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A function of x that calls function(x, *arguments). Further arguments come last."""
    return lambda x, *others: function(x, *arguments, *others)


def _sizes(dims: int, input: Any, *given: Any) -> tuple[tuple[int, ...], ...] | None:
    """Each argument as one number per dimension; None for arguments that torch has to judge."""
    try:
        found = tuple(numbers(each, dims) for each in given)
    except TypeError:
        return None
    are_whole = all(type(each) is int for numbers in found for each in numbers)
    return found if are_whole and all(len(each) == dims for each in found) and _fits(dims, input) else None


def _fits(dims: int, input: Any) -> bool:
    """Whether the input is (batch, channels, *) or (channels, *). Also true if it is no tensor: `run` raises for that."""
    return not isinstance(input, Tensor) or input.dim() in (dims + 1, dims + 2)


def _output_size(dims: int, input: Any, given: Any) -> tuple[int, ...] | None:
    """The output size of an adaptive pooling. None stands for the input's size, as torch has it for planes and volumes."""
    if isinstance(given, Sequence) and dims > 1 and len(given) == dims and isinstance(input, Tensor) and _fits(dims, input):
        given = tuple(own if each is None else each for each, own in zip(given, input.shape[-dims:], strict=True))
    sizes = _sizes(dims, input, given)
    return None if sizes is None else sizes[0]
