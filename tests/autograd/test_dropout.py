"""Dropout with one bit an element: torch's output, random numbers and gradients, bit for bit; and what its readers keep."""

import gc
from contextlib import nullcontext

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.autograd import sharing
from fewbit.errors import OverwriteError
from fewbit.packing import packed_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda: torch.randn(40, 333),
    "channels last": lambda: torch.randn(4, 8, 12, 12).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(300, 40).t(),
    "expanded": lambda: torch.randn(1, 700).expand(9, 700),
    "sliced": lambda: torch.randn(40, 600)[:, ::2],
    "one number": lambda: torch.randn(()),
}


def dropped(function, x, grad=None, **keywords):
    """The output, its strides, the gradient of x, its strides, and a random number drawn afterwards."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(5)
    y = function(leaf * 1, **keywords)
    drawn = torch.rand(())
    if grad is None:
        grad = torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(6)))
    (found,) = torch.autograd.grad(y, leaf, grad)
    return y.detach(), y.stride(), found, found.stride(), drawn


def check_the_same(found, expected):
    for ours, true in zip(found, expected, strict=True):
        if not isinstance(ours, torch.Tensor):
            assert ours == true
            continue
        torch.testing.assert_close(ours, true, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours.signbit(), true.signbit())


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.3, 1 / 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_torchs(dtype, p):
    for make in LAYOUTS.values():
        x = make().to(dtype)
        check_the_same(dropped(fewbit.functional.dropout, x, p=p), dropped(functional.dropout, x, p=p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_at_the_edge(dtype):
    """Infinities and NaN times 0, zeros with a sign, and overflow."""
    info = torch.finfo(dtype)
    edge = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, info.max, -info.max, info.tiny, info.eps], dtype=dtype)
    x, grad = edge.repeat(300), edge.repeat_interleave(300)
    ours, true = (dropped(each, x, grad, p=0.4) for each in (fewbit.functional.dropout, functional.dropout))
    torch.testing.assert_close(ours[:3:2], true[:3:2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "keywords", [{"p": 0.0}, {"p": 1.0}, {"p": 0, "training": True}, {"p": 1}, {"training": False}, {"inplace": True}], ids=str
)
def test_other_calls(keywords):
    x = torch.randn(64, 64)
    check_the_same(dropped(fewbit.functional.dropout, x, **keywords), dropped(functional.dropout, x, **keywords))


def test_what_is_off_gives_the_tensor_itself():
    x = torch.randn(64, 64, requires_grad=True)
    assert fewbit.functional.dropout(x, 0.0) is x
    assert fewbit.functional.dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_probability_out_of_range(p):
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        fewbit.functional.dropout(torch.randn(4, requires_grad=True), p)


@pytest.mark.parametrize("n", [1, 31, 33, 127, 128, 129, 1000, 1025, 50_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype, n):
    """One bit an element, unless torch's mask is no larger than that with padding."""
    x = torch.randn(n, dtype=dtype, requires_grad=True)
    ours, torchs = (bytes_kept(lambda x, f=f: f(x * 1, 0.5), x) for f in (fewbit.functional.dropout, functional.dropout))
    assert torchs == n * dtype.itemsize
    assert ours == min(packed_bytes(n, 1), torchs)


class TestInPlace:
    def test_a_view(self):
        results = []
        for function in (fewbit.functional.dropout, functional.dropout):
            torch.manual_seed(0)
            leaf = torch.randn(64, 64, requires_grad=True)
            whole = leaf * 1
            function(whole[:32], 0.5, inplace=True)
            results.append((whole.detach(), *torch.autograd.grad(whole.sum(), leaf)))
        assert all(map(torch.equal, *results))

    def test_a_leaf_stays_as_it_is(self):
        x = torch.randn(64, 64, requires_grad=True)
        before = x.detach().clone()
        with pytest.raises(OverwriteError, match="dropout cannot overwrite a leaf"):
            fewbit.functional.dropout(x, 0.5, inplace=True)
        assert torch.equal(x, before)

    @pytest.mark.parametrize(
        "change", [lambda y: y.add_(1), lambda y: y.mul_(2), lambda y: y[0].zero_()], ids=["add", "mul", "zero"]
    )
    def test_of_the_output(self, change):
        def changed(function):
            def call(x, **keywords):
                y = function(x, **keywords)
                change(y)
                return y

            return call

        x = torch.randn(64, 64)
        check_the_same(dropped(changed(fewbit.functional.dropout), x), dropped(changed(functional.dropout), x))


class TestSecondDerivatives:
    """Dropout is linear, and the mask is known exactly."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_are_torchs(self, dtype):
        results = []
        for function in (fewbit.functional.dropout, functional.dropout):
            torch.manual_seed(1)
            x = torch.randn(64, 65).to(dtype).requires_grad_()
            (first,) = torch.autograd.grad(function(x**3, 0.3).sum(), x, create_graph=True)
            results.append((first.detach(), *torch.autograd.grad(first.square().sum(), x)))
        assert all(map(torch.equal, *results))

    def test_batches_of_gradients(self):
        x = torch.randn(64, 64, requires_grad=True)
        y = fewbit.functional.dropout(x * 1, 0.5)
        grads = torch.randn(3, 64, 64)
        (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in grads]
        assert torch.equal(found, torch.stack(one_by_one))


def test_checkpointed():
    results = []
    for function in (fewbit.functional.dropout, functional.dropout):
        torch.manual_seed(2)
        x = torch.randn(64, 64, requires_grad=True)
        y = checkpoint(lambda x, f=function: f(x.sin(), 0.5) * x, x, use_reentrant=False)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    assert all(map(torch.equal, *results))


class TestReaders:
    """A linear layer after a dropout keeps the code of the dropout's input, and the mask."""

    N = 64

    def block(self, activation, p=0.5, **keywords):
        torch.manual_seed(3)
        x, weight = torch.randn(256, self.N, requires_grad=True), torch.randn(32, self.N, requires_grad=True)

        def call():
            torch.manual_seed(4)
            return fewbit.functional.linear(fewbit.functional.dropout(activation(x), p, **keywords), weight, bits=4)

        return x, weight, call

    @pytest.mark.parametrize("inplace", [False, True])
    def test_bytes_behind_an_activation(self, inplace):
        x, weight, call = self.block(lambda x: fewbit.functional.gelu(x, bits=4, shared=True), inplace=inplace)
        rung = 1
        assert bytes_kept(call, leave_out=(x, weight)) == 256 * self.N // 2 + rung + 256 * self.N // 8

    def test_bytes_behind_a_norm(self):
        x, weight, call = self.block(lambda x: fewbit.functional.layer_norm(x, (self.N,), bits=4))
        alone = bytes_kept(lambda: fewbit.functional.layer_norm(x, (self.N,), bits=4), leave_out=(x,))
        assert bytes_kept(call, leave_out=(x, weight)) == alone + 256 * self.N // 8

    def test_codes_of_its_own_where_there_are_none(self):
        x, weight, call = self.block(functional.gelu)
        codes, statistics = 256 * self.N // 2, 4 * (256 + 2 * self.N)
        expected = codes + statistics + 256 * self.N // 8
        assert bytes_kept(call, leave_out=(x, weight)) == expected

    def test_more_bits_than_another_reader_kept(self):
        """Codes of 2 bits that one layer made are not good enough for a layer of 4 bits."""
        x, weight = torch.randn(256, self.N, requires_grad=True), torch.randn(32, self.N, requires_grad=True)
        y = x * 1
        fewbit.functional.linear(y, weight, bits=2)
        z = fewbit.functional.dropout(y, 0.5)
        recipe = sharing.find(z)
        assert recipe is not None
        assert recipe.bits == 2
        errors = []
        for bits in (2, 4):
            out = fewbit.functional.linear(z, weight, bits=bits)
            grad = torch.randn_like(out)
            (found,) = torch.autograd.grad(out, weight, grad, retain_graph=True)
            errors.append(relative(found, grad.T @ z.detach()))
        assert errors[1] < errors[0] / 2

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
    def test_what_was_dropped_is_rebuilt_as_zero(self, make, dtype):
        x = make().to(dtype)
        if x.dim() == 0:
            pytest.skip("a number has no code")
        whole = fewbit.functional.silu(x.requires_grad_() * 1, bits=4, shared=True)
        y = fewbit.functional.dropout(whole, 0.5)
        of_whole, of_y = sharing.find(whole), sharing.find(y)
        assert of_whole is not None
        assert of_y is not None
        assert of_y.by_sign is None
        rebuilt, before = (each.rebuild(each.kept, dtype) for each in (of_y, of_whole))
        mask = (y != 0) | (whole == 0)
        assert not rebuilt[~mask].any()
        assert torch.equal(rebuilt[y != 0], 2 * before[y != 0])

    def test_an_input_that_is_kept_as_it_is(self):
        """Too small for codes: the output is rebuilt, bit for bit."""
        x = (torch.randn(2, 1000, requires_grad=True) * 1).to(torch.bfloat16)
        sharing.attach(x, sharing.as_it_is(x.detach()))
        y = fewbit.functional.dropout(x, 0.3)
        recipe = sharing.find(y)
        assert recipe is not None
        assert torch.equal(recipe.rebuild(recipe.kept, torch.bfloat16), y)

    def test_many_zeros_before_it(self):
        """Rows of padding stay zeros after a GELU, although its codes of 0 stand for another number."""
        x = torch.randn(400, self.N) * (torch.arange(400) % 4 == 0).view(-1, 1)
        y = fewbit.functional.gelu(x.requires_grad_() * 1, bits=4, shared=True)
        recipe = sharing.find(fewbit.functional.dropout(y, 0.1))
        assert recipe is not None
        assert not recipe.rebuild(recipe.kept, torch.float32)[x == 0].any()

    def test_nothing_is_found_after_a_change(self):
        y = fewbit.functional.dropout(fewbit.functional.gelu(torch.randn(64, 64, requires_grad=True), shared=True), 0.5)
        assert sharing.find(y) is not None
        assert sharing.find(y.view(-1)) is not None
        y.add_(1)
        assert sharing.find(y) is None

    def test_recipes_die_with_their_tensors(self):
        gc.collect()
        before = len(sharing._recipes)
        for _ in range(10):
            fewbit.functional.dropout(fewbit.functional.gelu(torch.randn(64, 64, requires_grad=True), shared=True), 0.5)
        gc.collect()
        assert len(sharing._recipes) <= before

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh])
    def test_no_worse_than_codes_of_its_own(self, activation, p):
        """Also with gradients of one sign, for which small errors of values add up over all rows."""
        model, x = nn.Sequential(nn.Linear(64, 256), activation(), nn.Dropout(p), nn.Linear(256, 32)), torch.randn(1024, 64)

        def errors():
            """The error of the last weight's gradient, for gradients of one sign and of both signs."""
            found = []
            for grad in (torch.rand(1024, 32), torch.randn(1024, 32)):
                both = []
                for context in (fewbit.exact, nullcontext):
                    torch.manual_seed(9)
                    with context():
                        both.append(torch.autograd.grad(model(x), model[3].weight, grad)[0])
                found.append(relative(both[1], both[0]))
            return found

        fewbit.convert(model, bits=4, filter_fn=lambda module, _: not isinstance(module, nn.Dropout))
        of_its_own = errors()
        fewbit.convert(model, bits=4)
        shared = errors()
        assert shared[0] < of_its_own[0] + 0.01
        assert shared[1] < of_its_own[1]
