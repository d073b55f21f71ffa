"""A code table or a ladder in the form that kernels take: tensors and a number of bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from fewbit import packing
from fewbit.constants import RUNGS

# Bounds between the fourth moments of neighbouring rungs: 3 s⁴, the fourth moment of a normal number, with s the geometric mean
# of the two standard deviations. The bounds and their products with the size of a sample are exact in every dtype.
BOUNDS = tuple(3 * (low * high) ** 2 for low, high in pairwise(RUNGS))
MIDDLE = RUNGS.index(1.0)  # the rung of an input without any information, such as zeros
SAMPLE = 509  # most elements from which the rung is chosen; a prime, so that it does not fall in step with rows


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """The parts of a code table that encode and decode need, on the device of the input.

    thresholds  (m,) ascending; float64 for float64 inputs, else float32. This is the dtype of all comparisons.
    codes       (m+1,) uint8, each below 2**bits. An x in interval i, thresholds[i-1] < x <= thresholds[i], has codes[i]. NaN
                lies in the last interval.
    levels      (K,) of the thresholds' dtype
    bits        bits of one code, 1 to 8

    A ladder has a table for each of `RUNGS`, and each input takes one of them: thresholds (rungs, m), codes (rungs, m+1) and
    levels (rungs, K). Rungs with fewer thresholds are padded with infinite ones and repeat their last code.
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
        """The tables of all rungs without padding. A single table is its only rung."""
        if not self.is_ladder:
            return (self,)
        tensors = zip(self.thresholds.unbind(), self.codes.unbind(), self.levels.unbind(), strict=True)
        return tuple(DeviceTable(*_unpadded(thresholds, codes), levels, self.bits) for thresholds, codes, levels in tensors)

    def packed_bytes(self, n: int) -> int:
        """Bytes of the packed codes of n elements. For a ladder, one byte more holds the number of the rung."""
        return packing.packed_bytes(n, self.bits) + self.is_ladder

    @cached_property
    def with_zeros(self) -> DeviceTable:
        """The table in which the level of the code of 0 is 0, in each rung. It is the table itself if that is so already."""
        levels = self.levels.clone()
        for rung, own in zip(self.rungs, levels.view(-1, levels.shape[-1]), strict=True):
            own[int(rung.codes[torch.searchsorted(rung.thresholds, rung.thresholds.new_zeros(1))])] = 0
        return self if torch.equal(levels, self.levels) else replace(self, levels=levels)

    @cached_property
    def is_even(self) -> bool:
        """Whether in every rung the code of x depends only on |x|. The upper half of the thresholds is then enough."""
        return all(map(_is_even, self.rungs))


def _unpadded(thresholds: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m = int((thresholds < torch.inf).sum())  # only NaN is above an infinite threshold
    return (thresholds[:m], codes[: m + 1]) if bool((codes[m:] == codes[-1]).all()) else (thresholds, codes)


def _is_even(table: DeviceTable) -> bool:
    thresholds, half = table.thresholds.cpu().numpy(), table.thresholds.numel() // 2
    if thresholds.size != 2 * half or not half or thresholds[half] < 0:
        return False
    mirrored = np.nextafter(-thresholds[half:][::-1], -np.inf, dtype=thresholds.dtype)
    return np.array_equal(thresholds[:half], mirrored) and torch.equal(table.codes, table.codes.flip(0))
