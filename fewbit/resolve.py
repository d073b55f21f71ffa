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
from fewbit.store import load_table
from fewbit.torch_internals import unwatched

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
    """The device tables of the table that `fewbit.load_table` gives for these bits, one for each channel."""
    return device_tables(load_table(record, bits, channels=channels), dtype, device)


@lru_cache(maxsize=256)
def device_tables(table: CodeTable, dtype: torch.dtype, device: torch.device) -> tuple[DeviceTable, ...]:
    """One DeviceTable for each channel of the table, with the same thresholds and codes, for inputs of a dtype.

    Thresholds are rounded down to float32: for a float32 x, x <= t holds for both or neither. Whatever mode or transform is
    active when they are first asked for, they outlast it.
    """
    thresholds, levels = table.thresholds.copy(), table.levels.copy()
    if dtype != torch.float64:
        with np.errstate(over="ignore"):  # a threshold beyond float32 is infinite, and compares as well
            single, levels = thresholds.astype(np.float32), levels.astype(np.float32)
        thresholds = np.where(single > thresholds, np.nextafter(single, np.float32(-np.inf)), single)
        if not np.all(np.isfinite(levels)):
            raise TableError(f"{table} has levels beyond float32; use another table, or inputs of float64")
    with unwatched():
        tensors = [torch.from_numpy(array.copy()).to(device) for array in (thresholds, table.codes, *levels)]
        found = tuple(DeviceTable(tensors[0], tensors[1], channel, table.bits) for channel in tensors[2:])
    in_use.update(found)
    return found
