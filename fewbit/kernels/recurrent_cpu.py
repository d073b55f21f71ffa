"""Back through time for LSTMs on the CPU: what `fewbit.kernels.recurrent` does in torch operations, compiled by numba.

A step of torch operations reads and writes each gate several times, and large factors besides; here it goes once through the
gates of a step, which become the gradients of the pre-activations.
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
    """As `fewbit.kernels.recurrent.lstm_back_through_time`."""
    sizes = steps.sizes
    rows, hidden = len(gates), gates.shape[1] // 4
    h, c = (
        torch.zeros_like(like) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for grad, like in zip(grads[1:], first, strict=True)
    )
    first_cells = first[1].contiguous()
    gates.view(rows, 4, hidden)[:, 2].mul_(2)
    gates.sigmoid_()
    cells, shown = gates.new_empty(rows, hidden), gates.new_empty(rows, hidden)
    begins = [0, *accumulate(sizes)]
    _scan(gates, first_cells, cells, shown, begins, steps)
    shown.sigmoid_()
    of_y = None if grads[0] is None else grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
    outputs = None if projection is None else gates.new_empty(rows, len(projection))
    kept = None if projection is None else gates[:, 3 * hidden :] * (2 * shown - 1)
    kernel, block, size_of = _kernel(stepper, gates.dtype), StepBlock(), gates.element_size()
    block.hidden, block.first, block.c = hidden, first_cells.data_ptr(), c.data_ptr()
    block.y_stride = 0 if of_y is None else of_y.stride(0)
    order = steps.numbered()
    scratch = step_scratch(_NAMES[gates.dtype], hidden)
    for place, step in reversed([*enumerate(order)]):
        size, begin = sizes[step], begins[step]
        now = h[:size]
        block.y = 0 if of_y is None else of_y.data_ptr() + begin * of_y.stride(0) * size_of
        if projection is not None and outputs is not None:
            here = outputs[begin : begin + size]
            torch.add(now, 0 if of_y is None else of_y[begin : begin + size], out=here)
            now, block.y = here @ projection, 0
        previous = order[place - 1] if place else None
        block.number = 0 if previous is None else min(size, sizes[previous])
        block.before = 0 if previous is None else cells.data_ptr() + begins[previous] * hidden * size_of
        block.gates = gates.data_ptr() + 4 * begin * hidden * size_of
        block.shown = shown.data_ptr() + begin * hidden * size_of
        block.h, block.pieces, block.claimed, block.workers, block.done = now.data_ptr(), size, 0, 0, 0
        kernel.share(block, 4 * size * hidden, size, scratch)
        torch.mm(gates[begin : begin + size], recurrent, out=h[:size])
    return [h, c], outputs, kept


def _scan(gates: Tensor, first: Tensor, cells: Tensor, doubled: Tensor, begins: Sequence[int], steps: Steps) -> None:
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
        doubled=doubled.data_ptr(),
    )
    _kernel(scanner, gates.dtype).share(block, gates.numel(), len(first), 0)


_NAMES = {torch.float32: "float32", torch.float64: "float64"}


@cache
def _kernel(make: Any, dtype: torch.dtype) -> Kernel:
    return Kernel(make(_NAMES[dtype]), 0)
