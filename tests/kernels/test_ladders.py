"""Ladders in every backend, compared with naive code: which rung an input takes, and that all else is as with its table."""

import numpy as np
import oracles
import pytest
import torch

import fewbit
from fewbit import activations, kernels, packing, resolve, store
from fewbit.errors import InputError
from fewbit.kernels import DeviceTable, cpu, ops, reference  # noqa: F401  ops registers the operators

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU = torch.device("cpu")


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def backend(request):
    return request.param


def wide_of(dtype):
    return np.float64 if dtype == torch.float64 else np.float32


def random_ladder(rng, bits, dtype=torch.float32):
    """Nine random tables, of one to thirty thresholds, as DeviceTables and as one ladder."""
    wide, rungs = wide_of(dtype), []
    for m in (1, 30, 8, 3, 17, 12, 4, 29, 2):
        thresholds = np.unique(rng.normal(0, 2, m).astype(np.float32)).astype(wide)
        codes = rng.integers(0, 2**bits, thresholds.size + 1).astype(np.uint8)
        rungs.append((thresholds, codes, rng.normal(size=2**bits).astype(wide)))
    padded = [
        (np.append(t, [np.inf] * (30 - t.size)).astype(wide), np.append(c, [c[-1]] * (30 - t.size)).astype(np.uint8), v)
        for t, c, v in rungs
    ]
    ladder = DeviceTable(*(torch.from_numpy(np.stack(each)) for each in zip(*padded, strict=True)), bits)
    return [DeviceTable(*map(torch.from_numpy, rung), bits) for rung in rungs], ladder


def samples(n, std, dtype, rng):
    """Normal numbers, some of which are not finite."""
    x = rng.normal(0, std, n)
    x[rng.random(n) < 0.05] = np.nan
    x[rng.random(n) < 0.05] = np.inf
    return torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [1, 2, 15, 509, 510, 1024, 4000])
def test_packed_codes_are_those_of_the_rung_and_its_number(backend, n, bits, dtype, rng):
    rungs, ladder = random_ladder(rng, bits, dtype)
    taken = set()
    for std in (0.001, 0.1, 0.3, 1.0, 3.0, 10.0, 1000.0):
        x, grad = samples(n, std, dtype, rng), torch.from_numpy(rng.normal(size=n)).to(dtype)
        packed, rung = backend.encode(x, ladder), oracles.rung_of(x, wide_of(dtype))
        single = backend.encode(x, rungs[rung])
        assert packed.tolist() == [*single.tolist(), rung]
        assert packed.numel() == ladder.packed_bytes(n) == packing.packed_bytes(n, bits) + 1
        assert torch.equal(backend.decode(packed, grad, ladder), backend.decode(single, grad, rungs[rung]))
        assert torch.equal(backend.values(packed, n, ladder, dtype), backend.values(single, n, rungs[rung], dtype))
        taken.add(rung)
    assert len(taken) > 4 or n < 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rungs_part_at_the_last_bit(backend, dtype, rng):
    """For each rung, the largest number that takes it, and the next number, which takes the rung above."""
    _, ladder = random_ladder(rng, 2, dtype)
    for k in range(-4, 4):
        at = torch.tensor(3**0.25 * 2 ** (k + 0.5), dtype=torch.float64).to(dtype)
        near = at + torch.finfo(dtype).eps * at * torch.arange(-6, 7)
        found = [backend.encode(each.view(1), ladder)[-1].item() for each in near.to(dtype)]
        assert found == [oracles.rung_of(each.view(1), wide_of(dtype)) for each in near.to(dtype)]
        assert set(found) == {k + 4, k + 5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_width_numbers_are_widened_exactly(dtype, rng):
    patterns = torch.arange(-(1 << 15), 1 << 15, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    _, ladder = random_ladder(rng, 1, dtype)
    found = [cpu.encode(each, ladder)[-1].item() for each in patterns.view(-1, 1)]
    assert found == [reference.rung_of(each, ladder).item() for each in patterns.view(-1, 1)]
    assert set(found) == set(range(9))


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(700), torch.full((9,), torch.nan), torch.full((9,), -torch.inf)])
def test_of_what_nothing_is_known_the_middle_rung_is_taken(backend, x, rng):
    rungs, ladder = random_ladder(rng, 3)
    packed = backend.encode(x, ladder)
    assert packed.tolist() == [*backend.encode(x, rungs[4]).tolist(), 4]
    assert backend.decode(packed, torch.ones_like(x), ladder).shape == x.shape


def test_the_largest_and_smallest_numbers(backend, rng):
    _, ladder = random_ladder(rng, 3)
    assert [backend.encode(torch.full((20,), value), ladder)[-1].item() for value in (3e38, -1e20, 1e-9)] == [8, 8, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_give_the_same_bytes(dtype, rng):
    _, ladder = random_ladder(rng, 3, dtype)
    x, grad = samples(300_001, 0.3, dtype, rng), torch.randn(300_001).to(dtype)
    packed, before = reference.encode(x, ladder), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.encode(x, ladder), packed)
            assert torch.equal(cpu.decode(packed, grad, ladder), reference.decode(packed, grad, ladder))
    finally:
        torch.set_num_threads(before)


def test_a_damaged_number_of_a_rung_reads_no_memory_outside(rng):
    rungs, ladder = random_ladder(rng, 3)
    packed = cpu.encode(torch.randn(100), ladder)
    packed[-1] = 200
    assert torch.equal(cpu.values(packed, 100, ladder, torch.float32), cpu.values(packed[:-1], 100, rungs[8], torch.float32))


@pytest.mark.parametrize("channels", [("derivative",), ("derivative", "value")])
def test_padding_changes_no_code(record, channels):
    ladder = store.load_ladder(record, 3, channels=channels)
    x = torch.cat([torch.linspace(-100, 100, 10_001), torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])])
    for device_table, channel in zip(resolve.device_tables(ladder, torch.float32, CPU), channels, strict=True):
        assert device_table.is_ladder == (len(ladder) > 1)
        for rung, table in zip(device_table.rungs, ladder, strict=True):
            alone = resolve.device_tables(table, torch.float32, CPU)[channels.index(channel)]
            assert torch.equal(rung.thresholds, alone.thresholds)
            assert torch.equal(rung.codes, alone.codes)
            assert torch.equal(rung.levels[: alone.levels.numel()], alone.levels)
        for thresholds, codes, table in zip(
            *(each.view(len(ladder), -1) for each in (device_table.thresholds, device_table.codes)), ladder, strict=True
        ):
            expected = resolve.device_tables(table, torch.float32, CPU)[0]
            found = oracles.lookup(x.numpy(), thresholds.numpy(), codes.numpy())
            assert np.array_equal(found, oracles.lookup(x.numpy(), expected.thresholds.numpy(), expected.codes.numpy()))


def test_an_infinite_threshold_that_parts_codes_is_kept():
    table = fewbit.CodeTable([0.0, 1e39], [0, 1, 2], [[0.0, 1.0, 2.0]], 2)
    (alone,) = resolve.device_tables(table, torch.float32, CPU)
    padded = DeviceTable(alone.thresholds.expand(9, 2), alone.codes.expand(9, 3), alone.levels.expand(9, 3), 2)
    assert all(torch.equal(rung.thresholds, alone.thresholds) for rung in padded.rungs)


def test_even_derivatives_compare_magnitudes_on_every_rung():
    for name in ("tanh", "sigmoid", "softsign", "tanhshrink"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            wide = torch.promote_types(dtype, torch.float32)
            (device_table,) = resolve.shipped_tables(fewbit.activations.get(name), ("derivative",), 4, wide, CPU)
            assert device_table.is_even
            assert len(cpu._encoding(device_table, dtype).tables) == 9
            assert cpu._encoding(device_table, dtype).tables[:, 4].all()
            assert max(array.size for array in cpu._encoding(device_table, dtype).arrays) <= 21


@pytest.mark.parametrize("name", ["gelu", "tanh", "sigmoid", "relu"])
def test_zeros_get_the_level_zero(name):
    """In each rung. Nothing else changes, and nothing at all if 0 has that level already."""
    ladder = resolve.shipped_tables(activations.get(name), resolve.JOINT, 4, torch.float32, CPU)[1]
    found = ladder.with_zeros
    assert (found is ladder) == (name == "relu")
    for rung, changed in zip(ladder.rungs, found.rungs, strict=True):
        (code,) = oracles.lookup(np.zeros(1), rung.thresholds.numpy(), rung.codes.numpy())
        assert changed.levels[int(code)] == 0
        others = torch.arange(len(rung.levels)) != int(code)
        assert torch.equal(changed.levels[others], rung.levels[others])


class TestEncodeChecked:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("is_ladder", [False, True])
    def test_notices_what_is_not_finite_wherever_it_is(self, dtype, is_ladder, rng):
        rungs, ladder = random_ladder(rng, 4, dtype)
        table = ladder if is_ladder else rungs[1]
        for n in (1, 1000, 100_003):
            x = torch.randn(n).to(dtype)
            x[n // 3] = torch.finfo(dtype).max
            packed, finite = kernels.encode_checked(x, table)
            assert finite
            assert torch.equal(packed, kernels.encode(x, table))
            for at in (0, n // 2, n - 1):
                for value in (torch.inf, -torch.inf, torch.nan):
                    spoilt = x.clone()
                    spoilt[at] = value
                    packed, finite = kernels.encode_checked(spoilt, table)
                    assert not finite
                    assert torch.equal(packed, kernels.encode(spoilt, table))

    def test_nothing_is_finite_and_what_cannot_be_told_is_said_to_be(self, rng):
        table = random_ladder(rng, 4)[1]
        assert kernels.encode_checked(torch.zeros(0), table)[1]
        own = torch.full((3,), torch.nan).as_subclass(type("Own", (torch.Tensor,), {}))
        assert kernels.encode_checked(own, table)[1]


class TestOperators:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(0,), (1025,), (2, 3, 129)], ids=str)
    def test_opcheck(self, dtype, shape, rng):
        ladder = random_ladder(rng, 3, dtype)[1]
        tensors = ladder.thresholds, ladder.codes, ladder.levels, ladder.bits
        x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        torch.library.opcheck(torch.ops.fewbit.encode, (x, *tensors))
        packed = torch.ops.fewbit.encode(x, *tensors)
        torch.library.opcheck(torch.ops.fewbit.decode, (packed, grad, *tensors))

    def test_each_row_takes_a_rung_of_its_own(self, rng):
        ladder = random_ladder(rng, 3)[1]
        tensors = ladder.thresholds, ladder.codes, ladder.levels, ladder.bits
        x = torch.randn(3, 50) * torch.tensor([[0.1], [1.0], [10.0]])
        packed = torch.ops.fewbit.encode(x, *tensors)
        assert packed[:, -1].tolist() == [oracles.rung_of(row) for row in x]
        mapped = torch.func.vmap(lambda row: torch.ops.fewbit.encode(row, *tensors))(x)
        assert torch.equal(mapped, packed)
        product = torch.ops.fewbit.decode(packed, x, *tensors)
        for row, codes, found in zip(x, packed, product, strict=True):
            assert torch.equal(found, reference.decode(codes, row, ladder))

    def test_sizes_that_do_not_fit(self, rng):
        ladder = random_ladder(rng, 3)[1]
        thresholds, codes, levels = ladder.thresholds, ladder.codes, ladder.levels
        wrong = [
            (thresholds[:8], codes[:8], levels[:8]),
            (thresholds, codes[:8], levels),
            (thresholds, codes[:, :-1], levels),
            (thresholds, codes, levels[0]),
            (thresholds[0], codes[0], levels),
            (thresholds[None], codes[None], levels[None]),
        ]
        for tensors in wrong:
            with pytest.raises(InputError, match="a ladder has 9 such rows; got thresholds"):
                torch.ops.fewbit.encode(torch.zeros(5), *tensors, 3)
        packed = torch.ops.fewbit.encode(torch.zeros(2000), thresholds, codes, levels, 3)
        with pytest.raises(InputError, match="2000 codes of 3 bits take 769 bytes, got 768"):
            torch.ops.fewbit.decode(packed[:-1], torch.zeros(2000), thresholds, codes, levels, 3)
