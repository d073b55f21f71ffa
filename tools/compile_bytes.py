"""Print what compiled and eager code keeps for backward, exact and coded: `python tools/compile_bytes.py [bits]`.

The figures count the distinct storages that autograd saves, without parameters and the model's input. They are bytes for each
element of the activation's input: one float32 tensor of its size counts 4.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.measuring import saved_storages

BATCH, WIDTH, HIDDEN, RANK = 256, 256, 1024, 8


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class LowRank(Mlp):
    """The same, frozen, with low-rank adapters (LoRA)."""

    def __init__(self, activation: nn.Module):
        super().__init__(activation)
        self.requires_grad_(False)
        self.adapt_up = nn.Sequential(nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, HIDDEN, bias=False))
        self.adapt_down = nn.Sequential(nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.up(x) + self.adapt_up(x))
        return self.down(hidden) + self.adapt_down(hidden)


class Gated(Mlp):
    """act(a) * b, as in GeGLU and SwiGLU."""

    def __init__(self, activation: nn.Module):
        super().__init__(activation)
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Linear → act → Linear": Mlp,
    "the same, frozen": lambda activation: Mlp(activation).requires_grad_(False),
    "the same with LoRA": LowRank,
    "Linear → LayerNorm → act → Linear": lambda activation: nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)
    ),
    "LayerNorm → act": lambda activation: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), activation),
    "act(a) * b": Gated,
    "Linear → act → dropout → Linear": lambda activation: nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), activation, nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH)
    ),
}


def kept(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Bytes that `call`, the model or its compiled form, keeps for backward, for each element of the activation's input."""
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    owned = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    saved: dict[int, int] = {}
    with saved_storages(saved, leave_out=owned):
        output = call(x)
    total = sum(saved.values())
    del output  # until here it held all that was counted, so that no address was used twice
    return total / (BATCH * HIDDEN)


def row(make: Callable[[nn.Module], nn.Module], bits: int) -> list[float]:
    """Eager exact, eager coded, compiled exact, compiled coded."""
    models = [make(activation) for activation in (nn.GELU(), fewbit.GELU(bits=bits))]
    eager = [kept(model, model) for model in models]
    compiled = []
    for model in models:
        torch.compiler.reset()
        compiled.append(kept(model, torch.compile(model, fullgraph=True)))  # type: ignore[arg-type]
    return [*eager, *compiled]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    bits = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    view = terminal.table((f"bytes kept an element, {bits} bits",), ("eager", "coded", "compiled", "coded"))
    for name, make in MODELS.items():
        view.add_row(name, *(f"{value:.3f}" for value in row(make, bits)))
    terminal.console().print(view)


if __name__ == "__main__":
    main()
