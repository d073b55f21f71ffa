"""Tables in the form that the CPU kernels for layers take."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fewbit.kernels import cpu, permutations
from fewbit.kernels.device_table import DeviceTable

Tensor = torch.Tensor


class PreparedTable(NamedTuple):
    """A table in the form that the kernels take: addresses and numbers, and the arrays to which they point.

    search    fields of EncodeBlock: thresholds, codes, fours, twos, permuted, permuted_codes
    sample    fields of SampleBlock: fours, twos, padding, thresholds, interval_levels, midpoints, above, permuted,
              permuted_levels
    ends      the lowest and the highest level, and the largest magnitude of a threshold
    """

    search: tuple[int, ...]
    sample: tuple[int, ...]
    ends: tuple[float, ...]
    arrays: tuple[Any, ...]


def levels_of(table: DeviceTable, packed: Tensor) -> Tensor:
    """The levels for packed codes, from their rung if the table is a ladder: (2**bits,), repeated up to 16. Unused ones are
    0."""
    levels = _levels(table)
    if len(levels) == 1:
        return levels[0]
    return levels[ctypes.c_uint8.from_address(packed.data_ptr() + packed.numel() - 1).value]


@lru_cache(maxsize=256)
def prepared_table(table: DeviceTable) -> PreparedTable:
    """The table in the form that the kernels take."""
    thresholds, codes, levels = table.thresholds.cpu(), table.codes.cpu(), table.levels.cpu()
    fours, rest = divmod(thresholds.numel(), 4)
    fours, twos, padding = ((fours, 0, 0), (fours, 1, 1), (fours, 1, 0), (fours + 1, 0, 1))[rest]
    # the repeated threshold comes first; it gives the code of the first interval again
    padded = torch.cat([thresholds[:1].expand(padding), thresholds])
    codes = torch.cat([codes[:1].expand(padding), codes]).long()
    interval_levels = levels[codes]
    of_codes = codes.to(torch.int64 if levels.dtype == torch.float64 else torch.int32)
    midpoints = 0.5 * (thresholds[1:] + thresholds[:-1])
    above = torch.nextafter(thresholds, torch.full_like(thresholds, torch.inf))
    rows, of_rows = _permuted(thresholds, codes[padding:])
    permuted_levels = levels[of_rows]
    arrays = padded, of_codes, interval_levels, midpoints, above, rows, of_rows, permuted_levels
    outermost = thresholds.abs().max().item() if thresholds.numel() else 0.0
    at_rows, *at_others = (each.data_ptr() for each in (rows, of_rows, permuted_levels))
    if thresholds.numel() >= permutations.WIDTH:
        at_rows = 0
    search = padded.data_ptr(), of_codes.data_ptr(), fours, twos, at_rows, at_others[0]
    addresses = (each.data_ptr() for each in (padded, interval_levels, midpoints, above))
    sample = fours, twos, padding, *addresses, at_rows, at_others[1]
    return PreparedTable(search, sample, (levels.min().item(), levels.max().item(), outermost), arrays)


def _permuted(thresholds: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds and codes in the form of `fewbit.kernels.permutations`, for tables with fewer than 16 thresholds."""
    width, m = permutations.WIDTH, thresholds.numel()
    index = torch.arange(width)
    filled = torch.cat([thresholds, thresholds.new_full((2 * width,), torch.inf)])
    rows = torch.cat([filled[index + step - 1] for step in permutations.STEPS])
    return rows, codes[index.clamp_max(m)].int()


@lru_cache(maxsize=256)
def _levels(table: DeviceTable) -> tuple[Tensor, ...]:
    """The levels of each rung: (2**bits,), repeated up to 16."""
    levels = cpu.padded_levels(table)
    return levels.repeat(1, max(1, permutations.WIDTH >> table.bits)).unbind()
