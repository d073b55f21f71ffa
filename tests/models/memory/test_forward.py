"""`fewbit.memory`: what it calls a model with, what it returns, and that the model is afterwards as it was."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fewbit
from fewbit.errors import InputError

ROWS, WIDTH, HIDDEN = 32, 16, 64
UNIT = ROWS * HIDDEN * 4  # one float32 tensor of the hidden width


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def batch():
    return torch.randn(ROWS, WIDTH)


@dataclass
class Output:
    last: torch.Tensor
    states: tuple


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, y + 1),
        lambda y: {"logits": [y]},
        lambda y: Output(y * 1, (y,)),
        lambda y: type("Opaque", (), {"__init__": lambda self: setattr(self, "y", y)})(),
    ],
    ids=["tensor", "tuple", "dict", "dataclass", "object"],
)
def test_outputs_of_any_structure(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, *, scale=1.0):
            return wrap(self.body(x) + scale)

    report = fewbit.memory(Wrapped(), {"x": batch(), "scale": 2.0})
    assert report.by_module() == {"body.1": UNIT, "body.2": UNIT}
    assert {row["operation"] for row in report.rows()} == {"Gelu", "Addmm"}


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1)
        self.calls, self.fails, self.cache = 0, False, None

    def forward(self, x):
        self.calls += 1
        self.cache = self.drop(self.norm(x))
        self.added = x
        if self.fails:
            raise KeyError("half way")
        return self.linear(self.cache)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fake, fails):
    model, x = Stateful(), batch()
    model(x).sum().backward()
    model.cache, model.fails = None, fails
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
    attributes, versions = dict(vars(model)), [parameter._version for parameter in model.parameters()]
    state, hooks = torch.get_rng_state(), dict(nn.modules.module._global_forward_hooks)
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if fails:
        with pytest.raises(KeyError, match="half way"):
            fewbit.memory(model, x, fake=fake)
    else:
        fewbit.memory(model, x, fake=fake)
    assert vars(model) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [parameter._version for parameter in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(nn.modules.module._global_forward_hooks) == hooks
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) == top is None  # none stays
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
    assert model.training


def test_gradients_are_enabled_for_it():
    with torch.no_grad():
        assert fewbit.memory(mlp(), batch()).activation_bytes == 2 * UNIT


def test_a_model_of_the_meta_device_is_planned_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(2**15, 2**15) for _ in range(3)], nn.GELU())  # 13 GiB of parameters
        x = torch.empty(2**16, 2**15)
    report = fewbit.memory(model, x, fake=True)
    assert report.activation_bytes == 3 * 2**16 * 2**15 * 4
    assert "on fake tensors" in str(report)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [(torch.sin, "memory takes a torch.nn.Module first, got builtin"), (nn.LazyLinear(3), "run it once on a batch before")],
)
def test_what_it_does_not_take(model, message):
    with pytest.raises(InputError, match=message):
        fewbit.memory(model, batch())


class Scaled(nn.Module):
    """Takes two arguments."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, scale):
        return self.body(x) * scale


@pytest.mark.parametrize("fake", [False, True])
def test_batches_may_be_tensors_arguments_or_names(fake):
    x, scale = batch(), torch.ones(1)
    for one in (x, (x,), [x], {"input": x}):
        assert fewbit.memory(mlp(), one, fake=fake).by_module() == {"1": UNIT, "2": UNIT}
    for two in ((x, scale), [x, scale], {"scale": scale, "x": x}, UserDict(x=x, scale=scale)):
        report = fewbit.memory(Scaled(), two, fake=fake)
        assert report.by_module() == {"body.1": UNIT, "body.2": UNIT}
        assert report.totals()["inputs"] == ROWS * WIDTH * 4 + 4


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda: batch(), "missing 1 required positional argument: 'scale'"),
        (lambda: (batch(), 1.0, 2.0), "positional arguments but"),
        (lambda: {"x": batch(), "size": 1.0}, "unexpected keyword argument 'size'"),
    ],
)
def test_batches_that_the_model_does_not_take(given, complaint, fake):
    remedy = "a batch is a tensor, a tuple or list of forward's arguments, or a mapping of named ones; give such batches"
    with pytest.raises(InputError) as raised:
        fewbit.memory(Scaled(), given(), fake=fake)
    assert str(raised.value).startswith("the model does not take this batch (")
    assert complaint in str(raised.value)
    assert remedy in str(raised.value)


def test_arguments_beside_the_batch_are_none():
    with pytest.raises(TypeError, match="positional argument"):
        fewbit.memory(Scaled(), batch(), torch.ones(1))
    with pytest.raises(TypeError, match="scale"):
        fewbit.memory(Scaled(), batch(), scale=torch.ones(1))


def test_buffers_that_lie_several_times_in_the_same_memory():
    model = mlp()
    model.register_buffer("mask", torch.zeros(1, 1).expand(4, 4))
    assert fewbit.memory(model, batch()).activation_bytes == fewbit.memory(mlp(), batch()).activation_bytes


class Link:
    """Of a chain."""

    next = None


def test_long_chains_of_objects():
    model = mlp()
    model.chain = last = Link()
    for _ in range(3000):
        last.next = last = Link()
    assert fewbit.memory(model, batch()).activation_bytes == 2 * UNIT
