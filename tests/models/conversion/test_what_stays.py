"""What a conversion leaves alone: modules that a filter rejects, that use fewbit's names, or that cannot be coded."""

import logging

import numpy as np
import pytest
import torch
from support import types
from torch import nn

import fewbit


class Gated(nn.Module):
    def __init__(self, name, value, module=nn.Linear):
        super().__init__()
        self.linear, self.other = module(3, 3), nn.Linear(3, 3)
        setattr(self.linear, name, value)
        self.name = name

    def forward(self, x):
        return self.other(self.linear(x) * torch.as_tensor(getattr(self.linear, self.name)))


@pytest.mark.parametrize("name", ["bits", "table", "rounding", "code", "gate", "coded_kind"])
@pytest.mark.parametrize(
    "value",
    [4, np.ones(3, np.float32), nn.Parameter(torch.ones(3)), torch.tensor([2, 2, 2])],
    ids=["number", "array", "parameter", "tensor"],
)
def test_a_module_with_a_use_of_its_own_for_our_names_stays(name, value):
    """Otherwise its forward pass would read what fewbit holds under that name."""
    model, x = Gated(name, value), torch.randn(5, 3)
    expected = model(x)
    fewbit.convert(model, bits=4)
    assert [type(model).__bases__[-1], *types(model)[1:]] == [Gated, nn.Linear, fewbit.Linear]
    assert torch.equal(model(x), expected)
    assert getattr(model.linear, name) is value
    fewbit.revert(model)
    assert getattr(model.linear, name) is value


def test_such_modules_are_named(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))
    model[0].bits, model[1].bits = 8, 2
    with caplog.at_level(logging.INFO, "fewbit"):
        fewbit.convert(model, bits={"linear": 4})
    assert "left exact: 0 (1 module), since they use names of fewbit's, bits; rename those attributes" in caplog.text
    assert (model[0].bits, model[1].bits) == (8, 2)


class TestFilters:
    """A filter sees each module as it is without fewbit, even if the model is converted several times."""

    @pytest.mark.parametrize("first", [4, {"activation": 2}, {"linear": 3}])
    def test_by_the_very_class(self, first):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        fewbit.convert(model, first)
        fewbit.convert(model, 3, lambda module, name: type(module) is nn.GELU)
        assert types(model) == [nn.Sequential, nn.Linear, fewbit.GELU, nn.Linear]
        plan = fewbit.memory(model, torch.randn(5, 8)).plan(4, lambda module, name: type(module) is nn.Linear)
        assert plan.candidates == {"0", "2"}
        assert types(model) == [nn.Sequential, nn.Linear, fewbit.GELU, nn.Linear]

    def test_of_calibration_too(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.SiLU())
        found = fewbit.calibrate(model, [torch.randn(64, 8)], filter_fn=lambda module, name: type(module) is nn.GELU)
        assert [layer.name for layer in found.layers] == ["1"]


def test_an_error_half_way_leaves_the_model_as_it_was():
    class Refuses(nn.Linear):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no other class")
            super().__setattr__(name, value)

    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU()), bits=3).append(Refuses(8, 8))
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(RuntimeError, match="no other class"):
        fewbit.convert(model, bits=4)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_stay():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.GELU()), nn.GELU())
    script = type(model[1])
    assert types(fewbit.convert(model, bits=4))[1:] == [fewbit.Linear, script, fewbit.GELU]


@pytest.mark.parametrize("module", [nn.LeakyReLU(float("nan")), nn.Softplus(beta=0.0), nn.GELU("foo")], ids=str)
def test_activations_without_a_table_stay(module):
    model = nn.Sequential(nn.Linear(3, 3), module)
    assert types(fewbit.convert(model, bits=4))[2] is type(module)
