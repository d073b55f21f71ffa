"""README.md: its Python runs, from the first block to the last, on a small model; its commands are there."""

import functools
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import fewbit

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Calls(nn.Module):
    """A model that calls its activations as functions, too."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.norm, self.down = nn.Linear(1024, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        return nn.functional.silu(self.down(self.norm(self.act(self.up(x)))))


def loss_of(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def names():
    """What the blocks are about: a user's own model and data; and stand-ins for what other packages make of a model."""
    model, same = Calls(), MagicMock(side_effect=lambda model, *_: model)
    batches = [torch.randn(16, 1024) for _ in range(3)]
    return {
        "model": model,
        "batch": batches[0],
        "batches": batches,
        "loss_fn": loss_of,
        "train": lambda model: [loss_of(model, batch).backward() for batch in batches],
        "gate": torch.randn(4, 8, requires_grad=True),
        "up": torch.randn(4, 8),
        "nn": nn,
        "functools": functools,
        "get_peft_model": same,
        "accelerator": MagicMock(prepare=lambda *things: things),
        **{name: MagicMock() for name in ("Trainer", "LoraConfig", "arguments", "data", "optimizer", "loader")},
    }


def test_blocks_run_in_order(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # they write files
    assert len(BLOCKS) >= 9
    for block in BLOCKS:
        exec(block, names)
    assert "coded gradient errs by" in capsys.readouterr().out
    assert {"mine.json", "tables.json"} <= {path.name for path in tmp_path.iterdir()}
    assert isinstance(names["model"].act, fewbit.GELU)


def test_commands_are_there():
    named = set(re.findall(r"^    fewbit (\w+)", README, re.MULTILINE))
    assert named >= {"memory", "plan", "fidelity", "calibrate", "allocate", "prepare", "bench", "list", "table", "plot"}
    shown = subprocess.run([sys.executable, "-m", "fewbit", "--help"], capture_output=True, text=True).stdout
    assert all(re.search(rf"\b{name}\b", shown) for name in named)
