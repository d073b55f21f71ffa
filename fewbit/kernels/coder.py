"""A code table as the kernels see it: tensors and a number of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fewbit.kernels.cpu import Constants


@dataclass(frozen=True, eq=False)
class Coder:
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
    def cpu_constants(self) -> Constants:
        """The same in the form of the CPU kernels."""
        from fewbit.kernels.cpu import Constants  # here, since it loads numba

        return Constants.of(self)
