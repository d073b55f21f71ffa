"""Pointwise activations with codes for backward. Each record in the registry gets a function with torch's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from fewbit import activations
from fewbit.autograd.activation import (
    activation_by_sign,
    check_overwritable,
    coded_activation,
    overwriting_activation,
    overwritten,
    watched_activation,
)
from fewbit.constants import DEFAULT_BITS, RUNGS, SHIPPED_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError
from fewbit.functional.operation import Operation, run
from fewbit.kernels import DeviceTable, Formula
from fewbit.kernels.device_table import SAMPLE
from fewbit.record import Activation, finite_number
from fewbit.resolve import JOINT
from fewbit.store import load_ladder, load_table
from fewbit.torch_internals import is_transformed

Tensor = torch.Tensor
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


@cache
def function(record: Activation) -> Callable[..., Tensor]:
    """The function `fewbit.functional.NAME` for a record."""

    def activation(
        input: Tensor, *args: Any, bits: int | None = None, table: CodeTable | None = None, shared: bool = False, **kwargs: Any
    ) -> Tensor:
        joint = shared or (table is not None and getattr(table, "channels", None) == JOINT)
        if args or kwargs:
            args, kwargs = tuple(map(_plain, args)), {name: _plain(value) for name, value in kwargs.items()}
        return run(activation_operation, (record, joint, args, tuple(kwargs.items())), (input,), bits, table)

    ours = [each for each in inspect.signature(activation).parameters.values() if each.kind is each.KEYWORD_ONLY]
    activation.__name__ = activation.__qualname__ = record.name
    activation.__module__ = "fewbit.functional"
    activation.record = record  # type: ignore[attr-defined]
    activation.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("input", _POSITIONAL, annotation="Tensor"), *_torchs_arguments(record), *ours],
        return_annotation="Tensor",
    )
    activation.__doc__ = docstring_of(
        record, f"{record.torch_name} with an exact forward. Backward reads codes of a few bits per element."
    )
    return activation


def constructor_arguments(record: Activation) -> list[inspect.Parameter]:
    """Arguments of the activation's module: all of its function's arguments except the input."""
    return list(inspect.signature(function(record)).parameters.values())[1:]


def _torchs_arguments(record: Activation) -> list[inspect.Parameter]:
    """torch's arguments in torch's order, then `inplace`."""
    taken = {**(record.options if _selects_variant(record) else {}), **record.parameters, "inplace": False}
    return [
        inspect.Parameter(name, _POSITIONAL, default=default, annotation=type(default).__name__)
        for name, default in taken.items()
    ]


def _plain(value: Any) -> Any:
    """The argument in hashable form: a tensor as its number, a list as a tuple. The record rejects a tuple later."""
    if isinstance(value, list):
        return tuple(value)
    return value.item() if isinstance(value, Tensor) and not torch.compiler.is_compiling() else value


class RecordMaker(Protocol):
    """A class whose instances compute an activation. Values of their attributes are its parameters."""

    name: ClassVar[str]  # of the activation

    @classmethod
    def record_at(cls, values: dict[str, Any]) -> Activation:
        """The record for these values, given by name."""
        ...


def activation_operation(
    source: Activation | type[RecordMaker], joint: bool, args: tuple, named: tuple[tuple[str, Any], ...]
) -> Operation:
    """The operation of an activation for these arguments. The input is not among them.

    source  the activation's record, or a class that makes records from named values
    joint   whether the code also serves the layers that read the result
    """
    given = dict(named)
    if isinstance(source, Activation):
        given = bind(inspect.signature(function(source)), source.name, None, *args, **given)
    inplace = bool(given.pop("inplace", False))
    record = bound_record(source, given) if isinstance(source, Activation) else source.record_at(given)
    with np.errstate(all="ignore"):
        keeps_zeros = float(record.f(np.zeros(1))[0]) == 0
    coded = partial(coded_activation, forward=record.forward, formula=formula(record), keeps_zeros=keeps_zeros)
    watched = partial(watched_activation, forward=record.forward)
    if inplace:
        coded = partial(overwriting_activation, forward=record.forward, forward_inplace=record.forward_inplace)
        coded = partial(coded, keeps_zeros=keeps_zeros)
    if joint or inplace:
        coded, watched = (partial(_shared_or_in_place, each, record, inplace) for each in (coded, watched))
    return Operation(
        record.name,
        partial(_exact_in_place, record=record) if inplace else record.forward,
        coded,
        watched,
        record,
        JOINT if joint else ("derivative",),
        bits=DEFAULT_BITS,
        transforms=True,
    )


def _exact_in_place(x: Tensor, record: Activation) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:  # torch's own backward may need x, so it gets a copy
        return x.copy_(record.forward(x.clone()))
    return record.forward_inplace(x)


def _shared_or_in_place(
    form: Callable[..., Tensor], record: Activation, inplace: bool, x: Tensor, *tables: DeviceTable
) -> Tensor:
    """Run `form` with the extra steps of shared codes and of in-place calls.

    An in-place call first checks that x may be overwritten, and at the end writes the result into x. With shared codes, the
    sign may come from a norm's codes.

    form  the coded operation. In plain eager code it overwrites x itself.
    """
    if inplace and not (torch.compiler.is_compiling() or is_transformed()):
        check_overwritable(record.name, x)
    slopes = _slopes(record) if len(tables) > 1 else None
    y = None if slopes is None else activation_by_sign(x, record.forward, slopes)
    y = form(x, *tables) if y is None else y
    return overwritten(x, y) if inplace and y is not x else y


@lru_cache(maxsize=256)
def _slopes(record: Activation) -> tuple[float, float] | None:
    """f' below and above 0, if f consists of two straight lines that meet at 0; else None."""
    if record.derivative_shape.jumps != (0.0,):
        return None
    table = load_table(record, 1)
    return tuple(table.levels[0, table.codes].tolist()) if table.mse == 0 and table.thresholds.tolist() == [0] else None


def formula(record: Activation) -> Formula | None:
    """The closed form of a built-in activation, else None. Some backends compute it together with the codes."""
    built_in = activations.BUILT_IN.get(record.name)
    if built_in is None or (built_in.function, built_in.torch_function) != (record.function, record.torch_function):
        return None
    return record.name, record.parameters


def bind(signature: inspect.Signature, name: str, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The given arguments by name. Raises TypeError as Python does, with the function's name."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{name}{signature}: {error}") from None


def bound_record(record: Activation, given: Mapping[str, Any]) -> Activation:
    """The record for the numeric parameters and options (such as approximate="tanh") in `given`. The rest is ignored."""
    if _selects_variant(record) and any(given.get(name, value) != value for name, value in record.options.items()):
        chosen = {**record.options, **{name: given[name] for name in record.options if name in given}}
        siblings = [
            sibling for sibling in map(activations.get, activations.names()) if sibling.torch_function == record.torch_function
        ]
        match = [sibling for sibling in siblings if sibling.options == chosen]
        if not match:
            known = " or ".join(str(dict(sibling.options)) for sibling in siblings)
            raise ActivationError(f"{record.name} takes {known}, got {chosen}")
        record = match[0]
    chosen = [name for name in record.parameters if name in given]
    return _with_parameters(record, tuple((name, finite_number(record.name, name, given[name])) for name in chosen))


@lru_cache(maxsize=256)
def _with_parameters(record: Activation, values: tuple[tuple[str, float], ...]) -> Activation:
    return record.with_parameters(**dict(values)) if values else record


def _selects_variant(record: Activation) -> bool:
    return bool(record.options) and record.torch_name.endswith("." + record.name)


def docstring_of(record: Activation, summary: str, module: bool = False) -> str:
    """The docstring of a function, or of a module."""
    parameters = "".join(f"\n    {name:8} as in torch" for name in (*record.options, *record.parameters))
    if module:
        others = "Inputs of other dtypes, layouts or classes get torch's operation.\n\n    Raises InputError (double backward)"
    else:
        parameters = f"\n    input    (*), any shape and strides; float16, bfloat16, float32 or float64{parameters}"
        others = "Raises InputError (dtype, layout, double backward)"
    return f"""{summary}
{parameters}
    inplace  whether to overwrite the input, which backward does not need
    bits     bits of one code, 1 to 8; 3 if no table is given
    table    a CodeTable of your own, from `fewbit.design`
    shared   whether one code serves f' and f. Layers of fewbit that read the output then keep this code, not the output.
    Returns  (*), the exact activation, equal to torch's bit for bit. GPU kernels may differ by one unit in the last place.

    If the input needs a gradient, n elements keep ceil(n * bits / 8) bytes plus at most 512, and no reference to the input.
    The gradient is the incoming one times table(x). If the input needs no gradient, this is torch's own operation.

{_describe_table(record)}

    The codes of the derivative follow Novikov et al., "Few-bit backward: quantized gradients of activation functions for
    memory footprint reduction", ICML 2023. The exact forward with backward from codes follows Chakrabarti and Moseley,
    "Backprop with approximate activations for memory-efficient network training", NeurIPS 2019.

    {others}, DesignError (bits), TableError (a table of something else),
    ActivationError (a parameter) and TypeError (an argument).
    """


def _describe_table(record: Activation) -> str:
    text = f"""    The tables are those of fewbit.load_ladder({record.name!r}, bits). Each call measures the spread of up to
    {SAMPLE} elements of the input and takes the table for it. The tables cover scales from {RUNGS[0]:g} to {RUNGS[-1]:g}"""
    if activations.BUILT_IN.get(record.name) != record:
        return text + "."
    ladders = [load_ladder(record, bits) for bits in SHIPPED_BITS]
    if all(len(ladder) == 1 for ladder in ladders):
        return f"    The table is that of fewbit.load_table({record.name!r}, bits), which is exact."
    head = " bits" + "".join(f"{f'std {std:g}':>12}" for std in _TOLD)
    rows = (f"{ladder[0].bits:5}" + _errors_of(ladder) for ladder in ladders)
    return text + ". Relative rms error on\n    normal inputs:\n" + "\n".join(f"     {line}" for line in (head, *rows))


_TOLD = (RUNGS[0], 0.25, 1.0, 4.0, RUNGS[-1])  # docstrings list the error at these standard deviations


def _errors_of(ladder: tuple[CodeTable, ...]) -> str:
    by_std = dict(zip(RUNGS, ladder if len(ladder) > 1 else ladder * len(RUNGS), strict=True))
    return "".join(f"{by_std[std].relative_rms:12.4f}" for std in _TOLD)
