"""What the functional and the module drop-ins share: the one way from a record and a tensor to a coded activation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol

import torch

from fewbit import activations, coders
from fewbit.autograd import handle, switch, traced
from fewbit.autograd.activation import activation_of_coded, coded_activation
from fewbit.coders import JOINT
from fewbit.constants import SHIPPED_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError, InputError
from fewbit.kernels import Coder, Formula
from fewbit.record import Activation, finite_number
from fewbit.store import load_table

Tensor = torch.Tensor
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXTRAS = frozenset(("bits", "table", "shared", "inplace"))  # what every drop-in takes besides torch's own arguments
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


class RecordMaker(Protocol):
    """A class whose instances compute an activation that depends on values of their attributes."""

    name: ClassVar[str]  # of the activation

    @classmethod
    def record_at(cls, values: dict[str, Any]) -> Activation:
        """The record at these values, by name."""
        ...


def apply(
    record: Activation,
    x: Tensor,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
    inplace: bool = False,
) -> Tensor:
    """The activation of a record on x: exact, with codes for backward where x needs a gradient.

    x        float16, bfloat16, float32 or float64; any shape, strides and device
    bits     of one code, 1 to 8: a shipped table; 3 if no table is given
    table    a table of your own, instead, with the channel "derivative", or with "derivative" and "value", which is shared
    shared   whether one code is to serve the coded layers that read the result, too
    inplace  overwrite x, which backward does not need
    Returns  a tensor of x's shape, and of x's dtype unless autocast says otherwise

    Raises InputError for other dtypes, DesignError for other bits, TableError for a table of another activation.
    """
    check_input(record.name, x)
    check_arguments(record, bits, table, shared)
    exact = switch.is_exact()
    if not exact:
        traced.check_no_tangent(x, record.name)
    if not (torch.is_grad_enabled() and (x.requires_grad or traced.wants_gradient(x))):
        return record.forward_inplace(x) if inplace else record.forward(x)
    if exact:  # torch's own backward may need the x that is overwritten
        return x.copy_(record.forward(x.clone())) if inplace else record.forward(x)
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise InputError(f"{record.name} can code a dense tensor, got {kind}; convert it first")
    forward_inplace = record.forward_inplace if inplace and not x._is_view() else None
    if inplace:
        _check_overwritable(record.name, x)
    coder, value_coder = coders_for(record, bits, table, shared, x.dtype, x.device)
    if value_coder is not None and (slopes := _slopes(record)) is not None:
        recipe = handle.find(x)
        if recipe is not None and recipe.keeps_sign:
            y = activation_of_coded(x, recipe, record.forward, slopes, forward_inplace)
            return x.copy_(y) if inplace and forward_inplace is None else y
    formula = _formula(record, x) if x.is_cuda and not inplace else None
    y = coded_activation(x, record.forward, coder, forward_inplace, formula, value_coder)
    # torch lets no function with two outputs, as coded_activation has inside, overwrite a view
    return x.copy_(y) if inplace and forward_inplace is None else y


@lru_cache(maxsize=256)
def _slopes(record: Activation) -> tuple[float, float] | None:
    """f' below and above 0, for an f of two straight lines that meet there."""
    if record.derivative_shape.jumps != (0.0,):
        return None
    table = load_table(record, 1)
    return tuple(table.levels[0, table.codes].tolist()) if table.mse == 0 and table.thresholds.tolist() == [0] else None


def _formula(record: Activation, x: Tensor) -> Formula | None:
    """The record's closed form: for the built-in activations, unless autocast makes torch's operation change the dtype."""
    built_in = activations.BUILT_IN.get(record.name)
    if built_in is None or (built_in.function, built_in.torch_function) != (record.function, record.torch_function):
        return None
    if torch.is_autocast_enabled(x.device.type) and record.forward(x.new_empty(0)).dtype != x.dtype:
        return None
    return record.name, record.parameters


def apply_compiled(record: Activation | type[RecordMaker], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same in code that torch.compile or torch.export traces; takes what the functional drop-in takes, or, with a class
    that makes records, the values that it makes them of.

    The arguments are checked and the coder is made once, while the code is traced: none of that, all cached or slow, gets
    into the graph.
    """
    from fewbit.autograd import compiled  # here, since it loads dynamo

    check_input(record.name, x)
    numbers, named = [fixed(value) for value in args], {name: fixed(value) for name, value in kwargs.items()}
    return run_compiled(x, compiled.constant(_constants, record, x.dtype, x.device, *numbers, **named))


def run_compiled(x: Tensor, constants: Any) -> Tensor:
    """The activation of those constants on x, in code that a compiler traces."""
    from fewbit.autograd import compiled  # here, since it loads dynamo

    run = compiled.overwriting_activation if constants.inplace else compiled.activation
    return run(x, constants.tensors, constants.bits, constants.name, switch.is_exact())


def fixed(value: Any) -> Any:
    """The value itself, of which a compiler would make a symbol where it is a number that changes between calls; a tuple of
    values likewise."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # here, since it loads sympy

    if isinstance(value, tuple):
        return tuple(fixed(each) for each in value)
    if isinstance(value, Tensor):
        raise ActivationError("in compiled code parameters of activations are numbers, got a tensor; pass value.item()")
    return guard_scalar(value) if isinstance(value, (int, float)) else value


def _constants(
    record: Activation | type[RecordMaker], dtype: torch.dtype, device: torch.device, /, *args: Any, **kwargs: Any
) -> Any:
    """What `compiled` needs, for these arguments of the functional drop-in."""
    if isinstance(record, Activation):
        kwargs = bind(_signature(record), record.name, None, *args, **kwargs)
    extras = {name: kwargs.pop(name) for name in EXTRAS if name in kwargs}
    bound = bound_record(record, kwargs) if isinstance(record, Activation) else record.record_at(kwargs)
    return constants(bound, dtype, device, **extras)


def constants(
    record: Activation,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
    table: CodeTable | None = None,
    shared: bool = False,
    inplace: bool = False,
) -> Any:
    """What `run_compiled` needs: made while the code is traced, by a call that `compiled.constant` keeps out of the graph."""
    from fewbit.autograd.compiled import Constants

    check_arguments(record, bits, table, shared)
    coder, value_coder = coders_for(record, bits, table, shared, dtype, device)
    slopes = _slopes(record) if value_coder is not None else None
    return Constants(coder, value_coder, slopes, record.forward, record.name, inplace)


def coders_for(
    record: Activation, bits: int | None, table: CodeTable | None, shared: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Coder, Coder | None]:
    """The coders of the derivative and, where the code is shared, of the value."""
    if shared or (table is not None and table.channels == JOINT):
        derivative, value = coders.joint_coders(record, bits, table, dtype, device)
        return derivative, value
    return coders.derivative_coder(record, bits, table, dtype, device), None


def check_arguments(record: Activation, bits: int | None, table: CodeTable | None, shared: bool = False) -> None:
    """Raise DesignError for bad bits, TableError for a table that does not hold what is needed of this activation."""
    joint = shared or (isinstance(table, CodeTable) and table.channels == JOINT)
    coders.check_arguments(record.name, bits, table, JOINT if joint else ("derivative",))
    coders.check_table_of(record, table)


def check_input(name: str, x: Any) -> None:
    """Raise InputError for what cannot be coded: no tensor, or one of another dtype."""
    if not isinstance(x, Tensor):
        if isinstance(x, torch.fx.Proxy):
            raise InputError(
                f"torch.fx.symbolic_trace cannot look into {name}: it depends on the tensor's dtype; trace with torch.export, "
                "or make fewbit's modules leaves in Tracer.is_leaf_module"
            )
        raise InputError(f"{name} takes a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if x.dtype not in _DTYPES:
        raise InputError(
            f"{name} takes a float16, bfloat16, float32 or float64 tensor, got {x.dtype}; convert it, for instance with "
            f"x.float(), or call torch's own operation"
        )


def is_codable(x: Tensor) -> bool:
    """Whether activations of x can be coded, by its dtype and layout."""
    return x.dtype in _DTYPES and x.layout == torch.strided and not x.is_nested


def _check_overwritable(name: str, x: Tensor) -> None:
    """torch checks in-place operations too, but after they have written."""
    if any(tensor.is_leaf for tensor in (x, x._base) if tensor is not None):
        raise InputError(f"{name} cannot overwrite a leaf that requires a gradient, nor a view of one; pass inplace=False")
    views: Any = torch._C._autograd  # type: ignore[attr-defined]
    if x._is_view() and views._get_creation_meta(x) != views.CreationMeta.DEFAULT:
        raise InputError(
            f"{name} cannot overwrite this view: it is one of several that a function such as chunk returned, or was made "
            "without gradients; pass inplace=False"
        )


@cache
def function(record: Activation) -> Callable[..., Tensor]:
    """The function `fewbit.functional.NAME` for a record, with torch's signature."""
    signature = _signature(record)

    def drop_in(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return apply_compiled(record, input, *args, **kwargs)
        if not args and kwargs.keys() <= EXTRAS:
            return apply(record, input, **kwargs)
        given = bind(signature, record.name, input, *args, **kwargs)
        extras = {name: given.pop(name) for name in EXTRAS if name in given}
        return apply(bound_record(record, given), given.pop("input"), **extras)

    drop_in.__name__ = drop_in.__qualname__ = record.name
    drop_in.__module__ = "fewbit.functional"
    drop_in.record = record  # type: ignore[attr-defined]
    drop_in.__signature__ = signature  # type: ignore[attr-defined]
    drop_in.__doc__ = describe(record, f"{record.torch_name}: exact forward, backward from codes of a few bits an element.")
    return drop_in


def _signature(record: Activation) -> inspect.Signature:
    return inspect.Signature([inspect.Parameter("input", _POSITIONAL), *arguments(record).values()])


def bind(signature: inspect.Signature, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments given, by name; TypeError, naming the function, as Python's own."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{name}{signature}: {error}") from None


def arguments(record: Activation) -> dict[str, inspect.Parameter]:
    """What a drop-in takes besides its input: torch's arguments in torch's order, then `inplace`, `bits`, `table`, `shared`."""
    own = {**(record.options if _selects_variant(record) else {}), **record.parameters, "inplace": False}
    taken = {name: inspect.Parameter(name, _POSITIONAL, default=default) for name, default in own.items()}
    for name, default in (("bits", None), ("table", None), ("shared", False)):
        taken[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return taken


def bound_record(record: Activation, given: Mapping[str, Any]) -> Activation:
    """The record at the numeric parameters and options (such as approximate="tanh") among `given`; the rest is ignored."""
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


def describe(record: Activation, summary: str) -> str:
    """The docstring of a drop-in."""
    parameters = "".join(f"\n    {name:8} as in torch" for name in (*record.options, *record.parameters))
    return f"""{summary}

    input    (*), any shape and strides; float16, bfloat16, float32 or float64{parameters}
    inplace  overwrite the input; backward does not need it
    bits     of one code, 1 to 8; 3 if no table is given
    table    a CodeTable of your own, from `fewbit.design`
    shared   one code for f' and f, which coded layers that read the output keep, too, and not the output
    Returns  (*), the exact activation, bit for bit torch's (within one unit in the last place where a GPU kernel computes it)

    Where the input needs a gradient, ceil(n * bits / 8) bytes plus at most 512 are kept for n elements, and no reference to
    the input; the gradient is the incoming one times table(x). Otherwise this is torch's own operation.

{_describe_table(record)}

    Codes of the derivative: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory
    footprint reduction", ICML 2023. Exact forward, backward from codes: Chakrabarti and Moseley, "Backprop with approximate
    activations for memory-efficient network training", NeurIPS 2019.

    Raises InputError (dtype, double backward), DesignError (bits), TableError (a table of something else).
    """


def _describe_table(record: Activation) -> str:
    text = f"    Table used: fewbit.load_table({record.name!r}, bits), weight student, level coding"
    if activations.BUILT_IN.get(record.name) != record:
        return text + "."
    tables = [load_table(record, bits) for bits in SHIPPED_BITS]
    rows = (f"      {table.bits:4}  {table.thresholds.size + 1:9}  {table.relative_rms:18.4f}" for table in tables)
    return text + ":\n      bits  intervals  relative rms error\n" + "\n".join(rows)
