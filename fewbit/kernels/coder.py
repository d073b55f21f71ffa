"""A code table as the kernels see it: tensors and a number of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from fewbit.kernels import cpu, cuda


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
    def even(self) -> bool:
        """Whether the code of x is that of |x| by the upper half of the thresholds and codes, for every x.

        It is where the lower half mirrors the upper one: -x <= t holds for the x above the float before -t.
        """
        thresholds, codes = self.thresholds.cpu().numpy(), self.codes.cpu().numpy()
        half = thresholds.size // 2
        if thresholds.size != 2 * half or not half or thresholds[half] < 0:
            return False
        mirrored = np.nextafter(-thresholds[half:][::-1], -np.inf, dtype=thresholds.dtype)
        return np.array_equal(thresholds[:half], mirrored) and np.array_equal(codes, codes[::-1])

    @cached_property
    def cpu_constants(self) -> cpu.Constants:
        """The same in the form of the CPU kernels."""
        from fewbit.kernels import cpu  # here, since it loads numba

        return cpu.Constants.of(self)

    @cached_property
    def cuda_constants(self) -> cuda.Constants:
        """The same in the form of the CUDA kernels."""
        from fewbit.kernels import cuda

        return cuda.Constants.of(self)
