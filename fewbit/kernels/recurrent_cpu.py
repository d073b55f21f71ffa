"""Backward through time for LSTMs on the CPU. It computes the same as `fewbit.kernels.recurrent`, but is compiled by numba.

In torch operations a step reads and writes each gate several times, and large factors too. Here a step goes through its gates
once and turns them into the gradients of the pre-activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fewbit.kernels.recurrent_loops import ScanBlock, StepBlock, scanner, step_scratch, stepper
from fewbit.kernels.steps import Steps
from fewbit.kernels.system import Kernel

Tensor = torch.Tensor


def back_through_time(
    gates: Tensor,
    first: Sequence[Tensor],
    recurrent: Tensor,
    projection: Tensor | None,
    grads: Sequence[Tensor | None],
    steps: Steps,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """See `fewbit.kernels.recurrent.lstm_back_through_time`."""
    first, begins = [each.contiguous() for each in first], [0, *accumulate(steps.sizes)]
    cells, halves = _activate(gates, first[1], begins, steps)
    grad_y, *last = grads
    h, c = (
        torch.zeros_like(like) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for grad, like in zip(last, first, strict=True)
    )
    outputs = unprojected = None
    if projection is not None:
        outputs = gates.new_zeros(len(gates), len(projection)) if grad_y is None else grad_y.contiguous().clone()
        unprojected = gates.view(len(gates), 4, -1)[:, 3] * (2 * halves - 1)
    elif grad_y is not None and grad_y.stride(1) != 1:
        grad_y = grad_y.contiguous()
    block = StepBlock(hidden=cells.shape[1], first=first[1].data_ptr(), c=c.data_ptr())
    for step in reversed(steps.order()):
        here, now, previous = slice(begins[step], begins[step + 1]), h[: steps.sizes[step]], steps.previous(step)
        before = None if previous is None else cells[begins[previous] : begins[previous + 1]]
        if outputs is not None and projection is not None:
            now = outputs[here].add_(now) @ projection
            _step(block, gates[here], halves[here], before, now, None)
        else:
            _step(block, gates[here], halves[here], before, now, None if grad_y is None else grad_y[here])
        torch.mm(gates[here], recurrent, out=h[: steps.sizes[step]])
    return [h, c], outputs, unprojected


def _activate(gates: Tensor, first: Tensor, begins: Sequence[int], steps: Steps) -> tuple[Tensor, Tensor]:
    """Turn pre-activations in place into gates for `recurrent_loops`. Gives the cells and σ of twice the cells, all (rows, n).

    Both hyperbolic tangents are computed as tanh(x) = 2 σ(2x) - 1, because torch's tanh takes several times as long as its σ.
    """
    gates.view(len(gates), 4, -1)[:, 2].mul_(2)
    gates.sigmoid_()
    cells, halves = (gates.new_empty(len(gates), first.shape[1]) for _ in range(2))
    of_steps = np.array([steps.sizes, begins[:-1]], np.int64)
    block = ScanBlock(
        pieces=len(first),
        hidden=first.shape[1],
        gates=gates.data_ptr(),
        first=first.data_ptr(),
        steps=len(steps.sizes),
        sizes=of_steps[0].ctypes.data,
        begins=of_steps[1].ctypes.data,
        backwards=steps.backwards,
        cells=cells.data_ptr(),
        doubled=halves.data_ptr(),
    )
    _kernel(scanner, gates.dtype).share(block, gates.numel(), len(first), 0)
    return cells, halves.sigmoid_()


def _step(block: StepBlock, gates: Tensor, halves: Tensor, before: Tensor | None, h: Tensor, y: Tensor | None) -> None:
    """Go one step back. Gates (sequences, 4 * hidden) become the gradients of their pre-activations. The gradient of cells in
    the block becomes that of the previous step.

    before  the cells of the previous step; None at the first step
    h, y    gradients of the outputs, from later steps and from layers that read them; their rows are contiguous
    """
    block.claimed = block.workers = block.done = 0
    block.pieces, block.gates, block.halves, block.h = len(gates), gates.data_ptr(), halves.data_ptr(), h.data_ptr()
    block.before, block.number = (0, 0) if before is None else (before.data_ptr(), len(before))
    block.y, block.y_stride = (0, 0) if y is None else (y.data_ptr(), y.stride(0))
    _kernel(stepper, gates.dtype).share(block, gates.numel(), len(gates), step_scratch(_NAMES[gates.dtype], block.hidden))


_NAMES = {torch.float32: "float32", torch.float64: "float64"}


@cache
def _kernel(make: Any, dtype: torch.dtype) -> Kernel:
    return Kernel(make(_NAMES[dtype]), 0)
