"""How every call of fewbit's functions and modules runs, eager and compiled: check, decide, resolve, run.

Each function or module makes or finds an `Operation` and passes it to `run` with its operands. Compiled code takes the same
four steps. It checks and resolves while the code is traced; the results are constants of the graph, which holds one call of
`_in_graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fewbit import activations, constants, resolve
from fewbit.autograd import exact as exact_mode
from fewbit.autograd import sharing, watched
from fewbit.constants import DEFAULT_LAYER_BITS, MAX_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError, InputError
from fewbit.kernels import DeviceTable
from fewbit.record import Activation
from fewbit.torch_internals import (
    constant_number,
    in_forward_mode,
    is_empty,
    is_intercepted,
    is_torchs_own,
    is_traced,
    is_transformed,
    is_watched_in_eager,
    levels,
    unintercepted,
)

Tensor = torch.Tensor
DTYPES = tuple(getattr(torch, name) for name in constants.DTYPES)
_DTYPES = frozenset(DTYPES)
_MOST = Tensor, torch.nn.Parameter  # the most frequent classes, known to be torch's own


@dataclass(frozen=True, eq=False)
class Operation:
    """One of torch's operations with certain options, and the operations that replace it where codes are kept.

    name      name in error messages
    exact     torch's own operation, on the operands
    coded     the same with codes for backward. It takes the operands, then the device tables.
    watched   the same under a compiler, a transform or a mode; `coded` itself, if that may be traced
    record    record of the activation that the table is for; the identity for codes of values
    channels  channels of the table; empty for exact codes
    bits      default if neither bits nor a table is given
    table     Default table, which goes before `bits`. Without it an activation takes its ladder, and values take their table.
    values    whether the device table of a standard normal number is passed after those of `channels`
    finer     If not 0, one more device table, of this many bits more, is passed before those of `channels`.
    masks     Whether the result is the input times a mask. It is then coded even if the input needs no gradient, provided the
              model made the input: layers that read the result want the mask and a code of the input.
    transforms  whether codes are kept under torch.func; if not, the operation is torch's own there
    tables    function of a dtype and a device that gives the device tables of an exact code. Users choose no bits for these.
    """

    name: str
    exact: Callable[..., Tensor]
    coded: Callable[..., Tensor]
    watched: Callable[..., Tensor]
    record: Activation = activations.IDENTITY
    channels: tuple[str, ...] = ()
    bits: int = DEFAULT_LAYER_BITS
    table: CodeTable | None = None
    values: bool = False
    finer: int = 0
    masks: bool = False
    transforms: bool = False
    tables: Callable[[torch.dtype, torch.device], tuple[DeviceTable, ...]] | None = None


def run(
    make: Callable[..., Operation],
    options: tuple,
    operands: tuple,
    bits: int | None = None,
    table: CodeTable | None = None,
    by_name: bool = True,
) -> Tensor:
    """Run the operation make(*options) on the operands. The result is exact. Codes are kept if a gradient needs them.

    make      Makes the Operation from its options. It is passed instead of an Operation, so that equal calls find one cached
              Operation, and so that a compiler can hold the options as constants.
    operands  tensors, the input first, None for those left out, and numbers that change from call to call
    bits      bits of one code, 1 to 8
    table     a table of your own, instead of bits
    by_name   Whether the user called a function of fewbit by its name. An input that cannot be coded is then an error. Modules
              and replaced functions of torch pass such an input to torch.

    Raises InputError (an input that cannot be coded), DesignError (bits), TableError (a table of something else), and what
    `make` raises: ActivationError (a parameter), TypeError (an argument).
    """
    if torch.compiler.is_compiling():
        return _run_in_graph(make, options, operands, bits, table, by_name)
    if is_intercepted():  # a mode intercepts calls, and each access to a tensor would go through Python
        if not by_name and any(isinstance(each, Tensor) and not is_torchs_own(type(each)) for each in operands):
            return _operation(make, *options).exact(*operands)  # the mode sees what torch keeps
        with unintercepted():
            return run(make, options, operands, bits, table, by_name)
    operation, x = _operation(make, *options), operands[0]
    _check(operation, x, bits, table, by_name)
    chosen = _decide(operation, operands, by_name)
    if chosen is operation.exact:
        return sharing.note_made(chosen(*operands), operands) if not exact_mode.is_active() else chosen(*operands)
    return chosen(*operands, *_tables(operation, bits, table, x.dtype, x.device))


@lru_cache(maxsize=1024)
def _operation(make: Callable[..., Operation], *options: Any) -> Operation:
    return make(*options)


def _check(operation: Operation, x: Any, bits: int | None, table: CodeTable | None, by_name: bool) -> None:
    """Raise for bits or a table that do not fit and, if the user called by name, for an input that cannot be coded."""
    if by_name and (not isinstance(x, Tensor) or x.dtype not in DTYPES):
        raise InputError(not_codable(operation.name, x))
    if table is not None or (
        bits is not None and not (type(bits) is int and 1 <= bits <= MAX_BITS)
    ):  # the common case, checked inline for speed
        resolve.check(operation.name, operation.record, operation.channels, bits, table)


def not_codable(name: str, x: Any) -> str:
    """The error message for a tensor, a dtype or a type of which no codes can be made."""
    if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided):
        got = "a nested tensor" if x.is_nested else x.layout
        return f"{name} can code dense tensors, got {got}; convert it first, or call torch's own operation"
    if isinstance(x, Tensor) and not is_torchs_own(type(x)):
        return f"{name} can code torch's own tensors, got the subclass {type(x).__name__}; call torch's own operation"
    if isinstance(x, (Tensor, torch.dtype)):
        dtype = x.dtype if isinstance(x, Tensor) else x
        return (
            f"{name} takes a float16, bfloat16, float32 or float64 tensor, got {dtype}; convert it, for instance with "
            "x.float(), or call torch's own operation"
        )
    if isinstance(x, torch.fx.Proxy):
        return (
            f"torch.fx.symbolic_trace cannot look into {name}: it depends on the tensor's dtype; trace with torch.export, "
            "or call torch's own operation"
        )
    kind = x if isinstance(x, type) else type(x)
    return f"{name} takes a torch.Tensor, got {kind.__name__}; convert it with torch.as_tensor"


def _decide(operation: Operation, operands: Sequence[Any], by_name: bool) -> Callable[..., Tensor]:
    """Choose what runs: the operation's `exact`, `coded` or `watched`."""
    x, needed = operands[0], False
    if exact_mode.active or exact_mode.compiled_depth or not torch.is_grad_enabled() or not isinstance(x, Tensor):
        return operation.exact
    if is_traced():  # a traced script holds torch's operation: from ours it would hold this batch's codes as constants
        return operation.exact
    if is_watched_in_eager(x):
        return _decide_watched(operation, operands, by_name)
    codable = x.dtype in _DTYPES
    for each in operands:
        if isinstance(each, Tensor):
            needed = needed or each.requires_grad
            codable = codable and takes_part(each)
    needed = needed or _wants_mask(operation, x)
    if not needed or (not operation.transforms and codable and x.numel() == 0):  # statistics of no elements divide by zero
        return operation.exact
    if not codable:
        return _exact_or_refused(operation, operands, by_name)
    return operation.coded


def _wants_mask(operation: Operation, x: Tensor) -> bool:
    """Whether layers that read the result may want its mask although x needs no gradient."""
    return operation.masks and not x.requires_grad and sharing.is_made(x)


def _decide_watched(operation: Operation, operands: Sequence[Any], by_name: bool) -> Callable[..., Tensor]:
    """The same choice under a compiler, a transform or a mode."""
    given = [each for each in operands if isinstance(each, Tensor)]
    if operation.transforms and by_name:
        watched.check_no_tangent(given[0], operation.name)
    elif in_forward_mode() or (is_transformed() and not operation.transforms):
        return operation.exact
    # exported programs hold torch's operation, because an exported graph keeps no autograd Function
    needed = any(level.requires_grad for each in given for level in levels(each)) or _wants_mask(operation, given[0])
    if torch.compiler.is_exporting() or not needed:
        return operation.exact
    codable = is_codable(given[0]) and all(map(takes_part, given))
    if codable and not operation.transforms and is_empty(given[0]):
        return operation.exact
    return operation.watched if codable else _exact_or_refused(operation, given, by_name)


def _exact_or_refused(operation: Operation, operands: Sequence[Any], by_name: bool) -> Callable[..., Tensor]:
    """torch's own operation for operands that cannot be coded. InputError if the user called by name."""
    if not by_name:
        return operation.exact
    wrong = next((each for each in operands if isinstance(each, Tensor) and not takes_part(each)), operands[0])
    raise InputError(not_codable(operation.name, wrong))


def is_codable(x: Any) -> bool:
    """Whether x can be coded: its dtype, layout and class decide."""
    return takes_part(x) and x.dtype in _DTYPES


def takes_part(x: Any) -> bool:
    """Whether x may be an operand: it can be coded, or is a mask of booleans."""
    return (
        (type(x) in _MOST or (isinstance(x, Tensor) and is_torchs_own(type(x))))
        and (x.dtype in _DTYPES or x.dtype == torch.bool)
        and x.layout == torch.strided
        and not x.is_nested
    )


@lru_cache(maxsize=1024)
def _tables(
    operation: Operation, bits: int | None, table: CodeTable | None, dtype: torch.dtype, device: torch.device
) -> tuple[DeviceTable, ...]:
    """Resolve: the device tables for these bits or this table."""
    if not operation.channels:
        return () if operation.tables is None else operation.tables(dtype, device)
    table = table or (operation.table if bits is None else None)
    bits = table.bits if table is not None else bits or operation.bits
    if table is not None:
        found = resolve.device_tables(table, dtype, device)
    else:
        found = resolve.shipped_tables(operation.record, operation.channels, bits, dtype, device)
    if operation.finer:
        more = min(bits + operation.finer, MAX_BITS)
        found = (found if table else resolve.shipped_tables(operation.record, operation.channels, more, dtype, device)) + found
    if operation.values:
        found += resolve.shipped_tables(activations.IDENTITY, ("value",), bits, dtype, device)
    return found


# Compiled code


def _run_in_graph(
    make: Callable[..., Operation], options: tuple, operands: tuple, bits: Any, table: CodeTable | None, by_name: bool
) -> Tensor:
    """`run` in code that torch.compile or torch.export traces."""
    from fewbit.autograd import compiled  # imported here because it loads dynamo

    x = operands[0]
    place = (x.dtype, x.device) if isinstance(x, Tensor) else (type(x), None)
    leaves = _leaves(fixed(options))  # passed one by one: the compiler takes an object as a constant, but not inside a tuple
    ready = compiled.constant(_prepare, *place, fixed(bits), table, by_name, make, _shape(options), *leaves)
    return compiled.call(ready.key, list(operands), ready.tensors, ready.bits, exact_mode.is_active(), by_name)


class _Ready:
    """A checked and resolved operation, in a form that a graph can hold: the key for `_in_graph`, tensors and a number."""

    def __init__(self, key: str, tables: Sequence[DeviceTable]):
        self.key, self.bits = key, tables[0].bits if tables else 0
        self.tensors = [tensor for table in tables for tensor in (table.thresholds, table.codes, table.levels)]


def _prepare(
    dtype: Any,
    device: Any,
    bits: int | None,
    table: CodeTable | None,
    by_name: bool,
    make: Any,
    shape: Any,
    *leaves: Any,
) -> _Ready:
    """Check and resolve while the code is traced. The key of an operation is its `make` and options, without its tables.

    dtype  of the input, or the type of an input that is no tensor
    """
    from fewbit.autograd import compiled

    options = _nested(shape, iter(leaves))
    operation = _operation(make, *options)
    if not isinstance(dtype, torch.dtype) or (by_name and dtype not in DTYPES):
        raise InputError(not_codable(operation.name, dtype))
    _check(operation, None, bits, table, by_name=False)
    key = compiled.remember((make, options), operation.name, lambda *arguments: _in_graph(operation, *arguments))
    return _Ready(key, _tables(operation, bits, table, dtype, device))


def _in_graph(operation: Operation, operands: list, tensors: list[Tensor], bits: int, exact: bool, by_name: bool) -> Tensor:
    """Decide and run in Python, when AOTAutograd traces the graph or when the graph runs."""
    chosen = operation.exact if exact else _decide(operation, operands, by_name)
    if chosen is operation.exact:
        return chosen(*operands)
    parts = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
    return chosen(*operands, *(DeviceTable(thresholds, codes, levels, bits) for thresholds, codes, levels in parts))


def _leaves(value: Any) -> list[Any]:
    """The items of nested tuples, in order."""
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, tuple) else [value]


def _shape(value: Any) -> Any:
    """The nested tuples with None in place of every item."""
    return tuple(_shape(each) for each in value) if isinstance(value, tuple) else None


def _nested(shape: Any, leaves: Iterator[Any]) -> Any:
    """Nested tuples of this shape with these leaves."""
    return tuple(_nested(each, leaves) for each in shape) if isinstance(shape, tuple) else next(leaves)


def fixed(value: Any) -> Any:
    """The value as a constant. Without this a compiler would make a symbol of a number that changes between calls.

    Tuples are treated item by item.
    """
    if isinstance(value, tuple):
        return tuple(fixed(each) for each in value)
    if isinstance(value, Tensor):
        raise ActivationError("in compiled code parameters of activations are numbers, got a tensor; pass value.item()")
    return constant_number(value) if isinstance(value, (int, float)) else value
