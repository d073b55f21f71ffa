"""Coded layers on inputs out of the ordinary, and with stochastic rounding."""

import layer_oracles as naive
import pytest
import torch
from layer_oracles import CASES, NORMS, PRODUCTS, gradients, leaves, relative
from torch.nn import functional

import fewbit

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own


class TestValues:
    """Inputs out of the ordinary."""

    @pytest.mark.parametrize("axis", [0, 1], ids=["rows", "channels"])
    def test_outliers_do_not_spoil_the_rest(self, axis):
        """Channels, or rows, at 50 standard deviations."""
        x = torch.randn(256, 128, dtype=torch.float64)
        plain = x.clone()
        x.select(axis, 3).mul_(50)
        x.select(axis, 70).add_(50)
        weight, grad = torch.randn(32, 128, dtype=torch.float64, requires_grad=True), torch.randn(256, 32, dtype=torch.float64)
        errors = {}
        for name, data in (("with", x), ("without", plain)):
            y = fewbit.functional.linear(data, weight, bits=4)
            ours = torch.autograd.grad(y, weight, grad)[0] - grad.T @ data
            by_row = grad.T @ (naive.row_scaled_values(naive.value_table(4), data) - data)
            ordinary = torch.tensor([channel for channel in range(128) if axis == 0 or channel not in (3, 70)])
            errors[name] = [each[:, ordinary].norm().item() for each in (ours, by_row)]
        if axis:
            assert errors["with"][0] < 1.1 * errors["without"][0]
            assert errors["with"][1] > 5 * errors["with"][0]  # a scale for each row alone
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
        """Where eps outweighs the variance, normalized values are small, and the error is relative to 1, not to them."""
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
        """None is the epsilon of the dtype that torch computes in: it matters where the input is tiny."""
        x = (1e-3 * torch.randn(64, 32)).to(dtype).requires_grad_()
        grad = torch.randn(64, 32).to(dtype)
        found, exact = (
            torch.autograd.grad(f(x, (32,)), x, grad)[0]
            for f in (lambda *a: fewbit.functional.rms_norm(*a, bits=8), functional.rms_norm)
        )
        assert relative(found, exact) < 0.02


class TestStochastic:
    def test_is_unbiased_between_the_outermost_levels(self):
        x, table = torch.randn(64, 16, dtype=torch.float64), naive.value_table(3)
        weight, draws = torch.zeros(64, 16, dtype=torch.float64, requires_grad=True), 200
        grad = torch.eye(64, dtype=torch.float64)  # then the weight's gradient is what the codes stand for
        found = []
        for _ in range(draws):
            y = fewbit.functional.linear(x, weight, bits=3, rounding="stochastic")
            found += torch.autograd.grad(y, weight, grad)
        values, (row, center, spread) = torch.stack(found), naive.standards(x, -1)
        normal, scale = (x / row - center) / spread, spread * row
        inside = normal.abs() < table.levels.max()
        levels = torch.tensor(table.levels[0])
        above = torch.bucketize(normal, levels).clamp(1, levels.numel() - 1)
        variance = (normal - levels[above - 1]) * (levels[above] - normal)  # of a choice between two with the mean in between
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
