"""Encode and decode as torch operators, `torch.ops.fewbit.encode` and `decode`, which are opaque to compilers and transforms.

Both work on the last dimension and pack each row separately. Under vmap a sample is a row. If the batch were packed as one, a
sample's codes would lie among those of its neighbours. Code that does not know this, such as functorch's generated rules, would
then read gradients of other samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import kernels
from fewbit.constants import RUNGS
from fewbit.errors import InputError
from fewbit.kernels.device_table import DeviceTable
from fewbit.torch_internals import is_dispatched, versions_of

Tensor = torch.Tensor
_TABLE = "Tensor thresholds, Tensor codes, Tensor levels, int bits"
# torch.library.custom_op would work too, at more than twice the overhead: it checks for mutation, which does not occur here
library = torch.library.Library("fewbit", "DEF")
_known: dict[tuple, DeviceTable] = {}
library.define(f"encode(Tensor x, {_TABLE}) -> Tensor")
library.define(f"decode(Tensor packed, Tensor grad, {_TABLE}) -> Tensor")


def encode(x: Tensor, thresholds: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Packed codes, row by row.

    x        (*, n), float16, bfloat16, float32 or float64
    others   as in `fewbit.kernels.DeviceTable`
    Returns  (*, packed_bytes(n)) uint8, with `packed_bytes` of the DeviceTable; with a ladder each row takes its own rung
    """
    table = device_table(thresholds, codes, levels, bits)
    if x.dim() == 1:
        return kernels.encode(x.contiguous(), table)
    packed = x.new_empty((*x.shape[:-1], table.packed_bytes(x.shape[-1])), dtype=torch.uint8)
    for source, target in zip(_rows(x.contiguous()), _rows(packed), strict=True):
        target.copy_(kernels.encode(source, table))
    return packed


def decode(packed: Tensor, grad: Tensor, thresholds: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """grad times the levels of the packed codes, row by row.

    packed   (*, packed_bytes(n)) uint8 from `encode`
    grad     (*, n)
    Returns  (*, n) of grad's dtype
    """
    table = device_table(thresholds, codes, levels, bits)
    packed, grad = packed.contiguous(), grad.contiguous()
    if packed.shape[-1] != (expected := table.packed_bytes(grad.shape[-1])):
        raise InputError(f"{grad.shape[-1]} codes of {bits} bits take {expected} bytes, got {packed.shape[-1]}")
    if grad.dim() == 1:
        return kernels.decode(packed, grad, table)
    product = torch.empty_like(grad)
    for codes_of_row, source, target in zip(_rows(packed), _rows(grad), _rows(product), strict=True):
        target.copy_(kernels.decode(codes_of_row, source, table))
    return product


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]).unbind()


def device_table(thresholds: Tensor, codes: Tensor, levels: Tensor, bits: int) -> DeviceTable:
    """The table of these tensors, which also keeps what a backend derives from them.

    Known tables are found by the addresses of their tensors, because compiled code passes the same memory as new tensor
    objects, and by their versions, which count in-place changes. Known tables hold their memory, so no other tensor can have
    the address.
    """
    tensors = thresholds, codes, levels
    try:
        key = (bits, versions_of(*tensors), *[(each.data_ptr(), each.shape, each.dtype) for each in tensors])
    except RuntimeError:  # tensors made in inference mode have no version
        _check_sizes(*tensors, bits)
        return DeviceTable(*tensors, bits)
    table = _known.get(key)
    if table is None:
        _check_sizes(*tensors, bits)
        if len(_known) >= 256:
            _known.clear()
        table = _known[key] = DeviceTable(*tensors, bits)
    return table


def _check_sizes(thresholds: Tensor, codes: Tensor, levels: Tensor, bits: int) -> None:
    """Raise InputError for sizes or dtypes that do not fit. Kernels read memory by address and rely on them."""
    *rungs, m = thresholds.shape or (-1,)
    is_table = list(codes.shape) == [*rungs, m + 1] and codes.dtype == torch.uint8
    has_levels = list(levels.shape[:-1]) == rungs and 1 <= levels.shape[-1] <= 2**bits <= 256
    if not (is_table and has_levels and rungs in ([], [len(RUNGS)])):
        raise InputError(
            f"a table of {bits} bits has m thresholds, m + 1 uint8 codes and up to {2**bits} levels, and a ladder has "
            f"{len(RUNGS)} such rows; got thresholds {tuple(thresholds.shape)}, {codes.dtype} codes {tuple(codes.shape)} and "
            f"levels {tuple(levels.shape)}"
        )


library.impl("encode", encode, "CompositeExplicitAutograd")
library.impl("decode", decode, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbit::encode", lib=library)
def _(x, thresholds, codes, levels, bits):
    size = DeviceTable(thresholds, codes, levels, bits).packed_bytes(x.shape[-1])
    return x.new_empty((*x.shape[:-1], size), dtype=torch.uint8)


@torch.library.register_fake("fewbit::decode", lib=library)
def _(packed, grad, thresholds, codes, levels, bits):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _encode_batch(info, in_dims, x, thresholds, codes, levels, bits):
    _check_shared(in_dims[1:])
    return torch.ops.fewbit.encode(x.movedim(in_dims[0], 0), thresholds, codes, levels, bits), 0


def _decode_batch(info, in_dims, packed, grad, thresholds, codes, levels, bits):
    _check_shared(in_dims[2:])
    packed, grad = (
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((packed, grad), in_dims[:2], strict=True)
    )
    return torch.ops.fewbit.decode(packed, grad, thresholds, codes, levels, bits), 0


def _check_shared(in_dims: tuple[int | None, ...]) -> None:
    if any(dim is not None for dim in in_dims):
        raise InputError("vmap over code tables is not supported; pass thresholds, codes and levels with in_dims=None")


def operator(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of that schema. It runs `function`, or `fake` if tensors have no numbers. vmap runs it on one sample after
    the other."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbit::{name}", fake, lib=library)
    found = getattr(torch.ops.fewbit, name)
    torch.library.register_vmap(f"fewbit::{name}", _looped(found), lib=library)
    return found


def _looped(operator: Any) -> Callable[..., Any]:
    """The rule by which vmap runs an operator on one sample after the other."""

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        results = []
        for i in range(info.batch_size):
            sample = (
                each.select(dim, i) if isinstance(each, Tensor) and dim is not None else each
                for each, dim in zip(arguments, in_dims, strict=True)
            )
            results.append(operator(*sample))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def constants(table: DeviceTable) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, codes and levels for operators. Fake-tensor modes and tracers have to be told that they are constants. In
    compiled code they are inputs of the graph."""
    tensors = table.thresholds, table.codes, table.levels
    if not is_dispatched():
        return tensors
    return tuple(torch.ops.aten.lift_fresh(each) if type(each) is Tensor else each for each in tensors)  # type: ignore[return-value]


def refuse_second_derivative(*_: object) -> None:
    """Raise InputError. This is the backward of a gradient from codes."""
    raise InputError(
        "the gradient of a coded activation or layer can be taken once: its codes hold no second derivative; "
        "for double backward (gradient penalties, Hessians), run that part inside fewbit.exact()"
    )


torch.library.register_vmap("fewbit::encode", _encode_batch, lib=library)
torch.library.register_vmap("fewbit::decode", _decode_batch, lib=library)
torch.library.register_autograd("fewbit::decode", refuse_second_derivative, lib=library)


def values(packed: Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> Tensor:
    """See `fewbit.kernels.values`."""
    return _values(packed, n, *constants(table), table.bits, dtype)


def _values_now(packed, n, thresholds, codes, levels, bits, dtype):
    return kernels.values(packed, n, device_table(thresholds, codes, levels, bits), dtype)


def _fake_values(packed, n, thresholds, codes, levels, bits, dtype):
    return packed.new_empty(n, dtype=dtype)


_values = operator(f"values(Tensor packed, SymInt n, {_TABLE}, ScalarType dtype) -> Tensor", _values_now, _fake_values)
