"""Outputs behave like torch's own: they can be changed in place, and batches of gradients go through them."""

import pytest
import torch
from layer_oracles import CASES, leaves
from torch import nn
from torch.nn import functional

import fewbit
from fewbit import activations, resolve
from fewbit.autograd.activation import coded_activation
from fewbit.functional import products

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # from torch


def ends_in_a_view(x):
    [table] = resolve.shipped_tables(activations.get("tanh"), ("derivative",), 4, x.dtype, x.device)
    return coded_activation(x, table, forward=lambda x: x.tanh().view(x.shape))


def product(function, *factors):
    return products.product(products.find(function, factors, {}), factors, 4, None)


OTHERS = {
    "gelu": ((6, 40), {}, lambda x, _: fewbit.functional.gelu(x, bits=4)),
    "a function that ends in a view": ((6, 40), {}, lambda x, _: ends_in_a_view(x)),
    "glu": ((6, 40), {}, lambda x, _: fewbit.functional.glu(x, bits=4)),
    "swiglu": ((6, 40), {"up": (6, 40)}, lambda x, own: fewbit.functional.swiglu(x, own["up"], bits=4)),
    "product": ((6, 40), {"other": (6, 40)}, lambda x, own: product(torch.mul, x, own["other"])),
    "matrix product": ((5, 14, 16), {"other": (5, 16, 4)}, lambda x, own: product(torch.bmm, x, own["other"])),
}
CALLS = {
    **{name: (case.x, case.parameters, case.coded) for name, case in CASES.items()},
    **OTHERS,
}
CHANGES = {
    "add": (lambda y: y.add_(1), lambda y: y + 1),
    "multiply": (lambda y: y.mul_(2), lambda y: y * 2),
    "fill": (lambda y: y.masked_fill_(y > 0.5, 0.25), lambda y: y.masked_fill(y > 0.5, 0.25)),
    "relu": (lambda y: functional.relu(y, inplace=True), functional.relu),
    "assign": (lambda y: y.select(-1, 0).zero_(), lambda y: torch.cat([0 * y[..., :1], y[..., 1:]], -1)),
}


def made(name, dtype=torch.float32):
    shape, parameters, call = CALLS[name]
    own = {each: torch.randn(size, dtype=dtype) for each, size in parameters.items()}
    return *leaves(torch.randn(shape, dtype=dtype), own), call


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_can_be_changed_in_place(name, change):
    x, own, call = made(name)
    in_place, out_of_place = CHANGES[change]
    y = call(x * 1, own)
    in_place(y)
    expected = out_of_place(call(x * 1, own))
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape)
    for found, each in zip(*(torch.autograd.grad(end, [x, *own.values()], grad) for end in (y, expected)), strict=True):
        assert torch.equal(found, each)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Dropout, nn.Hardswish])
@pytest.mark.parametrize("shape", [(2, 3, 6), (3, 6), (6,), (0, 6)])
def test_in_a_converted_model(activation, shape):
    """A linear layer with a bias ends in a view. torch's own function does not show that."""
    model = nn.Sequential(nn.Linear(6, 8), activation(inplace=True), nn.Linear(8, 4))
    x, found = torch.randn(shape), []
    for make in (lambda: model, lambda: fewbit.convert(model, bits=8)):
        torch.manual_seed(0)
        y = make()(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    for exact, coded in zip(*found, strict=True):
        assert (coded - exact).norm() <= 0.05 * exact.norm() + 1e-6


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # from torch, about operations without a rule
@pytest.mark.parametrize("name", CALLS)
def test_batches_of_gradients(name):
    x, own, call = made(name, torch.float64)
    inputs = [x, *own.values()]
    y = call(x * 1, own)
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    for found, each in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d", "layer_norm", "batch_norm", "gelu", "glu"])
def test_vectorized_jacobians(name):
    x, own, call = made(name)
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(lambda x: call(x, own).flatten(1).sum(1), x, vectorize=True)
    torch.testing.assert_close(found, jacobian(lambda x: call(x, own).flatten(1).sum(1), x))


class Shared(nn.Module):
    """Two linear layers that are used twelve times."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(12):
            x = x + self.down(functional.gelu(self.up(x)))
        return x


def test_each_use_of_a_shared_weight_keeps_no_cast_of_its_own():
    exact, x = Shared(), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = fewbit.memory(exact, x).activation_bytes
        y = exact(x)
        grads = torch.autograd.grad(y.float().sum(), [*exact.parameters()])
        coded = fewbit.convert(exact)
        assert fewbit.memory(coded, x).activation_bytes < 0.6 * before
        assert torch.equal(coded(x), y)
        found = torch.autograd.grad(coded(x).float().sum(), [*coded.parameters()])
    for ours, true in zip(found, grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - true).norm() < 0.1 * true.norm()
