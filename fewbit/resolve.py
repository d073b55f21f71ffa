"""Bits or a table -> device tables: what the kernels read, on the device and for the dtype of an input."""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakSet

import numpy as np
import torch

from fewbit.constants import CHANNELS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, TableError
from fewbit.kernels import DeviceTable
from fewbit.record import Activation, label
from fewbit.store import load_ladder, load_table
from fewbit.torch_internals import unwatched

Array = np.ndarray
JOINT = CHANNELS  # the channels of a code that serves an activation and the layers that read its output
in_use: WeakSet[DeviceTable] = WeakSet()  # what they hold is read by backward, but no forward pass made it


def check(name: str, record: Activation, channels: tuple[str, ...], bits: int | None, table: CodeTable | None) -> None:
    """Raise DesignError for bad bits, TableError for a table of another activation, with other channels, or of other bits.

    name  of the function that was called
    """
    if bits is not None:
        check_bits(bits, DesignError)
    if table is not None:
        _check_table(name, record, channels, bits, table)


def _check_table(name: str, record: Activation, channels: tuple[str, ...], bits: int | None, table: CodeTable) -> None:
    if not isinstance(table, CodeTable):
        raise TableError(f"table must be a fewbit.CodeTable, got {type(table).__name__}; CodeTable.load(path) reads one")
    if table.channels != channels:
        wanted = " and ".join(map(repr, channels)) + (" alone" if len(channels) == 1 else "")
        raise TableError(
            f"{name} needs a table with the channel{'s' if len(channels) > 1 else ''} {wanted}, got {table.channels}"
        )
    if bits is not None and bits != table.bits:
        raise TableError(f"bits={bits} contradicts the table, which has {table.bits}; leave bits out")
    if table.activation is not None and (table.activation, table.parameters) != (record.name, dict(record.parameters)):
        raise TableError(
            f"the table is for {label(table.activation, table.parameters)}, not for {record}; design one for it, or set the "
            "table's activation to None with dataclasses.replace if that is what you mean"
        )


def shipped_tables(
    record: Activation, channels: tuple[str, ...], bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[DeviceTable, ...]:
    """The device tables that are used where no table is given, one for each channel: of the ladder that `fewbit.load_ladder`
    gives for these bits, or, for values alone, which layers standardize, of the table that `fewbit.load_table` gives."""
    load = load_ladder if "derivative" in channels else load_table
    return device_tables(load(record, bits, channels=channels), dtype, device)


@lru_cache(maxsize=256)
def device_tables(
    table: CodeTable | tuple[CodeTable, ...], dtype: torch.dtype, device: torch.device
) -> tuple[DeviceTable, ...]:
    """One DeviceTable for each channel of a table or a ladder, with the same thresholds and codes, for inputs of a dtype.

    Thresholds are rounded down to float32: for a float32 x, x <= t holds for both or neither. Whatever mode or transform is
    active when they are first asked for, they outlast it.
    """
    rungs = (table,) if isinstance(table, CodeTable) else table
    m, count = max(each.thresholds.size for each in rungs), max(each.levels.shape[1] for each in rungs)
    by_rung = [_padded(*_arrays(each, dtype), m, count) for each in rungs]
    thresholds, codes, levels = by_rung[0] if len(by_rung) == 1 else map(np.stack, zip(*by_rung, strict=True))
    with unwatched():
        tensors = [torch.from_numpy(array.copy()).to(device) for array in (thresholds, codes, *np.moveaxis(levels, -2, 0))]
        found = tuple(DeviceTable(tensors[0], tensors[1], channel, rungs[0].bits) for channel in tensors[2:])
    in_use.update(found)
    return found


def _padded(thresholds: Array, codes: Array, levels: Array, m: int, count: int) -> tuple[Array, Array, Array]:
    """The same table with m thresholds and `count` levels: infinite thresholds, at which the code does not change."""
    return (
        np.pad(thresholds, (0, m - thresholds.size), constant_values=np.inf),
        np.pad(codes, (0, m + 1 - codes.size), "edge"),
        np.pad(levels, ((0, 0), (0, count - levels.shape[1]))),
    )


def _arrays(table: CodeTable, dtype: torch.dtype) -> tuple[Array, Array, Array]:
    """Thresholds (m,), codes (m+1,) and levels (channels, K) in the dtype of comparisons."""
    thresholds, levels = table.thresholds, table.levels
    if dtype != torch.float64:
        with np.errstate(over="ignore"):  # a threshold beyond float32 is infinite, and compares as well
            single, levels = thresholds.astype(np.float32), levels.astype(np.float32)
        thresholds = np.where(single > thresholds, np.nextafter(single, np.float32(-np.inf)), single)
        if not np.all(np.isfinite(levels)):
            raise TableError(f"{table} has levels beyond float32; use another table, or inputs of float64")
    return thresholds, table.codes, levels
