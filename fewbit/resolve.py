"""Turns bits or a table into device tables: what the kernels read, on the device and for the dtype of an input."""

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
JOINT = CHANNELS  # channels of a code that serves an activation and the layers that read its output
in_use: WeakSet[DeviceTable] = WeakSet()  # device tables in use: backward reads their tensors, which no forward pass made


def check(name: str, record: Activation, channels: tuple[str, ...], bits: int | None, table: CodeTable | None) -> None:
    """Raise DesignError for bad bits, and TableError for a table of another activation, with other channels, or of other bits.

    name  name of the function that was called
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
    """The default device tables, one for each channel.

    They come from the ladder of `fewbit.load_ladder` for these bits. Layers standardize values, so codes of values alone take
    the single table of `fewbit.load_table`.
    """
    load = load_ladder if "derivative" in channels else load_table
    return device_tables(load(record, bits, channels=channels), dtype, device)


@lru_cache(maxsize=256)
def device_tables(
    table: CodeTable | tuple[CodeTable, ...], dtype: torch.dtype, device: torch.device
) -> tuple[DeviceTable, ...]:
    """One DeviceTable for each channel of a table or a ladder, for inputs of a dtype. They share thresholds and codes.

    Thresholds are rounded down to float32. For a float32 x this does not change the result of x <= t. The tensors outlast any
    mode or transform that is active when they are made.
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
    """The table padded to m thresholds and `count` levels. Added thresholds are infinite and do not change the code."""
    return (
        np.pad(thresholds, (0, m - thresholds.size), constant_values=np.inf),
        np.pad(codes, (0, m + 1 - codes.size), "edge"),
        np.pad(levels, ((0, 0), (0, count - levels.shape[1]))),
    )


def _arrays(table: CodeTable, dtype: torch.dtype) -> tuple[Array, Array, Array]:
    """Thresholds (m,), codes (m+1,) and levels (channels, K) in the dtype of comparisons."""
    thresholds, levels = table.thresholds, table.levels
    if dtype != torch.float64:
        with np.errstate(over="ignore"):  # a threshold beyond float32 becomes infinite, which compares the same
            single, levels = thresholds.astype(np.float32), levels.astype(np.float32)
        thresholds = np.where(single > thresholds, np.nextafter(single, np.float32(-np.inf)), single)
        if not np.all(np.isfinite(levels)):
            raise TableError(f"{table} has levels beyond float32; use another table, or inputs of float64")
    return thresholds, table.codes, levels
