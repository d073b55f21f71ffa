"""The loops of the CPU backend for LSTMs: a scan of the cells, and one step back through time.

As in `fewbit.kernels.loops`, a kernel takes one block of arguments, claims pieces of its work from a counter until none are
left, and allocates nothing. Each loop writes one array, so that the compiler can vectorise it.

Gates are (rows, 4 hidden): σ of the pre-activations of i, f and o, and σ of twice that of g, because tanh(x) = 2 σ(2x) - 1.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fewbit.kernels.llvm import advance, pointer
from fewbit.kernels.loops import _CLAIMED, _DONE, _WORKERS, _array, _compile, _inlined

_COMMON = ("claimed", "workers", "done", "scratch", "pieces", "hidden", "gates", "first")


class ScanBlock(ctypes.Structure):
    """The arguments of `scanner`. Addresses are those of contiguous memory.

    pieces     number of sequences
    sizes      (steps,) int64: number of sequences in each step; begins (steps,) int64: its first row; backwards: whether the
               last step is taken first
    first      (sequences, hidden): the cells before the first step
    cells      (rows, hidden): written, as is `doubled` (rows, hidden), twice the cells
    """

    _fields_ = [(name, ctypes.c_int64) for name in (*_COMMON, "steps", "sizes", "begins", "backwards", "cells", "doubled")]


class StepBlock(ctypes.Structure):
    """The arguments of `stepper`, which takes one step. Addresses are those of the step's first row in contiguous memory.

    pieces    number of sequences in the step
    gates     overwritten with the gradients of the pre-activations
    before    (number, hidden): the cells of the previous step; other sequences begin at this step, with cells from `first`
    halves    (pieces, hidden): σ of twice the cells
    h         (pieces, hidden): the gradient of the outputs from later steps. y is that from layers that read them, or 0; its
              rows are y_stride elements apart.
    c         (pieces, hidden): the gradient of the cells, first of this step, in the end of the previous step
    """

    _fields_ = [(name, ctypes.c_int64) for name in (*_COMMON, "before", "number", "halves", "h", "y", "y_stride", "c")]


def step_scratch(wide: str, hidden: int) -> int:
    """Bytes of memory for each thread of `stepper`. It needs four rows."""
    return 4 * hidden * np.dtype(wide).itemsize


def scanner(wide: str) -> Any:
    """The compiled scan of the cells for float32 or float64."""
    values = np.dtype(wide).type
    size_of = np.dtype(wide).itemsize

    def scan_cells(address):
        block = _array(address, 1)[0]
        hidden, steps = block.hidden, block.steps
        sizes = _array(pointer(block.sizes), steps, np.int64)
        begins = _array(pointer(block.begins), steps, np.int64)
        sequence = advance(address, _CLAIMED, 1)
        if sequence < block.pieces:
            advance(address, _WORKERS, 1)
        while sequence < block.pieces:
            before = block.first + sequence * hidden * size_of
            for number in range(steps):
                step = steps - 1 - number if block.backwards else number
                if sequence < sizes[step]:
                    row = (begins[step] + sequence) * hidden * size_of
                    gates = _array(pointer(block.gates + 4 * row), (4, hidden), values)
                    cells = _array(pointer(block.cells + row), hidden, values)
                    _new_cells(gates, _array(pointer(before), hidden, values), cells)
                    _double(cells, _array(pointer(block.doubled + row), hidden, values))
                    before = block.cells + row
            advance(address, _DONE, 1)
            sequence = advance(address, _CLAIMED, 1)

    return _compile(scan_cells, ScanBlock, wide)


@_inlined
def _new_cells(gates, before, cells):
    i, f, g = gates[0], gates[1], gates[2]
    one, two = cells.dtype.type(1), cells.dtype.type(2)
    for k in range(np.uintp(cells.size)):
        cells[k] = f[k] * before[k] + i[k] * (two * g[k] - one)


@_inlined
def _double(values, out):
    two = values.dtype.type(2)
    for k in range(np.uintp(values.size)):
        out[k] = two * values[k]


def stepper(wide: str) -> Any:
    """The compiled step back through time for float32 or float64."""
    values = np.dtype(wide).type
    size_of = np.dtype(wide).itemsize

    def step_back(address):
        block = _array(address, 1)[0]
        hidden = block.hidden
        sequence = advance(address, _CLAIMED, 1)
        if sequence >= block.pieces:
            return
        memory = block.scratch + advance(address, _WORKERS, 1) * 4 * hidden * size_of
        scratch = _array(pointer(memory), (4, hidden), values)
        while sequence < block.pieces:
            row = sequence * hidden * size_of
            before = block.before + row if sequence < block.number else block.first + row
            _add(
                _array(pointer(block.h + row), hidden, values),
                _array(pointer(block.y + sequence * block.y_stride * size_of), hidden if block.y else 0, values),
                scratch[0],
            )
            _step(
                _array(pointer(block.gates + 4 * row), (4, hidden), values),
                _array(pointer(before), hidden, values),
                _array(pointer(block.halves + row), hidden, values),
                _array(pointer(block.c + row), hidden, values),
                scratch,
            )
            advance(address, _DONE, 1)
            sequence = advance(address, _CLAIMED, 1)

    return _compile(step_back, StepBlock, wide)


@_inlined
def _add(values, others, out):
    """values + others. An empty `others` counts as zeros."""
    if others.size:
        for k in range(np.uintp(out.size)):
            out[k] = values[k] + others[k]
    else:
        for k in range(np.uintp(out.size)):
            out[k] = values[k]


@_inlined
def _step(gates, before, halves, c, scratch):
    """scratch[0] holds the gradient of the outputs."""
    i, f, g, o = gates[0], gates[1], gates[2], gates[3]
    dh, dc, t, di = scratch[0], scratch[1], scratch[2], scratch[3]
    one, two, n = c.dtype.type(1), c.dtype.type(2), np.uintp(c.size)
    for k in range(n):
        t[k] = two * halves[k] - one
    for k in range(n):
        dc[k] = c[k] + dh[k] * o[k] * (one - t[k] * t[k])
    for k in range(n):
        o[k] = dh[k] * t[k] * (o[k] * (one - o[k]))
    for k in range(n):
        c[k] = dc[k] * f[k]
    for k in range(n):
        f[k] = dc[k] * before[k] * (f[k] * (one - f[k]))
    for k in range(n):
        di[k] = dc[k] * (two * g[k] - one) * (i[k] * (one - i[k]))
    for k in range(n):
        g[k] = dc[k] * i[k] * (one - (two * g[k] - one) * (two * g[k] - one))
    for k in range(n):
        i[k] = di[k]
