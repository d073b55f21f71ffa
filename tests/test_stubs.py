"""Stubs for editors and type checkers: they agree with today's names, and a user's code passes strict checks."""

import subprocess
import sys

import pytest

from tools import stubs

SNIPPET = """
from typing import Any

import torch
from torch import Tensor, nn

import fewbit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = fewbit.Linear(8, 16, bits=4), fewbit.GELU(bits=3), nn.Linear(16, 8)
        self.norm: nn.LayerNorm = fewbit.LayerNorm(8, bits=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(self.act(self.up(x))))
        return fewbit.functional.silu(fewbit.functional.linear(y, torch.eye(8), bits=4), bits=2)


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


model = Net()
batches = [torch.randn(4, 8) for _ in range(3)]
report: fewbit.MemoryReport = fewbit.memory(model, batches[0])
plan: fewbit.Plan = report.plan(bits={"activation": 3, "linear": 4})
plan.convert()
converted: Net = fewbit.convert(fewbit.revert(model), bits=4)
fidelity: fewbit.Fidelity = fewbit.fidelity(model, batches, loss_of)
allocation: fewbit.Allocation = fewbit.allocate(model, batches, budget=0.3)
calibration: fewbit.Calibration = fewbit.calibrate(model, batches, bits=4)
with fewbit.watch(model) as watching, fewbit.exact():
    drift: fewbit.Drift = watching.report()
with fewbit.patch(bits=4):
    pass


@fewbit.exact()
def exactly(x: Tensor) -> Tensor:
    return fewbit.functional.gelu(x)


table: fewbit.CodeTable = fewbit.design("gelu", bits=3)
print(table.mse, fidelity.verdict, report.activation_bytes, exactly(batches[0]))
"""
WRONG = 'import fewbit\nfewbit.GELU(bits="three")\n'


def test_are_those_of_todays_names(capsys):
    assert stubs.main(["--check"]) == 0, capsys.readouterr().out


def checked(tool, text, folder):
    """The tool's output for a file with this text, outside of the project."""
    file = folder / "snippet.py"
    file.write_text(text)
    commands = {"mypy": ["mypy", "--strict", "--no-incremental"], "pyright": ["pyright", "--pythonpath", sys.executable]}
    return subprocess.run([sys.executable, "-m", *commands[tool], file], capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_a_users_code_checks(tool, tmp_path):
    right = checked(tool, SNIPPET, tmp_path)
    assert right.returncode == 0, right.stdout
    wrong = checked(tool, WRONG, tmp_path)
    assert wrong.returncode == 1
    assert "bits" in wrong.stdout


@pytest.mark.slow
def test_the_snippet_runs():
    result = subprocess.run([sys.executable, "-c", SNIPPET], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
