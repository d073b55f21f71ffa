"""Every backend against naive code, bit by bit."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import packing
from fewbit.kernels import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, 7, 8, 9, 1023, 1024, 1025, 5000]


@pytest.fixture(params=[reference], ids=lambda module: module.__name__.rpartition(".")[2])
def backend(request):
    return request.param


def random_table(rng, bits, intervals):
    """Thresholds that float32 holds exactly, codes, levels."""
    thresholds = np.unique(rng.normal(0, 2, intervals - 1).astype(np.float32))
    codes = rng.integers(0, 2**bits, thresholds.size + 1).astype(np.uint8)
    return torch.from_numpy(thresholds), torch.from_numpy(codes), torch.from_numpy(rng.normal(size=2**bits).astype(np.float32))


def adversarial(thresholds, n, rng):
    """Values at and next to thresholds, zeros of both signs, infinities, NaN, subnormals, huge and ordinary ones."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 3e38, -3e38]
    t = thresholds.numpy()
    pool = np.concatenate(
        [special, t, np.nextafter(t, np.float32(np.inf)), np.nextafter(t, np.float32(-np.inf)), rng.normal(0, 3, 50)]
    )
    return torch.from_numpy(rng.choice(pool, n).astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_encode_packs_the_specified_bytes(backend, bits, n, rng):
    thresholds, codes, _ = random_table(rng, bits, 20)
    x = adversarial(thresholds, n, rng)
    packed = backend.encode(x, thresholds, codes, bits)
    expected = oracles.pack(oracles.lookup(x.numpy(), thresholds.numpy(), codes.numpy()), bits, packing.words(n, bits))
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 9, 1025])
def test_decode_multiplies_by_the_level(backend, bits, dtype, n, rng):
    thresholds, codes, levels = random_table(rng, bits, 20)
    x = torch.from_numpy(rng.normal(0, 3, n)).float()
    grad = torch.from_numpy(rng.normal(size=n)).to(dtype)
    levels = levels.double() if dtype == torch.float64 else levels
    product = backend.decode(backend.encode(x, thresholds, codes, bits), levels, grad, bits)
    code = torch.from_numpy(oracles.lookup(x.numpy(), thresholds.numpy(), codes.numpy()).astype(np.int64))
    expected = (grad.to(levels.dtype) * levels[code]).to(dtype)
    assert product.dtype == dtype
    assert torch.equal(product, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_compared_in_full_precision(backend, dtype, rng):
    """A bfloat16 input is widened, not the thresholds narrowed: 1.001 rounds to 1 in bfloat16, and 1 <= 1.001 holds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    thresholds, codes = torch.tensor([0.999, 1.001], dtype=wide), torch.tensor([0, 1, 2], dtype=torch.uint8)
    packed = backend.encode(torch.tensor([0.5, 1.0, 2.0], dtype=dtype), thresholds, codes, 2)
    levels = torch.tensor([10.0, 20.0, 30.0], dtype=wide)
    assert backend.decode(packed, levels, torch.ones(3, dtype=wide), 2).tolist() == [10.0, 20.0, 30.0]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(0, 3000), intervals=st.integers(1, 256), seed=st.integers(0, 2**32 - 1))
def test_round_trip(bits, n, intervals, seed):
    rng = np.random.default_rng(seed)
    thresholds, codes, levels = random_table(rng, bits, intervals)
    x = adversarial(thresholds, n, rng)
    packed = reference.encode(x, thresholds, codes, bits)
    code = oracles.lookup(x.numpy(), thresholds.numpy(), codes.numpy()).astype(np.int64)
    assert torch.equal(reference.decode(packed, levels, torch.ones(n), bits), levels[torch.from_numpy(code)])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_three_million_elements(backend, bits, rng):
    thresholds, codes, _ = random_table(rng, bits, 31)
    x = adversarial(thresholds, 3_000_000, rng)
    expected = oracles.pack(oracles.lookup(x.numpy(), thresholds.numpy(), codes.numpy()), bits, packing.words(x.numel(), bits))
    np.testing.assert_array_equal(backend.encode(x, thresholds, codes, bits).numpy(), expected)
