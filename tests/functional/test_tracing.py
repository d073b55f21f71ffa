"""torch.jit.trace, and exports that use it, get torch's own operations: a trace would hold the codes of one batch."""

import copy

import pytest
import torch
from support import SwiGLU, gradients
from torch import nn

import fewbit
from fewbit.errors import InputError

CODED = fewbit.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def every_kind():
    convolution = nn.Conv1d(3, 8, 3, padding="same"), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.GroupNorm(2, 8), nn.GELU()
    rows = nn.Flatten(), nn.Linear(64, 12), nn.LayerNorm(12), nn.SiLU(inplace=True), nn.Linear(12, 6), nn.GLU(), nn.RMSNorm(3)
    return nn.Sequential(*convolution, nn.ConvTranspose1d(8, 8, 1), *rows, SwiGLU(3, 4))


def traced(module, x):
    return torch.jit.trace(module, x, check_trace=False)


class TestModels:
    @pytest.mark.parametrize("way", ["converted", "patched"])
    def test_another_batch_has_its_own_gradients(self, way):
        exact = every_kind()
        model = copy.deepcopy(exact)
        example, batch = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
        if way == "patched":
            with fewbit.patch(bits=2):
                script = traced(model, example)
        else:
            script = traced(fewbit.convert(model, bits=2), example)
        reference = traced(exact, example)
        assert torch.equal(script(batch), reference(batch))
        found, true = gradients(script, batch), gradients(reference, batch)
        assert found.keys() == true.keys() != set()
        for name, each in true.items():
            assert torch.equal(found[name], each), name
        for name, each in reference.state_dict().items():  # running statistics among them
            assert torch.equal(script.state_dict()[name], each), name

    def test_codes_are_back_afterwards(self):
        model, x = fewbit.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU()), bits=2), torch.randn(3, 4)
        traced(model, x)
        assert type(model(x).grad_fn).__name__ == "_CodedActivationBackward"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: CODED.gelu(x, bits=2),
        lambda x: CODED.silu(x, bits=2, shared=True),
        lambda x: CODED.relu(x * 1, inplace=True),
        lambda x: CODED.linear(x * 1, torch.ones(2, 4, requires_grad=True)),
        lambda x: CODED.layer_norm(x, (4,)),
        lambda x: CODED.swiglu(x, x),
    ],
)
def test_functions_by_name(function):
    example, batch = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    script = traced(function, example)
    with fewbit.exact():
        (true,) = torch.autograd.grad(function(batch).square().sum(), batch)
    (found,) = torch.autograd.grad(script(batch).square().sum(), batch)
    assert torch.equal(found, true)


@pytest.mark.parametrize("module", [fewbit.Linear(3, 4), fewbit.GELU(), fewbit.convert(SwiGLU(3, 4), bits=4)])
def test_scripts_are_refused(module):
    with pytest.raises(InputError, match=r"torch.jit.script cannot compile .*; .*fewbit.revert\(model\).*torch.jit.trace"):
        torch.jit.script(nn.Sequential(module))
