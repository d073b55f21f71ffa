"""fewbit.exact: no codes inside, in eager and compiled code, in the thread that entered it."""

import contextvars
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.autograd import switch
from fewbit.errors import InputError


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def one_bit(x):
    return fewbit.functional.gelu(x, bits=1)


@pytest.fixture
def x():
    return torch.randn(64)


@pytest.fixture
def exact_gradient(x):
    return gradient(nn.functional.gelu, x)


@pytest.fixture
def coded_gradient(x, exact_gradient):
    coded = gradient(one_bit, x)
    assert not torch.equal(coded, exact_gradient)
    return coded


def test_every_activation_is_torchs(record, x):
    with fewbit.exact():
        found = gradient(getattr(fewbit.functional, record.name), x)
    assert torch.equal(found, gradient(record.forward, x))


def test_inplace_and_shared_codes_too(x, exact_gradient):
    with fewbit.exact():
        for options in ({"inplace": True}, {"shared": True}):
            found = gradient(lambda x, options=options: fewbit.functional.gelu(x.clone(), bits=2, **options), x)
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


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


@pytest.fixture
def nets():
    """The same net exact and coded, and an input."""
    exact = Net()
    return exact, fewbit.convert(copy.deepcopy(exact), bits=2, inputs=2), torch.randn(4, 3, 10)


def test_converted_models_are_torchs(nets):
    exact, coded, x = nets
    with fewbit.exact():
        found = gradients(coded, x)
    assert all(map(torch.equal, found, gradients(exact, x)))
    assert not all(map(torch.equal, gradients(coded, x), found))


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
    assert torch.equal(gradient(one_bit, x), coded_gradient)
    assert (switch._open, switch._anywhere) == (0, False)


def test_nests_and_decorates(x, exact_gradient, coded_gradient):
    same = fewbit.exact()
    with same, same:
        with fewbit.exact():
            pass
        assert torch.equal(gradient(one_bit, x), exact_gradient)

    @fewbit.exact()
    def decorated(depth):
        return decorated(depth - 1) if depth else gradient(one_bit, x)

    assert torch.equal(decorated(2), exact_gradient)
    assert torch.equal(gradient(one_bit, x), coded_gradient)


def test_other_threads_go_on_coding(x, exact_gradient, coded_gradient):
    found = {}
    with fewbit.exact():
        thread = threading.Thread(target=lambda: found.update(there=gradient(one_bit, x)))
        thread.start()
        thread.join()
        found["here"] = gradient(one_bit, x)
    assert torch.equal(found["there"], coded_gradient)
    assert torch.equal(found["here"], exact_gradient)


def test_many_threads_at_once_lose_no_count():
    def enter_often():
        for _ in range(500):
            with fewbit.exact():
                assert switch.is_exact()
            assert not switch.is_exact()

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for each in (*threads,):
        each.start()
    for each in threads:
        each.join()
    assert switch._open == 0


def test_checkpointing_runs_forward_again_the_same_way(x, exact_gradient):
    with fewbit.exact():
        assert torch.equal(gradient(lambda x: checkpoint(one_bit, x, use_reentrant=False), x), exact_gradient)


def test_threads_of_the_autograd_engine_follow_the_one_that_called_backward():
    """As torch leaves the caller's context to them."""
    found = []

    def engine_thread(context):
        torch._C._stash_obj_in_tls("context", context)
        found.append(switch.is_exact())
        torch._C._remove_obj_from_tls("context")

    outside = contextvars.copy_context()
    with fewbit.exact():
        for context in (contextvars.copy_context(), outside):
            thread = threading.Thread(target=engine_thread, args=(context,))
            thread.start()
            thread.join()
    assert found == [True, False]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("exact_first", [False, True])
    def test_recompiles_for_the_switch(self, x, exact_gradient, coded_gradient, exact_first):
        function = torch.compile(one_bit, backend="aot_eager", fullgraph=True)
        for exact in (exact_first, not exact_first, exact_first):
            if exact:
                with fewbit.exact():
                    assert torch.equal(gradient(function, x), exact_gradient)
            else:
                assert torch.equal(gradient(function, x), coded_gradient)

    def test_inside_of_compiled_code(self, x, exact_gradient, coded_gradient):
        def half(x):
            with fewbit.exact():
                y = one_bit(x)
            return y + one_bit(x)

        function = torch.compile(half, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradient(function, x), exact_gradient + coded_gradient)
        assert not switch._anywhere

    def test_graph_break_inside(self, x, exact_gradient):
        def broken(x):
            with fewbit.exact():
                torch._dynamo.graph_break()
                return one_bit(x)

        assert torch.equal(gradient(torch.compile(broken, backend="aot_eager"), x), exact_gradient)
        assert (switch._open, switch._here.get()) == (0, False)

    def test_layers(self, nets):
        exact, coded, x = nets
        function = torch.compile(coded, backend="aot_eager", fullgraph=True)
        before = torch.autograd.grad(function(x).square().sum(), list(coded.parameters()))
        with fewbit.exact():
            found = torch.autograd.grad(function(x).square().sum(), list(coded.parameters()))
        for mine, torchs in zip(found, gradients(exact, x), strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)
        assert any((a - b).norm() > 1e-2 * b.norm() for a, b in zip(before, found, strict=True))


def test_one_object_in_two_threads_at_once():
    both, inside, errors = fewbit.exact(), threading.Barrier(2), []

    def enter():
        try:
            with both:
                inside.wait(10)
                assert switch.is_exact()
            assert not switch._here.get()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not errors
    assert not switch.is_exact()


async def goes_on_later():
    """A coroutine."""


def yields():
    """A generator."""
    yield


@pytest.mark.parametrize("function", [goes_on_later, yields], ids=lambda each: each.__name__)
def test_what_goes_on_after_its_call_is_not_decorated(function):
    with pytest.raises(InputError, match=r"exact decorates functions that return when they are done.*with fewbit.exact\(\)"):
        fewbit.exact()(function)


def test_compiled_code_leaves_the_count_of_threads_alone():
    seen = []

    @torch._dynamo.disable
    def elsewhere():
        with fewbit.exact():
            seen.append(switch.is_exact())

    @torch.compile(backend="eager")
    def run(x):
        with fewbit.exact():
            y = fewbit.functional.gelu(x, bits=1)
            elsewhere()
            return y + fewbit.functional.gelu(x, bits=1)

    x = torch.randn(8, requires_grad=True)
    run(x).sum().backward()
    true = torch.autograd.grad(2 * torch.nn.functional.gelu(x).sum(), x)[0]
    assert torch.allclose(x.grad, true)
    assert not switch.is_exact()
    with fewbit.exact():
        assert switch.is_exact()
    assert seen == [True]
    assert (switch._open, switch._traced) == (0, 0)
