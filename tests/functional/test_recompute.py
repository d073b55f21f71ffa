"""recompute: the function's own results, gradients near its own, and only codes of its inputs are kept."""

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept, compiled
from torch import nn
from torch.nn import functional

import fewbit
from fewbit.errors import DesignError, InputError, TableError


def written(x, weight):
    return functional.dropout(functional.gelu(x @ weight / 8), 0.3).softmax(-1) * x


def gradients(call, *tensors):
    torch.manual_seed(0)
    y = call(*(each * 1 for each in tensors))
    after = torch.rand(1)
    return y, after, torch.autograd.grad(y.square().mean(), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_and_gradients(dtype):
    x, weight = torch.randn(64, 64, dtype=dtype, requires_grad=True), torch.randn(64, 64, dtype=dtype, requires_grad=True)
    exact, after, true = gradients(written, x, weight)
    for bits, bound in ((4, 0.3), (8, 0.04)):
        y, then, found = gradients(lambda *given, bits=bits: fewbit.recompute(written, *given, bits=bits), x, weight)
        assert torch.equal(y, exact)
        assert torch.equal(after, then)
        assert all(0 < relative(*pair) < bound for pair in zip(found, true, strict=True))


def test_nothing_else_is_kept():
    x = torch.randn(256, 256, requires_grad=True)
    kept = bytes_kept(lambda: fewbit.recompute(lambda x: (x.exp() * x.sin()).softmax(-1), x * 1, bits=4))
    assert kept < 0.16 * x.nbytes
    shared = fewbit.functional.layer_norm(x, (256,), bits=4)
    assert bytes_kept(lambda: fewbit.recompute(torch.sin, shared), leave_out=()) < 0.16 * x.nbytes


def test_parameters_and_other_arguments():
    layer, x = nn.Linear(32, 16), torch.randn(64, 32, requires_grad=True)

    def call(x, scale, times, names):
        return {name: times * layer(x) * scale for name in names}

    scale = torch.rand(16)
    exact = call(x, scale, 3, ["a", "b"])
    found = fewbit.recompute(call, x, scale, 3, ["a", "b"], bits=8)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    wanted = [x, *layer.parameters()]
    true, ours = (torch.autograd.grad(sum(each.square().sum() for each in made.values()), wanted) for made in (exact, found))
    assert all(relative(*pair) < 0.03 for pair in zip(ours, true, strict=True))


def test_where_there_is_nothing_to_code():
    x = torch.randn(64, 64)
    assert torch.equal(fewbit.recompute(torch.sin, x), x.sin())
    with torch.no_grad():
        assert not fewbit.recompute(torch.sin, x.requires_grad_()).requires_grad
    assert torch.equal(torch.func.grad(lambda x: fewbit.recompute(torch.sin, x).sum())(x.detach()), x.detach().cos())
    y = fewbit.recompute(torch.sin, x[:0])
    assert y.shape == (0, 64)


def test_compiled_is_torchs_checkpointing():
    x = torch.randn(64, 64, requires_grad=True)
    y = compiled(lambda x: fewbit.recompute(lambda x: x.sin().exp(), x * 1))(x)
    assert torch.allclose(y, x.sin().exp())
    assert torch.allclose(*torch.autograd.grad(y.sum(), x), *torch.autograd.grad(x.sin().exp().sum(), x))


def test_errors():
    x = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(InputError, match="takes a function"):
        fewbit.recompute(x, x)
    with pytest.raises(DesignError, match="1 to 8"):
        fewbit.recompute(torch.sin, x, bits=9)
    with pytest.raises(TableError):
        fewbit.recompute(torch.sin, x, table=fewbit.load_table("gelu", 2))
