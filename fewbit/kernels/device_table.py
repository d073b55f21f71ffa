"""A code table, or a ladder of them, as the kernels see it: tensors and a number of bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from fewbit import packing
from fewbit.constants import RUNGS

# What the fourth moments of neighbouring rungs part at: 3 s⁴ of a normal number of the standard deviation s between both, which
# is their geometric mean. Exact in every dtype, and so are their products with the size of a sample.
BOUNDS = tuple(3 * (low * high) ** 2 for low, high in pairwise(RUNGS))
MIDDLE = RUNGS.index(1.0)  # the rung of an input of which nothing is known
SAMPLE = 509  # elements at most from which the rung is told; a prime, so that rows of no length fall in step with it


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """What encode and decode need of a code table, on the device of the input.

    thresholds  (m,) ascending: float64 for float64 inputs, else float32, which is the dtype of all comparisons
    codes       (m+1,) uint8, each below 2**bits: the code of x is that of the interval it lies in, thresholds[i-1] < x <=
                thresholds[i]; NaN lies in the last
    levels      (K,) of the thresholds' dtype
    bits        of one code, 1 to 8

    A ladder has a table for each of `RUNGS`, of which each input takes one: thresholds (rungs, m), codes (rungs, m+1) and
    levels (rungs, K). Rungs with fewer thresholds end with infinite ones, and repeat their last code.
    """

    thresholds: torch.Tensor
    codes: torch.Tensor
    levels: torch.Tensor
    bits: int

    @property
    def is_ladder(self) -> bool:
        """Whether there are several rungs."""
        return self.thresholds.dim() > 1

    @cached_property
    def rungs(self) -> tuple[DeviceTable, ...]:
        """The tables of all rungs, without what fills them up; of a single table itself."""
        if not self.is_ladder:
            return (self,)
        tensors = zip(self.thresholds.unbind(), self.codes.unbind(), self.levels.unbind(), strict=True)
        return tuple(DeviceTable(*_unpadded(thresholds, codes), levels, self.bits) for thresholds, codes, levels in tensors)

    def packed_bytes(self, n: int) -> int:
        """Bytes of the packed codes of n elements: behind those of a ladder comes one with the number of the rung."""
        return packing.packed_bytes(n, self.bits) + self.is_ladder

    @cached_property
    def with_zeros(self) -> DeviceTable:
        """The table with 0 as the level of the code of 0, in each rung; itself where nothing changes."""
        levels = self.levels.clone()
        for rung, own in zip(self.rungs, levels.view(-1, levels.shape[-1]), strict=True):
            own[int(rung.codes[torch.searchsorted(rung.thresholds, rung.thresholds.new_zeros(1))])] = 0
        return self if torch.equal(levels, self.levels) else replace(self, levels=levels)

    @cached_property
    def is_even(self) -> bool:
        """Whether the code of x depends on |x| alone, in every rung, so that the upper half of the thresholds is enough."""
        return all(map(_is_even, self.rungs))


def _unpadded(thresholds: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m = int((thresholds < torch.inf).sum())  # above an infinite one is NaN alone
    return (thresholds[:m], codes[: m + 1]) if bool((codes[m:] == codes[-1]).all()) else (thresholds, codes)


def _is_even(table: DeviceTable) -> bool:
    thresholds, half = table.thresholds.cpu().numpy(), table.thresholds.numel() // 2
    if thresholds.size != 2 * half or not half or thresholds[half] < 0:
        return False
    mirrored = np.nextafter(-thresholds[half:][::-1], -np.inf, dtype=thresholds.dtype)
    return np.array_equal(thresholds[:half], mirrored) and torch.equal(table.codes, table.codes.flip(0))
