"""Backward of LSTMs compiled by numba, compared with torch operations. Tests of gradients compare these with torch's LSTM."""

import numba
import pytest
import torch
from torch.utils._pytree import tree_map

from fewbit.kernels import loops, recurrent_cpu, recurrent_loops
from fewbit.kernels.recurrent import KINDS, Weights, lstm_back_through_time
from fewbit.kernels.steps import Steps

SIZES = {"equal": (5,) * 7, "packed": (5, 5, 4, 2, 2, 1), "one step": (3,), "one sequence": (1,) * 9}


def operands(sizes, hidden=13, out=None, dtype=torch.float32, seed=0):
    """Pre-activations, first states, recurrent weights, a projection, and gradients."""
    numbers = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

    rows, batch, width = sum(sizes), sizes[0], out or hidden
    projection = random(out, hidden) if out else None
    first = [random(batch, width), random(batch, hidden)]
    return (
        random(rows, 4 * hidden),
        first,
        random(4 * hidden, width),
        projection,
        [random(rows, width), *map(torch.randn_like, first)],
    )


@pytest.mark.parametrize("out", [None, 6])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_that_of_torch_operations(dtype, sizes, backwards, out):
    gates, *others = operands(sizes, out=out, dtype=dtype)
    steps, expected = Steps(sizes, backwards), gates.clone()
    states, outputs, shown = lstm_back_through_time(expected, *others, steps)
    found_states, found_outputs, found_shown = recurrent_cpu.back_through_time(gates, *others, steps)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(gates, expected, **close)
    for each, true in zip([*found_states, found_outputs, found_shown], [*states, outputs, shown], strict=True):
        assert (each is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(each, true, **close)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_gradients_that_are_zeros(missing):
    gates, first, recurrent, _, grads = operands(SIZES["packed"])
    zeros = [torch.zeros_like(each) if number in missing else each for number, each in enumerate(grads)]
    grads = [None if number in missing else each for number, each in enumerate(grads)]
    steps, expected = Steps(SIZES["packed"]), gates.clone()
    states, *_ = recurrent_cpu.back_through_time(expected, first, recurrent, None, zeros, steps)
    found, *_ = recurrent_cpu.back_through_time(gates, first, recurrent, None, grads, steps)
    assert torch.equal(gates, expected)
    assert all(map(torch.equal, found, states))


def test_large_ones_run_in_threads_and_give_the_same():
    gates, *others = operands((64,) * 3, hidden=300)
    one, steps = gates.clone(), Steps((64,) * 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, *_ = recurrent_cpu.back_through_time(one, *others, steps)
        torch.set_num_threads(2)
        found, *_ = recurrent_cpu.back_through_time(gates, *others, steps)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(gates, one, rtol=1e-4, atol=1e-5)  # products on several threads round differently
    for each, true in zip(found, expected, strict=True):
        torch.testing.assert_close(each, true, rtol=1e-4, atol=1e-5)


def test_gradients_of_any_strides():
    gates, first, recurrent, _, (grad, *last) = operands(SIZES["equal"])
    wide = torch.randn(len(grad), 3 * grad.shape[1])
    wide[:, 13:26] = grad
    steps, results = Steps(SIZES["equal"]), []
    for each in (grad, wide[:, 13:26], grad.t().contiguous().t()):
        own = gates.clone()
        recurrent_cpu.back_through_time(own, first, recurrent, None, [each, *last], steps)
        results.append(own)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    columns = [each.t().contiguous().t() for each in first]
    for grads in ([grad, None, None], [grad, *(each.t().contiguous().t() for each in last)]):
        found = []
        for states in (first, columns):
            own = gates.clone()
            found.append([own, *recurrent_cpu.back_through_time(own, states, recurrent, None, grads, steps)[0]])
        assert all(map(torch.equal, *found))


def test_other_devices_take_torch_operations():
    _, first, recurrent, _, grads = operands(SIZES["equal"])
    weights = [torch.randn(52, 4), recurrent]

    def on(device):
        moved = tree_map(lambda each: each.to(device), (torch.randn(35, 4), torch.randn(35, 13), first, weights, grads))
        x, y, states, of_layer, incoming = moved
        return KINDS["lstm"].backward(x, y, states, Weights(*of_layer), incoming, Steps(SIZES["equal"]))

    here, there = on("cpu"), on("meta")
    assert there.gates.device.type == "meta"
    assert there.gates.shape == here.gates.shape


MAKERS = recurrent_loops.scanner, recurrent_loops.stepper


def test_each_kernel_has_a_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(recurrent_loops, "_compile", lambda kernel, block, variant: f"{kernel.__qualname__}.{variant}")
    assert len({make(wide) for make in MAKERS for wide in ("float32", "float64")}) == 2 * len(MAKERS)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_kernels_allocate_nothing(make, monkeypatch):
    """Errors in these functions are swallowed, so the functions must not be able to fail in other ways."""
    monkeypatch.setattr(loops, "callback", numba.cfunc)  # without a cache: cached functions have no text to look at
    assert "NRT_Allocate" not in make("float32").inspect_llvm()
