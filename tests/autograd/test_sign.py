"""A ReLU that reads a normalization finds the sign of its input exactly in the normalization's codes."""

import pytest
import torch
from layer_oracles import relative
from torch.nn import functional

import fewbit

CODED = fewbit.functional


class TestReluOfCodes:
    """The derivative of a ReLU that reads a normalization depends on the sign of the ReLU's input."""

    def mask(self, x, weight, bias, bits, relu=CODED.relu, **keywords):
        y = CODED.batch_norm(x.clone().requires_grad_(), None, None, weight, bias, training=True, bits=bits)
        y.retain_grad()
        torch.autograd.backward(relu(y, bits=bits, shared=True, **keywords).sum(), inputs=[y])
        return y.detach(), y.grad

    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_is_exact(self, bits, dtype):
        """For channels that are sometimes negative: y is zero within 2.5σ, or anywhere above."""
        x = torch.randn(400, 96).to(dtype)
        weight = torch.cat([torch.linspace(-3, 3, 64), torch.tensor([0.0, 1e-3, -1e-3, 1e-20] * 8)])
        zero = torch.cat([torch.rand(64) * 4.5 - 2.25, torch.rand(32) * 2])
        bias = -zero * weight
        bias[64::4] = torch.linspace(-1, 1, 8)
        y, grad = self.mask(x, weight.to(dtype), bias.to(dtype), bits)
        wrong = grad.float() != (y > 0).float()
        assert wrong.sum() == 0, (wrong.sum(0), y[wrong])

    def test_of_channels_that_are_hardly_ever_positive(self):
        """Exact up to 5σ; beyond, y is taken to be negative."""
        x, zero = torch.randn(2000, 40), torch.linspace(0, 8, 40)
        y, grad = self.mask(x, torch.ones(40), -zero, 4)
        assert torch.equal(grad, (y > 0).float())
        y, grad = self.mask(x, -torch.ones(40), -zero, 4)
        assert torch.equal(grad, (y > 0).float())

    @pytest.mark.parametrize(("bits", "share"), [(2, 0.08), (3, 0.015), (4, 0.002), (5, 0.0004), (8, 0.0001)])
    def test_of_channels_that_are_hardly_ever_negative(self, bits, share):
        """The mask may be wrong where y is negative, but y is negative only for a small share of the normal distribution."""
        x, zero = torch.randn(5000, 60), -torch.linspace(0, 6, 60)
        for sign in (1, -1):
            y, grad = self.mask(x * sign, sign * torch.ones(60), -zero, bits)
            wrong = grad != (y > 0).float()
            assert not (wrong & (y > 0)).any()
            assert wrong.float().mean(0).max() < share

    def test_of_the_dead_and_the_constant(self):
        """Channels without spread: y is the bias, and its sign decides. The derivative at 0 is 0."""
        x = torch.zeros(16, 12)
        for weight in (1.0, -1.0, 0.0, 0.3, -1e-10):
            bias = torch.linspace(-1, 1, 12)
            bias[:3] = 0
            y, grad = self.mask(x, torch.full((12,), weight), bias, 4)
            assert torch.equal(y, bias.expand_as(y))
            ordinary = torch.ones(12, dtype=torch.bool) if abs(weight) in (0, 1e-10) else (bias / weight).abs() < 2.2
            assert torch.equal(grad[:, ordinary], (y > 0).float()[:, ordinary])

    def test_leaky(self):
        def leaky(y, **keywords):
            return CODED.leaky_relu(y, 0.25, **keywords)

        y, grad = self.mask(torch.randn(300, 30), torch.linspace(-2, 2, 30), torch.randn(30) / 5, 5, leaky)
        exact = torch.where(y > 0, 1.0, 0.25)
        steep = (torch.linspace(-2, 2, 30).abs() > 0.5).expand_as(y)
        assert torch.equal(grad[steep], exact[steep])

    @pytest.mark.parametrize("weight", [1e-10, -1e-10, 1e-30])
    @pytest.mark.parametrize("bias", [-1.0, 1.0])
    def test_tiny_weights_do_not_blow_up_the_norms_own_gradient(self, weight, bias):
        """Parameters as weight decay leaves them; without a ReLU after the norm."""
        x, grad = torch.randn(64, 4), torch.randn(64, 4)
        found = []
        for function in (
            lambda *a: CODED.batch_norm(*a, training=True, bits=8),
            lambda *a: functional.batch_norm(*a, training=True),
        ):
            own = x.clone().requires_grad_(), torch.full((4,), weight, requires_grad=True), torch.full((4,), bias)
            function(own[0], None, None, *own[1:]).backward(grad)
            found.append((own[0].grad, own[1].grad))
        assert relative(found[0][1], found[1][1]) < 0.02
        assert (found[0][0] - found[1][0]).abs().max() <= 0.1 * found[1][0].abs().max()


class TestCorners:
    """Corner cases of the statistics that must not give NaN, and for which no signs are claimed."""

    def test_one_bit_has_no_threshold_to_move_to(self):
        x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], requires_grad=True)
        CODED.batch_norm(x, None, None, torch.ones(1), torch.zeros(1), training=True, bits=1).square().sum().backward()
        assert x.grad.isfinite().all()

    def test_stochastic_rounding_claims_no_signs(self):
        x, weight, bias = torch.randn(500, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
        y = CODED.batch_norm(x, None, None, weight, bias, training=True, bits=4, rounding="stochastic")
        y.retain_grad()
        CODED.relu(y, bits=4, shared=True).sum().backward()
        assert torch.equal(y.grad, (y > 0).float())

    @pytest.mark.parametrize("size", [1e-5, 1e5, 1e7])
    def test_stale_statistics_of_another_size(self, size):
        x, weight = size * torch.randn(64, 4), torch.ones(4, requires_grad=True)
        running = torch.zeros(4), torch.ones(4)
        grad = torch.randn(64, 4)
        (found,) = torch.autograd.grad(CODED.batch_norm(x, *running, weight, None, bits=8), weight, grad)
        (exact,) = torch.autograd.grad(functional.batch_norm(x, *running, weight, None), weight, grad)
        assert relative(found, exact) < 0.03

    def test_group_norm_in_bfloat16_keeps_signs(self):
        x = (torch.randn(16, 8, 20) + 5).bfloat16().requires_grad_()
        y = CODED.group_norm(x, 2, torch.ones(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16), bits=4)
        y.retain_grad()
        CODED.relu(y, bits=4, shared=True).sum().backward()
        assert (y.grad.bool() != (y > 0)).float().mean() < 5e-4  # y itself is rounded
