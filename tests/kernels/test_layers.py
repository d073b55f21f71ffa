"""The kernels for layers compared with their specification, bit for bit, and their gradients with torch's own norms."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewbit import activations, kernels, resolve
from fewbit.kernels import DeviceTable, layer_loops, layer_rows, layer_sample, layer_sums, layers, layers_cpu, loops
from fewbit.kernels import layers_reference as reference
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import Codes, First, Vectors, wide_dtype

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU = torch.device("cpu")
MAKERS = [
    *(layer_loops.encoder, layer_loops.rebuilder, layer_sample.sampler, layer_rows.row_statistics),
    *(layer_sums.rows_backward, layer_sums.channel_sums),
]


def normal_table(bits, dtype):
    return resolve.shipped_tables(activations.IDENTITY, ("value",), bits, wide_dtype(dtype), CPU)[0]


def gate_tables(bits, dtype):
    return resolve.shipped_tables(activations.get("silu"), ("derivative", "value"), bits, wide_dtype(dtype), CPU)


def assert_same(found, expected):
    """The same dtype and shape, NaN in the same places, and the same bytes elsewhere."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (torch.where(each.isnan(), 0, each).contiguous().view(torch.uint8) for each in (found, expected))
    assert torch.equal(found, expected)


def assert_close(found, expected, bound, dtype):
    """Equal to rounding: in the wide dtype for terms of size `bound` at most, and of the result to its dtype."""
    error = (found.double() - expected).abs()
    of_result = torch.finfo(dtype).eps * expected.abs().clamp_min(torch.finfo(dtype).smallest_normal)
    assert (error <= 64 * torch.finfo(wide_dtype(dtype)).eps * bound + of_result).all()


def laid_out(x, layout):
    """The numbers of x (outer, channels, inner) in another layout; `expanded`: those of its first outer index, repeated."""
    outer, channels, inner = x.shape
    if layout == "channels last":
        return x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "sliced":
        whole = x.new_full((outer, 2 * channels + 1, inner + 3), 7.0)
        whole[:, 1::2, 2 : 2 + inner] = x
        return whole[:, 1::2, 2 : 2 + inner]
    if layout == "expanded":
        return x[:1].expand(outer, channels, inner)
    return torch._neg_view(-x) if layout == "negated" else x


LAYOUTS = ["contiguous", "channels last", "transposed", "sliced", "expanded", "negated"]


def random_input(rng, grid, dtype, kind):
    """(outer, channels, inner)"""
    size, generator = grid[:3], torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    scale = 10 ** torch.from_numpy(rng.uniform(-2, 2, (1, grid.channels, 1)))
    x = torch.randn(size, dtype=torch.float64, generator=generator) * scale + torch.from_numpy(rng.normal(size=scale.shape))
    if kind == "sparse":
        x = x * (torch.rand(size, generator=generator) < 0.3)
    elif kind == "zeros":
        x[rng.integers(grid.outer)] = 0
        x[:, rng.integers(grid.channels)] = 0
    elif kind == "constant":
        x = x[:1, :, :1].expand(size)
    elif kind == "one-hot":
        x = (torch.rand(size, generator=generator) < 1 / grid.channels).double()
    elif kind == "tiny":
        x = x * (1e-42 if dtype != torch.float64 else 1e-310)
    elif kind == "huge":
        x = x * torch.finfo(dtype).max / 100
    elif kind == "not finite":
        flat = x.view(-1)
        for value in (np.inf, -np.inf, np.nan):
            flat[rng.integers(flat.numel())] = value
    elif kind == "ties":
        x = torch.round(x * 2) / 2
    return x.to(dtype)


KINDS = ["normal", "sparse", "zeros", "constant", "one-hot", "tiny", "huge", "not finite", "ties"]


@st.composite
def grids(draw):
    inner, per_row, groups = draw(st.sampled_from([1, 1, 2, 5, 33])), draw(st.sampled_from([1, 1, 3])), draw(st.integers(1, 3))
    outer = per_row * draw(st.sampled_from([1, 2, 7, 30, 300 // inner]))
    return Grid(outer, groups * draw(st.sampled_from([1, 2, 5, 16, 40])), inner, per_row, groups)


CASES = {
    "grid": grids(),
    "dtype": st.sampled_from(DTYPES),
    "bits": st.integers(1, 8),
    "kind": st.sampled_from(KINDS),
    "layout": st.sampled_from(LAYOUTS),
    "of": st.sampled_from(["rows scaled", "rows", "padded rows", "channels", "nothing"]),
    "affine": st.sampled_from(["", "weight", "bias", "weight and bias"]),
    "by_sign": st.booleans(),
    "keep_means": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=60)
@given(**CASES)
def test_all_bits_are_those_of_the_specification(grid, dtype, bits, kind, layout, of, affine, by_sign, keep_means, seed):
    check_codes(grid, dtype, bits, kind, layout, of, affine, by_sign, keep_means, seed)


@pytest.mark.slow
@settings(max_examples=1500)
@given(**CASES)
def test_all_bits_are_those_of_the_specification_at_length(
    grid, dtype, bits, kind, layout, of, affine, by_sign, keep_means, seed
):
    check_codes(grid, dtype, bits, kind, layout, of, affine, by_sign, keep_means, seed)


def check_codes(grid, dtype, bits, kind, layout, of, affine, by_sign, keep_means, seed):
    rng, wide, table = np.random.default_rng(seed), wide_dtype(dtype), normal_table(bits, dtype)
    x = laid_out(random_input(rng, grid, dtype, kind), layout)
    magnitude = reference.magnitudes(x, grid)
    assert_same(layers_cpu.magnitudes(x, grid), magnitude)
    row_scales, row_weight = reference.row_scales(x, grid, magnitude), None
    assert_same(layers_cpu.row_scales(x, grid, magnitude), row_scales)
    for centered in (True, False):
        moments = reference.row_moments(x, grid, 1e-5, centered)
        assert_same(layers_cpu.row_moments(x, grid, 1e-5, centered), moments)
    row, eps = None, None
    if of == "rows scaled":
        first, row_weight = First(None, row_scales[1], True), row_scales[0]
        row = row_weight
    elif of == "rows":
        first = First(moments[0], moments[1], True)
    elif of == "padded rows":  # an eps near the variance of some channels
        first = First(moments[0], moments[1], True, float(moments[1].nan_to_num(1.0, 1.0, 1.0).pow(-2).median()))
        row, eps = moments[1], first.eps
    elif of == "channels":
        first = First(*torch.from_numpy(rng.normal(size=(2, grid.channels))).to(wide), False)
    else:
        first = First(None, None, True)
    weight, bias = (torch.from_numpy(rng.normal(size=grid.channels)).to(dtype) for _ in range(2))
    weight, bias = weight if "weight" in affine else None, bias if "bias" in affine else None
    arguments = x, grid, first, row_weight, table, weight, bias, by_sign, keep_means
    coding, vectors, where = reference.standardize(*arguments)
    for found, expected in zip(layers_cpu.standardize(*arguments), (coding, vectors, where), strict=True):
        assert_same(found, expected) if isinstance(found, torch.Tensor) else None
    z = reference.standard(x, grid, first, coding)
    is_finite = all(bool(each.isfinite().all()) for each in (z, coding, vectors))
    marked, unmarked = vectors.clone(), vectors.clone()
    packed, _ = reference.encode(x, grid, first, coding, table, marked, where)
    for marks, expected in ((where, marked), (None, vectors)):
        own = vectors.clone()
        found, told = layers_cpu.encode(x, grid, first, coding, table, own, marks)
        assert_same(found, packed)
        assert_same(own, expected)
        assert told == is_finite
    codes = Codes(packed, grid, marked, where, row, eps, table)
    assert_same(layers_cpu.decode(codes, dtype), reference.decode(codes, dtype))
    grad = random_input(rng, grid, dtype, "normal").reshape(-1)
    arguments = codes._replace(vectors=unmarked), grad, 0.1, 0.9
    assert_same(layers_cpu.times_slope(*arguments), reference.times_slope(*arguments))


GRADIENT_CASES = {name: CASES[name] for name in ("grid", "dtype", "bits", "layout", "seed")}


@settings(max_examples=40)
@given(**GRADIENT_CASES)
def test_gradients_are_those_of_the_specification(grid, dtype, bits, layout, seed):
    check_gradients(grid, dtype, bits, layout, seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(**GRADIENT_CASES)
def test_gradients_are_those_of_the_specification_at_length(grid, dtype, bits, layout, seed):
    check_gradients(grid, dtype, bits, layout, seed)


def check_gradients(grid, dtype, bits, layout, seed):
    rng, wide, table = np.random.default_rng(seed), wide_dtype(dtype), normal_table(bits, dtype)
    grad = laid_out(torch.from_numpy(rng.normal(size=grid[:3])).to(dtype), layout)
    packed = kernels.encode(torch.from_numpy(rng.normal(size=grid.n)).to(wide), table)
    vectors = torch.from_numpy(rng.normal(size=(2, grid.channels))).to(wide)
    weight = [None, torch.from_numpy(rng.normal(size=grid.channels)).to(dtype)][rng.integers(2)]
    eps, centered, has_bias = [None, 0.3][rng.integers(2)], bool(rng.integers(2)), bool(rng.integers(2))
    scale = torch.from_numpy(rng.uniform(0.5, 2, grid.rows)).to(wide)
    codes = Codes(packed, grid, vectors, Vectors(), None if eps is None else scale, eps, table)
    x_hat = reference.decode(codes, wide)
    found = layers_cpu.rows_backward(codes, grad, scale, weight, centered, has_bias)
    check_norm(found, grad, x_hat, scale, weight, row_of_elements(grid), grid, centered, True, weight is not None, has_bias)
    scale = torch.from_numpy(rng.uniform(0.5, 2, grid.channels)).to(wide)
    codes = Codes(packed, grid, vectors, Vectors(), None, None, table)
    x_hat = reference.decode(codes, wide)
    found = layers_cpu.channels_backward(codes, grad, scale, weight, centered)
    size = x_hat.abs().view(grid[:3])
    if centered:  # it is taken about its mean
        mean = x_hat.double().view(grid[:3]).mean((0, 2), keepdim=True)
        x_hat, size = x_hat.double().view(grid[:3]) - mean, size + mean.abs()
    size = size + 2 * vectors[0].abs().view(1, -1, 1)  # of the rebuilt values, without the center
    check_norm(found, grad, x_hat, scale, weight, channel_of_elements(grid), grid, centered, centered, True, True, size)
    derivative, value = gate_tables(min(bits, 4), dtype)
    gate, row = (
        kernels.encode(torch.from_numpy(rng.normal(size=grid.n)).to(wide), derivative),
        torch.rand(grid.rows, dtype=wide),
    )
    up = codes._replace(row=row)
    arguments = up, gate, grad, derivative, value
    for own, expected in zip(layers_cpu.gate_backward(*arguments), reference.gate_backward(*arguments), strict=True):
        assert_same(own, expected)
    assert_same(layers_cpu.gate_value(up, gate, value, dtype), reference.gate_value(up, gate, value, dtype))


def channel_of_elements(grid):
    return torch.arange(grid.channels).view(1, -1, 1).expand(grid[:3])


def row_of_elements(grid):
    outer, channel = torch.arange(grid.outer).view(-1, 1, 1), channel_of_elements(grid)
    return outer // grid.per_row * grid.groups + channel // (grid.channels // grid.groups)


def check_norm(found, grad, x_hat, scale, weight, share, grid, has_mean, has_product, has_weight, has_bias, size=None):
    """The gradients (of x, weight and bias) of a norm, by the formula in float64.

    share  (outer, channels, inner): which of the statistics an element shares
    size   of x̂, to which errors are relative, if that is not its own size
    """
    of_x, of_weight, of_bias = found
    g, x_hat = grad.double(), x_hat.double().view(grid[:3])
    size = x_hat.abs() if size is None else size.double()
    for own, values, of, is_there in ((of_weight, g * x_hat, g * size, has_weight), (of_bias, g, g, has_bias)):
        assert (own is not None) == is_there
        if own is not None:
            assert own.dtype == wide_dtype(grad.dtype)
            assert_close(own, values.sum((0, 2)), of.abs().sum((0, 2)), own.dtype)
    g = g if weight is None else g * weight.double().view(1, -1, 1)

    def mean(values):
        number = scale.numel()
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, share.flatten(), values.flatten())
        return (sums / (grid.n // number))[share]

    expected, bound = g, g.abs()
    if has_mean:
        expected, bound = expected - mean(g), bound + mean(g.abs())
    if has_product:
        expected, bound = expected - x_hat * mean(g * x_hat), bound + size * mean((g * size).abs())
    scale = scale.double()[share]
    assert of_x.dtype == grad.dtype
    assert_close(of_x.view(grid[:3]), expected * scale, bound * scale, grad.dtype)


def plus_and_minus_one(shape, over, rng):
    """Random signs, equally many of both along the dimensions `over`: numbers of mean 0 and variance 1."""
    whole = np.moveaxis(np.empty(shape), over, range(-len(over), 0))
    rows = np.tile([1.0, -1.0], whole.size // 2).reshape(-1, int(np.prod(whole.shape[-len(over) :])))
    signs = rng.permuted(rows, axis=1).reshape(whole.shape)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(signs, range(-len(over), 0), over)))


ONE_BIT = DeviceTable(torch.zeros(1), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([-1.0, 1.0]), 1)
NORMS = {
    "layer norm": ((7, 40), (1,), Grid(7, 40), lambda x, w, b: F.layer_norm(x, (40,), w, b, 0.0)),
    "long layer norm": ((3, 9000), (1,), Grid(3, 9000), lambda x, w, b: F.layer_norm(x, (9000,), w, b, 0.0)),
    "RMS norm": ((7, 40), (1,), Grid(7, 40), lambda x, w, b: F.rms_norm(x, (40,), w, 0.0) + b),
    "group norm": ((4, 6, 5, 2), (1, 2, 3), Grid(4, 6, 10), lambda x, w, b: F.group_norm(x, 1, w, b, 0.0)),
    "batch norm": ((8, 5, 3, 3), (0, 2, 3), Grid(8, 5, 9), lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=1e-12)),
    "batch norm of features": ((80, 5), (0,), Grid(80, 5), lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=1e-12)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_torchs_where_codes_are_exact(name, dtype, rng):
    """For numbers that are 1 or -1, one bit is exact, and a norm does not change them: autograd in float64 is the oracle."""
    shape, over, grid, norm = NORMS[name]
    signs, sigma = plus_and_minus_one(shape, over, rng), 4.0
    packed = kernels.encode(signs.float(), ONE_BIT)
    vectors = torch.stack([torch.zeros(grid.channels), torch.ones(grid.channels)])
    weight, bias = torch.from_numpy(rng.normal(size=(2, grid.channels))).to(dtype)
    grad = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    leaves = [each.double().requires_grad_() for each in (sigma * signs, weight, bias)]
    expected = torch.autograd.grad(norm(*leaves), leaves, grad.double())
    arguments = Codes(packed, grid, vectors, Vectors(), None, None, ONE_BIT), grad.view(grid[:3])
    if "batch" in name:
        scale = torch.full((grid.channels,), 1 / sigma)
        found = layers_cpu.channels_backward(*arguments, scale, weight, True)
    else:
        scale = torch.full((grid.rows,), 1 / sigma)
        found = layers_cpu.rows_backward(*arguments, scale, weight, name != "RMS norm", True)
    for own, of in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), of.flatten(), atol=1e-4, rtol=torch.finfo(own.dtype).eps)


def all_results(x, grad, grid):
    """All results of the kernels for a layer's input, as one list."""
    table = normal_table(4, x.dtype)
    magnitude = layers_cpu.magnitudes(x, grid)
    scales, moments = layers_cpu.row_scales(x, grid, magnitude), layers_cpu.row_moments(x, grid, 1e-5, True)
    first = First(moments[0], moments[1], True, 1e-5)
    weight = torch.linspace(0.5, 2, grid.channels)
    coding, vectors, where = layers_cpu.standardize(x, grid, first, None, table, weight, None, False, True)
    packed, is_finite = layers_cpu.encode(x, grid, first, coding, table, vectors, None)
    assert is_finite
    derivative, value = gate_tables(4, x.dtype)
    gate = kernels.encode(x.float().reshape(-1), derivative)
    codes = Codes(packed, grid, vectors, where, moments[1], 1e-5, table)
    of_x_hat, up = codes._replace(where=Vectors()), Codes(packed, grid, vectors, Vectors(), scales[0], None, table)
    return [
        *(magnitude, scales, moments, coding, vectors, packed),
        layers_cpu.decode(codes, x.dtype),
        layers_cpu.times_slope(codes, grad.reshape(-1), 0.0, 1.0),
        *layers_cpu.rows_backward(of_x_hat, grad, moments[1], weight, True, True),
        *layers_cpu.channels_backward(of_x_hat._replace(row=None, eps=None), grad, weight, weight, True),
        *layers_cpu.gate_backward(up, gate, grad, derivative, value),
        layers_cpu.gate_value(up, gate, value, x.dtype),
    ]


@pytest.mark.parametrize("grid", [Grid(900, 515), Grid(13, 70, 401, 1, 7)], ids=["rows", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(grid, dtype):
    x, grad = torch.randn(2, *grid[:3]).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_results(x, grad, grid))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for own, other in zip(found[0], others, strict=True):
            assert_same(other, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes_that_the_kernels_do_not_mix_go_to_the_reference(dtype, rng):
    """A gradient, or an output, in a wider or narrower dtype than the codes were made in."""
    grid, other = Grid(9, 11), torch.float64 if dtype == torch.float32 else torch.float32
    table = normal_table(3, dtype)
    packed = kernels.encode(torch.randn(99, dtype=dtype), table)
    vectors, scale = torch.randn(2, 11, dtype=dtype), torch.rand(9, dtype=dtype)
    grad = torch.randn(grid[:3], dtype=other)
    codes = Codes(packed, grid, vectors, Vectors(), scale, None, table)
    assert_same(layers_cpu.decode(codes, other), reference.decode(codes, other))
    arguments = codes._replace(row=None), grad, scale, None, True, True
    for found, expected in zip(layers_cpu.rows_backward(*arguments), reference.rows_backward(*arguments), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_same(found, expected)


def test_tables_with_any_thresholds_and_codes(rng):
    """Codes in any order, one used twice; and a number of thresholds that is no multiple of the block size of comparisons."""
    grid = Grid(30, 21)
    x = torch.randn(grid[:3])
    coding = torch.stack([torch.zeros(21), torch.ones(21), torch.zeros(21)])
    vectors = torch.stack([torch.zeros(21), torch.ones(21)])
    for bits, thresholds in ((1, 0), (1, 1), (3, 2), (3, 5), (4, 15), (5, 20), (8, 255)):
        levels = torch.from_numpy(rng.normal(size=2**bits)).float()
        codes = torch.from_numpy(rng.integers(0, 2**bits, thresholds + 1).astype(np.uint8))
        table = DeviceTable(torch.from_numpy(np.sort(rng.normal(size=thresholds))).float(), codes, levels, bits)
        arguments = x, grid, First(None, None, True), coding, table, vectors, None
        packed = reference.encode(*arguments)[0]
        assert_same(layers_cpu.encode(*arguments)[0], packed)
        codes = Codes(packed, grid, vectors, Vectors(), None, None, table)
        assert_same(layers_cpu.decode(codes, torch.float32), reference.decode(codes, torch.float32))
        for by_sign in (False, True):
            arguments = x, grid, First(None, None, True), None, table, None, None, by_sign, True
            for found, expected in zip(
                layers_cpu.standardize(*arguments)[:2], reference.standardize(*arguments)[:2], strict=True
            ):
                assert_same(found, expected)


def test_who_serves_what():
    x = torch.zeros(3)
    assert layers.backend_of(x) is layers_cpu
    assert layers.backend_of(torch.nn.Parameter(x)) is layers_cpu
    assert layers.backend_of(x.to("meta")) is reference
    assert layers.backend_of(x.as_subclass(type("Own", (torch.Tensor,), {}))) is reference


def test_a_kernel_that_does_not_finish_raises(monkeypatch):
    kernel = layers_cpu._kernel(layer_sample.sampler, torch.float32)
    monkeypatch.setattr(kernel, "call_at_once", lambda argument: None)
    with pytest.raises(RuntimeError, match="a kernel of fewbit did 0 of 2 pieces; run it again"):
        layers_cpu.magnitudes(torch.ones(4, 40, 1), Grid(4, 40))


def test_each_kernel_has_a_cache_of_its_own(monkeypatch):
    for module in (layer_loops, layer_rows, layer_sample, layer_sums):
        monkeypatch.setattr(module, "_compile", lambda kernel, block, variant: f"{kernel.__qualname__}.{variant}")
    assert len({make(wide) for make in MAKERS for wide in ("float32", "float64")}) == 2 * len(MAKERS)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_kernels_allocate_nothing(make, monkeypatch):
    """Errors in these functions are swallowed, so the functions must not be able to fail in other ways."""
    monkeypatch.setattr(loops, "callback", numba.cfunc)  # without a cache: cached functions have no text to look at
    assert "NRT_Allocate" not in make("float32").inspect_llvm()
