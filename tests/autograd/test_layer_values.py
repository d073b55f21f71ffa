"""Coded layers on unusual inputs, and with stochastic rounding."""

import copy

import layer_oracles as naive
import pytest
import torch
from layer_oracles import CASES, NORMS, PRODUCTS, gradients, leaves, relative
from torch import nn
from torch.nn import functional

import fewbit
from fewbit import activations, resolve
from fewbit.autograd.quantize import Quantizer, scaled

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # from torch


class TestValues:
    """Unusual inputs."""

    @pytest.mark.parametrize("axis", [0, 1], ids=["rows", "channels"])
    def test_outliers_do_not_spoil_the_rest(self, axis):
        """Channels, or rows, whose mean is 50 standard deviations."""
        x = torch.randn(256, 128, dtype=torch.float64)
        plain = x.clone()
        x.select(axis, 3).mul_(50)
        x.select(axis, 70).add_(50)
        weight, grad = torch.randn(32, 128, dtype=torch.float64, requires_grad=True), torch.randn(256, 32, dtype=torch.float64)
        errors = {}
        for name, data in (("with", x), ("without", plain)):
            y = fewbit.functional.linear(data.clone().requires_grad_(), weight, bits=4)
            ours = torch.autograd.grad(y, weight, grad)[0] - grad.T @ data
            by_row = grad.T @ (naive.row_scaled_values(naive.value_table(4), data) - data)
            ordinary = torch.tensor([channel for channel in range(128) if axis == 0 or channel not in (3, 70)])
            errors[name] = [each[:, ordinary].norm().item() for each in (ours, by_row)]
        if axis:
            assert errors["with"][0] < 1.1 * errors["without"][0]
            assert errors["with"][1] > 5 * errors["with"][0]  # each row has its own scale
        else:
            assert errors["with"][0] < 1.2 * errors["with"][1]

    @pytest.mark.parametrize("magnitude", [1e-20, 1e-10, 1.0, 1e10, 1e18])
    @pytest.mark.parametrize("name", ["linear", "conv2d"])
    def test_magnitudes_do_not_matter_to_products(self, magnitude, name):
        case = PRODUCTS[name]
        x, parameters = case.make()
        x = x * magnitude
        grad = torch.randn(case.exact(x, parameters).shape)
        found, exact = gradients(case, x, parameters, grad, bits=8), naive.torch_gradients(case, x, parameters, grad)
        assert relative(found["weight"], exact["weight"]) < 0.02

    @pytest.mark.parametrize("name", NORMS)
    @pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e4])
    def test_magnitudes_in_norms(self, name, magnitude):
        """If eps is larger than the variance, normalized values are small, and the error is relative to 1."""
        case = NORMS[name]
        x, parameters = case.make()
        x, grad = x * magnitude, torch.randn(x.shape)
        found, exact = gradients(case, x, parameters, grad, bits=8), naive.torch_gradients(case, x, parameters, grad)
        for each in found:
            unit = grad.norm() if each == "weight" else 0
            assert (found[each] - exact[each]).norm() < 0.05 * max(exact[each].norm(), unit)

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("fill", ["zeros", "constant rows", "a channel of zeros"])
    def test_without_spread(self, name, fill):
        case = CASES[name]
        x, parameters = case.make()
        if fill == "zeros":
            x.zero_()
        elif fill == "constant rows":
            x.copy_(x.flatten()[: x.shape[0]].view(-1, *[1] * (x.dim() - 1)).expand_as(x))
        else:
            x.select(1 if x.dim() > 1 else 0, 0).zero_()
        grad = torch.randn(case.exact(x, parameters).shape)
        found, exact = gradients(case, x, parameters, grad, bits=8), naive.torch_gradients(case, x, parameters, grad)
        for each in found:
            assert found[each].isfinite().all()
            assert (found[each] - exact[each]).norm() <= 0.05 * exact[each].norm() + 1e-2 * grad.norm() * (name in NORMS) + 1e-9

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_does_no_harm(self, name, value):
        case = CASES[name]
        x, parameters = case.make()
        x.view(-1)[1] = value
        x, parameters = leaves(x, parameters)
        y = case.coded(x, parameters)
        torch.testing.assert_close(y, case.exact(x, parameters), rtol=0, atol=0, equal_nan=True)
        y.sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rms_norm_takes_torchs_own_eps(self, dtype):
        """None means the epsilon of the dtype that torch computes in. It matters if the input is tiny."""
        x = (1e-3 * torch.randn(64, 32)).to(dtype).requires_grad_()
        grad = torch.randn(64, 32).to(dtype)
        found, exact = (
            torch.autograd.grad(f(x, (32,)), x, grad)[0]
            for f in (lambda *a: fewbit.functional.rms_norm(*a, bits=8), functional.rms_norm)
        )
        assert relative(found, exact) < 0.02


def errors(module, x, bits, one_sign=True):
    """Errors of the gradient of each parameter, by name, for output gradients between 0.5 and 1.5, or normal ones."""
    exact, coded = copy.deepcopy(module), fewbit.convert(module, bits=bits)
    found = []
    for each in (exact, coded):
        torch.manual_seed(1)  # of dropout
        y = each(x.clone().requires_grad_())
        grad = 0.5 + torch.rand(y.shape) if one_sign else torch.randn(y.shape)
        y.backward(grad)
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
    return {name: relative(found[1][name], grad) for name, grad in found[0].items()}


class TestZeros:
    @pytest.mark.parametrize(("dropped", "bound"), [(0.0, 0.04), (0.1, 0.02), (0.5, 0.02), (0.9, 0.03)])
    def test_behind_a_dropout_no_bias_adds_up(self, dropped, bound):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(dropped), nn.Linear(256, 32))
        assert errors(model, torch.randn(2048, 64), bits=4)["3.weight"] < bound

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])  # its tables are designed here
    @pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid])
    def test_and_sparse_values_cost_no_more_than_dense_ones(self, activation, bits):
        for one_sign in (True, False):
            dense, sparse = (
                errors(
                    nn.Sequential(nn.Linear(64, 128), activation(), nn.Dropout(p), nn.Linear(128, 32)),
                    torch.randn(1024, 64),
                    bits,
                    one_sign,
                )["3.weight"]
                for p in (0.01, 0.6)
            )
            assert sparse < 2 * dense + 4.0**-bits + 1e-4

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.SELU, nn.Hardswish])
    @pytest.mark.parametrize("one_sign", [True, False])
    def test_through_an_activation(self, activation, one_sign):
        """A case in which codes of 0 stand for other numbers than 0."""
        dense, model = torch.randn(512, 64), nn.Sequential(activation(), nn.Linear(64, 32))
        error = errors(model, dense, 4, one_sign)["1.weight"]
        rows, columns = dense * (torch.arange(512) % 10 == 0).view(-1, 1), dense * (torch.arange(64) < 32)
        for sparse in (dense * (torch.rand(dense.shape) < 0.1), rows, columns):
            assert errors(copy.deepcopy(model), sparse, 4, one_sign)["1.weight"] < 2 * error + 0.05
        coded = fewbit.convert(copy.deepcopy(model), bits=4)
        coded(columns.requires_grad_()).sum().backward()
        assert not coded[1].weight.grad[:, 32:].any()

    def test_padded_images_through_a_batch_norm(self):
        """Numbers that are 0 in most images are far from 0 after the norm, by the same amount everywhere."""
        model, x = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(16, 8, 10, 10)
        x[2:] = 0
        assert max(errors(model, x, bits=4).values()) < 0.2

    @pytest.mark.parametrize("bits", [2, 4])
    def test_a_bias_before_a_batch_norm_learns_nothing(self, bits):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        coded, x = fewbit.convert(model, bits=bits), torch.randn(16, 3, 10, 10)
        coded(x).square().sum().backward()
        assert coded[0].bias.grad.norm() < 1e-4 * coded[0].weight.grad.norm()

    def test_one_hot_features(self):
        x = functional.one_hot(torch.arange(4000) % 1000, 1000).float()
        weight, grad = torch.randn(8, 1000, requires_grad=True), torch.rand(4000, 8)
        (found,) = torch.autograd.grad(fewbit.functional.linear(x, weight, bits=4), weight, grad)
        assert torch.equal(found, grad.T @ x)  # the batch itself is kept
        made = (x + torch.zeros((), requires_grad=True)) * 1
        (found,) = torch.autograd.grad(fewbit.functional.linear(made, weight, bits=4), weight, grad)
        assert relative(found, grad.T @ x) < 0.01

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_are_decoded_as_zeros(self, name, dtype, bits):
        """Otherwise a weight would learn from rows that are all zero except for it."""
        case = PRODUCTS[name]
        x, _ = case.make(dtype)
        x = torch.where(torch.rand(x.shape) < 0.4, 0, x)
        recipe = scaled(x.unsqueeze(0) if "unbatched" in name else x, quantizer(bits, dtype), -1 if "linear" in name else 1)
        rebuilt = recipe.rebuild(recipe.kept, dtype).reshape(x.shape)
        assert not rebuilt[x == 0].any()
        assert relative(rebuilt, x) < {2: 0.6, 4: 0.2, 8: 0.03}[bits]

    def test_channels_keep_their_means(self):
        x = torch.randn(512, 20) * torch.rand(512, 1) + torch.linspace(-3, 3, 20)
        recipe = scaled(x, quantizer(3, x.dtype), -1)
        torch.testing.assert_close(recipe.rebuild(recipe.kept, x.dtype).mean(0), x.mean(0), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("eps", [1e-12, 1e-5])
    @pytest.mark.parametrize("padding", [0.0, 1e-6, 1e-3])
    @pytest.mark.parametrize("first", [nn.LayerNorm, nn.RMSNorm], ids=["layer norm", "rms norm"])
    @pytest.mark.parametrize("second", [nn.LayerNorm, nn.RMSNorm], ids=["layer norm", "rms norm"])
    def test_padded_rows_through_norms(self, first, second, padding, eps):
        """Their gradients are multiplied by 1/σ of the second norm, which is some hundred times that of other channels."""
        x = torch.randn(32, 16)
        x[8:16] *= padding
        model = nn.Sequential(first(16, eps), second(16, eps), nn.Linear(16, 16))
        assert max(errors(model, x, bits=4, one_sign=False).values()) < 0.2

    @pytest.mark.parametrize(
        "layers", [lambda: [nn.Linear(16, 16, bias=False)], lambda: [nn.Linear(16, 16, bias=False), nn.Tanh()]]
    )
    def test_padded_rows_through_layers_without_bias(self, layers):
        x = torch.randn(256, 16)
        x[64:128] = 0
        model = nn.Sequential(nn.RMSNorm(16), *layers(), nn.LayerNorm(16), nn.Linear(16, 16))
        assert max(errors(model, x, bits=4, one_sign=False).values()) < 0.2

    @pytest.mark.parametrize("between", [nn.Identity, nn.ReLU])
    def test_padded_images_through_norms(self, between):
        x = torch.randn(16, 8, 6, 6)
        x[4:8] = 0
        model = nn.Sequential(nn.GroupNorm(2, 8), between(), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3))
        assert max(errors(model, x, bits=4, one_sign=False).values()) < 0.2


def quantizer(bits, dtype):
    device = torch.device("cpu")
    return Quantizer(*resolve.shipped_tables(activations.IDENTITY, ("value",), bits, dtype, device))


class TestStochastic:
    def test_is_unbiased_between_the_outermost_levels(self):
        x, table = torch.randn(64, 16, dtype=torch.float64, requires_grad=True), naive.value_table(3)
        weight, draws = torch.zeros(64, 16, dtype=torch.float64, requires_grad=True), 200
        grad = torch.eye(64, dtype=torch.float64)  # then the weight's gradient equals the decoded values
        found = []
        for _ in range(draws):
            y = fewbit.functional.linear(x, weight, bits=3, rounding="stochastic")
            found += torch.autograd.grad(y, weight, grad)
        x = x.detach()
        values, (row, center, spread) = torch.stack(found), naive.standards(x, -1, table)
        normal, scale = (x / row - center) / spread, spread * row
        inside = normal.abs() < table.levels.max()
        levels = torch.tensor(table.levels[0])
        above = torch.bucketize(normal, levels).clamp(1, levels.numel() - 1)
        variance = (normal - levels[above - 1]) * (levels[above] - normal)  # of a random choice between two numbers
        assert ((values.mean(0) - x).abs() < 5 * scale * (variance / draws).sqrt())[inside].all()
        outside = ((normal.sign() * table.levels.max() * spread + center) * row)[~inside]
        torch.testing.assert_close(values.mean(0)[~inside], outside)

    def test_is_reproducible_and_differs_between_calls(self):
        for name in ("linear", "conv2d", "layer_norm", "batch_norm"):
            case = CASES[name]
            x, parameters = case.make()
            found = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                own = leaves(x, parameters)
                case.coded(*own, bits=3, rounding="stochastic").square().sum().backward()
                found.append(own[1]["weight"].grad)
            assert torch.equal(found[0], found[1])
            assert not torch.equal(found[0], found[2])
