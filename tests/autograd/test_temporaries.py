"""No activation is copied into a wider dtype: in bfloat16 no allocation of a coded step is larger than torch's own."""

import copy

import pytest
import torch
from torch import nn

import fewbit
from fewbit.torch_internals import allocations


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 512), nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, x):
        return self.down(fewbit.functional.swiglu(self.gate(x), self.up(x), bits=4) if self.coded else self.exact(x))

    def exact(self, x):
        return nn.functional.silu(self.gate(x)) * self.up(x)

    coded = False


MODELS = {
    "transformer": (lambda: nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)), (1024, 128)),
    "gated unit": (lambda: nn.Sequential(nn.RMSNorm(128), Gated()), (1024, 128)),
    "dropout": (lambda: nn.Sequential(nn.Linear(128, 512), nn.SiLU(), nn.Dropout(0.5), nn.Linear(512, 128)), (1024, 128)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.GroupNorm(4, 32)),
        (32, 16, 32, 32),
    ),
}


def largest_allocation(model, x):
    def step():
        model(x).backward(torch.ones_like(model(x)))

    step()  # tables are prepared once
    return max(allocations(step))


@pytest.mark.parametrize("name", MODELS)
def test_no_allocation_is_larger_than_torchs(name, monkeypatch):
    make, shape = MODELS[name]
    exact = make().to(torch.bfloat16)
    x = torch.randn(shape).to(torch.bfloat16).requires_grad_()
    expected = largest_allocation(exact, x)
    monkeypatch.setattr(Gated, "coded", True)
    assert largest_allocation(fewbit.convert(copy.deepcopy(exact), bits=4), x) <= expected
