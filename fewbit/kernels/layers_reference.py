"""The specification of the kernels for layers, in torch operations, on any device. Tests compare every other backend with it.

Numbers are computed in float32, or in float64 for float64 inputs. This dtype is called wide. Every operation is rounded by
itself, without fused multiplication and addition. Sums are taken in a fixed order. Divisions and square roots are correctly
rounded. Codes and statistics are then the same bytes on every backend. Results in half precision are clamped to its range.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from fewbit.kernels import reference
from fewbit.kernels.device_table import DeviceTable
from fewbit.kernels.grid import Grid, row_numbers

Tensor = torch.Tensor
HEADROOM = (
    16.0  # above all levels of a normal number: rows are scaled to this norm, so that no product in between is out of range
)
ROW_LANES, SAMPLE_LANES = 128, 16  # accumulators of the sums along rows, and of the sums over the sample
SMALLEST_UNIT = 2.0**-22  # least squared unit of a row, at about the rounding errors of 1
COEFFICIENT = 2.72  # times 4**-bits: the mean squared error of the best quantizer of a normal number (Panter and Dite, 1951)


class First(NamedTuple):
    """The first step of coding values v: u = (v - shift) * scale.

    shift, scale  wide; (rows,) if `by_row`, else (channels,); None for 0 and 1
    eps           For rows whose scale is 1/σ = 1 / sqrt(variance + eps). u then has the mean square
                  variance / (variance + eps). If that is below a half, u is taken in units of its root:
                  scale / unit(scale) replaces scale.
    """

    shift: Tensor | None
    scale: Tensor | None
    by_row: bool
    eps: float | None = None


class Vectors(NamedTuple):
    """The rows of the vectors (k, channels) that hold the numbers of a channel; -1 if there is no such row.

    The rebuilt value is (level * factor + offset [+ move]) * unit of its row + shift, or with `row` instead of the unit.
    Without `move` it has the sign of the coded value. `center` and `spread` rebuild the coded value itself, with center + move.
    """

    center: int = 0
    spread: int = 1
    offset: int = 0
    factor: int = 1
    shift: int = -1
    move: int = -1

    @property
    def number(self) -> int:
        return max(self) + 1

    @property
    def of_readers(self) -> Vectors:
        """The same for the vectors that readers of y keep: the rows after center and spread, or these two if there are no
        others."""
        if self.factor == 1:
            return self
        shift, move = (each - 2 if each >= 0 else each for each in (self.shift, self.move))
        return Vectors(0, 1, self.offset - 2, self.factor - 2, shift, move)

    @classmethod
    @cache
    def of(cls, has_weight: bool, has_bias: bool, by_sign: bool, by_row: bool) -> Vectors:
        """The vectors of a norm. Factor and offset are spread and center times its weight. Its bias is the shift or, if rows
        have no units, part of the offset."""
        number, found = 2, cls()
        if has_weight or by_sign:
            found, number = found._replace(offset=2, factor=3), 4
        if has_bias and by_row:
            found, number = found._replace(shift=number), number + 1
        return found._replace(move=number) if by_sign else found


class Codes(NamedTuple):
    """Packed codes of a tensor (outer, channels, inner), and the numbers that rebuild its values:
    (level * factor + offset [+ move]) * row + shift.

    vectors  (k, channels) wide; `where` tells the meaning of each row
    row      (rows,) wide, or None for 1; with an eps these are scales 1/σ, and their `unit` is used instead
    table    the table with the levels of the codes
    """

    packed: Tensor
    grid: Grid
    vectors: Tensor
    where: Vectors
    row: Tensor | None
    eps: float | None
    table: DeviceTable


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for computations with tensors of the dtype: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitudes(x: Tensor, grid: Grid) -> Tensor:
    """The mean of |x| by channel, over the sample: (channels,) wide. Numbers that are not finite count as 0.

    x  (outer, channels, inner), any strides
    """
    v, _ = _sample(x, grid)
    return _mean(v.abs())


def row_scales(x: Tensor, grid: Grid, magnitude: Tensor) -> Tensor:
    """(2, rows) wide: the scale of each row, `HEADROOM` times the norm of x / magnitude, and its inverse.

    magnitude  (channels,); zeros, of channels with only zeros in the sample, count as the mean of all

    Numbers that are not finite count as 0.
    """
    v = x.to(wide_dtype(x.dtype))
    mean = _ordered_sum(magnitude * (1 / grid.channels), ROW_LANES)
    mean = torch.where(mean == 0, 1, mean)
    inverse = 1 / _positive(torch.where(magnitude == 0, mean, magnitude))
    scaled = v * inverse.view(1, -1, 1)
    scaled = torch.where(v.isfinite(), scaled, 0)
    norm = _root(_ordered_sum(_by_row(scaled * scaled, grid), ROW_LANES))
    largest = torch.finfo(norm.dtype).max
    scale = _positive((HEADROOM * norm).clamp_max(largest / 2))
    return torch.stack([scale, 1 / scale])


def row_moments(x: Tensor, grid: Grid, eps: float, centered: bool) -> Tensor:
    """(2, rows) wide: the mean, or 0 if not `centered`, and 1 / sqrt(mean (v - mean)² + eps) of each row."""
    v = _by_row(x.to(wide_dtype(x.dtype)), grid)
    mean = _ordered_sum(v * (1 / grid.row_size), ROW_LANES) if centered else v.new_zeros(grid.rows)
    d = v - mean
    variance = _ordered_sum(d * d * (1 / grid.row_size), ROW_LANES)
    return torch.stack([mean, 1 / _root(variance + eps)])


def unit(scale: Tensor, eps: float | None) -> Tensor:
    """The unit in which a row with 1/σ = `scale` is coded, see `First`. NaN if the scale is NaN or infinite."""
    if eps is None:
        return torch.ones_like(scale)
    share = 1 - (eps * scale) * scale
    return torch.where(share > 0.5, 1, _root(share.clamp_min(SMALLEST_UNIT)))


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
    """Compute from the sample how each channel of u (see `First`) is standardized to a normal number.

    row_weight   (rows,) wide: factors that turn u into the rebuilt value; None for `unit(first.scale)`, or 1
    weight, bias (channels,) of y = weight * value + bias; None for 1 and 0
    by_sign      whether y = 0 lies on a threshold; else zeros of the value lie on a level
    keep_means   whether channels keep the means of the sample

    Returns      coding (3, channels), with which z = (u - coding[0]) * coding[1] + coding[2] is encoded; vectors (k, channels);
                 and the `Vectors` that tell their rows
    """
    v, rows = _sample(x, grid)
    u = _first(v, first, rows)
    u = torch.where(u.isfinite(), u, 0)
    center = mean_of_u = _mean(u)
    d = u - center
    largest = d.abs().amax(0)
    relative = d / _or_one(largest)
    power = relative * relative
    power = power * power
    moment = _mean(power * power) * (1 / 105)
    spread = _root(_root(_root(moment))) * largest
    spread = torch.where((1 / spread).isinf(), torch.finfo(spread.dtype).tiny ** 0.5, spread)
    if grid.sampled < grid.places:  # channels that are constant in the sample get the usual spread: more is not known
        usual = 1.0 if row_weight is None else 1 / (HEADROOM * grid.row_size**0.5)
        spread = torch.where(largest == 0, usual, spread)
    one = torch.ones_like(center)
    middle, onto, sparse, level = center, torch.zeros_like(center), torch.zeros_like(center, dtype=torch.bool), one
    if by_sign and table.thresholds.numel() > 1:
        middle, onto, spread, center = _with_zero_on_a_threshold(center, spread, weight, bias, table.thresholds)
    elif not by_sign and grid.places > 1:
        has_zeros = (u == 0).any(0)
        spread, sparse, level = _with_zero_on_a_level(center, spread, has_zeros, table)
        middle = center = torch.where(sparse, -level * spread, center)
    coding = torch.stack([middle, 1 / spread, onto])
    move = torch.zeros_like(center)
    if keep_means and grid.places > 1:
        z = (u - coding[0]) * coding[1] + coding[2]
        q = table.levels[table.codes[torch.searchsorted(table.thresholds, z)].long()]
        of_row = row_weight
        if row_weight is None and first.scale is not None and first.eps is not None:
            of_row = unit(first.scale, first.eps)
        w = one.expand_as(u) if of_row is None else of_row[rows]
        w = torch.where(w.isfinite(), w, 0)
        spread = _of_gain_one((u - torch.where(sparse, 0, mean_of_u)) * coding[1], q - torch.where(sparse, level, 0), spread)
        value = u * w
        mean, mean_level, mean_weight, size = _mean(value), _mean(q * w), _mean(w), _mean(value.abs())
        center = torch.where(sparse, -level * spread, middle - onto * spread)
        found = spread * mean_level + center * mean_weight
        doubt = COEFFICIENT / 4**table.bits + 1 / grid.places
        relative, relative_found = mean / _or_one(size), found / _or_one(size)
        stretch = (relative * relative_found + doubt) / (relative_found * relative_found + doubt)
        stretch = torch.where(sparse, stretch, 1)
        move = torch.where(sparse, 0, (mean - found) / _or_one(mean_weight))
        spread = spread * stretch
        center = torch.where(sparse, -level * spread, center)
    own = center + move
    kept = [own, spread]
    where = Vectors.of(weight is not None, bias is not None, by_sign, first.by_row)
    w = one if weight is None else weight.to(one.dtype)
    if where.factor == 3:
        offset = (center if by_sign else own) * w
        kept += [offset if bias is None or where.shift >= 0 else offset + bias.to(one.dtype), spread * w]
    if where.shift >= 0:
        assert bias is not None
        kept.append(bias.to(one.dtype))
    if where.move >= 0:
        kept.append(move * w)
    return coding, torch.stack(kept), where


def encode(
    x: Tensor, grid: Grid, first: First, coding: Tensor, table: DeviceTable, vectors: Tensor, where: Vectors | None
) -> tuple[Tensor, bool]:
    """Packed codes of z (see `standardize`), and False if a backend has seen a z or a vector that is not finite.

    where  If given, channels in which some z is not finite are marked in the vectors: their center and offset become NaN.
    """
    z = standard(x, grid, first, coding)
    mark(z, vectors, where)
    return reference.encode(z.reshape(-1), table), True


def mark(z: Tensor, vectors: Tensor, where: Vectors | None) -> None:
    """Mark channels in the vectors as `encode` does."""
    if where is not None:
        lost = ~z.isfinite().all(2).all(0)
        for row in {where.center, where.offset}:
            vectors[row].masked_fill_(lost, torch.nan)


def standard(x: Tensor, grid: Grid, first: First, coding: Tensor) -> Tensor:
    """z (outer, channels, inner), wide."""
    u = x.to(wide_dtype(x.dtype))
    shift, scale = (None if each is None else _along(each, grid, first.by_row) for each in _shift_and_scale(first))
    u = u if shift is None else u - shift
    u = u if scale is None else u * scale
    middle, inverse, onto = (each.view(1, -1, 1) for each in coding)
    return (u - middle) * inverse + onto


def decode(codes: Codes, dtype: torch.dtype, below: float = 1.0, above: float = 1.0) -> Tensor:
    """(n,): the rebuilt values times `above` where they are positive, else times `below`, rounded to the dtype."""
    value = _rebuilt(codes, moved=True)
    value = value * _slopes(value, below, above)
    return _narrowed(value, dtype).reshape(-1)


def times_slope(codes: Codes, grad: Tensor, below: float, above: float) -> Tensor:
    """grad (n,), in packed order, times `above` where the value (without the move) is positive, else times `below`."""
    value = _rebuilt(codes, moved=False).reshape(-1)
    return (grad.to(value.dtype) * _slopes(value, below, above)).to(grad.dtype)


def rows_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Backward of a norm along rows: LayerNorm, RMSNorm (not `centered`), GroupNorm.

    codes     codes of x̂; `row` is the scale, or None if x̂ was coded without units
    grad      (outer, channels, inner), any strides
    scale     (rows,) wide: 1/σ
    Returns   grad_x (n,) of grad's dtype, in packed order; the gradients of weight and bias (channels,) wide, None without them

    With g = grad * weight and means along rows: grad_x = (g - mean(g) - x̂ mean(g x̂)) * scale.
    """
    grid, x_hat = codes.grid, _rebuilt(codes, moved=False)
    g = grad.to(x_hat.dtype)
    by_weight = None if weight is None else (g * x_hat).sum((0, 2))
    by_bias = g.sum((0, 2)) if has_bias else None
    g = g if weight is None else g * weight.to(g.dtype).view(1, -1, 1)
    found = _along(_by_row(g * x_hat, grid).mean(0), grid, True)
    rest = g - x_hat * found
    if centered:
        rest = rest - _along(_by_row(g, grid).mean(0), grid, True)
    return _narrowed(rest * _along(scale, grid, True), grad.dtype).reshape(-1), by_weight, by_bias


def channels_backward(
    codes: Codes, grad: Tensor, scale: Tensor, weight: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a batch norm.

    codes     codes of x̂
    grad      (outer, channels, inner), any strides
    scale     (channels,) wide: 1/σ
    training  If true, x̂ has the mean 0, and the rebuilt x̂ is centered too. Else the statistics are constants, and grad_x is
              grad * weight * scale.
    Returns   grad_x (n,) of grad's dtype, in packed order; the gradients of weight and bias (channels,) wide
    """
    places, x_hat = codes.grid.places, _rebuilt(codes, moved=False)
    g = grad.to(x_hat.dtype)
    if training:
        x_hat = x_hat - x_hat.mean((0, 2), keepdim=True)
    by_weight, by_bias = (g * x_hat).sum((0, 2)), g.sum((0, 2))
    factor = scale if weight is None else scale * weight.to(scale.dtype)
    rest = g
    if training:
        rest = g - (by_bias / places).view(1, -1, 1) - x_hat * (by_weight / places).view(1, -1, 1)
    return _narrowed(rest * factor.view(1, -1, 1), grad.dtype).reshape(-1), by_weight, by_bias


def gate_backward(
    up: Codes, packed: Tensor, grad: Tensor, derivative: DeviceTable, value: DeviceTable
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up in f(gate) * up, both (n,) of grad's dtype in packed order.

    packed  codes of gate (n,) in packed order; `derivative` and `value` hold the levels of its joint table
    grad    (outer, channels, inner), any strides
    """
    times = _rebuilt(up, moved=False).reshape(-1)
    g = grad.to(times.dtype).reshape(-1)
    slope, f = (reference.values(packed, up.grid.n, table, times.dtype) for table in (derivative, value))
    return _narrowed((times * g) * slope, grad.dtype), _narrowed(g * f, grad.dtype)


def gate_value(up: Codes, packed: Tensor, value: DeviceTable, dtype: torch.dtype) -> Tensor:
    """f(gate) * up (n,) of the dtype, in packed order, from codes of both."""
    times = _rebuilt(up, moved=False).reshape(-1)
    return _narrowed(reference.values(packed, up.grid.n, value, times.dtype) * times, dtype)


def _rebuilt(codes: Codes, moved: bool) -> Tensor:
    """(outer, channels, inner), wide."""
    packed, grid, vectors, where, row, eps, table = codes
    level = reference.values(packed, grid.n, table, vectors.dtype).view(grid[:3])
    offset = vectors[where.offset]
    if moved and where.move >= 0:
        offset = offset + vectors[where.move]
    value = level * vectors[where.factor].view(1, -1, 1) + offset.view(1, -1, 1)
    if row is not None:
        value = value * _along(row if eps is None else unit(row, eps), grid, True)
    return value if where.shift < 0 else value + vectors[where.shift].view(1, -1, 1)


def _slopes(value: Tensor, below: float, above: float) -> Tensor:
    return torch.where(value > 0, value.new_tensor(above), value.new_tensor(below))


def _shift_and_scale(first: First) -> tuple[Tensor | None, Tensor | None]:
    if first.scale is None or first.eps is None:
        return first.shift, first.scale
    return first.shift, first.scale / unit(first.scale, first.eps)


def _first(v: Tensor, first: First, rows: Tensor) -> Tensor:
    """u of the sample v (k, channels)."""
    shift, scale = (each if each is None or not first.by_row else each[rows] for each in _shift_and_scale(first))
    v = v if shift is None else v - shift
    return v if scale is None else v * scale


def _sample(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The sample (k, channels), wide, and the rows of its elements. Numbers that are not finite are 0."""
    place = torch.arange(grid.sampled, device=x.device) * grid.places // grid.sampled
    outer = place // grid.inner
    v = x[outer, :, place % grid.inner].to(wide_dtype(x.dtype))
    return torch.where(v.isfinite(), v, 0), row_numbers(grid, outer)


def _mean(values: Tensor) -> Tensor:
    """The mean over the sample (k, channels). It divides before it sums, because sums may be out of range."""
    return _ordered_sum(values * (1 / values.shape[0]), SAMPLE_LANES)


def _ordered_sum(values: Tensor, lanes: int) -> Tensor:
    """The sum over the first dimension. Number k is added to accumulator k % lanes, in ascending order; accumulators start at
    0. Then the accumulators are added in adjacent pairs until one is left."""
    padding = -values.shape[0] % lanes
    parts = torch.cat([values, values.new_zeros(padding, *values.shape[1:])]).view(-1, lanes, *values.shape[1:])
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    while total.shape[0] > 1:
        total = total[0::2] + total[1::2]
    return total[0]


def _by_row(values: Tensor, grid: Grid) -> Tensor:
    """(row_size, rows) from (outer, channels, inner): the elements of each row, in packed order."""
    parts = values.reshape(-1, grid.per_row, grid.groups, grid.channels // grid.groups, grid.inner)
    return parts.permute(1, 3, 4, 0, 2).reshape(grid.row_size, grid.rows)


def _along(statistic: Tensor, grid: Grid, by_row: bool) -> Tensor:
    """(rows,) or (channels,) in a shape that broadcasts with (outer, channels, inner)."""
    if not by_row:
        return statistic.view(1, -1, 1)
    by_group = statistic.view(-1, grid.groups).repeat_interleave(grid.per_row, 0)
    return by_group.repeat_interleave(grid.channels // grid.groups, 1).unsqueeze(2)


def _with_zero_on_a_level(
    center: Tensor, spread: Tensor, has_zeros: Tensor, table: DeviceTable
) -> tuple[Tensor, Tensor, Tensor]:
    """For each channel: its spread, whether its zeros are to lie on a level, and the level.

    Zeros lie on a level with the center -level * spread. If 0 lies farther out than the outermost level, the spread grows until
    they meet. If 0 lies more than twice as far out, zeros are given up.
    """
    low, high = table.levels.min(), table.levels.max()
    zero = -center / spread
    beyond = torch.where(zero < 0, zero / low, zero / high)
    sparse = has_zeros & (beyond <= 2) & (low < 0) & (high > 0)
    spread = torch.where(sparse, spread * beyond.clamp_min(1), spread)
    return spread, sparse, table.levels[table.codes[torch.searchsorted(table.thresholds, -center / spread)].long()]


def _with_zero_on_a_threshold(
    center: Tensor, spread: Tensor, weight: Tensor | None, bias: Tensor | None, thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """middle, onto, spread and center, such that y = weight * u + bias = 0 lies on a threshold.

    z = (u - middle) / spread + onto, which equals (u - center) / spread. The shift to the nearest threshold is less than half
    an interval. If y = 0 lies beyond the outermost threshold, but not more than twice as far out, the channel is shrunk until
    it lies on that threshold.
    """
    factor = spread if weight is None else spread * weight.to(spread.dtype)
    offset = center if weight is None else center * weight.to(spread.dtype)
    offset = offset if bias is None else offset + bias.to(spread.dtype)
    zero, outermost = torch.where(factor == 0, torch.inf, -offset / factor), thresholds.abs().max()
    near = zero.abs() <= 2 * outermost
    zero = torch.where(near, zero, 0)
    shrink = torch.where(near, outermost / zero.abs().maximum(outermost), 1)
    edge = thresholds[torch.searchsorted(0.5 * (thresholds[1:] + thresholds[:-1]), shrink * zero)]
    # a z on the threshold gets the code below it; with a negative factor that code means y > 0, so y = 0 goes just above it
    edge = torch.where(factor < 0, torch.nextafter(edge, torch.full_like(edge, torch.inf)), edge)
    middle = -(torch.zeros_like(center) if bias is None else bias.to(center.dtype))  # where y = 0, exactly
    middle = middle if weight is None else middle / weight.to(center.dtype)
    spread = spread / shrink
    return (
        torch.where(near, middle, center),
        torch.where(near, edge, 0),
        spread,
        torch.where(near, middle - edge * spread, center),
    )


def _of_gain_one(d: Tensor, e: Tensor, spread: Tensor) -> Tensor:
    """The spread a of gain one: <a e, spread d> = <spread d, spread d>, or the given spread if a is far from it.

    With it the rebuilt values a e are on average as far from their center as the values spread * d.

    d  deviations from the mean (e then needs no center) or, if zeros lie on a level, distances from that level
    e  the same of the levels

    Levels are conditional means. Rebuilt values are thus too small by the mean squared error, always in the same direction. A
    norm's backward would then leave a part of the gradient along x̂ in the residual stream. The exact backward leaves none.
    """
    gain = _mean(d * d) / _mean(d * e)
    return torch.where((gain >= 0.7) & (gain <= 2), gain * spread, spread)


def _positive(scale: Tensor) -> Tensor:
    """The scale, or a small number to divide by where the scale is 0."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)


def _or_one(scale: Tensor) -> Tensor:
    """The scale, or 1 where the scale is 0. The numbers that it divides are then 0 as well."""
    return torch.where(scale == 0, 1, scale)


def _root(a: Tensor) -> Tensor:
    """The square root, correctly rounded. torch's own may be off by one unit on a CPU."""
    if a.dtype == torch.float32:
        return a.double().sqrt().float()
    is_small = a < 2.0**-500
    a = torch.where(is_small, a * 2.0**600, a)
    root = a.sqrt()
    # the exact square of the root in two parts (Dekker, 1971) tells whether a neighbour is nearer
    high = root * (2.0**27 + 1)
    high = high - (high - root)
    low = root - high
    square = root * root
    error = ((high * high - square) + 2 * high * low) + low * low
    rest = (a - square) - error
    above, below = (torch.nextafter(root, torch.full_like(root, end)) for end in (torch.inf, 0))
    nearest = torch.where(rest > root * (above - root), above, root)
    nearest = torch.where(rest <= -root * (root - below), below, nearest)
    root = torch.where((a > 0) & a.isfinite(), nearest, root)
    return torch.where(is_small, root * 2.0**-300, root)


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """value in the dtype. Numbers beyond the dtype's range become its largest number."""
    largest = torch.finfo(dtype).max
    return value.to(torch.promote_types(value.dtype, dtype)).clamp(-largest, largest).to(dtype)
