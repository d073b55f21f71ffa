"""In-place operation and second derivatives: when a coded activation must refuse, it must write nothing."""

import numpy as np
import oracles
import pytest
import torch

import fewbit
from fewbit.errors import InputError


class TestInPlace:
    def test_on_a_leaf_it_objects_and_writes_nothing(self):
        x = torch.ones(3, requires_grad=True)
        for target in (x, x[1:]):
            with pytest.raises(InputError, match="cannot overwrite a leaf that requires a gradient, nor a view of one"):
                fewbit.functional.gelu(target, inplace=True)
        assert x.tolist() == [1.0, 1.0, 1.0]

    def test_on_what_backward_needs_torch_objects(self):
        x = torch.randn(5, requires_grad=True)
        y = x.exp()  # it keeps its output
        z = fewbit.functional.gelu(y, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()

    def test_on_a_view(self):
        leaf = torch.randn(6, 8, requires_grad=True)
        x = leaf * 1
        y = fewbit.functional.tanh(x[:, 2:5], inplace=True)
        assert torch.equal(x[:, 2:5], y)
        x.sum().backward()
        expected = torch.ones_like(leaf)
        expected[:, 2:5] = oracles.expected_gradient(fewbit.load_ladder("tanh", 3), leaf[:, 2:5], expected[:, 2:5])
        assert torch.equal(leaf.grad, expected)

    @pytest.mark.parametrize("views", [lambda x: x.chunk(2), lambda x: x.split(3), lambda x: x.unbind()])
    def test_on_one_of_several_views_it_objects_and_writes_nothing(self, views):
        x = torch.ones(6, requires_grad=True) * 1
        with pytest.raises(InputError, match="cannot overwrite this view: it is one of several"):
            fewbit.functional.silu(views(x)[0], inplace=True)
        assert x.tolist() == [1.0] * 6

    def test_on_overlapping_memory_torch_objects(self):
        x = (torch.randn(1, requires_grad=True) * 1).expand(4)
        with pytest.raises(RuntimeError, match="single memory location"):
            fewbit.functional.gelu(x, inplace=True)


class TestDoubleBackward:
    def test_raises_with_the_reason(self):
        x = torch.randn(5, requires_grad=True)
        (grad,) = torch.autograd.grad(fewbit.functional.gelu(x).sum(), x, create_graph=True)
        with pytest.raises(InputError, match="codes hold no second derivative; for double backward"):
            grad.pow(2).sum().backward()

    def test_is_never_silently_left_out(self):
        x = torch.randn(5, requires_grad=True)
        y = fewbit.functional.gelu(x).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(InputError, match="can be taken once"):
            (y + grad.sum()).backward()

    @pytest.mark.parametrize(
        "take",
        [
            lambda penalty, inner, weight: torch.autograd.grad(penalty, weight),
            lambda penalty, inner, weight: torch.autograd.grad(penalty, inner),
            lambda penalty, inner, weight: penalty.backward(inputs=[weight]),
        ],
    )
    def test_no_way_round_it(self, take):
        weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        inner = weight @ x
        outer = (fewbit.functional.gelu(inner, bits=8) @ weight).sum()
        (grad,) = torch.autograd.grad(outer, x, create_graph=True)
        with pytest.raises(InputError, match="can be taken once"):
            take(grad.pow(2).sum(), inner, weight)

    @pytest.mark.parametrize("name", ["hessian", "hvp", "vhp"])
    def test_hessians(self, name):
        x = torch.randn(3)
        arguments = (x,) if name == "hessian" else (x, torch.ones(3))
        with pytest.raises(InputError, match="can be taken once"):
            getattr(torch.autograd.functional, name)(lambda t: fewbit.functional.gelu(t).sum(), *arguments)

    def test_retained_graphs_may_be_used_again(self):
        x = torch.randn(5, requires_grad=True)
        y = fewbit.functional.gelu(x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, *grads):
        return None


def test_no_incoming_gradient_gives_none():
    x = torch.randn(3, requires_grad=True)
    _NoGradient.apply(fewbit.functional.gelu(x * 1)).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_an_activation_that_changes_the_dtype(dtype, other):
    fewbit.register("other_tanh", lambda x: x.to(other).tanh())
    x, grad = torch.randn(500, dtype=dtype, requires_grad=True), torch.randn(500).to(other)
    y = fewbit.functional.other_tanh(x, bits=3)
    assert y.dtype == other
    (found,) = torch.autograd.grad(y, x, grad)
    table = fewbit.load_ladder("other_tanh", 3)[oracles.rung_of(x, np.float64 if dtype == torch.float64 else np.float32)]
    expected = grad.double() * torch.from_numpy(table(x.detach().double().numpy()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_first_use_under_another_default_device():
    """Things that are made once and kept lie on the device of the input."""
    from fewbit.kernels import cpu

    cpu._encoding.cache_clear()
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"):
        fewbit.functional.gelu(x).backward(x.detach().t().contiguous().t())
    assert x.grad.device.type == "cpu"
