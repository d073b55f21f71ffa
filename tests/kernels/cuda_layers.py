"""The CUDA kernels of layers and ladders, in Triton's interpreter or on a device. `test_cuda.py` runs it in its own process.

Codes and decoded values are those of the reference, bit for bit. Gradients agree to rounding. The interpreter truncates float32
to bfloat16, so bfloat16 results are compared with truncated ones.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cuda_device import DEVICE, INTERPRETED, OnDevice
from test_kernels import DTYPES, adversarial, random_device_table

from fewbit import activations, resolve
from fewbit.kernels import DeviceTable, reference
from fewbit.kernels import cuda as cuda_kernels
from fewbit.kernels import layers_cuda as layer_kernels
from fewbit.kernels import layers_reference as layers
from fewbit.kernels.device_table import MIDDLE
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import Codes, First, Vectors, wide_dtype
from fewbit.kernels.sample_programs import next_after

cuda, layers_cuda = OnDevice(cuda_kernels), OnDevice(layer_kernels)
CPU, EPS = torch.device("cpu"), 1e-5
TOKENS, IMAGES, LAST = Grid(9, 48), Grid(3, 6, 49, 1, 2), Grid(12, 24, 1, 4, 3)  # the last: images with the channels last
GRIDS = [
    TOKENS,
    IMAGES,
    LAST,
    Grid(70, 16),
    Grid(2, 8, 16),
    Grid(1, 1),
    Grid(5, 1),
    Grid(1, 7),
    Grid(40, 3, 7),
    Grid(4, 6, 32, 2, 1),
]


def slow(*cases):
    return [
        cases[0],
        *(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases[1:]),
    ]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each launch costs as much as its numbers: one program for all channels. Overflow gives no warning, as on a GPU."""
    if INTERPRETED:
        monkeypatch.setattr(layer_kernels, "_CHANNELS", 64)
    with np.errstate(all="ignore"):
        yield


def normal_table(bits, dtype):
    return resolve.shipped_tables(activations.IDENTITY, ("value",), bits, wide_dtype(dtype), CPU)[0]


def ladder(name, bits, dtype, channels=("derivative", "value")):
    return resolve.shipped_tables(activations.get(name), channels, bits, wide_dtype(dtype), CPU)


def an_input(grid, dtype, rng):
    """Channels with their own centers and spreads, zeros, one constant channel, one with numbers that are not finite."""
    x = rng.normal(size=grid[:3]) * np.linspace(0.1, 3, grid.channels)[:, None] + np.linspace(-2, 2, grid.channels)[:, None]
    x = torch.from_numpy(x).to(dtype)
    x[0] = 0
    x[:, grid.channels // 2] = 0.5
    if grid.channels > 4:
        x[-1, 2] = torch.inf
        x[-1, 3, 0] = torch.nan
    return x


def assert_same(found, expected):
    """The same dtype, shape and bits, NaN as NaN. float32 rounded to bfloat16 may be truncated."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype == torch.bfloat16 and INTERPRETED:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0, equal_nan=True)
    elif found.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert torch.equal(found, expected)


def assert_near(found, expected):
    """Equal to rounding, relative to the largest number, or to 1, since their terms may cancel."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5, torch.float64: 1e-12}[found.dtype]
    size = max(1.0, float(expected.abs().nan_to_num(0, 0).max()))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def statistics(x, grid):
    """The reference's magnitudes, row scales and row moments, after asserting that the kernels' are the same."""
    magnitude = layers.magnitudes(x, grid)
    scales, moments = layers.row_scales(x, grid, magnitude), layers.row_moments(x, grid, EPS, True)
    assert_same(layers_cuda.magnitudes(x, grid), magnitude)
    assert_same(layers_cuda.row_scales(x, grid, magnitude), scales)
    assert_same(layers_cuda.row_moments(x, grid, EPS, True), moments)
    assert_same(layers_cuda.row_moments(x, grid, 0.0, False), layers.row_moments(x, grid, 0.0, False))
    return magnitude, scales, moments


def firsts(x, grid):
    """What may be done to x first, and the weights of rows: norms along rows, values in scales of rows, batch norms."""
    magnitude, scales, moments = statistics(x, grid)
    return [
        (First(moments[0], moments[1], True, EPS), None),
        (First(None, scales[1], True), scales[0]),
        (First(magnitude, 1 / (magnitude + 1), False), None),
        (First(None, None, True), None),
    ]


def check_codes(x, grid, first, row_weight, table, rng, by_sign, affine, keep_means):
    """From the sample to the rebuilt values."""
    weight = torch.from_numpy(rng.normal(size=grid.channels)).to(x.dtype) if affine else None
    bias = torch.from_numpy(rng.normal(size=grid.channels)).to(x.dtype) if affine else None
    if weight is not None:
        weight[-1] = 0
    arguments = x, grid, first, row_weight, table, weight, bias, by_sign, keep_means
    coding, vectors, where = layers.standardize(*arguments)
    found = layers_cuda.standardize(*arguments)
    assert_same(found[0], coding)
    assert_same(found[1], vectors)
    assert found[2] == where
    marked = vectors.clone()
    packed, _ = layers.encode(x, grid, first, coding, table, vectors, where)
    assert_same(layers_cuda.encode(x, grid, first, coding, table, marked, where)[0], packed)
    assert_same(marked, vectors)
    row, eps = (row_weight, None) if row_weight is not None else (first.scale if first.by_row else None, first.eps)
    codes = Codes(packed, grid, vectors, where, row, eps, table)
    assert_same(layers_cuda.decode(codes, x.dtype), layers.decode(codes, x.dtype))
    assert_same(layers_cuda.decode(codes, x.dtype, 0.01, 1.5), layers.decode(codes, x.dtype, 0.01, 1.5))
    grad = torch.from_numpy(rng.normal(size=grid.n)).to(x.dtype)
    assert_same(layers_cuda.times_slope(codes, grad, 0.01, 1.5), layers.times_slope(codes, grad, 0.01, 1.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_dtype(dtype, rng):
    x, table = an_input(TOKENS, dtype, rng), normal_table(3, dtype)
    first, row_weight = firsts(x, TOKENS)[0]
    check_codes(x, TOKENS, first, row_weight, table, rng, False, True, True)


@pytest.mark.parametrize("grid", [IMAGES, LAST, *(pytest.param(grid, marks=pytest.mark.slow) for grid in GRIDS[3:])], ids=str)
def test_codes_of_every_layout(grid, rng):
    x, table = an_input(grid, torch.float32, rng), normal_table(4, torch.float32)
    for i, (first, row_weight) in enumerate(firsts(x, grid)):
        check_codes(x, grid, first, row_weight, table, rng, i == 2, i != 3, i != 1)


@pytest.mark.slow
@pytest.mark.parametrize("by_sign", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_choice(by_sign, dtype, rng):
    """Combinations of dtype, first, by_sign, affine, keep_means and grid: any three of them meet in all ways."""
    for i in range(4):
        one, other = divmod(DTYPES.index(dtype) ^ i, 2)
        affine, keep_means, grid = by_sign ^ one, by_sign ^ other, (IMAGES, LAST)[by_sign ^ one ^ other]
        x, table = an_input(grid, dtype, rng), normal_table(2, dtype)
        check_codes(x, grid, *firsts(x, grid)[i], table, rng, bool(by_sign), bool(affine), bool(keep_means))


@pytest.mark.parametrize("bits", [1, 6, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 4, 5, 7, 8))])
def test_codes_of_every_number_of_bits(bits, rng):
    x = an_input(IMAGES, torch.float32, rng)
    table = random_device_table(rng, bits, 2**bits)
    for by_sign in (False, True):
        check_codes(x, IMAGES, First(None, None, True), None, table, rng, by_sign, True, True)


def test_more_places_than_the_sample(rng):
    grid = Grid(54, 5, 10, 18, 1)._replace(sample=127)
    x = an_input(grid, torch.float32, rng)
    x[1::2, 0], x[1::3, 1] = 0, 1e9
    first, row_weight = firsts(x, grid)[1]
    check_codes(x, grid, first, row_weight, normal_table(2, torch.float32), rng, False, False, True)


def strided(x, kind):
    """The same numbers with other strides; "expanded": those of the first outer place."""
    outer, channels, inner = x.shape
    wide = torch.zeros(outer + 1, channels + 2, inner + 3, dtype=x.dtype)
    wide[1:, 2:, 3:] = x
    return {
        "transposed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "channels last": x.transpose(1, 2).contiguous().transpose(1, 2),
        "a slice": wide[1:, 2:, 3:],
        "expanded": x[:1].expand(x.shape),
        "negated": torch._neg_view(x),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "grid"),
    slow(
        *((kind, grid) for grid in (IMAGES, LAST) for kind in ("channels last", "transposed", "a slice", "expanded", "negated"))
    ),
    ids=str,
)
def test_strides(kind, grid, rng):
    table, x = normal_table(4, torch.float32), strided(an_input(grid, torch.float32, rng), kind)
    dense = x.resolve_neg().contiguous()
    _, _, moments = statistics(x, grid)
    first = First(moments[0], moments[1], True, EPS)
    coding, vectors, where = layers_cuda.standardize(x, grid, first, None, table, None, None, False, True)
    assert_same(coding, layers.standardize(dense, grid, first, None, table, None, None, False, True)[0])
    packed, _ = layers_cuda.encode(x, grid, first, coding, table, vectors, where)
    assert_same(packed, layers.encode(dense, grid, first, coding, table, vectors.clone(), where)[0])
    grad = strided(torch.from_numpy(rng.normal(size=grid[:3])).float(), kind)
    check_gradients(packed, grad, grid, vectors.nan_to_num(0), moments[1].nan_to_num(1), table, rng, affine=True)


def check_gradients(packed, grad, grid, vectors, scale, table, rng, affine):
    """The gradients of norms, by the kernels and by the reference."""
    weight = torch.from_numpy(rng.normal(size=grid.channels)).to(grad.dtype) if affine else None
    for eps, centered in ((EPS, True), (None, False)):
        codes = Codes(packed, grid, vectors, Vectors(), None if eps is None else scale, eps, table)
        arguments = codes, grad, scale, weight, centered, affine and centered
        found, expected = layers_cuda.rows_backward(*arguments), layers.rows_backward(*arguments)
        assert [each is None for each in found] == [each is None for each in expected]
        for one, other in zip(found, expected, strict=True):
            if one is not None:
                assert_near(one, other)
    for training in (True, False):
        codes = Codes(packed, grid, vectors, Vectors(), None, None, table)
        arguments = codes, grad, vectors[1] + 0.5, weight, training
        for one, other in zip(layers_cuda.channels_backward(*arguments), layers.channels_backward(*arguments), strict=True):
            assert_near(one, other)


def coded(grid, dtype, table, rng):
    """Codes of normal numbers, their vectors, and gradients."""
    x, grad = (torch.from_numpy(rng.normal(size=grid[:3])).to(dtype) for _ in range(2))
    vectors = torch.from_numpy(rng.normal(size=(2, grid.channels))).to(wide_dtype(dtype))
    return reference.encode(x, table), grad, vectors


@pytest.mark.parametrize(
    ("grid", "dtype", "bits", "affine"),
    [
        (TOKENS, torch.float32, 3, True),
        (IMAGES, torch.bfloat16, 4, True),
        (LAST, torch.float16, 6, False),
        *(
            pytest.param(grid, dtype, bits, affine, marks=pytest.mark.slow)
            for i, grid in enumerate(GRIDS)
            for j, dtype in enumerate(DTYPES)
            for bits, affine in [((i + 2 * j) % 8 + 1, bool((i + j) % 2))]
        ),
    ],
    ids=str,
)
def test_gradients(grid, dtype, bits, affine, rng):
    table = random_device_table(rng, bits, 2**bits, dtype)
    packed, grad, vectors = coded(grid, dtype, table, rng)
    scale = torch.from_numpy(rng.uniform(0.5, 300, grid.rows)).to(vectors.dtype)
    check_gradients(packed, grad, grid, vectors, scale, table, rng, affine)


@pytest.mark.parametrize(("size", "parts"), slow((16, 2), (64, 3)))
def test_long_rows_and_many_parts(size, parts, rng, monkeypatch):
    """Rows that do not fit a program, and sums over several programs."""
    monkeypatch.setattr(layer_kernels, "_PARTS", parts)
    table = normal_table(3, torch.float32)
    for grid in (Grid(70, 48), Grid(3, 6, 49, 1, 2)):
        packed, grad, vectors = coded(grid, torch.float32, table, rng)
        scale = torch.from_numpy(rng.uniform(0.5, 300, grid.rows)).float()
        for largest in (layer_kernels._LARGEST_ROW, 2 * size):
            monkeypatch.setattr(layer_kernels, "_LARGEST_ROW", largest)
            check_gradients(packed, grad, grid, vectors, scale, table, rng, True)


def test_gradients_beyond_the_range_of_the_dtype_end_at_it(rng):
    table = normal_table(3, torch.float16)
    packed, grad, vectors = coded(TOKENS, torch.float16, table, rng)
    scale = torch.full((TOKENS.rows,), 1e9)
    arguments = Codes(packed, TOKENS, vectors, Vectors(), None, None, table), grad, scale, None, True, False
    grad_x, *_ = layers_cuda.rows_backward(*arguments)
    assert grad_x.abs().max() == 65504
    assert_near(grad_x, layers.rows_backward(*arguments)[0])


@pytest.mark.parametrize(
    ("dtype", "grid"), slow((torch.float32, IMAGES), *((dtype, grid) for dtype in DTYPES for grid in (TOKENS, LAST))), ids=str
)
def test_gates(dtype, grid, rng):
    normal = normal_table(4, dtype)
    for derivative, value in (ladder("silu", 4, dtype), tuple(table.rungs[3] for table in ladder("gelu", 3, dtype))):
        packed_up, grad, vectors = coded(grid, dtype, normal, rng)
        packed = reference.encode(torch.from_numpy(3 * rng.normal(size=grid.n)).to(dtype), derivative)
        row = torch.from_numpy(rng.uniform(0.5, 3, grid.rows)).to(vectors.dtype)
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        up = Codes(packed_up, grid, vectors, Vectors(), row, None, normal)
        arguments = up, packed, grad, derivative, value
        for found, expected in zip(layers_cuda.gate_backward(*arguments), layers.gate_backward(*arguments), strict=True):
            assert_same(found, expected)
        arguments = up, packed, value, dtype
        assert_same(layers_cuda.gate_value(*arguments), layers.gate_value(*arguments))


def test_nothing_to_do():
    grid, table = Grid(0, 4), normal_table(2, torch.float32)
    vectors = torch.ones(2, 4)
    packed, _ = layers_cuda.encode(
        torch.zeros(0, 4, 1), grid, First(None, None, True), torch.ones(3, 4), table, vectors, Vectors()
    )
    assert packed.numel() == 0
    codes = Codes(packed, grid, vectors, Vectors(), None, None, table)
    assert layers_cuda.decode(codes, torch.float16).shape == (0,)


@triton.jit
def next_numbers(a, found):
    i = tl.arange(0, 8)
    tl.store(found + i, next_after(tl.load(a + i)))


def test_the_next_number():
    """As in torch, for thresholds of channels whose factor is negative."""
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        a = torch.tensor([0.0, -0.0, 1.0, -1.0, info.max, -info.max, info.smallest_normal, -torch.inf], dtype=dtype)
        found = torch.empty_like(a, device=DEVICE)
        next_numbers[(1,)](a.to(DEVICE), found)
        assert torch.equal(found.cpu(), torch.nextafter(a, torch.full_like(a, torch.inf)))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("gelu", 1),
        ("gelu", 3),
        *(pytest.param(name, i % 4 + 1, marks=pytest.mark.slow) for i, name in enumerate(activations.names())),
    ],
)
def test_shipped_ladders(name, bits, rng):
    for i, channels in enumerate((("derivative",), ("derivative", "value"))):
        tables = ladder(name, bits, torch.float32, channels)
        for dtype, scale, n in ((torch.float32, 0.03, 1030), (torch.float16, 1, 1030), (torch.float32, 9, 3000)):
            x = torch.from_numpy(scale * rng.normal(size=n)).to(dtype)
            x[3:9] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0, -0.0, 1e-42])
            packed = cuda.encode(x, tables[0])
            assert torch.equal(packed, reference.encode(x, tables[0]))
            for table in tables[: 1 + i]:
                grad = torch.from_numpy(rng.normal(size=n)).to(dtype)
                assert torch.equal(cuda.decode(packed, grad, table), reference.decode(packed, grad, table))
                assert torch.equal(
                    cuda.values(packed, n, table, torch.float32), reference.values(packed, n, table, torch.float32)
                )


def random_ladder(rng, bits, intervals, dtype=torch.float32, even=False):
    """Rungs that have nothing in common, with different numbers of thresholds."""
    rungs = [
        random_device_table(rng, bits, int(rng.integers(1, intervals + 1)) if not even else intervals, dtype, even)
        for _ in range(9)
    ]
    m = max(table.thresholds.numel() for table in rungs)
    thresholds = [
        torch.nn.functional.pad(table.thresholds, (0, m - table.thresholds.numel()), value=torch.inf) for table in rungs
    ]
    codes = [torch.cat([table.codes, table.codes[-1:].expand(m + 1 - table.codes.numel())]) for table in rungs]
    return DeviceTable(torch.stack(thresholds), torch.stack(codes), torch.stack([table.levels for table in rungs]), bits)


@pytest.mark.parametrize(
    ("bits", "intervals", "dtype"),
    slow(
        (3, 6, torch.float32),
        *((bits, (3, 16, 40)[(i + j) % 3], dtype) for i, bits in enumerate((1, 2, 4, 5, 8)) for j, dtype in enumerate(DTYPES)),
    ),
    ids=str,
)
def test_random_ladders(bits, intervals, dtype, rng):
    for even in (False, True):
        table = random_ladder(rng, bits, intervals, dtype, even)
        for scale in (0.05, 1.0, 12.0):
            x = (adversarial(table.rungs[MIDDLE], 1100, rng) * scale).to(dtype)
            packed, grad = cuda.encode(x, table), torch.from_numpy(rng.normal(size=1100)).to(dtype)
            assert torch.equal(packed, reference.encode(x, table))
            assert_same(cuda.decode(packed, grad, table), reference.decode(packed, grad, table))


@pytest.mark.parametrize("n", [0, 1, 5, 508, 509, 510, 2000])
def test_rungs_of_all_sizes(n, rng):
    (table,) = ladder("tanh", 1, torch.float32, ("derivative",))
    for scale in (0.0, 0.01, 0.3, 1.0, 30.0, 1e12):
        x = torch.from_numpy(scale * rng.normal(size=n)).float()
        assert torch.equal(cuda.encode(x, table)[-1:], reference.encode(x, table)[-1:])


def test_forward_with_a_ladder(rng):
    """Hard-swish needs no function of libdevice, which the interpreter lacks."""
    record = activations.get("hardswish")
    (table,) = ladder("hardswish", 3, torch.float32, ("derivative",))
    x = torch.from_numpy(0.1 * rng.normal(size=1500)).float()
    y, packed = cuda.forward(x, table, record.name, record.parameters)
    assert torch.equal(packed, reference.encode(x, table))
    torch.testing.assert_close(y, record.forward(x))
