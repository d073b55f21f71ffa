"""The CUDA backend: encode, decode and a forward with codes, in Triton.

The registers of a program hold a small table, and a binary search by selections finds the code. Tables are mostly runs: from
one interval to the next the code rises, or falls, by one. On a run the number of thresholds below x is the code, so that no map
from intervals to codes is needed; the few thresholds outside the longest run are compared one by one (`Search`). Other tables
stay in memory and are searched there.

This module can be imported without Triton, which it loads on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from fewbit import packing
from fewbit.constants import DTYPES
from fewbit.kernels.device_table import DeviceTable

Tensor = torch.Tensor
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
_WARPS = 4
# of compilation: subnormal numbers are kept, as torch keeps them. No limit of registers: with maxnreg=128 the assembler takes
# that many (for GELU's forward at 3 bits 128 where it takes 72 by itself), and saves no instructions by it.
OPTIONS = {"num_warps": _WARPS, "enable_reflect_ftz": False}
_BYTES = 16  # of each lane in a thread: one 128-bit access
_MAX_HEIGHT = 5  # of a search by selections: 31 thresholds
_MAX_EXTRAS = 6


class Search(NamedTuple):
    """How a program finds codes: what it is compiled for. Compile-time values all.

    bits, fold  of one code; whether |x| is compared instead of x
    height      of the search tree over the run: 2**height - 1 thresholds, at which the code changes by `step` each
    extras      for each threshold outside the run, by how much the code of an x up to it differs from that of an x above
    start       the word whose codes are those of an x above no threshold of the run and above all others
    depth       instead of all these, of the search in memory: 2**depth - 1 thresholds; else 0
    """

    bits: int
    fold: bool
    height: int = 0
    step: int = 1
    extras: tuple[int, ...] = ()
    start: int = 0
    depth: int = 0

    @property
    def scalars(self) -> int:
        """Number of thresholds that a program keeps in registers."""
        return 0 if self.depth else 2**self.height - 1 + len(self.extras)

    @property
    def all_ones(self) -> int:
        """The largest packed word."""
        return 2**32 - 1 if self.bits <= 4 else 2**64 - 1


class ProgramTable(NamedTuple):
    """A DeviceTable in the form of the programs.

    thresholds  those of the run, then the others; or, in memory, all, padded with infinity to 2**depth - 1
    codes       (2**depth,) uint8 for the search in memory; else unused
    levels      (2**bits,), those past the table's own zero
    """

    search: Search
    thresholds: Tensor
    codes: Tensor
    levels: Tensor

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, table: DeviceTable) -> ProgramTable:
        thresholds, codes = table.thresholds.cpu().numpy(), table.codes.cpu().numpy().astype(np.int64)
        if table.is_even:
            thresholds, codes = thresholds[thresholds.size // 2 :], codes[codes.size // 2 :]
        search, order = _plan(codes, table.bits, table.is_even)
        if search.depth:
            padding = 2**search.depth - codes.size
            thresholds, codes = np.append(thresholds, [np.inf] * padding), np.append(codes, [codes[-1]] * padding)
        else:
            thresholds = thresholds[order]
        device = table.thresholds.device
        with torch.inference_mode(False):
            return cls(
                search,
                torch.as_tensor(thresholds, dtype=table.thresholds.dtype, device=device),
                torch.as_tensor(codes.astype(np.uint8), device=device),
                torch.nn.functional.pad(table.levels.cpu(), (0, 2**table.bits - table.levels.numel())).to(device),
            )


def _plan(codes: np.ndarray, bits: int, fold: bool) -> tuple[Search, np.ndarray]:
    """The cheapest search for these codes, and the order of its thresholds."""
    differences = codes[:-1] - codes[1:]
    best = None
    for step in (1, -1):
        first, length = _longest_run(differences == -step)
        for height in range(min(_MAX_HEIGHT, (length + 1).bit_length() - 1) + 1):
            inside = 2**height - 1
            # instructions: a comparison and an addition a level, 2**height - 1 - height selections, two for each other one
            cost = inside + height + 2 * (differences.size - inside)
            if best is None or cost < best[0]:
                best = cost, step, first, height
    assert best is not None, "height 0 is always possible"
    _, step, first, height = best
    run = np.arange(first, first + 2**height - 1)
    others = np.setdiff1d(np.arange(differences.size), run)
    if others.size > _MAX_EXTRAS:
        return Search(bits, fold, depth=max(1, int(codes.size - 1).bit_length())), run
    code = int(codes[-1]) - step * run.size
    word = Search(bits, fold)
    start = sum(code << (lane * bits) for lane in range(packing.LANES)) & word.all_ones
    extras = tuple(differences[others].tolist())
    return Search(bits, fold, height, step, extras, start), np.append(run, others)


def _longest_run(members: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], members.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not starts.size:
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest] - starts[longest])


@cache
def available() -> bool:
    """Whether Triton is installed, 3.7 or newer, which torch 2.13 brings along; does not load it."""
    try:
        return find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
    except (PackageNotFoundError, ValueError):  # distributed under another name: a build that was never tried
        return False


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels can take such tensors: floating-point, on an NVIDIA GPU of compute capability 8.0 or newer.

    With TRITON_INTERPRET=1, which is for tests, tensors on the CPU count too.
    """
    if dtype not in _DTYPES or not available():
        return False
    return _interpreted() if device.type == "cpu" else device.type == "cuda" and _capable(device)


@cache
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def has_formula(name: str) -> bool:
    """Whether `forward` can compute the built-in activation of that name; false without Triton."""
    if not available():
        return False
    from fewbit.kernels.formulas import FORMULAS

    return name in FORMULAS


def block_size(dtype: torch.dtype) -> int:
    """Words of a program: each thread has 128 bits of every lane."""
    return 32 * _WARPS * _BYTES // dtype.itemsize


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """As `fewbit.kernels.reference.encode`, for x on a GPU."""
    return _encode(x, x, table)


def forward(x: Tensor, table: DeviceTable, name: str, parameters: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The activation and the packed codes of x, in one pass.

    x           (*) contiguous, on a GPU; float16, bfloat16, float32 or float64
    table       as for `fewbit.kernels.reference.encode`
    name        of a built-in activation that `has_formula`
    parameters  as in its record, all of them, in the record's order
    Returns     (*) of x's shape and dtype, at most one unit in the last place from torch's; (packed_bytes(n, bits),) uint8
    """
    from fewbit.kernels import formulas

    y = torch.empty_like(x)
    constants = _constants(name, tuple(parameters.items()), x.dtype, x.device)
    return y, _encode(x, y, table, formulas.FORMULAS[name], constants)


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """As `fewbit.kernels.reference.decode`, for tensors on a GPU."""
    grad = grad.detach().resolve_neg().contiguous()
    return _decode(packed, grad, torch.empty_like(grad), table)


def values(packed: Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> Tensor:
    """As `fewbit.kernels.reference.values`, for tensors on a GPU."""
    return _decode(packed, None, torch.empty(n, dtype=dtype, device=packed.device), table)


def _decode(packed: Tensor, grad: Tensor | None, product: Tensor, table: DeviceTable) -> Tensor:
    """Fill the product; ones where there is no grad."""
    from fewbit.kernels import programs

    words, block = packed.numel() // table.bits, block_size(product.dtype)
    levels = ProgramTable.of(table).levels
    _launch(programs.decode, words, block, packed, grad, levels, product, product.numel(), words, table.bits, block)
    return product


def _encode(x: Tensor, y: Tensor, table: DeviceTable, formula: Any = None, constants: Tensor | None = None) -> Tensor:
    from fewbit.kernels import programs

    x = x.detach().resolve_neg().contiguous()
    n, block, (search, thresholds, codes, _) = x.numel(), block_size(x.dtype), ProgramTable.of(table)
    words = packing.words(n, table.bits)
    packed = torch.empty(table.bits * words, dtype=torch.uint8, device=x.device)
    count = 0 if constants is None else constants.numel()
    tensors = x, y, packed, thresholds, codes, thresholds if constants is None else constants
    _launch(programs.encode, words, block, *tensors, n, words, search, formula, count, block)
    return packed


def _launch(program: Any, words: int, block: int, *arguments: Any) -> None:
    """Run the program over all words, on the device and the current stream of its first argument."""
    if words == 0:
        return
    with torch.cuda.device_of(arguments[0]):
        program[(-(-words // block),)](*arguments, **OPTIONS)


@lru_cache(maxsize=256)
def _constants(name: str, parameters: tuple[tuple[str, float], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    from fewbit.kernels import formulas

    with torch.inference_mode(False):
        return formulas.constants(name, dict(parameters), dtype).to(device)
