"""A code table as the kernels see it: tensors and a number of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """What encode and decode need of a code table, on the device of the input.

    thresholds  (m,) ascending: float64 for float64 inputs, else float32, which is the dtype of all comparisons
    codes       (m+1,) uint8, each below 2**bits: the code of x is that of the interval it lies in, thresholds[i-1] < x <=
                thresholds[i]; NaN lies in the last
    levels      (K,) of the thresholds' dtype
    bits        of one code, 1 to 8
    """

    thresholds: torch.Tensor
    codes: torch.Tensor
    levels: torch.Tensor
    bits: int

    @cached_property
    def at_zero(self) -> float:
        """The level of the code of 0."""
        interval = torch.searchsorted(self.thresholds, self.thresholds.new_zeros(1))
        return self.levels[self.codes[interval].long()].item()

    @cached_property
    def is_even(self) -> bool:
        """Whether the code of x depends on |x| alone, so that the upper half of the thresholds is enough."""
        thresholds, half = self.thresholds.cpu().numpy(), self.thresholds.numel() // 2
        if thresholds.size != 2 * half or not half or thresholds[half] < 0:
            return False
        mirrored = np.nextafter(-thresholds[half:][::-1], -np.inf, dtype=thresholds.dtype)
        return np.array_equal(thresholds[:half], mirrored) and torch.equal(self.codes, self.codes.flip(0))
