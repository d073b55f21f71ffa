"""What `fewbit.memory` and its plan say of small networks: `python -m tools.studies.planner`.

For each network, eager and compiled: what it keeps in units of batch x hidden numbers, measured; what the plan predicts after
conversion, and what is measured then; and what the plan advises. Tables go to the terminal and, as JSON, to tools/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import common

Tensor = torch.Tensor

BATCH, WIDTH, HIDDEN = 256, 128, 512
SETTINGS: dict[str, dict[str, Any]] = {"bits=3": {"bits": 3}, "bits=4, inputs=4": {"bits": 4, "inputs": 4}}


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), and a linear layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def mlp(activation: nn.Module) -> nn.Module:
    """Linear, activation, Linear."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ReLU MLP": lambda: mlp(nn.ReLU()),
    "tanh MLP": lambda: mlp(nn.Tanh()),
    "GELU MLP": lambda: mlp(nn.GELU()),
    "SwiGLU": SwiGLU,
}


def study(make: Callable[[], nn.Module], trainable: bool, compiled: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Units kept exact, predicted, measured after conversion, and after the conversions alone that pay; and the advice.

    Compiled code is counted without the code tables, which are not of the batch.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    model = make().requires_grad_(trainable)
    call: Any = torch.compile(model) if compiled else model
    x, unit = torch.randn(BATCH, WIDTH, requires_grad=not trainable), BATCH * HIDDEN * 4
    exact = fewbit.memory(call, x)
    plan = exact.plan(**settings)
    fewbit.convert(call, **settings)
    measured = fewbit.memory(call, x).activation_bytes
    bytes_of = {"exact": exact.activation_bytes, "predicted": plan.after_bytes, "measured": measured, "pays": plan.best_bytes}
    names = {name.removeprefix("_orig_mod."): each for name, each in ((each.module, each) for each in plan.advice)}
    advice = {name or "(model)": [each.advice, each.reason] for name, each in names.items()}
    return {"units": {name: number / unit for name, number in bytes_of.items()}, "advice": advice}


def run(console: Console, compiled: tuple[bool, ...] = (False, True)) -> dict[str, Any]:
    """All networks, frozen and trainable, eager and compiled."""
    results: dict[str, Any] = {}
    for label, settings in SETTINGS.items():
        view = terminal.table((f"units kept, {label}",), ("exact", "predicted", "measured", "what pays"))
        view.add_column("to code")
        for name, make in NETWORKS.items():
            for trainable in (True, False):
                for with_compiler in compiled:
                    row = f"{name}{'' if trainable else ', frozen'}{', compiled' if with_compiler else ''}"
                    found = study(make, trainable, with_compiler, settings)
                    results.setdefault(label, {})[row] = found
                    coded = ", ".join(module for module, (advice, _) in found["advice"].items() if advice == "code")
                    view.add_row(row, *(f"{number:.4f}" for number in found["units"].values()), coded or "–")
        console.print(view, "")
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eager", action="store_true", help="leave out compiled code")
    compiled = (False,) if parser.parse_args().eager else (False, True)
    common.write("planner", run(terminal.console(at_least=100), compiled))


if __name__ == "__main__":
    main()
