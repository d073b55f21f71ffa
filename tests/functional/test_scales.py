"""Gradients of activations for inputs of every scale: the spread of the input chooses the table."""

import oracles
import pytest
import torch
from support import gradient_at

import fewbit
from fewbit import activations
from fewbit.constants import RUNGS

SCALES = [0.01, 0.03, 0.0625, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 6.0, 8.0, 11.0, 16.0, 30.0, 100.0]


def error(function, exact, x):
    found, true = gradient_at(function, x), gradient_at(exact, x)
    return ((found - true).norm() / true.norm()).item()


class Kept(torch.nn.Module):
    """An activation and a linear layer that reads it."""

    def __init__(self, name, coded):
        super().__init__()
        module = activations.get(name).module
        self.activation = getattr(fewbit, module)(bits=4, shared=True) if coded else getattr(torch.nn, module)()
        self.linear = (fewbit.Linear(64, 16, bits=4) if coded else torch.nn.Linear(64, 16)).requires_grad_()

    def forward(self, x):
        return self.linear(self.activation(x))


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "elu", "softplus", "tanh", "sigmoid"])
def test_four_bits_serve_every_scale(name):
    """A single table has up to ten times the error at another scale. Each table of a ladder is near the best for its scale."""
    record, at_one = activations.get(name), torch.randn(1 << 16)
    coded = getattr(fewbit.functional, name)
    errors = {scale: error(lambda x: coded(x, bits=4), record.forward, scale * at_one) for scale in SCALES}
    assert max(errors.values()) < 0.05, errors
    rms = dict(zip(RUNGS, (table.relative_rms for table in fewbit.load_ladder(record, 4)), strict=True))
    for scale in RUNGS:
        assert error(lambda x: coded(x, bits=4), record.forward, scale * at_one) == pytest.approx(rms[scale], rel=0.1)


@pytest.mark.parametrize("name", ["gelu", "silu", "elu", "tanh"])
def test_weights_behind_shared_codes_at_every_scale(name):
    x, grad = torch.randn(4096, 64), torch.randn(4096, 16)
    coded, exact = Kept(name, True), Kept(name, False)
    exact.linear.load_state_dict(coded.linear.state_dict())
    errors = {}
    for scale in SCALES[2:-2]:
        for model in (coded, exact):
            model.zero_grad()
            model((scale * x).requires_grad_()).backward(grad)
        found, true = coded.linear.weight.grad, exact.linear.weight.grad
        errors[scale] = ((found - true).norm() / true.norm()).item()
    assert max(errors.values()) < 0.14, errors


def test_heavy_tails_stretch_the_table():
    """Values far out cost most, so the table is chosen by the fourth moment."""
    x = torch.distributions.StudentT(3.0).sample((1 << 16,))
    assert oracles.rung_of(x) > 4


def test_a_table_of_your_own_is_used_as_it_is():
    table, x = fewbit.load_table("gelu", 3), 0.01 * torch.randn(1000)
    found = gradient_at(lambda x: fewbit.functional.gelu(x, table=table), x)
    assert torch.equal(found, oracles.expected_gradient(table, x, torch.ones(1000)))
    assert not torch.equal(found, gradient_at(lambda x: fewbit.functional.gelu(x, bits=3), x))


def test_gates_choose_by_the_gate():
    """The value half does not influence the choice of the gate's table."""
    gate, up = 0.05 * torch.randn(512, 64), 30 * torch.randn(512, 64)
    both = torch.cat([up, gate], 1)
    assert error(lambda x: fewbit.functional.glu(x, bits=4), torch.nn.functional.glu, both) < 0.15
