"""The CUDA backend: encode, decode and a forward with codes, in Triton.

A program holds a small table in registers and finds codes by a binary search with selections. Tables consist mostly of runs, in
which the code rises or falls by one from interval to interval. In a run the number of thresholds below x gives the code, and no
map from intervals to codes is needed. The few thresholds outside of the longest run are compared one by one (`Search`). Larger
tables stay in memory and are searched there.

All rungs of a ladder are searched in the same way. A tiny first program finds the rung of an input and writes its number after
the packed codes. The other programs read it there, so nothing waits for the device.

This module can be imported without Triton. It loads Triton on first use.
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
from fewbit.kernels.device_table import BOUNDS, MIDDLE, SAMPLE, DeviceTable

Tensor = torch.Tensor
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
WARPS = 4
# Options of compilation. Subnormal numbers are kept, as in torch. There is no limit of registers: with maxnreg=128 the
# assembler takes all 128 (for GELU's forward at 3 bits; without the limit it takes 72) and saves no instructions.
OPTIONS = {"num_warps": WARPS, "enable_reflect_ftz": False}
_BYTES = 16  # bytes of each lane per thread: one 128-bit access
_MAX_HEIGHT = 5  # largest height of a search by selections: 31 thresholds
_MAX_EXTRAS = 6


class Search(NamedTuple):
    """How a program finds codes. All are compile-time values.

    bits, fold  bits of one code; whether |x| is compared instead of x
    height      height of the search tree over the run: it has 2**height - 1 thresholds, and the code changes by `step` at each
    extras      for each threshold outside of the run, the code of an x up to it minus the code of an x above it
    start       the packed word for an x that is above no threshold of the run and above all others
    depth       depth of the search in memory, with 2**depth - 1 thresholds; 0 if the search is in registers
    ladder      whether there are rungs; `start` and `extras` are then 0 here and read from memory
    """

    bits: int
    fold: bool
    height: int = 0
    step: int = 1
    extras: tuple[int, ...] = ()
    start: int = 0
    depth: int = 0
    ladder: bool = False

    @property
    def scalars(self) -> int:
        """Number of thresholds that a program keeps in registers."""
        return 0 if self.depth else 2**self.height - 1 + len(self.extras)

    @property
    def changes(self) -> int:
        """Number of start words and code differences that a program reads for a rung."""
        return 1 + len(self.extras) if self.ladder and not self.depth else 0

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of thresholds and of codes of a rung in memory."""
        return (2**self.depth - 1, 2**self.depth) if self.depth else (self.scalars, self.changes)

    @property
    def all_ones(self) -> int:
        """The largest packed word."""
        return 2**32 - 1 if self.bits <= 4 else 2**64 - 1


class ProgramTable(NamedTuple):
    """A DeviceTable in the form that the programs take. Ladders have a row for each rung.

    thresholds  In registers: the thresholds of the run, padded at the low end with NaN, which all x are above; then the others.
                In memory: all thresholds, padded with infinity to 2**depth - 1.
    codes       For the search in memory (2**depth,) uint8. For ladders in registers int64: the start word and the code
                differences of the other thresholds. Else unused.
    levels      (2**bits,); levels past the table's own are zero
    """

    search: Search
    thresholds: Tensor
    codes: Tensor
    levels: Tensor

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, table: DeviceTable) -> ProgramTable:
        rungs = [(each.thresholds.cpu().numpy(), each.codes.cpu().numpy().astype(np.int64)) for each in table.rungs]
        if table.is_even:
            rungs = [(thresholds[thresholds.size // 2 :], codes[codes.size // 2 :]) for thresholds, codes in rungs]
        search = _plan([codes for _, codes in rungs], table.bits, table.is_even)
        rows = [(_in_memory if search.depth else _in_registers)(*each, search) for each in rungs]
        thresholds, codes = (np.stack(each) if search.ladder else each[0] for each in zip(*rows, strict=True))
        if not (search.depth or search.ladder):  # the differences are compile-time constants
            start, *extras = codes.view(np.uint64).tolist()
            search = search._replace(start=start, extras=tuple(extras))
        levels = torch.nn.functional.pad(table.levels.cpu(), (0, 2**table.bits - table.levels.shape[-1]))
        device = table.thresholds.device
        with torch.inference_mode(False):
            return cls(
                search,
                torch.as_tensor(thresholds, dtype=table.thresholds.dtype, device=device),
                torch.as_tensor(codes, device=device),
                levels.to(device),
            )


def _plan(rungs: list[np.ndarray], bits: int, fold: bool) -> Search:
    """The cheapest search for the codes of all rungs. `start` and `extras` are not filled in yet."""
    most = max(codes.size - 1 for codes in rungs)
    best = None
    for step in (1, -1):
        for height in range(min(_MAX_HEIGHT, most.bit_length()) + 1):
            inside = 2**height - 1
            others = max(codes.size - 1 - min(_longest_run(codes, step)[1], inside) for codes in rungs)
            # instructions: a comparison and an addition per level, 2**height - 1 - height selections, two per other threshold
            cost = inside + height + 2 * others
            if best is None or cost < best[0]:
                best = cost, step, height, others
    assert best is not None, "height 0 is always possible"
    _, step, height, others = best
    if others > _MAX_EXTRAS:
        return Search(bits, fold, depth=max(1, int(most).bit_length()), ladder=len(rungs) > 1)
    return Search(bits, fold, height, step, (0,) * others, ladder=len(rungs) > 1)


def _in_memory(thresholds: np.ndarray, codes: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray]:
    padding = 2**search.depth - codes.size
    return np.append(thresholds, [np.inf] * padding), np.append(codes, [codes[-1]] * padding).astype(np.uint8)


def _in_registers(thresholds: np.ndarray, codes: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds in the order of the search; the start word, and the code differences at the thresholds outside of the run."""
    inside = 2**search.height - 1
    first, length = _longest_run(codes, search.step)
    run = np.arange(first, first + min(length, inside))
    others = np.setdiff1d(np.arange(thresholds.size), run)
    padding = len(search.extras) - others.size
    code = int(codes[-1]) - search.step * inside
    start = sum(code << (lane * search.bits) for lane in range(packing.LANES)) & search.all_ones
    differences = np.append((codes[:-1] - codes[1:])[others], [0] * padding)
    ordered = np.concatenate([[np.nan] * (inside - run.size), thresholds[run], thresholds[others], [np.inf] * padding])
    return ordered, np.array([start, *(int(each) & search.all_ones for each in differences)], np.uint64).view(np.int64)


def _longest_run(codes: np.ndarray, step: int) -> tuple[int, int]:
    """First threshold and length of the longest stretch of thresholds at which the code changes by `step`."""
    members = (np.diff(codes) == step).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], members, [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not starts.size:
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest] - starts[longest])


@cache
def available() -> bool:
    """Whether Triton 3.6 or newer is installed (torch 2.13 brings 3.7). This does not load it."""
    try:
        return find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 6)
    except (PackageNotFoundError, ValueError):  # Triton may be distributed under another name, but such builds are untested
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
    """Words of a program. Each thread takes 128 bits of every lane."""
    return 32 * WARPS * _BYTES // dtype.itemsize


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.reference.encode` for x on a GPU."""
    return _encode(x, x, table)


def encode_checked(x: Tensor, table: DeviceTable) -> tuple[Tensor, bool]:
    """The same, and True. Whether x is finite would only be known after waiting for the GPU."""
    return encode(x, table), True


def forward(x: Tensor, table: DeviceTable, name: str, parameters: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The activation and the packed codes of x, in one pass.

    x           (*) contiguous, on a GPU; float16, bfloat16, float32 or float64
    table       as for `fewbit.kernels.reference.encode`
    name        name of a built-in activation for which `has_formula` is true
    parameters  all parameters of its record, in the record's order
    Returns     (*) of x's shape and dtype, at most one unit in the last place from torch's; (table.packed_bytes(n),) uint8
    """
    from fewbit.kernels import formulas

    y = torch.empty_like(x)
    constants = _constants(name, tuple(parameters.items()), x.dtype, x.device)
    return y, _encode(x, y, table, formulas.FORMULAS[name], constants)


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.reference.decode` for tensors on a GPU."""
    grad = grad.detach().resolve_neg().contiguous()
    return _decode(packed, grad, torch.empty_like(grad), table)


def values(packed: Tensor, n: int, table: DeviceTable, dtype: torch.dtype) -> Tensor:
    """`fewbit.kernels.reference.values` for tensors on a GPU."""
    return _decode(packed, None, torch.empty(n, dtype=dtype, device=packed.device), table)


def _decode(packed: Tensor, grad: Tensor | None, product: Tensor, table: DeviceTable) -> Tensor:
    """Fill the product. grad=None stands for a gradient of ones."""
    from fewbit.kernels import programs

    n, block, tables = product.numel(), block_size(product.dtype), ProgramTable.of(table)
    words = packing.words(n, table.bits)
    tensors = packed, grad, tables.levels, product
    launch(programs.decode, (-(-words // block),), *tensors, n, words, table.bits, table.is_ladder, block)
    return product


def _encode(x: Tensor, y: Tensor, table: DeviceTable, formula: Any = None, constants: Tensor | None = None) -> Tensor:
    from fewbit.kernels import programs

    x = x.detach().resolve_neg().contiguous()
    n, block, (search, thresholds, codes, _) = x.numel(), block_size(x.dtype), ProgramTable.of(table)
    words = packing.words(n, table.bits)
    packed = torch.empty(table.packed_bytes(n), dtype=torch.uint8, device=x.device)
    if table.is_ladder:
        _tell_rung(x, packed, table)
    count = 0 if constants is None else constants.numel()
    tensors = x, y, packed, thresholds, codes, thresholds if constants is None else constants
    # a rung's thresholds and changes need registers; without a limit the assembler takes 209, and only eight warps fit
    options = {"maxnreg": 168} if search.changes and search.scalars > 16 else {}
    launch(programs.encode, (-(-words // block),), *tensors, n, words, search, formula, count, block, **options)
    return packed


def _tell_rung(x: Tensor, packed: Tensor, table: DeviceTable) -> None:
    """Write the number of x's rung after the packed codes."""
    from fewbit.kernels import sample_programs

    n = x.numel()
    if not n:
        packed.fill_(MIDDLE)
        return
    size = min(n, SAMPLE)
    sizes = packed.numel() - 1, size, n // size, n % size
    choices = BOUNDS, MIDDLE, table.thresholds.dtype == torch.float64
    launch(sample_programs.tell_rung, (1,), x, packed, *sizes, *choices, num_warps=1, enable_fp_fusion=False)


def launch(program: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run this number of programs on the device and the current stream of the first argument. The number may be 0."""
    if all(programs):
        with torch.cuda.device_of(arguments[0]):
            program[programs](*arguments, **OPTIONS | options)


@lru_cache(maxsize=256)
def _constants(name: str, parameters: tuple[tuple[str, float], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    from fewbit.kernels import formulas

    with torch.inference_mode(False):
        return formulas.constants(name, dict(parameters), dtype).to(device)
