"""Inputs of a linear layer with outliers, coded with 4 bits in several ways: `python -m tools.studies.outliers`.

For each input the error ||x~ - x|| / ||x|| of what the codes stand for, over all numbers and over the ordinary ones alone
(those of no outlying channel or row, or single number), with the bits an element of codes and scales. The table goes to the
terminal and, as JSON, to tools/results/.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import common
from tools.studies.baselines import min_max, min_max_bits

Tensor = torch.Tensor
BITS, ROWS, CHANNELS, GROUP = 4, 2048, 512, 64


def inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (ROWS, CHANNELS), each with a mask of what is ordinary in it: not four channels or rows, or one number."""
    torch.manual_seed(0)

    def normal() -> tuple[Tensor, Tensor]:
        return torch.randn(ROWS, CHANNELS), torch.ones(ROWS, CHANNELS, dtype=torch.bool)

    found = {name: normal() for name in ("normal", "channels × 50", "channels + 50", "rows × 50", "one is 1000")}
    where = {"channels × 50": (..., slice(4)), "rows × 50": slice(4), "one is 1000": (7, 3)}
    for name, place in where.items():
        x, ordinary = found[name]
        x[place] = 1000.0 if "one" in name else 50 * x[place]
        ordinary[place] = False
    x, ordinary = found["channels + 50"]
    x[:, :4] += 50
    ordinary[:, :4] = False
    gate, ordinary = normal()
    return {**found, "SwiGLU": (nn.functional.silu(gate) * normal()[0], ordinary)}


def ours(x: Tensor) -> Tensor:
    """What a coded linear layer makes its weight's gradient of: its own gradient for a unit matrix."""
    weight = torch.zeros(ROWS, CHANNELS, requires_grad=True)
    output = fewbit.functional.linear(x.clone().requires_grad_(), weight, bits=BITS)  # a batch would be kept as it is
    (seen,) = torch.autograd.grad(output, weight, torch.eye(ROWS))
    return seen


def by_row(x: Tensor) -> Tensor:
    """The same table with one scale a row."""
    scale = x.square().mean(1, keepdim=True).sqrt()
    return _quantized(x / scale) * scale


def by_group(x: Tensor) -> Tensor:
    """The same table with one scale for each group of neighbours in a row."""
    return by_row(x.reshape(-1, GROUP)).reshape(x.shape)


def with_exact_list(x: Tensor) -> Tensor:
    """The same with one scale a row, of all but the largest numbers, one in a thousand, which are kept exactly."""
    largest = x.abs() >= x.abs().flatten().kthvalue(x.numel() - x.numel() // 1000).values
    return torch.where(largest, x, by_row(torch.where(largest, 0, x)))


def _quantized(x: Tensor) -> Tensor:
    return torch.from_numpy(fewbit.load_table("identity", BITS, channels="value")(x.numpy())).float()


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "channels and rows (fewbit)": (ours, BITS + 32 / CHANNELS + 64 / ROWS),
    "one scale a row": (by_row, BITS + 32 / CHANNELS),
    "groups of 64, by rms": (by_group, BITS + 16 / GROUP),
    "groups of 64, min-max": (lambda x: min_max(x, BITS, GROUP), min_max_bits(BITS, GROUP)),
    "rows, 0.1 % kept exactly": (with_exact_list, BITS + 32 / CHANNELS + 64 / 1000),
}


def main() -> None:
    """Print the table and write it."""
    console, data = terminal.console(at_least=130), inputs()
    view = terminal.table(("error: all, ordinary numbers",), ("bits", *data))
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (way, bits) in WAYS.items():
        results[name] = {}
        for label, (x, ordinary) in data.items():
            off = way(x) - x
            parts = (off.norm() / x.norm(), off[ordinary].norm() / x[ordinary].norm())
            results[name][label] = (float(parts[0]), float(parts[1]))
        view.add_row(name, f"{bits:.2f}", *(f"{all_:.3f}  {rest:.3f}" for all_, rest in results[name].values()))
    console.print(view, "")
    common.write("outliers", results)


if __name__ == "__main__":
    main()
