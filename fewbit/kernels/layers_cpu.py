"""The CPU backend for layers, compiled by numba. Its results equal those of `fewbit.kernels.layers_reference` bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fewbit import packing
from fewbit.kernels import layer_loops, layer_rows, layer_sample, layer_sums
from fewbit.kernels import layers_reference as reference
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import Grid
from fewbit.kernels.layer_tables import levels_of, prepared_table
from fewbit.kernels.layers_reference import Codes, First, Vectors
from fewbit.kernels.spans import KINDS
from fewbit.kernels.system import Kernel, in_huge_pages
from fewbit.torch_internals import is_zero

Tensor = torch.Tensor
_WIDE = {torch.float32: "float32", torch.float64: "float64"}
_LONG = 128  # from this many elements per channel on, a separate loop for each channel pays
_PASSES = 4  # passes over a sample; each takes as long as a pass of other kernels
_OF_COMBINED = Vectors(factor=0, offset=1, move=2)  # grad * move + level * factor + offset
_PIECE = 1 << 14  # approximate elements of a piece of work, if threads claim rows


def magnitudes(x: Tensor, grid: Grid) -> Tensor:
    """See `fewbit.kernels.layers_reference.magnitudes`."""
    wide = reference.wide_dtype(x.dtype)
    if not _takes(x.dtype, wide, grid):
        return reference.magnitudes(x, grid)
    x, found = _readable(x), torch.empty(grid.channels, dtype=wide)
    _sample(x, grid, wide, found.data_ptr())
    return found


def row_scales(x: Tensor, grid: Grid, magnitude: Tensor) -> Tensor:
    """See `fewbit.kernels.layers_reference.row_scales`."""
    wide = reference.wide_dtype(x.dtype)
    if not _takes(x.dtype, wide, grid, magnitude.dtype):
        return reference.row_scales(x, grid, magnitude)
    ends = torch.finfo(wide)
    magnitude, out = _contiguous(magnitude, wide), torch.empty(2, grid.rows, dtype=wide)
    numbers = (0.0, ends.tiny**0.5, ends.max / 2, 0.0, 1 / grid.channels, reference.HEADROOM)
    _rows(x, grid, out, magnitude.data_ptr(), False, numbers)
    return out


def row_moments(x: Tensor, grid: Grid, eps: float, centered: bool) -> Tensor:
    """See `fewbit.kernels.layers_reference.row_moments`."""
    wide = reference.wide_dtype(x.dtype)
    if not _takes(x.dtype, wide, grid):
        return reference.row_moments(x, grid, eps, centered)
    out = torch.empty(2, grid.rows, dtype=wide)
    _rows(x, grid, out, 0, centered, (eps, 0.0, 0.0, 1 / grid.row_size, 0.0, 0.0))
    return out


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
    wide = reference.wide_dtype(x.dtype)
    if not _takes(x.dtype, wide, grid, table.levels.dtype):
        return reference.standardize(x, grid, first, row_weight, table, weight, bias, by_sign, keep_means)
    x, where, prepared = (
        _readable(x),
        Vectors.of(weight is not None, bias is not None, by_sign, first.by_row),
        prepared_table(table),
    )
    coding, vectors = torch.empty(3, grid.channels, dtype=wide), torch.empty(where.number, grid.channels, dtype=wide)
    of_rows, of_weight, of_bias = (None if each is None else _contiguous(each, wide) for each in (row_weight, weight, bias))
    shift, scale = _of_first(first, grid, wide)
    usual = float("nan")
    if grid.sampled < grid.places:
        usual = 1.0 if row_weight is None else 1 / (reference.HEADROOM * grid.row_size**0.5)
    doubt = reference.COEFFICIENT / 4**table.bits + 1 / grid.places
    low, high, outermost = prepared.ends
    numbers = {"eps": first.eps or 0.0, "usual": usual, "doubt": doubt, "low": low, "high": high, "outermost": outermost}
    integers = (
        *(_address(shift), _address(scale), first.by_row, _has_eps(first), _address(of_rows), _address(of_weight)),
        *(_address(of_bias), by_sign, keep_means, *prepared.sample, coding.data_ptr(), vectors.data_ptr()),
        *(where.number, where.factor if where.factor > 1 else -1, where.shift, where.move),
    )
    _sample(x, grid, wide, 0, *integers, **numbers)
    return coding, vectors, where


def encode(
    x: Tensor, grid: Grid, first: First, coding: Tensor, table: DeviceTable, vectors: Tensor, where: Vectors | None
) -> tuple[Tensor, bool]:
    """See `fewbit.kernels.layers_reference.encode`."""
    wide = reference.wide_dtype(x.dtype)
    if not _takes(x.dtype, wide, grid, table.levels.dtype, coding.dtype, vectors.dtype) or not vectors.is_contiguous():
        return reference.encode(x, grid, first, coding, table, vectors, where)
    bits, words, prepared = table.bits, packing.words(grid.n, table.bits), prepared_table(table)
    shift, scale = _of_first(first, grid, wide)
    coding, (grid, x, repeat) = _contiguous(coding, wide), _merged(grid, _readable(x))
    own = -1 if where is None else where.center, -1 if where is None else where.offset
    packed = torch.empty(bits * words, dtype=torch.uint8)
    pieces = -(-words // layer_loops.CHUNK)
    block = layer_loops.EncodeBlock(
        *(0, 0, 0, 0, pieces, *_of_grid(grid, repeat), *_view(x), packed.data_ptr(), words, bits, 0),
        *(_address(shift), _address(scale), first.by_row, _has_eps(first), coding.data_ptr()),
        *(vectors.data_ptr(), vectors.numel(), *own),
        *prepared.search,
        first.eps or 0.0,
    )
    scratch = layer_loops.encoder_scratch(_WIDE[wide], _repeated(grid, repeat))
    _kernel(layer_loops.encoder, wide).share(block, grid.n, pieces, scratch)
    return packed, block.lost == 0


def decode(codes: Codes, dtype: torch.dtype, below: float = 1.0, above: float = 1.0) -> Tensor:
    """See `fewbit.kernels.layers_reference.decode`."""
    if not _takes(dtype, codes.vectors.dtype, codes.grid, codes.table.levels.dtype):
        return reference.decode(codes, dtype, below, above)
    product = _empty(codes.grid.n, dtype)
    _rebuild(layer_loops.DECODE, codes, None, product, slopes=(below, above))
    return product


def times_slope(codes: Codes, grad: Tensor, below: float, above: float) -> Tensor:
    """See `fewbit.kernels.layers_reference.times_slope`."""
    if not _takes(grad.dtype, codes.vectors.dtype, codes.grid, codes.table.levels.dtype):
        return reference.times_slope(codes, grad, below, above)
    product, codes = _empty(codes.grid.n, grad.dtype), codes._replace(where=codes.where._replace(move=-1))
    _rebuild(layer_loops.SLOPE, codes, _readable(grad).view(codes.grid[:3]), product, slopes=(below, above))
    return product


def rows_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `fewbit.kernels.layers_reference.rows_backward`."""
    grid, wide = codes.grid, codes.vectors.dtype
    if not _takes(grad.dtype, wide, grid, codes.table.levels.dtype):
        return reference.rows_backward(codes, grad, scale, weight, centered, has_bias)
    rows_of_piece = _rows_of_piece(grid.rows)
    pieces = -(-grid.rows // rows_of_piece)
    has_sums = weight is not None or has_bias
    sums = torch.empty((2, grid.channels) if has_sums else 0, dtype=wide)
    partial = torch.empty((pieces, 2, grid.channels) if has_sums else 0, dtype=wide)
    product = _empty(grid.n, grad.dtype)
    own = grid.rows, rows_of_piece, grid.channels, grid.row_size, centered
    _backward(layer_sums.rows_backward, codes, grad, scale, weight, pieces, own, partial, sums, product)
    return product, None if weight is None else sums[0], sums[1] if has_bias else None


def channels_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fewbit.kernels.layers_reference.channels_backward`."""
    grid, wide = codes.grid, codes.vectors.dtype
    if not _takes(grad.dtype, wide, grid, codes.table.levels.dtype):
        return reference.channels_backward(codes, grad, scale, weight, training)
    channels, (merged, grad, repeat) = grid.channels, _merged(grid, grad)
    down = _rows_of_piece(merged.outer) if merged.inner == 1 else max(1, merged.outer // 64)
    across = merged.channels if merged.inner == 1 else max(1, min(channels, _PIECE // (down * merged.inner)))
    pieces = -(-merged.outer // down)
    partial, combined = torch.empty(pieces, 3, merged.channels, dtype=wide), torch.empty(3, channels, dtype=wide)
    sums, product = torch.empty(2, channels, dtype=wide), _empty(grid.n, grad.dtype)
    own, codes = (merged.outer, down, across, grid.places, training), codes._replace(grid=merged)
    pieces *= -(-merged.channels // across)
    _backward(layer_sums.channel_sums, codes, grad, scale, weight, pieces, own, partial, sums, product, combined, repeat)
    _rebuild(layer_loops.COMBINE, codes._replace(vectors=combined, where=_OF_COMBINED), grad, product)
    return product, sums[0], sums[1]


def _merged(grid: Grid, x: Tensor | None) -> tuple[Grid, Any, int]:
    """The grid and x with inner elements merged into the channels, and the number of channels that then share their numbers.

    This is done if channels have few inner elements, so that loops along channels are long. Else all stays as it is.
    """
    is_one = x is None or x.stride(1) == grid.inner * x.stride(2)
    if not (1 < grid.inner < _LONG and grid.channels * grid.inner <= _PIECE and is_one):
        return grid, x, 1
    merged = grid._replace(channels=grid.channels * grid.inner, inner=1)
    return merged, None if x is None else x.as_strided(merged[:3], (x.stride(0), x.stride(2), 1)), grid.inner


def gate_backward(
    up: Codes, packed: Tensor, grad: Tensor, derivative: DeviceTable, value: DeviceTable
) -> tuple[Tensor, Tensor]:
    """See `fewbit.kernels.layers_reference.gate_backward`."""
    if not _takes(grad.dtype, up.vectors.dtype, up.grid, *(each.levels.dtype for each in (derivative, value, up.table))):
        return reference.gate_backward(up, packed, grad, derivative, value)
    of_gate, of_up = _empty(up.grid.n, grad.dtype), _empty(up.grid.n, grad.dtype)
    _rebuild(layer_loops.GATE_BACKWARD, up, grad, of_gate, (packed, derivative, value, of_up))
    return of_gate, of_up


def gate_value(up: Codes, packed: Tensor, value: DeviceTable, dtype: torch.dtype) -> Tensor:
    """See `fewbit.kernels.layers_reference.gate_value`."""
    if not _takes(dtype, up.vectors.dtype, up.grid, value.levels.dtype, up.table.levels.dtype):
        return reference.gate_value(up, packed, value, dtype)
    product = _empty(up.grid.n, dtype)
    _rebuild(layer_loops.GATE_VALUE, up, None, product, (packed, value, value, product))
    return product


def _rebuild(
    mode: int,
    of: Codes,
    grad: Tensor | None,
    product: Tensor,
    gate: tuple[Tensor, DeviceTable, DeviceTable, Tensor] | None = None,
    slopes: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Fill the product. gate: the codes of gate, the tables of slopes and values, and the second product. Channels may be
    merged."""
    packed, grid, vectors, where, row, eps, table = of
    wide, words, bits = vectors.dtype, packing.words(grid.n, table.bits), table.bits
    levels, vectors = levels_of(table, packed), _contiguous(vectors, wide)
    grid, grad, _ = _merged(grid, None if grad is None else _readable(grad))
    repeat = grid.channels // vectors.shape[1]
    row = None if row is None else _contiguous(row, wide)
    of_gate: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if gate is not None:
        codes, derivative, value, other = gate
        tables = levels_of(derivative, codes), levels_of(value, codes)
        addresses = (*(each.data_ptr() for each in tables), other.data_ptr())
        of_gate = codes.data_ptr(), packing.words(grid.n, value.bits), value.bits, *addresses
    begin, step = vectors.data_ptr(), vectors.shape[1] * vectors.element_size()
    pieces, largest = -(-words // layer_loops.CHUNK), torch.finfo(product.dtype).max
    block = layer_loops.RebuildBlock(
        *(0, 0, 0, 0, pieces, *_of_grid(grid, repeat), *(_NOTHING if grad is None else _view(grad))),
        *(packed.data_ptr(), words, bits),
        *(mode, begin + where.factor * step, begin + where.offset * step),
        *(begin + each * step if each >= 0 else 0 for each in (where.move, where.shift)),
        *(_address(row), eps is not None, levels.data_ptr(), product.data_ptr(), KINDS[product.dtype], *of_gate),
        *(eps or 0.0, largest, *slopes),
    )
    scratch = layer_loops.rebuilder_scratch(_WIDE[wide], _repeated(grid, repeat))
    _kernel(layer_loops.rebuilder, wide).share(block, grid.n, pieces, scratch)


def _backward(
    make: Any,
    of: Codes,
    grad: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    pieces: int,
    own: tuple[int, ...],
    partial: Tensor,
    sums: Tensor,
    product: Tensor,
    combined: Tensor | None = None,
    repeat: int = 1,
) -> None:
    """Run a kernel that takes a BackwardBlock."""
    packed, grid, vectors, where, _, eps, table = of
    wide, words, bits = vectors.dtype, packing.words(grid.n, table.bits), table.bits
    vectors, scale = _contiguous(vectors, wide), _contiguous(scale, wide)
    grad, levels = _readable(grad), levels_of(table, packed)
    weight = None if weight is None else _contiguous(weight, wide)
    begin, step = vectors.data_ptr(), vectors.shape[1] * vectors.element_size()
    block = layer_sums.BackwardBlock(
        *(0, 0, 0, 0, pieces, *_of_grid(grid, repeat), *_view(grad), packed.data_ptr(), words, bits),
        *(begin + where.center * step, begin + where.spread * step, scale.data_ptr(), eps is not None, _address(weight)),
        *(levels.data_ptr(), *own, partial.data_ptr(), sums.data_ptr() if sums.numel() else 0),
        *(_address(combined), product.data_ptr(), KINDS[product.dtype], eps or 0.0, torch.finfo(product.dtype).max),
    )
    _kernel(make, wide).share(block, grid.n, pieces, layer_sums.backward_scratch(_WIDE[wide]))


def _rows(x: Tensor, grid: Grid, out: Tensor, magnitude: int, centered: bool, numbers: tuple[float, ...]) -> None:
    x, rows_of_piece = _readable(x), max(1, _PIECE // grid.row_size)
    pieces = -(-grid.rows // rows_of_piece)
    block = layer_rows.RowBlock(
        *(0, 0, 0, 0, pieces, *_of_grid(grid), *_view(x), 0, 0, 0),
        *(grid.rows, rows_of_piece, grid.row_size, magnitude, out.data_ptr(), centered),
        *numbers,
    )
    kernel = _kernel(layer_rows.row_statistics, out.dtype)
    kernel.share(block, grid.n, pieces, layer_rows.row_scratch(_WIDE[out.dtype], grid.channels))


def _sample(x: Tensor, grid: Grid, wide: torch.dtype, magnitudes: int, *integers: int, **numbers: float) -> None:
    sampled, across = grid.sampled, layer_sample.width_of_block(grid.channels)
    pieces = -(-grid.channels // across)
    block = layer_sample.SampleBlock(
        *(0, 0, 0, 0, pieces, *_of_grid(grid), *_view(x), 0, 0, 0, across, sampled, grid.places, magnitudes, *integers),
        **numbers,
        tiny=torch.finfo(wide).tiny ** 0.5,
        by_sample=1 / sampled,
    )
    scratch = layer_sample.sample_scratch(_WIDE[wide], sampled, across)
    work = _PASSES * sampled * grid.channels
    _kernel(layer_sample.sampler, wide).share(block, work, pieces, scratch)


def _takes(dtype: torch.dtype, wide: torch.dtype, grid: Grid, *others: torch.dtype) -> bool:
    """Whether the kernels take tensors of the dtype and compute in `wide`, which is the dtype of all others. Exceptions are
    rare."""
    fits = dtype == wide == torch.float64 or (dtype != torch.float64 and wide == torch.float32)
    return fits and dtype in KINDS and grid.n > 0 and all(other == wide for other in others)


def _readable(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds the numbers themselves, without a pending negation and not a tensor of zeros without
    memory."""
    return tensor.clone().resolve_neg() if tensor.is_neg() or is_zero(tensor) else tensor


def _contiguous(tensor: Tensor, wide: torch.dtype) -> Tensor:
    tensor = _readable(tensor)
    return tensor if tensor.dtype == wide and tensor.is_contiguous() else tensor.to(wide).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _has_eps(first: First) -> bool:
    return first.scale is not None and first.eps is not None


def _of_first(first: First, grid: Grid, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    shift, scale = (None if each is None else _contiguous(each, wide) for each in (first.shift, first.scale))
    return shift, scale


def _of_grid(grid: Grid, repeat: int = 1) -> tuple[int, ...]:
    outer, channels, inner, per_row, groups, _ = grid
    return outer * channels * inner, channels, inner, per_row, groups, channels // groups, repeat


def _repeated(grid: Grid, repeat: int) -> int:
    """Number of channels that need memory for repeated numbers."""
    return grid.channels if repeat > 1 else 0


_NOTHING = (0,) * 6  # the view of no tensor


def _view(x: Tensor) -> tuple[int, ...]:
    """The view of a tensor (outer, channels, inner), see `fewbit.kernels.spans`."""
    return x.data_ptr(), *x.stride(), KINDS[x.dtype], x.is_contiguous()


def _rows_of_piece(rows: int) -> int:
    """Number of rows of one partial sum: few, for small rounding errors, but enough that the sums take little memory."""
    return min(512, max(32, -(-rows // 64)))


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    return in_huge_pages(torch.empty(n, dtype=dtype))


@cache
def _kernel(make: Any, wide: torch.dtype) -> Kernel:
    return Kernel(make(_WIDE[wide]), 0)
