"""Tensors that torch computes from a weight: they are computed again in backward, or kept if that would change numbers."""

import pytest
import torch
from support import bytes_kept
from torch import nn

import fewbit
from fewbit.autograd.parameters import PRODUCTS, made_of_frozen

IN, OUT, ROWS = 48, 64, 32


class Product(nn.Module):
    """x @ weight, as in GPT-2's layers, with a frozen or trained weight."""

    def __init__(self, is_trained):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(IN, OUT), requires_grad=is_trained)
        self.bias = nn.Parameter(torch.randn(OUT))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def inputs():
    return torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradient(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    return torch.autograd.grad(y.float().square().sum(), x)[0]


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_casts_of_autocast_are_made_again(is_trained):
    exact, model, x = Product(is_trained), fewbit.convert(Product(is_trained), bits={"activation": 4}), inputs()

    def kept(model):
        torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16):
            return bytes_kept(model, x)

    assert kept(exact) - kept(model) == IN * OUT * 2
    assert torch.equal(gradient(model, x), gradient(exact, x))


def test_a_weight_that_changes_is_looked_at_again():
    exact, model, x = Product(False), fewbit.convert(Product(False), bits=4), inputs()
    for _ in range(3):
        assert torch.equal(gradient(model, x), gradient(exact, x))
        for each in (exact, model):
            each.weight.data.mul_(0.7)


def test_a_weight_that_changes_before_backward_is_an_error():
    model, x = fewbit.convert(Product(False), bits=4), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


class TestMadeOfFrozen:
    weight = nn.Parameter(torch.arange(12.0).view(3, 4), requires_grad=False)

    def of(self, tensor, function=torch.mm, operands=(), saved=None):
        found = made_of_frozen(tensor, saved or [tensor], function, operands or (self.weight,))
        return None if found is None else found.rebuild(found.kept, tensor.dtype)

    def test_as_it_lies_and_transposed(self):
        cast = self.weight.bfloat16()
        assert torch.equal(self.of(cast), cast)
        assert torch.equal(self.of(cast.t().contiguous()), cast.t())

    def test_other_numbers_are_kept(self):
        assert self.of(self.weight.bfloat16() + 1) is None
        assert self.of(torch.zeros(2, 2)) is None

    def test_kept_where_it_cannot_be_said(self):
        cast = self.weight.bfloat16()
        assert torch.einsum not in PRODUCTS
        assert self.of(cast, function=torch.einsum) is None
        assert self.of(cast, operands=(self.weight, self.weight)) is None
        assert self.of(cast, saved=[cast, cast + 1]) is None
        assert self.of(cast, operands=(nn.Parameter(self.weight.detach().clone()),)) is None  # it is trained
