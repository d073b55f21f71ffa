"""tools/studies/zoo: models with known figures, one that fails, and the report on them."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from tools.studies import common
from tools.studies.zoo import __main__ as zoo
from tools.studies.zoo import packages, report, written_models
from tools.studies.zoo.entry import Entry, WithLoss
from tools.studies.zoo.measure import measure

WIDTH, HIDDEN, ROWS = 32, 64, 128


class Hidden(nn.Module):
    """A linear layer, a sine, which is not coded, dropout, and a linear layer."""

    def __init__(self, p=0.5):
        super().__init__()
        self.up, self.down, self.p = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), p

    def forward(self, x):
        return self.down(functional.dropout(torch.sin(self.up(x)), self.p))


class Forgetful(nn.Linear):
    """A module whose copies give another output."""

    def __deepcopy__(self, memo):
        copied = Forgetful(self.in_features, self.out_features)
        copied.load_state_dict({name: 2 * each for name, each in self.state_dict().items()})
        return copied


class Broken(nn.Module):
    """A module that raises once it is converted."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if type(self.layer) is not nn.Linear:
            raise RuntimeError("no longer a\nlinear layer")
        return self.layer(x)


def entry(make, name="model"):
    def batch():
        return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)

    return Entry(name, "test", lambda: WithLoss(make(), functional.mse_loss), batch)


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=140)


def test_bytes_are_those_of_the_tensors_kept():
    row = measure(entry(Hidden))
    hidden, target = 4 * ROWS * HIDDEN, 4 * ROWS * WIDTH  # of the mean square's input; the target is an input
    assert row["kept_bytes"]["exact"] == 3 * hidden + target  # the sine's input, the mask, and what the last layer reads
    difference = ROWS * WIDTH + 4 * (ROWS + 2 * WIDTH)  # 8 bits a number, and scales
    assert row["left"] == {"Sin": {"Hidden": hidden}, "MseLoss": {"WithLoss": difference}}
    assert row["codes"] == row["kept_bytes"]["coded"] - hidden - difference
    assert ROWS * HIDDEN / 2 <= row["codes"] < hidden / 4  # 4 bits a number, and scales
    assert row["kept_bytes"]["predicted"] == row["kept_bytes"]["coded"] == row["kept_bytes"]["patched"]


def test_errors_are_those_of_gradients():
    row = measure(entry(Hidden))
    assert row["differ"] == []
    assert 0.01 < row["gradient_errors"]["4"] < 0.2
    assert 0 < row["gradient_errors"]["8"] < row["gradient_errors"]["4"] / 5


def test_exact_layers_have_no_error(monkeypatch):
    monkeypatch.setattr(common, "coded", lambda model, bits: copy.deepcopy(model))
    row = measure(entry(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))))
    assert row["gradient_errors"] == {"4": 0.0, "8": 0.0}
    assert row["kept_bytes"]["coded"] == row["kept_bytes"]["exact"]
    assert row["codes"] == 0


def test_what_differs_is_told(monkeypatch):
    def spoilt(model, bits):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.model[0].bias[0] += 1e-3
        return model

    assert measure(entry(lambda: Forgetful(WIDTH, WIDTH)))["differ"] == ["copy's output"]
    monkeypatch.setattr(common, "coded", spoilt)
    row = measure(entry(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1))))
    assert row["differ"] == ["copy's output", "copy's buffers", "output", "buffers"]
    assert row["exact differs from itself"] == []


def test_failures_are_rows(screen):
    entries = [entry(Broken, "broken"), entry(Hidden, "sound")]
    found = zoo.measure_all(screen, entries)
    assert found["models"]["broken"]["failure"] == "memory of the coded model: RuntimeError: no longer a linear layer"
    assert (found["summary"]["models"], found["summary"]["failures"]) == (2, 1)
    text = screen.file.getvalue()
    assert "broken failed: memory of the coded model: RuntimeError: no longer a linear layer" in text
    assert max(map(len, text.splitlines())) <= 140
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_models_written_out(screen):
    entries = [each for each in written_models.entries() if each.name in ("SIREN", "flow", "graph")]
    found = zoo.measure_all(screen, entries)
    assert found["summary"]["failures"] == 0
    assert found["summary"]["not the same"] == []
    assert all(0 < report.ratio(row) < 1 for row in found["models"].values())
    assert sum(each["share"] for each in found["left"].values()) == pytest.approx(1, abs=1e-3)  # up to rounding
    assert "Sin" in found["models"]["SIREN"]["left"]


def test_families_that_are_not_installed_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(packages, "missing", lambda package: "" if package == "timm" else f"{package} is not installed")
    zoo.main(["--list", "written", "timm", "vision"])
    printed = capsys.readouterr().out
    assert "vision: left out, since transformers is not installed" in printed
    assert "written: GPT, functional; " in printed
    assert "timm: vit_tiny" in printed
    assert "torch.nn: " not in printed


def test_names_are_checked(capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda package: "not asked for")
    with pytest.raises(SystemExit):
        zoo.main(["no such model"])
    assert "no model and no family is called no such model" in capsys.readouterr().err


def test_names_are_unique():
    names = [each.name for _, listed in zoo.SOURCES for each in listed()]
    assert len(names) > 200
    written = [each.name for each in written_models.entries()]
    assert len(set(written)) == len(written)
