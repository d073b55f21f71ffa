"""fewbit.exact: no codes inside the context, in eager and compiled code, in all threads while any thread is inside."""

import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import compiled, gradient_at, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.autograd import exact as process
from fewbit.errors import InputError


def one_bit(x):
    return fewbit.functional.gelu(x, bits=1)


def same(found, others):
    """Whether both have the same gradients by name, bit for bit."""
    return list(found) == list(others) and all(torch.equal(found[name], others[name]) for name in found)


def left():
    """Whether no context is open or counted."""
    return (process.active, process.compiled_depth, process._depth) == (False, 0, 0)


@pytest.fixture
def x():
    return torch.randn(64)


@pytest.fixture
def exact_gradient(x):
    return gradient_at(nn.functional.gelu, x)


@pytest.fixture
def coded_gradient(x, exact_gradient):
    coded = gradient_at(one_bit, x)
    assert not torch.equal(coded, exact_gradient)
    return coded


def test_every_activation_is_torchs(record, x):
    with fewbit.exact():
        found = gradient_at(getattr(fewbit.functional, record.name), x)
    assert torch.equal(found, gradient_at(record.forward, x))


def test_inplace_and_shared_codes_too(x, exact_gradient):
    with fewbit.exact():
        for options in ({"inplace": True}, {"shared": True}):
            found = gradient_at(lambda x, options=options: fewbit.functional.gelu(x.clone(), bits=2, **options), x)
            assert torch.equal(found, exact_gradient)


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.convolution, self.batch_norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.act = nn.ReLU(inplace=True)
        self.up, self.gate, self.norm, self.down = nn.Linear(8, 16), nn.GLU(), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.act(self.batch_norm(self.convolution(x)))
        return self.down(nn.functional.silu(self.norm(self.gate(self.up(x.transpose(1, 2))))))


@pytest.fixture
def nets():
    """The same net exact and coded, and an input."""
    exact = Net()
    return exact, fewbit.convert(copy.deepcopy(exact), bits=2), torch.randn(4, 3, 10)


def test_converted_models_are_torchs(nets):
    exact, coded, x = nets
    with fewbit.exact():
        found = gradients(coded, x)
    assert same(found, gradients(exact, x))
    assert not same(found, gradients(coded, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, for rules of forward-mode derivatives
def test_second_and_forward_mode_derivatives_exist(x):
    leaf = x.clone().requires_grad_()
    with fewbit.exact():
        (first,) = torch.autograd.grad(one_bit(leaf).sum(), leaf, create_graph=True)
        assert torch.autograd.grad(first.sum(), leaf)[0].abs().sum() > 0
        torch.func.jvp(one_bit, (x,), (x,))
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.jvp(one_bit, (x,), (x,))


def test_ends_with_the_context_however_it_ends(x, coded_gradient):
    with pytest.raises(KeyError), fewbit.exact():
        raise KeyError
    assert torch.equal(gradient_at(one_bit, x), coded_gradient)
    assert left()


def test_nests_and_decorates(x, exact_gradient, coded_gradient):
    same = fewbit.exact()
    with same, same:
        with fewbit.exact():
            pass
        assert torch.equal(gradient_at(one_bit, x), exact_gradient)

    @fewbit.exact()
    def decorated(depth):
        return decorated(depth - 1) if depth else gradient_at(one_bit, x)

    assert torch.equal(decorated(2), exact_gradient)
    assert torch.equal(gradient_at(one_bit, x), coded_gradient)


def in_a_thread(function, *args):
    """What the function returns in a thread and a context of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.Context().run, function, *args).result()


def test_all_threads_and_tasks_are_exact_too(x, exact_gradient, coded_gradient):
    with fewbit.exact():
        assert torch.equal(in_a_thread(gradient_at, one_bit, x), exact_gradient)
    assert torch.equal(in_a_thread(gradient_at, one_bit, x), coded_gradient)


def test_all_are_exact_while_any_thread_is_inside(x, exact_gradient, coded_gradient):
    """Two threads enter one after the other, and leave in the same order."""
    leave = [threading.Event() for _ in range(2)]
    inside = [threading.Event() for _ in range(2)]

    def enter(number):
        with fewbit.exact():
            inside[number].set()
            leave[number].wait(60)

    found = [gradient_at(one_bit, x)]
    with ThreadPoolExecutor(2) as pool:
        threads = []
        for number in range(2):
            threads.append(pool.submit(enter, number))
            assert inside[number].wait(60)
            found.append(gradient_at(one_bit, x))
        for number in range(2):
            leave[number].set()
            threads[number].result()
            found.append(gradient_at(one_bit, x))
    exact = [torch.equal(each, exact_gradient) for each in found]
    assert exact == [False, True, True, True, False]
    assert torch.equal(found[-1], coded_gradient)


def test_many_threads_at_once_lose_no_count():
    def enter_often():
        for _ in range(500):
            with fewbit.exact():
                assert process.is_active()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(enter_often) for _ in range(4)]:
            each.result()
    assert left()


def test_checkpointing_runs_forward_again_the_same_way(x, exact_gradient):
    with fewbit.exact():
        assert torch.equal(gradient_at(lambda x: checkpoint(one_bit, x, use_reentrant=False), x), exact_gradient)


def test_checkpointing_in_another_thread(x, exact_gradient):
    with fewbit.exact():
        assert torch.equal(in_a_thread(gradient_at, lambda x: checkpoint(one_bit, x, use_reentrant=False), x), exact_gradient)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("exact_first", [False, True])
    def test_recompiles_for_the_switch(self, x, exact_gradient, coded_gradient, exact_first):
        function = compiled(one_bit)
        for exact in (exact_first, not exact_first, exact_first):
            if exact:
                with fewbit.exact():
                    assert torch.equal(gradient_at(function, x), exact_gradient)
            else:
                assert torch.equal(gradient_at(function, x), coded_gradient)

    def test_inside_of_compiled_code(self, x, exact_gradient, coded_gradient):
        def half(x):
            with fewbit.exact():
                y = one_bit(x)
            return y + one_bit(x)

        function = compiled(half)
        torch.testing.assert_close(gradient_at(function, x), exact_gradient + coded_gradient)
        assert left()

    def test_graph_break_inside(self, x, exact_gradient):
        def broken(x):
            with fewbit.exact():
                torch._dynamo.graph_break()
                return one_bit(x)

        assert torch.equal(gradient_at(torch.compile(broken, backend="aot_eager"), x), exact_gradient)
        assert left()

    def test_layers(self, nets):
        exact, coded, x = nets
        function = compiled(coded)
        before = {name: each.clone() for name, each in self.gradients(coded, function, x).items()}
        with fewbit.exact():
            found = self.gradients(coded, function, x)
        for name, torchs in gradients(exact, x).items():
            torch.testing.assert_close(found[name], torchs, rtol=1e-4, atol=1e-5)
        assert any((before[name] - found[name]).norm() > 1e-2 * found[name].norm() for name in found)

    def gradients(self, model, function, x):
        return gradients(model, x, lambda _, x: function(x).square().sum())

    def test_the_count_of_threads_is_left_alone(self):
        seen = []

        @torch._dynamo.disable
        def elsewhere():
            with fewbit.exact():
                seen.append(process.is_active())

        @torch.compile(backend="eager")
        def run(x):
            with fewbit.exact():
                y = one_bit(x)
                elsewhere()
                return y + one_bit(x)

        x = torch.randn(8)
        torch.testing.assert_close(gradient_at(run, x), gradient_at(lambda x: 2 * nn.functional.gelu(x), x))
        assert seen == [True]
        assert left()

    def test_a_thread_that_enters_meanwhile_is_not_forgotten(self):
        """Compiled code writes back its count when it ends."""
        enter, inside, leave = (threading.Event() for _ in range(3))

        def enter_when_asked():
            enter.wait(60)
            with fewbit.exact():
                inside.set()
                leave.wait(60)

        def backend(graph, inputs):
            def run(*args):
                enter.set()
                assert inside.wait(60)
                return graph(*args)

            return run

        def function(x):
            with fewbit.exact():
                return one_bit(x)

        with ThreadPoolExecutor(1) as pool:
            thread = pool.submit(enter_when_asked)
            compiled(function, backend)(torch.ones(3))
            assert process.is_active()
            leave.set()
            thread.result()
        assert left()


def test_one_object_in_two_threads_at_once():
    both, inside = fewbit.exact(), threading.Barrier(2)

    def enter():
        with both:
            inside.wait(60)
            assert process.is_active()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(enter) for _ in range(2)]:
            each.result()
    assert left()


async def goes_on_later():
    """A coroutine."""


def yields():
    """A generator."""
    yield


@pytest.mark.parametrize("function", [goes_on_later, yields], ids=lambda each: each.__name__)
def test_what_goes_on_after_its_call_is_not_decorated(function):
    with pytest.raises(InputError, match=r"exact decorates functions that return when they are done.*with fewbit.exact\(\)"):
        fewbit.exact()(function)


@pytest.mark.parametrize("thing", [3, None])
def test_what_cannot_be_decorated(thing):
    for context in (fewbit.patch(4), fewbit.exact()):
        with pytest.raises(InputError, match="decorates functions"):
            context(thing)
