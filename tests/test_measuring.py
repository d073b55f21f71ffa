import time

import numpy as np
import pytest
import torch

from fewbit import measuring, packing
from fewbit.errors import InputError
from fewbit.functional import gelu, tanh

CPU = torch.device("cpu")


def task(action):
    return measuring.Task(lambda: None, action)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `passes` moves."""

    class Clock:
        now = 0.0

        def passes(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_samples_of_one_round_belong_together(clock):
    """The machine slows down from round to round. Both tasks slow down, and their ratio does not change."""
    pace = iter(np.linspace(1, 9, 50))
    slowness = {"now": 1.0}
    tasks = {
        ("slow", "down"): task(lambda _: slowness.update(now=next(pace, 9.0)) or clock.passes(1.0)),
        ("both", "exact"): task(lambda _: clock.passes(2e-3 * slowness["now"])),
        ("both", "3 bits"): task(lambda _: clock.passes(3e-3 * slowness["now"])),
    }
    samples = measuring.time_rounds(tasks, 20, CPU)
    exact, coded = samples["both", "exact"], samples["both", "3 bits"]
    np.testing.assert_allclose(coded / exact, 1.5)
    assert np.all(np.diff(exact) > 0)


def test_rounds_go_phase_by_phase_in_changing_order(clock):
    order = []

    def note(key):
        return lambda _: order.append(key) or clock.passes(1.0)

    keys = [(phase, label) for label in "abc" for phase in ("forward", "both")]
    measuring.time_rounds({key: task(note(key)) for key in keys}, 40, CPU)
    rounds = [tuple(order[i : i + 6]) for i in range(len(order) - 240, len(order), 6)]
    for each in rounds:
        assert sorted(each[:3]) == [("forward", label) for label in "abc"]
        assert sorted(each[3:]) == [("both", label) for label in "abc"]
    assert len(set(rounds)) > 10
    assert {each[0][1] for each in rounds} == set("abc")


def test_short_calls_are_repeated_until_a_sample_is_long_enough(clock):
    calls = {"made": 0}

    def action(_):
        calls["made"] += 1
        clock.passes(30e-6)

    samples = measuring.time_rounds({("both", "exact"): task(action)}, 5, CPU)
    np.testing.assert_allclose(samples["both", "exact"], 30e-6)
    before = 3 + 1 + 2 + 4 + 8  # warm-up, then doubling up to 240 µs
    assert calls["made"] == before + 5 * 8


def test_preparing_is_not_timed(clock):
    prepared = iter(range(100))
    seen = []

    def prepare():
        clock.passes(1.0)
        return next(prepared)

    prepared_task = measuring.Task(prepare, lambda argument: seen.append(argument) or clock.passes(0.5))
    assert measuring.seconds(prepared_task, 3, CPU) == pytest.approx(1.5)
    assert seen == [0, 1, 2]


def test_quantiles(rng):
    samples = rng.normal(size=101)
    found = measuring.quantiles(samples)
    ordered = np.sort(samples)
    assert found == pytest.approx(dict(zip(measuring.QUANTILES, ordered[[10, 25, 50, 75, 90]], strict=True)))
    assert set(measuring.quantiles(np.array([2.0])).values()) == {2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_bytes_kept(n, dtype):
    x = torch.randn(n, dtype=dtype, requires_grad=True)
    assert measuring.kept_bytes(torch.nn.functional.gelu, x) == (n * dtype.itemsize, 0)
    assert measuring.kept_bytes(torch.tanh, x) == (n * dtype.itemsize, 0)  # its output
    assert measuring.kept_bytes(lambda x: gelu(x, bits=3), x) == (packing.packed_bytes(n, 3) + 1,) * 2  # and the rung
    assert measuring.kept_bytes(lambda x: tanh(x, bits=1), x) == (packing.packed_bytes(n, 1) + 1,) * 2
    assert measuring.kept_bytes(lambda x: x * x.sin(), x) == (2 * n * dtype.itemsize, n * dtype.itemsize)


def test_a_storage_counts_once_and_some_are_left_out():
    x, y = torch.randn(2, 100, requires_grad=True).unbind()
    factor = torch.randn(100)
    assert measuring.kept_bytes(lambda x: x * x, x) == (800, 0)  # the storage that x shares with y
    seen, all_seen = {}, {}
    address = factor.untyped_storage().data_ptr()
    with measuring.saved_storages(all_seen), measuring.saved_storages(seen, all_seen, leave_out={address}):
        held = y * factor, y.exp()
    assert sorted(seen.values()) == [400]
    assert held[0].requires_grad


def test_threads_are_set_back():
    before = torch.get_num_threads()
    with measuring.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), measuring.torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(InputError, match=f"torch has no device '{name}' here"):
        measuring.find_device(name)


def test_peak_counts_what_is_gone_at_the_end():
    def step():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)

    assert 1 << 20 <= measuring.peak_bytes(step, CPU) < 2 << 20
    assert measuring.peak_bytes(lambda: None, CPU) == 0


def test_peak_of_a_device_whose_memory_nobody_follows():
    with pytest.raises(InputError, match="torch follows the memory of the CPU and of CUDA devices, not of 'meta'"):
        measuring.peak_bytes(lambda: None, torch.device("meta"))
