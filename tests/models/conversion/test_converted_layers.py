"""Converted layers compared with torch's: norms with running statistics, all convolutions, autocast, torch.func, export."""

import copy

import pytest
import torch
from layer_oracles import CASES, relative
from support import bytes_kept
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional

import fewbit

NORMS = [
    (nn.BatchNorm1d, (6, 5), {}),
    (nn.BatchNorm1d, (6, 5, 7), {"momentum": None}),
    (nn.BatchNorm1d, (6, 5), {"affine": False, "momentum": 0.5}),
    (nn.BatchNorm2d, (3, 5, 4, 4), {"track_running_stats": False}),
    (nn.BatchNorm3d, (2, 5, 3, 3, 3), {"eps": 0.1}),
]


@pytest.mark.parametrize(("torchs", "shape", "keywords"), NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_running_statistics(torchs, shape, keywords, dtype):
    exact = torchs(5, **keywords).to(dtype)
    coded = fewbit.convert(copy.deepcopy(exact), bits=8)
    for step in range(5):
        if step == 3:
            exact.eval(), coded.eval()
        x, results = 3 * torch.randn(shape).to(dtype) + 1, []
        grad = torch.randn(shape).to(dtype)
        for module in (coded, exact):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(grad)
            results.append((y, leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert relative(results[0][1], results[1][1]) < 0.1
        for name, state in exact.state_dict().items():
            assert torch.equal(coded.state_dict()[name], state), name


CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 8)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", stride=2), (2, 3, 8, 9)),
    (nn.Conv2d(3, 4, (3, 5), padding="same", padding_mode="replicate"), (2, 3, 8, 9)),
    (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, bias=False), (4, 8, 9)),
    (nn.Conv3d(2, 3, 2, padding="valid"), (2, 2, 3, 4, 5)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    (nn.ConvTranspose2d(3, 4, 3, stride=(2, 3), padding=1, output_padding=1), (2, 3, 5, 6)),
    (nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("exact", "shape"), CONVOLUTIONS)
def test_convolutions(exact, shape):
    coded = fewbit.convert(copy.deepcopy(exact), bits=8)
    x, grads = torch.randn(shape), []
    for module in (coded, exact):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        grads.append((y, leaf.grad, module.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert relative(grads[0][2], grads[1][2]) < 0.03


def test_transposed_convolutions_take_an_output_size():
    exact = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    coded, x = fewbit.convert(copy.deepcopy(exact), bits=4), torch.randn(1, 3, 6, 6, requires_grad=True)
    for size in ((11, 12), (12, 11)):
        assert torch.equal(coded(x, output_size=size), exact(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        coded(x, output_size=(20, 20))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # from torch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_autocast_of_each_layer(name, own):
    case = CASES[name]
    x, parameters = case.make(own)
    parameters = {name: each.float().requires_grad_() for name, each in parameters.items()}
    if own == torch.float64:
        parameters = {name: each.detach().double().requires_grad_() for name, each in parameters.items()}
    with torch.autocast("cpu", torch.bfloat16):
        exact = case.exact(x.requires_grad_(), parameters)
        y = case.coded(x, parameters)
    assert y.dtype == exact.dtype
    assert torch.equal(y, exact)
    y.sum().backward()
    assert x.grad.dtype == own


class TestTransforms:
    """Under torch.func, forward-mode differentiation and export, the layers run torch's own operations and are exact."""

    def layers(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GLU(), nn.RMSNorm(8), nn.Linear(8, 2))
        return fewbit.convert(copy.deepcopy(model), bits=2), model

    def test_gradients(self):
        coded, exact = self.layers()
        parameters = {name: each.detach() for name, each in exact.named_parameters()}
        x = torch.randn(5, 6)

        def loss(module):
            return lambda parameters, x: functional_call(module, parameters, (x,)).square().sum()

        for take in (
            lambda f: grad(f)(parameters, x),
            lambda f: vmap(grad(f), in_dims=(None, 0))(parameters, x),
            lambda f: vjp(f, parameters, x)[1](torch.ones(()))[0],
        ):
            ours, true = take(loss(coded)), take(loss(exact))
            for name in true:
                torch.testing.assert_close(ours[name], true[name])

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_forward_mode(self):
        coded, exact = self.layers()
        x, tangent = torch.randn(5, 6), torch.randn(5, 6)
        for ours, true in zip(jvp(coded, (x,), (tangent,)), jvp(exact, (x,), (tangent,)), strict=True):
            torch.testing.assert_close(ours, true)

    def test_no_grad_and_frozen_keep_nothing(self):
        coded, _ = self.layers()
        x = torch.randn(5, 6)
        with torch.no_grad():
            assert bytes_kept(coded, x) == 0
        assert bytes_kept(coded.requires_grad_(False), x) == 0

    @pytest.mark.slow
    def test_export(self):
        coded, exact = self.layers()
        x = torch.randn(5, 6)
        program = torch.export.export(coded, (x,))
        assert "fewbit" not in str(program.graph)
        assert torch.equal(program.module()(x), exact(x))

    def test_on_the_meta_device(self):
        coded, _ = self.layers()
        y = coded.to("meta")(torch.randn(5, 6, device="meta"))
        y.sum().backward()
        assert coded[0].weight.grad.shape == (8, 6)


def test_dropout_of_functional_use():
    """A module may be called twice in one step, with different inputs."""
    module = fewbit.convert(nn.Linear(4, 4, bias=False), bits=8)
    a, b = torch.randn(9, 4), 100 * torch.randn(3, 4)
    (module(a).sum() + module(b).sum()).backward()
    assert relative(module.weight.grad, (a.sum(0) + b.sum(0)).expand(4, 4)) < 0.03
    assert functional.linear(a, module.weight).equal(module(a))
