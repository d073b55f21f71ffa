"""The CUDA backend for layers, in Triton, as `fewbit.kernels.layers_reference` specifies it.

Nothing waits for the device. Besides results, memory is only taken for partial sums. So all of it can be captured in CUDA
graphs. The partial sums depend on sizes, not on the device, so results are the same on every GPU of a kind.

This module can be imported without Triton. It loads Triton on first use.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fewbit import packing
from fewbit.kernels import cuda
from fewbit.kernels.cuda import ProgramTable
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import COEFFICIENT, HEADROOM, Codes, First, Vectors, wide_dtype

Tensor = torch.Tensor
_ROWS = 4  # rows of a program that sums rows in a fixed order
_CHANNELS = 8  # channels of a program that goes through their sample
_TILE, _LARGEST_ROW = 1024, 8192  # least and most elements of a program of `rows_backward`
_PARTS = 512  # most partial sums of a channel


class Tile(NamedTuple):
    """How a program goes through a grid. All are compile-time values.

    block           words of a program that follows the packed layout
    full            whether all programs have this many words, and all lanes of them
    vector          elements of a group, a power of two; see `fewbit.kernels.program_parts`
    big             whether numbers of elements need 64 bits
    dense           whether x is in packed order in memory
    along_channels  whether groups lie along channels
    grouped         whether rows have parts of the channels
    whole_rows      whether the elements of a row follow each other in packed order
    """

    block: int
    full: bool
    vector: int
    big: bool
    dense: bool
    along_channels: bool
    grouped: bool
    whole_rows: bool

    @property
    def warps(self) -> int:
        """Number of warps. Small groups get fewer elements per thread, because their places take many registers."""
        return cuda.WARPS * min(4, self.block // (32 * cuda.WARPS) // self.vector)

    @classmethod
    def of(cls, grid: Grid, dtype: torch.dtype, dense: bool) -> Tile:
        stretch = grid.channels // grid.groups if grid.inner == 1 else grid.inner
        vector = min(stretch & -stretch, 16 // dtype.itemsize)
        block, big = cuda.block_size(dtype), grid.n > 2**31 - 2**16  # the last program goes a little beyond
        full = grid.n % (packing.LANES * block) == 0
        return cls(block, full, vector, big, dense, grid.inner == 1, grid.groups > 1, grid.per_row == 1)


class SampleTable(NamedTuple):
    """A DeviceTable in the form that `standardize` searches: in memory, by `depth` comparisons.

    bounds   (2**depth - 1,) the thresholds, then infinity
    results  (2**depth,) the levels of the intervals
    middles  (2**depth - 1,) midpoints between thresholds, then infinity
    edges    (2**depth,) the thresholds, then the last one again: for each interval between midpoints the threshold in it
    ends     (3,) the lowest and the highest level, and the largest magnitude of a threshold
    """

    depth: int
    bounds: Tensor
    results: Tensor
    middles: Tensor
    edges: Tensor
    ends: Tensor

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, table: DeviceTable) -> SampleTable:
        thresholds, levels, codes = table.thresholds.cpu(), table.levels.cpu(), table.codes.cpu()
        depth = max(1, int(codes.numel() - 1).bit_length())

        def padded(values: Tensor, size: int, value: float) -> Tensor:
            return torch.nn.functional.pad(values, (0, size - values.numel()), value=value).to(table.thresholds.device)

        results = levels[codes.long()]
        outermost = thresholds.abs().max() if thresholds.numel() else levels.new_zeros(())
        edges = thresholds if thresholds.numel() else levels.new_zeros(1)
        with torch.inference_mode(False):
            return cls(
                depth,
                padded(thresholds, 2**depth - 1, torch.inf),
                padded(results, 2**depth, float(results[-1])),
                padded(0.5 * (thresholds[1:] + thresholds[:-1]), 2**depth - 1, torch.inf),
                padded(edges, 2**depth, float(edges[-1])),
                padded(torch.stack([levels.min(), levels.max(), outermost]), 3, 0),
            )


def magnitudes(x: Tensor, grid: Grid) -> Tensor:
    """See `fewbit.kernels.layers_reference.magnitudes`."""
    from fewbit.kernels import sample_programs

    x = x.resolve_neg()
    found = x.new_empty(grid.channels, dtype=wide_dtype(x.dtype))
    sizes = grid.channels, *_sample_sizes(grid)
    count = -(-grid.channels // _CHANNELS)
    _launch(
        sample_programs.magnitudes,
        (count,),
        x,
        found,
        *sizes,
        grid.inner,
        *x.stride(),
        _CHANNELS,
        Tile.of(grid, x.dtype, True).big,
    )
    return found


def row_scales(x: Tensor, grid: Grid, magnitude: Tensor) -> Tensor:
    """See `fewbit.kernels.layers_reference.row_scales`."""
    from fewbit.kernels import row_programs

    x, block = x.resolve_neg(), 256
    inverses, scales = torch.empty_like(magnitude), magnitude.new_empty(2, grid.rows)
    programs = (-(-grid.channels // block),)
    _launch(row_programs.inverse_magnitudes, programs, magnitude, inverses, grid.channels, _bits(1 / grid.channels), block)
    sizes = grid.rows, grid.row_size, *_row_sizes(grid)
    programs, tile = (-(-grid.rows // _ROWS),), _tile(x, grid)
    _launch(row_programs.row_scales, programs, x, inverses, scales, *sizes, *x.stride(), _ROWS, tile, num_warps=2)
    return scales


def row_moments(x: Tensor, grid: Grid, eps: float, centered: bool) -> Tensor:
    """See `fewbit.kernels.layers_reference.row_moments`."""
    from fewbit.kernels import row_programs

    x = x.resolve_neg()
    moments = x.new_empty(2, grid.rows, dtype=wide_dtype(x.dtype))
    sizes = grid.rows, grid.row_size, _bits(1 / grid.row_size), _bits(eps), *_row_sizes(grid)
    programs, tile = (-(-grid.rows // _ROWS),), _tile(x, grid)
    _launch(row_programs.row_moments, programs, x, moments, *sizes, *x.stride(), centered, _ROWS, tile, num_warps=2)
    return moments


def standardize(
    x: Tensor,
    grid: Grid,
    first: First,
    row_weight: Tensor | None,
    table: DeviceTable,
    weight: Tensor | None,
    bias: Tensor | None,
    by_sign: bool,
    keep_means: bool,
) -> tuple[Tensor, Tensor, Vectors]:
    """See `fewbit.kernels.layers_reference.standardize`."""
    from fewbit.kernels import sample_programs

    x = x.resolve_neg()
    where = Vectors.of(weight is not None, bias is not None, by_sign, first.by_row)
    coding = x.new_empty(3, grid.channels, dtype=wide_dtype(x.dtype))
    vectors = coding.new_empty(where.number, grid.channels)
    searched = SampleTable.of(table)
    usual = 1.0 if row_weight is None else 1 / (HEADROOM * grid.row_size**0.5)
    doubt = COEFFICIENT / 4**table.bits + 1 / grid.places
    tensors = x, coding, vectors, first.shift, first.scale, row_weight, weight, bias, *searched[1:]
    numbers = _bits(usual), _bits(doubt), None if first.eps is None else _bits(first.eps)
    choices = (
        first.by_row,
        by_sign and table.thresholds.numel() > 1,
        grid.places > 1,
        grid.sampled < grid.places,
        keep_means,
        where,
        searched.depth,
        _CHANNELS,
        Tile.of(grid, x.dtype, True).big,
    )
    sizes = grid.channels, *_sample_sizes(grid)
    programs = (-(-grid.channels // _CHANNELS),)
    _launch(sample_programs.standardize, programs, *tensors, *sizes, *numbers, *_row_sizes(grid), *x.stride(), *choices)
    return coding, vectors, where


def encode(
    x: Tensor, grid: Grid, first: First, coding: Tensor, table: DeviceTable, vectors: Tensor, where: Vectors | None
) -> tuple[Tensor, bool]:
    """See `fewbit.kernels.layers_reference.encode`."""
    from fewbit.kernels import layer_programs

    x, tile = x.resolve_neg(), _tile(x, grid)
    search, thresholds, codes, _ = ProgramTable.of(table)
    words = packing.words(grid.n, table.bits)
    packed = torch.empty(table.packed_bytes(grid.n), dtype=torch.uint8, device=x.device)
    tensors = x, packed, thresholds, codes, first.shift, first.scale, coding, vectors
    sizes = (
        grid.n,
        words,
        None if first.eps is None or first.scale is None else _bits(first.eps),
        grid.channels,
        *_row_sizes(grid),
    )
    marked = (-1, -1) if where is None else (where.center, where.offset)
    programs = (-(-words // tile.block),)
    _launch(
        layer_programs.encode,
        programs,
        *tensors,
        *sizes,
        *x.stride(),
        search,
        first.by_row,
        *marked,
        tile,
        num_warps=tile.warps,
    )
    return packed, True


def decode(codes: Codes, dtype: torch.dtype, below: float = 1.0, above: float = 1.0) -> Tensor:
    """See `fewbit.kernels.layers_reference.decode`."""
    product = torch.empty(codes.grid.n, dtype=dtype, device=codes.packed.device)
    kind = "values" if below == above == 1 else "sloped values"
    return _decode(kind, codes, product, slopes=(_bits(below), _bits(above)))


def times_slope(codes: Codes, grad: Tensor, below: float, above: float) -> Tensor:
    """See `fewbit.kernels.layers_reference.times_slope`."""
    grad = grad.resolve_neg().contiguous().view(codes.grid[:3])
    return _decode("slopes", codes, grad.new_empty(codes.grid.n), grad, slopes=(_bits(below), _bits(above)))


def rows_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `fewbit.kernels.layers_reference.rows_backward`."""
    from fewbit.kernels import row_programs

    packed, grid, vectors, _, _, eps, table = codes
    grad, tile = grad.resolve_neg(), _tile(grad, grid)
    grad_x, has_weight = grad.new_empty(grid.n), weight is not None
    single, vector = grid.row_size <= _LARGEST_ROW, tile.vector
    size = max(_power_of_two(grid.row_size), vector) if single else _LARGEST_ROW // 2
    count = max(1, _TILE // size)
    turns = -(-packing.LANES * -(-grid.rows // packing.LANES) // count)
    sums = (has_weight or has_bias) and single and grid.row_size == grid.channels
    parts, programs = None, turns
    if sums:
        programs = min(_PARTS, -(-turns // 8))
        parts = vectors.new_empty(programs, has_weight + has_bias, grid.channels)
    _launch(
        row_programs.rows_backward,
        (programs,),
        *(packed, grad, grad_x, parts, ProgramTable.of(table).levels, vectors, scale, weight),
        *(grid.rows, grid.row_size, packing.words(grid.n, table.bits)),
        *(_bits(1 / grid.row_size), None if eps is None else _bits(eps)),
        *(grid.channels, *_row_sizes(grid), *grad.stride()),
        *(table.bits, centered, sums and has_weight, sums and has_bias, single, count, size, tile),
        num_warps=max(4, min(16, count * size // 256)),
    )
    if not (has_weight or has_bias):
        return grad_x, None, None
    if parts is not None:
        found = list(_added(parts))
        return grad_x, found.pop(0) if has_weight else None, found.pop(0) if has_bias else None
    by_weight, by_bias, _ = _added(_channel_sums(codes, grad))
    return grad_x, by_weight if has_weight else None, by_bias if has_bias else None


def channels_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fewbit.kernels.layers_reference.channels_backward`."""
    from fewbit.kernels import row_programs

    grid, vectors, grad = codes.grid, codes.vectors, grad.resolve_neg()
    parts, block = _channel_sums(codes, grad), 64
    sums, means = vectors.new_empty(2, grid.channels), vectors.new_empty(3, grid.channels) if training else None
    sizes = len(parts), grid.channels, _bits(1 / grid.places), block
    _launch(row_programs.batch_norm_sums, (-(-grid.channels // block),), parts, sums, means, *sizes)
    product = grad.new_empty(grid.n)
    _decode("batch norm", codes, product, grad, sums=means, scale=scale, weight=weight)
    return product, sums[0], sums[1]


def gate_backward(
    up: Codes, packed: Tensor, grad: Tensor, derivative: DeviceTable, value: DeviceTable
) -> tuple[Tensor, Tensor]:
    """See `fewbit.kernels.layers_reference.gate_backward`."""
    grad = grad.resolve_neg()
    product, of_up = grad.new_empty(up.grid.n), grad.new_empty(up.grid.n)
    of_gate = {"gate": packed, "product_other": of_up, "derivative": derivative, "value": value}
    return _decode("gradients", up, product, grad, **of_gate), of_up


def gate_value(up: Codes, packed: Tensor, value: DeviceTable, dtype: torch.dtype) -> Tensor:
    """See `fewbit.kernels.layers_reference.gate_value`."""
    product = torch.empty(up.grid.n, dtype=dtype, device=packed.device)
    return _decode("gated", up, product, gate=packed, value=value)


def _decode(
    kind: str,
    codes: Codes,
    product: Tensor,
    grad: Tensor | None = None,
    *,
    slopes: tuple[int, int] = (0, 0),
    sums: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    product_other: Tensor | None = None,
    derivative: DeviceTable | None = None,
    value: DeviceTable | None = None,
) -> Tensor:
    """Fill the product: see `fewbit.kernels.layer_programs.decode`."""
    from fewbit.kernels import layer_programs

    packed, grid, vectors, where, row, eps, table = codes
    tile = Tile.of(grid, product.dtype, True) if grad is None else _tile(grad, grid)
    words = packing.words(grid.n, table.bits)
    levels = (None if each is None else ProgramTable.of(each).levels for each in (table, derivative, value))
    _launch(
        layer_programs.decode,
        (-(-words // tile.block),),
        *(packed, gate, grad, product, product_other, *levels, vectors, row, sums, scale, weight),
        *(grid.n, words, None if eps is None else _bits(eps), *slopes),
        *(grid.channels, *_row_sizes(grid), *((0, 0, 0) if grad is None else grad.stride())),
        *(kind, table.bits, table.bits if value is None else value.bits, value is not None and value.is_ladder, where, tile),
        num_warps=tile.warps,
    )
    return product


def _channel_sums(codes: Codes, grad: Tensor) -> Tensor:
    """(parts, 3, channels): sums over parts of the places of grad * the rebuilt values, of grad, and of the rebuilt values."""
    from fewbit.kernels import row_programs

    packed, grid, vectors, _, row, eps, table = codes
    tile = _tile(grad, grid)
    size = max(128, tile.vector) if tile.along_channels else 1
    count, places = (16, 16) if tile.along_channels else (2048 // tile.vector, 2048)
    blocks = -(-grid.channels // size)
    parts = vectors.new_empty(min(_PARTS, -(-2 * _PARTS // blocks), -(-grid.places // places)), 3, grid.channels)
    _launch(
        row_programs.channel_sums,
        (blocks, len(parts)),
        *(packed, grad, parts, ProgramTable.of(table).levels, vectors, row),
        *(grid.places, packing.words(grid.n, table.bits), None if eps is None else _bits(eps)),
        *(grid.channels, *_row_sizes(grid), *grad.stride()),
        *(table.bits, count, size, tile),
    )
    return parts


def _added(parts: Tensor) -> Tensor:
    """The sum of the parts (k, …) over the first dimension."""
    from fewbit.kernels import row_programs

    sums, block = torch.empty_like(parts[0]), 64
    _launch(row_programs.add_parts, (-(-sums.numel() // block),), parts, sums, len(parts), sums.numel(), block)
    return sums


def _tile(x: Tensor, grid: Grid) -> Tile:
    return Tile.of(grid, x.dtype, x.is_contiguous())


def _row_sizes(grid: Grid) -> tuple[int, int, int, int]:
    return grid.inner, grid.per_row, grid.channels // grid.groups, grid.groups


def _sample_sizes(grid: Grid) -> tuple[int, int, int, int]:
    """Number of places in the sample, the two numbers by which they are found, and the share of one place."""
    return grid.sampled, grid.places // grid.sampled, grid.places % grid.sampled, _bits(1 / grid.sampled)


def _bits(value: float) -> int:
    """The bits of a float64 as a signed number."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _launch(program: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a program without fused multiplication and addition, so that codes equal the reference's to the byte."""
    cuda.launch(program, programs, *arguments, enable_fp_fusion=False, **options)
