"""Calibrated tables and allocated bits on the demo's GPT: `python -m tools.studies.calibration`.

tables      gradient errors at equal bits with shipped tables, with tables calibrated on the model's own pre-activations, and
            with calibrated tables weighted by the squared gradient there
allocation  bits chosen for each layer, compared with the same bits everywhere, at equal bytes; all tables are calibrated

The model is that of `tools.studies.gpt`. Errors are means over batches that were not used to calibrate. Tables are printed, and
written to tools/results/ as JSON with a picture.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import demo, terminal
from fewbit.plots import save
from tools.studies import common, gpt
from tools.studies.pictures import plot_calibration_study

Tensor = torch.Tensor

KINDS = ("GELU", "GELU and linear", "all layers")
BITS = (1, 2, 3, 4)
ALLOCATED_BITS = (2, 3)


def converted(model: nn.Module, kind: str, bits: int) -> nn.Module:
    """A copy that codes the derivative of GELU, or GELU and the layer after it with one code, or all layers."""
    if kind == "GELU":
        return common.coded(model, bits={"activation": bits})
    filter_fn = None if kind == "all layers" else lambda _, name: name.endswith(("act", "down"))
    return common.coded(model, bits=bits, filter_fn=filter_fn)


def batches(seed: int, number: int) -> list[Tensor]:
    """Batches of the training text."""
    training, _ = demo.read_text(torch.device("cpu"))
    sampler = torch.Generator().manual_seed(seed)
    return [demo.sample_batch(training, sampler) for _ in range(number)]


class Judge:
    """Measures the gradient's error on some batches."""

    def __init__(self, exact: nn.Module, data: Sequence[Tensor]):
        self._data = data
        self._exact = self._gradients(exact)

    def error(self, model: nn.Module) -> float:
        """Mean over the batches of ||g̃ - g|| / ||g||, of all parameters."""
        return common.gradient_errors(self._exact, self._gradients(model))[common.ALL]

    def _gradients(self, model: nn.Module) -> list[common.Gradients]:
        return [
            common.gradients(model, lambda batch=batch: demo.batch_loss(model, batch), gpt.group_of) for batch in self._data
        ]


def tables(console: Console, model: nn.Module, judge: Judge, data: Sequence[Tensor]) -> dict[str, Any]:
    """Kind -> way to make the tables -> bits -> error."""
    results: dict[str, Any] = {}
    view = terminal.table(("what is coded", "tables"), tuple(f"{bits} bits" for bits in BITS))
    for kind in KINDS[:2]:
        ways: dict[str, dict[int, float]] = {"shipped": {}, "calibrated": {}, "by gradient": {}}
        for bits in BITS:
            for way, errors in ways.items():
                if kind != "GELU" and way == "by gradient":
                    continue  # the same as calibrated: these tables hold values
                coded = converted(model, kind, bits)
                if way != "shipped":
                    loss_fn = demo.batch_loss if way == "by gradient" else None
                    fewbit.calibrate(coded, _inputs(data, loss_fn), loss_fn)
                errors[bits] = judge.error(coded)
        results[kind] = {way: errors for way, errors in ways.items() if errors}
        for way, errors in results[kind].items():
            view.add_row(kind, way, *(f"{error:.4f}" for error in errors.values()))
    console.print(view, "")
    return results


def _inputs(data: Sequence[Tensor], loss_fn: Any) -> Sequence[Tensor]:
    """The batches that calibrate takes: those for the loss, or those for the model if there is no loss."""
    return data if loss_fn else [batch[:, :-1] for batch in data]


def allocation(console: Console, model: nn.Module, judge: Judge, data: Sequence[Tensor]) -> dict[str, Any]:
    """Kind -> bits -> errors with the same bits everywhere, and with bits allocated to take the same bytes."""
    results: dict[str, Any] = {}
    columns = ("bytes", "predicted", "on its batch", "held out", "over uniform")
    view = terminal.table(("what is coded", "bits"), columns)
    for kind in ("GELU", "all layers"):
        results[kind] = {}
        for bits in ALLOCATED_BITS:
            found = {}
            for way, choices in (("uniform", [bits]), ("allocated", range(1, 9))):
                coded = converted(model, kind, bits)
                made = fewbit.allocate(coded, data, demo.batch_loss, bits / 32, choices=choices)
                found[way] = made.outcome._asdict() | {"held_out": judge.error(coded), "bits": made.bits}
                shown = f"{bits} everywhere" if way == "uniform" else " ".join(map(str, made.bits.values()))
                ratio = found[way]["held_out"] / found["uniform"]["held_out"]
                numbers = (found[way][name] for name in ("predicted", "measured", "held_out"))
                view.add_row(kind, shown, f"{made.outcome.bytes:,}", *(f"{each:.4f}" for each in numbers), f"{ratio:.2f}")
            results[kind][bits] = found
    console.print(view, "")
    return results


def study(console: Console, model: nn.Module, number: int = 4) -> dict[str, Any]:
    """Both parts, calibrated on `number` batches and judged on as many others."""
    data, judge = batches(11, number), Judge(copy.deepcopy(model), batches(12, number))
    return {"tables": tables(console, model, judge, data), "allocation": allocation(console, model, judge, data)}


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(tempfile.gettempdir()) / "fewbit-study-gpt.pt"
    parser.add_argument("--weights", type=Path, default=default, help="of the trained model: read, or made (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="that the trained model has seen (%(default)s)")
    arguments = parser.parse_args()
    results = study(terminal.console(at_least=100), gpt.trained(arguments.weights, arguments.steps))
    save(plot_calibration_study(results), common.RESULTS / "calibration.png")
    common.write("calibration", results)


if __name__ == "__main__":
    main()
