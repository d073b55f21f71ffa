"""From code tables to what the kernels take, on the device and for the dtype of an input. Here the two wings meet."""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakSet

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from fewbit.constants import DEFAULT_BITS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, TableError
from fewbit.kernels import Coder
from fewbit.record import Activation, label
from fewbit.store import load_table

JOINT = ("derivative", "value")
made: WeakSet[Coder] = WeakSet()  # all that are in use: what they hold are tables, which backward reads but no forward made


def derivative_coder(
    record: Activation, bits: int | None, table: CodeTable | None, dtype: torch.dtype, device: torch.device
) -> Coder:
    """The coder of a table of your own, or of the shipped one for the derivative of the activation."""
    return channel_coders(table or _shipped(record, bits or DEFAULT_BITS, ("derivative",)), dtype, device)[0]


def joint_coders(
    record: Activation, bits: int | None, table: CodeTable | None, dtype: torch.dtype, device: torch.device
) -> tuple[Coder, ...]:
    """Coders of f' and of f for the same codes: of a table of your own, or of the shipped one with both channels."""
    return channel_coders(table or _shipped(record, bits or DEFAULT_BITS, JOINT), dtype, device)


def value_coder(bits: int, table: CodeTable | None, dtype: torch.dtype, device: torch.device) -> Coder:
    """The coder of a standard normal number: of a table of your own, or of the optimal quantizer."""
    return channel_coders(table or _shipped("identity", bits, ("value",)), dtype, device)[0]


@lru_cache(maxsize=256)
def _shipped(activation: Activation | str, bits: int, channels: tuple[str, ...]) -> CodeTable:
    return load_table(activation, bits, channels=channels)


@lru_cache(maxsize=256)
def channel_coders(table: CodeTable, dtype: torch.dtype, device: torch.device) -> tuple[Coder, ...]:
    """One Coder for each channel of the table, with the same thresholds and codes, for inputs of a dtype.

    Thresholds are rounded down to float32: for a float32 x, x <= t holds for both or neither. Whatever mode or transform is
    active when they are first asked for, they outlast it: `torch.tensor` would make fake tensors, or wrap them for a transform.
    """
    thresholds, levels = table.thresholds.copy(), table.levels.copy()
    if dtype != torch.float64:
        single = thresholds.astype(np.float32)
        thresholds = np.where(single > thresholds, np.nextafter(single, np.float32(-np.inf)), single)
        levels = levels.astype(np.float32)
    with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
        tensors = [torch.from_numpy(array.copy()).to(device) for array in (thresholds, table.codes, *levels)]
        found = tuple(Coder(tensors[0], tensors[1], channel, table.bits) for channel in tensors[2:])
    made.update(found)
    return found


def check_arguments(name: str, bits: int | None, table: CodeTable | None, channels: tuple[str, ...]) -> None:
    """Raise DesignError for bad bits, TableError for a table with other channels or that contradicts them."""
    if bits is not None:
        check_bits(bits, DesignError)
    if table is None:
        return
    if not isinstance(table, CodeTable):
        raise TableError(f"table must be a fewbit.CodeTable, got {type(table).__name__}; CodeTable.load(path) reads one")
    if table.channels != channels:
        wanted = " and ".join(map(repr, channels)) + (" alone" if len(channels) == 1 else "")
        raise TableError(
            f"{name} needs a table with the channel{'s' if len(channels) > 1 else ''} {wanted}, got {table.channels}"
        )
    if bits is not None and bits != table.bits:
        raise TableError(f"bits={bits} contradicts the table, which has {table.bits}; leave bits out")


def check_table_of(record: Activation, table: CodeTable | None) -> None:
    """Raise TableError for a table of another activation, or at other parameters."""
    if table is None or table.activation is None:
        return
    if table.activation != record.name or table.parameters != dict(record.parameters):
        raise TableError(
            f"the table is for {label(table.activation, table.parameters)}, not for {record}; design one for it, or set the "
            "table's activation to None with dataclasses.replace if that is what you mean"
        )
