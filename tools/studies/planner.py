"""Check `fewbit.memory` and its plan on small networks: `python -m tools.studies.planner`.

For each network, eager and compiled, it shows what the network keeps, in units of batch x hidden numbers; what the plan
predicts if everything is converted, and if only what pays is converted; what is measured then, independently of
`fewbit.memory`; and what the plan advises. Tables are printed, and written to tools/results/ as JSON.
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
from fewbit.models.conversion.setting import Bits
from tools.studies import common

Tensor = torch.Tensor

BATCH, WIDTH, HIDDEN = 256, 128, 512
COLUMNS = ("exact", "predicted", "measured", "pays, predicted", "pays, measured")
SETTINGS: dict[str, Bits] = {"activations at 3 bits": {"activation": 3}, "all at 4 bits": 4}


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


def study(make: Callable[[], nn.Module], trainable: bool, compiled: bool, bits: Bits) -> dict[str, Any]:
    """Units kept by the exact network, with all converted, and with only what pays converted, predicted and measured; and the
    advice."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = make().requires_grad_(trainable)
    call: Any = torch.compile(model) if compiled else model
    x, unit = torch.randn(BATCH, WIDTH, requires_grad=not trainable), BATCH * HIDDEN * 4
    kept = {"exact": common.kept_bytes(call, x)}
    plan = fewbit.memory(call, x).plan(bits)
    plan.convert()
    kept |= {"pays, predicted": plan.best_bytes, "pays, measured": common.kept_bytes(call, x)}
    fewbit.convert(call, bits)
    kept |= {"predicted": plan.after_bytes, "measured": common.kept_bytes(call, x)}
    names = [each.module.removeprefix("_orig_mod").removeprefix(".") or "(model)" for each in plan.advice]
    advice = {name: [each.advice, each.reason] for name, each in zip(names, plan.advice, strict=True)}
    return {"units": {name: kept[name] / unit for name in COLUMNS}, "advice": advice}


def run(console: Console, compiled: tuple[bool, ...] = (False, True)) -> dict[str, Any]:
    """All networks, frozen and trainable, eager and compiled."""
    results: dict[str, Any] = {}
    for label, bits in SETTINGS.items():
        view = terminal.table((f"units kept, {label}",), COLUMNS)
        view.add_column("to code")
        for name, make in NETWORKS.items():
            for trainable in (True, False):
                for with_compiler in compiled:
                    row = f"{name}{'' if trainable else ', frozen'}{', compiled' if with_compiler else ''}"
                    found = study(make, trainable, with_compiler, bits)
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
    common.write("planner", run(terminal.console(at_least=120), compiled))


if __name__ == "__main__":
    main()
