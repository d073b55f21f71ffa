"""Conversions in files: a continued run is the same run, bit for bit."""

import copy
import json

import pytest
import torch
from support import SwiGLU, gradients, types
from torch import nn

import fewbit
from fewbit.demo import Block
from fewbit.errors import InputError, TableFileError


class Functional(nn.Module):
    """A module that calls torch's functions itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(16, 16), SwiGLU(16, 32)

    def forward(self, x):
        return self.out(nn.functional.gelu(self.inner(x)) * x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(inplace=True), Block(nn.GELU(), 16, 2), nn.Dropout(0.1), Functional(), nn.PReLU(), nn.Tanh()
    )


X = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(5))


def converted(how):
    model = network()
    if how == "calibrated":
        fewbit.calibrate(fewbit.convert(model, bits=3), [X])
    elif how == "allocated":
        fewbit.allocate(fewbit.convert(model), [X], lambda model, x: model(x).square().mean(), budget=0.3)
    elif how == "filtered":
        fewbit.convert(model, {"activation": 3, "linear": 5}, lambda module, name: not name.startswith("2"))
    elif how == "uniform":
        fewbit.convert(model, 4, coding="uniform")
    else:
        fewbit.convert(model, how)
    return model


HOWS = [4, {"norm": 3}, "filtered", "uniform", "calibrated", "allocated"]


def attributes(model):
    return [(type(each), each.extra_repr()) for each in model.modules()]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_same_gradients_bit_for_bit(how, tmp_path):
    model = converted(how)
    fewbit.save(model, tmp_path / "conversion.json")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = network()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert fewbit.load(other, tmp_path / "conversion.json") is other
    assert attributes(other) == attributes(model)
    for each in (model, other):
        torch.manual_seed(1)
        each.found = gradients(each, X)
    assert model.found.keys() == other.found.keys()
    assert all(torch.equal(each, other.found[name]) for name, each in model.found.items())
    assert types(fewbit.revert(other)) == types(network())


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Ten steps of Adam at once; or five, a checkpoint, and five more with a new model."""

    def steps(model, optimizer, numbers):
        for i in numbers:
            torch.manual_seed(i)
            optimizer.zero_grad()
            (model(X + 0.1 * i) - X).square().mean().backward()
            optimizer.step()

    def start():
        model = network()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = start()
    fewbit.calibrate(fewbit.convert(model), [X])
    other = copy.deepcopy(model)
    steps(model, optimizer, range(10))

    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    steps(other, optimizer, range(5))
    torch.save({"model": other.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    fewbit.save(other, tmp_path / "conversion.json")

    resumed, optimizer = start()
    saved = torch.load(tmp_path / "checkpoint.pt")
    fewbit.load(resumed, tmp_path / "conversion.json").load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, range(5, 10))
    for name, each in model.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[name])


def test_a_former_conversion_is_undone(tmp_path):
    fewbit.save(converted({"norm": 3}), tmp_path / "conversion.json")
    model = fewbit.load(converted(4), tmp_path / "conversion.json")
    assert attributes(model) == attributes(converted({"norm": 3}))


class TestErrors:
    def test_what_is_not_converted(self, tmp_path):
        with pytest.raises(InputError, match=r"fewbit\.convert"):
            fewbit.save(network(), tmp_path / "conversion.json")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("layers", [[nn.Linear(16, 16)], [nn.Identity()] * 7], ids=["less", "other"])
    def test_another_model(self, layers, tmp_path):
        other = nn.Sequential(*layers)
        fewbit.save(converted(4), tmp_path / "conversion.json")
        before = types(other)
        with pytest.raises(InputError, match="is it the model of the file"):
            fewbit.load(other, tmp_path / "conversion.json")
        assert types(other) == before

    @pytest.mark.parametrize(
        "entry",
        [
            3,
            {},
            {"name": "0", "bits": 9},
            {"name": "0", "bits": True},
            {"name": "0", "bits": 4, "table": {}},
            {"name": "0", "bits": 4, "rounding": "up"},
            {"name": "0", "bits": 4, "shared": 1},
            {"name": "0", "weight": 3},
            {"name": "0", "interception": 3},
            {"name": "0", "interception": {"bits": {"linear": 12}, "coding": None}},
            {"name": "0", "interception": None, "bits": 3},
        ],
        ids=str,
    )
    def test_broken_entries(self, entry, tmp_path):
        path = tmp_path / "conversion.json"
        path.write_text(json.dumps({"format": "fewbit-conversion", "version": 1, "modules": [entry]}))
        model = network()
        with pytest.raises(TableFileError, match=r"conversion\.json"):
            fewbit.load(model, path)
        assert types(model) == types(network())

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fewbit-conversion", "version": 99, "modules": []}'])
    def test_other_files(self, text, tmp_path):
        path = tmp_path / "conversion.json"
        path.write_text(text)
        with pytest.raises(TableFileError, match=r"conversion\.json"):
            fewbit.load(network(), path)
