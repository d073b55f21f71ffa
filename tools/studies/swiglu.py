"""What a SwiGLU block keeps for backward, exact and coded: `python -m tools.studies.swiglu`.

The block is down(silu(gate(x)) * up(x)), with Linear layers without bias. The table shows the bits that it keeps for each
element of the hidden tensor, and the block's input separately; and the error of the weights' gradients at random weights. It is
printed, and written to tools/results/ as JSON.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import common

Tensor = torch.Tensor

WIDTH, HIDDEN, BATCH, TOKENS = 384, 1024, 8, 128
PARTS = ("gate, up: their input", "SwiGLU", "down", "all but the input")


class SwiGLU(nn.Module):
    """(..., width) to (..., width) in torch's own operations."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x), self.up(x)))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate) * up


class CodedSwiGLU(SwiGLU):
    """The same, with codes of gate and up."""

    def __init__(self, width: int, hidden: int, bits: int):
        super().__init__(width, hidden)
        self.bits = bits

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return fewbit.functional.swiglu(gate, up, bits=self.bits)


def coded(block: SwiGLU, bits: int) -> SwiGLU:
    """A copy that keeps codes of gate and up, and of the inputs of its Linear layers."""
    copied = CodedSwiGLU(block.gate.in_features, block.gate.out_features, bits).to(block.gate.weight.dtype)
    copied.load_state_dict(block.state_dict())
    fewbit.convert(copied, bits=bits)
    return copied


def kept_bits(block: SwiGLU, x: Tensor, hidden: int) -> dict[str, float]:
    """Bits kept for each hidden element, by part."""
    kept = fewbit.memory(block, x).by_module()
    elements = x.shape[:-1].numel() * hidden
    parts = [kept.get("gate", 0) + kept.get("up", 0), kept.get("", 0), kept.get("down", 0)]
    bits = [8 * part / elements for part in parts]
    return dict(zip(PARTS, [*bits, bits[1] + bits[2]], strict=True))


def memory(console: Console, width: int = WIDTH, hidden: int = HIDDEN) -> dict[str, Any]:
    """Bits kept and the error of the gradient, exact and coded, for each dtype."""
    results: dict[str, Any] = {}
    view = terminal.table((f"{width} wide, {hidden} hidden",), (*PARTS, "gradient error"))
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        exact = SwiGLU(width, hidden).to(dtype)
        x = torch.randn(BATCH, TOKENS, width, dtype=dtype, requires_grad=True)
        target = torch.randn_like(x)
        expected = gradients(exact, x, target)
        for label, block in {"exact": exact, "4 bits": coded(exact, 4), "5 bits": coded(exact, 5)}.items():
            error = common.gradient_errors([expected], [gradients(block, x, target)])
            bits = kept_bits(block, x, hidden)
            name = f"{str(dtype).removeprefix('torch.')}, {label}"
            results[name] = {"bits": bits, "error": error}
            view.add_row(name, *(f"{each:.2f}" for each in bits.values()), f"{error[common.ALL]:.4f}")
    console.print(view, "")
    return results


def gradients(block: SwiGLU, x: Tensor, target: Tensor) -> common.Gradients:
    """The gradients of the squared distance from the target, by weight."""
    return common.gradients(block, lambda: (block(x) - target).square().sum(), lambda name: name)


if __name__ == "__main__":
    common.write("swiglu", memory(terminal.console(at_least=100)))
