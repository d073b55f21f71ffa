"""The rival in tools/studies/baselines.py, 8-bit training, in cases with known answers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tools.studies import baselines


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)
    )


class TestEvenSteps:
    def test_nearest(self):
        x = torch.tensor([-1.0, -0.3, 0.2, 2.0])  # steps of 1 from -1
        assert baselines.even_steps(x, bits=2).tolist() == pytest.approx([-1, 0, 0, 2])

    @pytest.mark.parametrize("stochastic", [False, True])
    def test_at_most_so_many_values_between_the_extremes(self, stochastic):
        x = torch.randn(2000)
        y = baselines.even_steps(x, bits=3, stochastic=stochastic)
        assert y.unique().numel() == 8
        assert (float(y.min()), float(y.max())) == pytest.approx((float(x.min()), float(x.max())))
        assert float((y - x).abs().max()) < (1 if stochastic else 0.5) * float(x.max() - x.min()) / 7 * 1.0001

    def test_at_random_is_right_on_average(self):
        x = torch.tensor([0.0, 0.1, 0.5, 0.8, 3.0])
        draws = torch.stack([baselines.even_steps(x, bits=2, stochastic=True) for _ in range(4000)])
        assert torch.equal(draws.unique(), torch.arange(4.0)[[0, 1, 3]])
        deviation = (x * (1 - x)).clamp_min(0).sqrt() / 4000**0.5  # of the mean of numbers that are 0 or 1
        assert ((draws.mean(0) - x).abs() <= 4 * deviation + 1e-6).all()

    @pytest.mark.parametrize("stochastic", [False, True])
    def test_a_constant_stays(self, stochastic):
        assert torch.equal(baselines.even_steps(torch.full((5,), 0.7), 8, stochastic), torch.full((5,), 0.7))

    def test_gradient_passes_straight_through(self):
        x, g = torch.randn(9, requires_grad=True), torch.randn(9)
        y = baselines.rounded(x, 2)
        assert torch.allclose(y, baselines.even_steps(x.detach(), 2))
        assert torch.equal(torch.autograd.grad(y, x, g)[0], g)


class TestRangeBatchNorm:
    def test_is_the_formula(self):
        norm = baselines.RangeBatchNorm2d.of(nn.BatchNorm2d(3, eps=0.0), bits=23)  # so fine that rounding is not visible
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
        x = torch.randn(4, 3, 5, 6)
        channels = x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
        scale = (channels.max(1) - channels.min(1)) / (2 * np.sqrt(2 * np.log(4 * 5 * 6)))
        expected = (channels - channels.mean(1, keepdims=True)) / scale[:, None]
        weight, bias = norm.weight.detach().numpy()[:, None], norm.bias.detach().numpy()[:, None]
        found = norm(x).detach().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
        np.testing.assert_allclose(found, expected * weight + bias, atol=1e-5)
        np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * channels.mean(1), atol=1e-6)
        np.testing.assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * scale, rtol=1e-5)

    def test_of_normal_numbers_is_about_a_batch_norm(self):
        deviation = baselines.RangeBatchNorm2d(2)(torch.randn(64, 2, 16, 16)).std().item()
        assert 1 < deviation < 1.3

    def test_evaluation_uses_the_running_statistics(self):
        norm = baselines.RangeBatchNorm2d(2)
        x = torch.randn(8, 2, 4, 4)
        for _ in range(200):
            expected = norm(x)
        torch.testing.assert_close(norm.eval()(x), expected)


class TestBifurcated:
    @pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)])
    def test_weight_gets_the_full_gradient_and_the_input_a_rounded_one(self, shape):
        x = torch.randn(shape, requires_grad=True)
        weight, bias = torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
        y = baselines.bifurcated(nn.functional.linear, x, weight, bias, bits=3)
        plain = nn.functional.linear(x, weight, bias)
        assert torch.equal(y, plain)
        g = torch.randn(y.shape)
        of_input, *rest = torch.autograd.grad(y, (x, weight, bias), g)
        exact, *expected = torch.autograd.grad(plain, (x, weight, bias), g)
        for a, b in zip(rest, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.allclose(of_input, exact, atol=1e-3)

    def test_the_inputs_gradient_comes_from_a_rounded_one_that_is_right_on_average(self):
        x, weight, g = torch.randn(3, 5, requires_grad=True), torch.eye(5), torch.randn(3, 5)

        def of_input():
            y = baselines.bifurcated(nn.functional.linear, x, weight, None, bits=2)
            return torch.autograd.grad(y, x, g)[0]

        draws = torch.stack([of_input() for _ in range(2000)])
        assert draws.sub(g.min()).div((g.max() - g.min()) / 3).round(decimals=4).unique().numel() == 4
        assert float((draws.mean(0) - g).abs().max()) < 4 * float(g.max() - g.min()) / 3 / 2 / 2000**0.5


class TestEightBitTrained:
    def test_layers_are_replaced_and_the_original_stays(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        trained = baselines.eight_bit_trained(model)
        assert isinstance(trained[1], baselines.RangeBatchNorm2d)
        assert type(model[1]) is nn.BatchNorm2d
        assert trained.state_dict().keys() == before.keys()
        trained(torch.randn(2, 1, 8, 8)).sum().backward()
        assert all(each.grad is not None for each in trained.parameters())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    def test_many_bits_give_what_the_layers_give(self):
        model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
        trained, x = baselines.eight_bit_trained(model, bits=22), torch.randn(4, 2, 8, 8)
        torch.testing.assert_close(trained(x), model(x), atol=1e-4, rtol=1e-4)
        for each in (trained, model):
            each(x).square().sum().backward()
        for a, b in zip(trained.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)

    def test_it_learns(self):
        x, labels = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
        model = baselines.eight_bit_trained(network())
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]

    def test_bytes_are_those_of_inputs(self):
        n = 5
        expected = n * (8 * 8 + 4 * 6 * 6 + 4 * 6 * 6 + 2 * 4 * 4)  # of the two convolutions, the norm and the linear layer
        assert baselines.eight_bit_bytes(network(), (torch.randn(n, 1, 8, 8),)) == expected

    def test_bytes_of_choices_masks_and_signs(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2))
        values, signs, choices, mask = 8 * 8 + 36, 4 * 6 * 6, 36, 36
        assert baselines.eight_bit_bytes(model, (torch.randn(1, 1, 8, 8),)) == values + (signs + 2 * choices + mask) // 8
