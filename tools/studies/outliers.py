"""Code inputs of a linear layer that have outliers, with 4 bits in several ways: `python -m tools.studies.outliers`.

For each input it measures the error ||x~ - x|| / ||x|| of the decoded numbers, over all numbers and over the ordinary ones only
(those that are neither outliers nor in an outlying channel or row), and the bits of codes and scales for each element. The
table is printed, and written to tools/results/ as JSON.
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
    """Name -> an input (ROWS, CHANNELS), and a mask of its ordinary numbers. Outliers are four channels, four rows or one
    number."""
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
    """The input from which a coded linear layer computes its weight's gradient. It is that gradient for a unit matrix."""
    weight = torch.zeros(ROWS, CHANNELS, requires_grad=True)
    # an input that needs no gradient would be kept exactly
    output = fewbit.functional.linear(x.clone().requires_grad_(), weight, bits=BITS)
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
    """The same table with one scale a row. The largest numbers, one in a thousand, are kept exactly."""
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
