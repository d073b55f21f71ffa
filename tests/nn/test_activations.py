"""The coded activation modules: torch's modules in every respect except the codes."""

import copy
import io
import pickle

import pytest
import torch
from support import gradient_at, signature

import fewbit
from fewbit import activations
from fewbit.errors import ActivationError, DesignError, TableError

CALLS = [
    ("GELU", (), {"approximate": "tanh"}),
    ("ELU", (0.5,), {}),
    ("ELU", (), {"alpha": 0.5, "inplace": True}),
    ("CELU", (2.0, True), {}),
    ("Hardtanh", (-2.0, 0.5), {}),
    ("Softplus", (2.0, 10.0), {}),
    ("LeakyReLU", (0.2,), {}),
    ("Threshold", (0.5, -1.0), {}),
    ("Softshrink", (0.25,), {}),
    ("ReLU", (True,), {}),
    ("ReLU6", (), {"inplace": True}),
]


def module_of(record, **keywords):
    return getattr(fewbit, record.module)(**keywords)


def gradient(module, x):
    return gradient_at(lambda leaf: module(leaf * 1), x)  # a module may overwrite it


def test_forward_gradient_and_class(record):
    module = module_of(record, bits=2, **record.options)
    torch_class = getattr(torch.nn, record.module, torch.nn.Module)
    assert isinstance(module, torch_class)
    assert type(module).__name__ == record.module
    x = 2 * torch.randn(100)
    assert torch.equal(module(x), record.forward(x))
    expected = gradient(lambda t: getattr(fewbit.functional, record.name)(t, bits=2), x)
    assert torch.equal(gradient(module, x), expected)


@pytest.mark.parametrize(("name", "arguments", "keywords"), CALLS)
def test_torchs_constructors(name, arguments, keywords):
    module, exact = getattr(fewbit, name)(*arguments, **keywords, bits=8), getattr(torch.nn, name)(*arguments, **keywords)
    x = 2 * torch.randn(300, dtype=torch.float64)
    assert torch.equal(module(x.clone()), exact(x.clone()))
    torch.testing.assert_close(gradient(module, x), gradient(exact, x), rtol=0, atol=0.02)
    for attribute, value in vars(exact).items():
        if not attribute.startswith("_"):
            assert getattr(module, attribute) == value


def test_inplace_overwrites(record):
    module = module_of(record, inplace=True, **record.options)
    x = torch.randn(30)
    y = x.clone()
    assert module(y) is y
    assert torch.equal(y, record.forward(x))


def test_state_is_torchs(record):
    module = module_of(record)
    assert list(module.parameters()) == list(module.buffers()) == []
    assert module.state_dict() == {}
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), module)
    exact = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Identity())
    assert list(model.state_dict()) == list(exact.state_dict())
    model.load_state_dict(exact.state_dict())


def test_copies_and_moves(record):
    module = module_of(record, bits=2, **record.options)
    x = torch.randn(64)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(buffer, weights_only=False)]
    copies.append(copy.deepcopy(module).to(torch.bfloat16).to("cpu").eval().train())
    for other in copies:
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert torch.equal(gradient(other, x), gradient(module, x))


def test_own_table_travels():
    table = fewbit.design("silu", 5, weight="normal")
    module = fewbit.SiLU(table=table)
    assert pickle.loads(pickle.dumps(module)).table == table
    assert copy.deepcopy(module).table is table
    assert (
        gradient(module, torch.linspace(-3, 3, 50, dtype=torch.float64)).tolist()
        == table(torch.linspace(-3, 3, 50).double()).tolist()
    )


def test_parameters_may_change_later():
    module = fewbit.LeakyReLU(0.25)
    x = torch.tensor([-1.0, 1.0])
    assert gradient(module, x).tolist() == [0.25, 1.0]
    module.negative_slope = 0.5
    assert gradient(module, x).tolist() == [0.5, 1.0]


def test_repr():
    assert repr(fewbit.GELU(approximate="tanh")) == "GELU(approximate='tanh', bits=3)"
    assert repr(fewbit.Tanh(inplace=True)) == "Tanh(inplace=True, bits=3)"
    assert repr(fewbit.ReLU(inplace=True, bits=1)) == "ReLU(inplace=True, bits=1)"
    table = fewbit.load_table("gelu", 1)
    assert repr(fewbit.GELU(table=table)) == f"GELU(approximate='none', table={table!r})"


def test_subclasses():
    class Doubled(fewbit.GELU):
        def __init__(self):
            super().__init__(bits=2)

        def forward(self, input):
            return 2 * super().forward(input)

    x = torch.randn(20)
    assert torch.equal(Doubled()(x), 2 * torch.nn.functional.gelu(x))


def test_help_tells_what_users_ask():
    text = fewbit.GELU.__doc__ or ""
    assert signature(fewbit.GELU) == "(approximate='none', inplace=False, *, bits=None, table=None, shared=False)"
    for part in (
        "get torch's operation",
        "load_ladder('gelu', bits)",
        "    3      0.0183      0.0601      0.0646",
        "ICML 2023",
        "NeurIPS 2019",
        "InputError",
    ):
        assert part in text
    assert "(*), any shape" in (fewbit.functional.gelu.__doc__ or "")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fewbit.GELU(bits=9), DesignError, "bits must be an integer from 1 to 8, got 9"),
        (lambda: fewbit.GELU(table=fewbit.load_table("silu")), TableError, "the table is for silu, not for gelu"),
        (lambda: fewbit.GELU(approximate="erf"), ActivationError, "gelu takes"),
        (lambda: fewbit.GELU(aproximate="tanh"), TypeError, "GELU.*unexpected keyword argument 'aproximate'"),
        (lambda: fewbit.ELU(alpha="x"), ActivationError, "parameter alpha must be a finite number"),
        (lambda: fewbit.Gelu(), AttributeError, "has no attribute 'Gelu'"),
    ],
)
def test_wrong_constructions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registered_activations_have_a_module():
    fewbit.register("snake", lambda x, a: x + (a * x).sin() ** 2 / a, parameters={"a": 1.0})
    module = fewbit.nn.Snake(a=2.0, bits=6)
    assert repr(module) == "Snake(a=2.0, bits=6)"
    x = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(gradient(module, x), 1 + (4 * x).sin(), rtol=0, atol=0.05)


def test_training_step_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), fewbit.GELU(bits=4), torch.nn.Linear(32, 1))
    exact = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    exact.load_state_dict(model.state_dict())
    x = torch.randn(256, 8)
    losses = [net(x).pow(2).mean() for net in (model, exact)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    coded, true = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (model, exact))
    assert 0 < (coded - true).norm() / true.norm() < 0.03


def test_all_are_listed():
    assert {activations.get(name).module for name in activations.names()} <= set(dir(fewbit)) & set(dir(fewbit.nn))


def test_modules_that_torch_lacks_show_their_arguments():
    assert signature(fewbit.SwiGLU) == "(*, bits=None, table=None, rounding='nearest')"
    assert signature(fewbit.GEGLU) == "(approximate='none', *, bits=None, table=None, rounding='nearest')"
