"""Every backend compared with naive code, bit for bit."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbit
from fewbit import kernels, packing, resolve
from fewbit.kernels import DeviceTable, cpu, loops, reference, system

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, 7, 8, 9, 1023, 1024, 1025, 5000]
BACKENDS = [reference, cpu]


@pytest.fixture(params=BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
def backend(request):
    return request.param


def random_device_table(rng, bits, intervals, dtype=torch.float32, even=False):
    """Random thresholds that float32 holds exactly, codes and levels."""
    thresholds = np.unique(rng.normal(0, 2, intervals - 1).astype(np.float32))
    codes = rng.integers(0, 2**bits, thresholds.size + 1).astype(np.uint8)
    if even:
        upper = np.unique(np.abs(thresholds))
        thresholds = np.concatenate([np.nextafter(-upper[::-1], np.float32(-np.inf)), upper])
        codes = np.concatenate([codes[: upper.size + 1][::-1], codes[1 : upper.size + 1]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = torch.from_numpy(rng.normal(size=2**bits)).to(wide)
    return DeviceTable(torch.from_numpy(thresholds).to(wide), torch.from_numpy(codes), levels, bits)


def adversarial(device_table, n, rng):
    """Values at and next to thresholds, zeros of both signs, infinities, NaN, subnormals, huge and ordinary ones."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 3e38, -3e38]
    t = device_table.thresholds.float().numpy()
    above, below = (np.nextafter(t, np.float32(side)) for side in (np.inf, -np.inf))
    return torch.from_numpy(
        rng.choice(np.concatenate([special, t, -t, above, below, rng.normal(0, 3, 50)]), n).astype(np.float32)
    )


def codes_of(x, device_table):
    return oracles.lookup(x.double().numpy(), device_table.thresholds.double().numpy(), device_table.codes.numpy())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("even", [False, True], ids=["", "even"])
@pytest.mark.parametrize("n", SIZES)
def test_encode_packs_the_specified_bytes(backend, bits, even, n, rng):
    for intervals in (1, 9, 32):
        device_table = random_device_table(rng, bits, intervals, even=even)
        x = adversarial(device_table, n, rng)
        packed = backend.encode(x, device_table)
        assert packed.dtype == torch.uint8
        np.testing.assert_array_equal(packed.numpy(), oracles.pack(codes_of(x, device_table), bits, packing.words(n, bits)))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 9, 1025])
def test_decode_multiplies_by_the_level(backend, bits, dtype, n, rng):
    device_table = random_device_table(rng, bits, 20, dtype)
    x = torch.from_numpy(rng.normal(0, 3, n)).to(dtype)
    grad = torch.from_numpy(rng.normal(size=n)).to(dtype)
    product = backend.decode(backend.encode(x, device_table), grad, device_table)
    level = device_table.levels[torch.from_numpy(codes_of(x, device_table).astype(np.int64))]
    assert product.dtype == dtype
    assert torch.equal(product, (grad.to(device_table.levels.dtype) * level).to(dtype))
    assert torch.equal(backend.values(backend.encode(x, device_table), n, device_table, dtype), level.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_compared_in_full_precision(backend, dtype):
    """A bfloat16 input is widened; the thresholds are not narrowed: 1.001 rounds to 1 in bfloat16, and 1 <= 1.001 holds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = torch.tensor([10.0, 20.0, 30.0], dtype=wide)
    device_table = DeviceTable(torch.tensor([0.999, 1.001], dtype=wide), torch.tensor([0, 1, 2], dtype=torch.uint8), levels, 2)
    packed = backend.encode(torch.tensor([0.5, 1.0, 2.0], dtype=dtype), device_table)
    assert backend.decode(packed, torch.ones(3, dtype=wide), device_table).tolist() == [10.0, 20.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_of_a_half_width_float(backend, dtype, rng):
    """All 65,536 numbers: each is encoded as the float that it stands for, and multiplied and rounded as torch rounds."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    device_table = random_device_table(rng, 4, 20, dtype)
    packed = backend.encode(x, device_table)
    np.testing.assert_array_equal(packed.numpy(), reference.encode(x.float(), device_table).numpy())
    expected = (x.float() * device_table.levels[torch.from_numpy(codes_of(x, device_table).astype(np.int64))]).to(dtype)
    assert torch.equal(backend.decode(packed, x, device_table).nan_to_num(-1.5), expected.nan_to_num(-1.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "thresholds",
    [[0.0], [-0.0], [1e-30], [-1e-30], [-1e-42, 1e-42], [-3.4e38, -65504.5, 65504.5, 3.4e38], [-65505.0, -1.00001, 1.00001]],
    ids=str,
)
def test_thresholds_that_no_half_width_float_equals(backend, dtype, thresholds):
    """All 65,536 patterns again, around zero and at the ends of the range."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    codes = torch.arange(len(thresholds) + 1, dtype=torch.uint8)
    device_table = DeviceTable(torch.tensor(thresholds), codes, torch.zeros(codes.numel()), 3)
    expected = oracles.pack(codes_of(x, device_table), 3, packing.words(x.numel(), 3))
    np.testing.assert_array_equal(backend.encode(x, device_table).numpy(), expected)


@settings(max_examples=40)
@given(
    bits=st.integers(1, 8),
    n=st.integers(0, 3000),
    intervals=st.integers(1, 256),
    even=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_backends_agree(bits, n, intervals, even, dtype, seed):
    rng = np.random.default_rng(seed)
    device_table = random_device_table(rng, bits, intervals, dtype, even)
    x, grad = adversarial(device_table, n, rng).to(dtype), torch.from_numpy(rng.normal(size=n)).to(dtype)
    packed = reference.encode(x, device_table)
    assert torch.equal(cpu.encode(x, device_table), packed)
    assert torch.equal(cpu.decode(packed, grad, device_table), reference.decode(packed, grad, device_table))


@pytest.mark.parametrize("threads_of", ["torch", "Python"])
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_three_million_elements_in_threads(bits, threads_of, rng, monkeypatch):
    handed_over = []
    pool = system._pool
    monkeypatch.setattr(system, "_pool", lambda process: handed_over.append(process) or pool(process))
    if threads_of == "Python":
        monkeypatch.setattr(system, "_openmp", lambda: None)
    device_table = random_device_table(rng, bits, 31)
    x, grad = adversarial(device_table, 3_000_001, rng), torch.randn(3_000_001)
    packed = reference.encode(x, device_table)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.encode(x, device_table), packed)
            assert torch.equal(cpu.decode(packed, grad, device_table), reference.decode(packed, grad, device_table))
    finally:
        torch.set_num_threads(before)
    # encode and decode, with one thread less than asked for
    assert len(handed_over) == (2 * (0 + 1 + 2) if threads_of == "Python" or system._openmp() is None else 0)


def test_even_tables_compare_magnitudes():
    for name in ("tanh", "sigmoid", "softsign", "hardtanh", "hardshrink"):
        for dtype in (torch.float32, torch.float64):
            table = fewbit.load_table(name, 4)
            device_table = resolve.device_tables(table, dtype, torch.device("cpu"))[0]
            assert device_table.is_even
            assert cpu._encoding(device_table, dtype).arrays[0].size <= 16
    assert not resolve.device_tables(fewbit.load_table("gelu", 4), torch.float32, torch.device("cpu"))[0].is_even


def test_who_serves_what():
    x = torch.zeros(3)
    assert kernels.backend(x) is cpu
    assert kernels.backend(x.to("meta")) is reference
    assert kernels.backend(torch.nn.Parameter(x)) is cpu
    assert kernels.backend(x.as_subclass(type("Own", (torch.Tensor,), {}))) is reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype_than_the_device_tables(backend, dtype, rng):
    """As when an activation returns float64 for a float32 input: levels keep the device_table's dtype."""
    for wide in (torch.float32, torch.float64):
        device_table = random_device_table(rng, 3, 9, wide)
        x, grad = torch.randn(1000, dtype=wide), torch.randn(1000).to(dtype)
        level = device_table.levels[torch.from_numpy(codes_of(x, device_table).astype(np.int64))]
        product = backend.decode(backend.encode(x, device_table), grad, device_table)
        assert torch.equal(product, (grad.to(wide) * level).to(dtype))


def test_zeros_without_memory(backend):
    device_table = DeviceTable(torch.tensor([0.0]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([5.0, 7.0]), 1)
    packed = backend.encode(torch._efficientzerotensor(5), device_table)
    assert backend.decode(packed, torch._efficientzerotensor(5), device_table).tolist() == [0.0] * 5


def test_negated_views_are_read_as_what_they_stand_for(backend):
    x = torch._neg_view(torch.tensor([1.0, -2.0, 3.0]))  # as from `.conj().imag`
    assert x.is_neg()
    device_table = DeviceTable(torch.tensor([0.0]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([5.0, 7.0]), 1)
    assert backend.decode(backend.encode(x, device_table), torch.ones(3), device_table).tolist() == [5.0, 7.0, 5.0]


def test_a_kernel_that_does_not_finish_raises(monkeypatch):
    table = DeviceTable(torch.tensor([0.0]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([5.0, 7.0]), 1)
    x = torch.randn(9)
    packed = cpu.encode(x, table)
    monkeypatch.setattr(cpu._encoding(table, x.dtype).kernel, "call_at_once", lambda argument: None)
    with pytest.raises(RuntimeError, match="a kernel of fewbit did 0 of 128 words"):
        cpu.encode(x, table)
    monkeypatch.setattr(cpu._decoder(x.dtype), "call_at_once", lambda argument: None)
    with pytest.raises(RuntimeError, match="0 of 128 words"):
        cpu.decode(packed, x, table)


@pytest.mark.slow
def test_kernels_allocate_nothing(monkeypatch):
    """Errors in these functions are swallowed, so the functions must not be able to fail in other ways."""
    monkeypatch.setattr(loops, "callback", numba.cfunc)  # without a cache: cached functions have no text to look at
    compiled = [loops.encoder("int16", False), loops.encoder("float64", True), loops.decoder("uint16")]
    assert not [kernel for kernel in compiled if "NRT_Allocate" in kernel.inspect_llvm()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the address space from Linux")
def test_where_memory_runs_out_there_is_an_error_or_the_right_result():
    code = """
import resource, torch, fewbit
from pathlib import Path
from fewbit import activations, kernels, resolve
torch.set_num_threads(1)
[table] = resolve.shipped_tables(activations.IDENTITY, ("value",), 4, torch.float32, torch.device("cpu"))
x = torch.linspace(-3, 3, 30_000)
packed = kernels.encode(x, table)
expected, counts = kernels.decode(packed, x, table), {"right": 0, "raised": 0, "wrong": 0}
for call in (lambda: kernels.encode(x, table), lambda: kernels.decode(packed, x, table)):
    for room in range(0, 1 << 19, 1 << 12):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, -1))
        try:
            found = call()
        except (MemoryError, RuntimeError):
            found = None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        right = found is not None and torch.equal(found, packed if found.dtype == torch.uint8 else expected)
        counts["raised" if found is None else "right" if right else "wrong"] += 1
print(counts)
"""
    own_pages = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000"}  # so that each allocation meets the limit
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, **own_pages})
    assert result.returncode == 0, result.stderr
    counts = ast.literal_eval(result.stdout)
    assert not counts["wrong"], counts
    assert counts["right"], counts
    assert counts["raised"], counts
    assert "ignored" not in result.stderr


@pytest.mark.slow
def test_a_fork_makes_threads_of_its_own():
    code = """
import os, torch
from fewbit.functional import gelu
from fewbit.kernels import system
def work():
    x = torch.linspace(-3, 3, 1 << 21, requires_grad=True)
    gelu(x, bits=3).sum().backward()
    return x.grad
torch.set_num_threads(2)
system._openmp = lambda: None
expected = work()
assert system._pool(os.getpid())._threads
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # OpenMP's own threads do not outlive a fork, whoever calls it
    torch.get_num_threads = lambda: 2
    os._exit(0 if torch.equal(work(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_each_kernel_has_a_cache_of_its_own(monkeypatch):
    """Otherwise two processes that compile at once, for different dtypes, may store a kernel under the other's number."""
    monkeypatch.setattr(loops, "callback", lambda *_, **__: lambda kernel: kernel)
    kernels = [loops.encoder(element, wide) for element in ("int16", "float32", "float64") for wide in (False, True)]
    kernels += [loops.decoder(element) for element in ("uint16", "int16", "float32", "float64")]
    assert len({kernel.__qualname__ for kernel in kernels}) == len(kernels)


@pytest.mark.slow
def test_a_cache_of_kernels_that_cannot_be_written(tmp_path):
    """A source tree that this user cannot write: numba uses the user's cache folder, or compiles in memory."""
    code = """
import torch, fewbit
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as where no folder can be written
fewbit.functional.gelu(torch.ones(9, requires_grad=True)).sum().backward()
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr
