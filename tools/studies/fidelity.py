"""Is it safe? On the demo's GPT, trained for 300 steps: `python -m tools.studies.fidelity [errors] [drift]`, both by default,
and `… fidelity systematic`.

errors  the verdicts of `fewbit.fidelity` at 1 to 4 bits, with only activations coded, with all layers of the blocks coded, and
        with all layers coded
drift   training continues with coded blocks, and at one step the weights of one layer are multiplied by 10: when does
        `fewbit.watch` warn, and what does it say? The same with only activations coded, whose tables of the derivative bear it.
systematic  the part of the error that does not average out over 64 batches, by group of parameters, for 2 to 8 bits. The noise
        of a single batch hides it, but training follows it.

Tables are printed, and written to tools/results/ as JSON with pictures.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fewbit
from fewbit import demo, terminal
from tools.studies import common, gpt

LEARNING_RATE = 2e-4
SCALED, TIMES = "blocks.1.up", 10.0


def in_blocks(_: Any, name: str) -> bool:
    """Whether a module of that name is part of a block."""
    return name.startswith("blocks.")


def errors(console: Console, model: demo.GPT, batches: int = 8) -> dict[str, Any]:
    """`fewbit.fidelity` of each way to code, on the batches of `tools.studies.gpt errors`."""
    training, _ = demo.read_text(torch.device("cpu"))
    sampler = torch.Generator().manual_seed(1)
    data = [demo.sample_batch(training, sampler) for _ in range(batches)]
    ways: dict[str, Callable[[int], dict[str, Any]]] = {
        "activations": lambda bits: {"bits": {"activation": bits}},
        "blocks": lambda bits: {"bits": bits, "filter_fn": in_blocks},
        "all layers": lambda bits: {"bits": bits},
    }
    view = terminal.table(("coded", "bits"), ("error", "error / noise", "systematic", "worst group", "its share", "verdict"))
    results: dict[str, Any] = {}
    for (label, options_of), bits in itertools.product(ways.items(), (1, 2, 3, 4)):
        report = fewbit.fidelity(common.coded(model, **options_of(bits)), data, demo.batch_loss)
        results[f"{label}, {bits} bits"] = report.to_dict()
        whole, weakest = report.whole, report.weakest
        figures = [f"{each:.4f}" for each in (whole.error, whole.share, whole.systematic)]
        of_weakest = (weakest.group, f"{weakest.share:.3f}") if weakest else ("–", "–")
        view.add_row(label, str(bits), *figures, *of_weakest, report.level, end_section=bits == 4)
        if (label, bits) == ("blocks", 4):
            console.print(str(report), "")
            report.plot(common.RESULTS / "fidelity.png")
    console.print(view, "")
    return results


def systematic(
    console: Console, model: demo.GPT, batches: int = 64, bits: Sequence[int] = (2, 3, 4, 5, 6, 8)
) -> dict[str, dict[str, float | None]]:
    """Bits of all layers -> group -> the part of the error that does not average out, relative to the mean gradient."""
    training, _ = demo.read_text(torch.device("cpu"))
    sampler = torch.Generator().manual_seed(1)
    data = [demo.sample_batch(training, sampler) for _ in range(batches)]
    reports = {number: fewbit.fidelity(common.coded(model, bits=number), data, demo.batch_loss) for number in bits}
    results = {
        f"{number} bits": {part.group: part.systematic for part in (*report.parts, report.whole)}
        for number, report in reports.items()
    }
    view = terminal.table((f"systematic part, {batches} batches",), tuple(results))
    for group in next(iter(results.values())):
        figures = [found[group] for found in results.values()]
        view.add_row(group, *("–" if each is None else f"{each:.4f}" for each in figures))
    console.print(view, "")
    return results


def drift(console: Console, model: demo.GPT, steps: int = 30, every: int = 5) -> dict[str, Any]:
    """Continue training for so many steps. The weights are scaled after half of them."""
    results = {}
    ways: dict[str, dict[str, Any]] = {
        "blocks, 4 bits": {"bits": 4, "filter_fn": in_blocks},
        "activations, 4 bits": {"bits": {"activation": 4}},
    }
    for label, options in ways.items():
        coded = common.coded(model, **options)
        with fewbit.watch(coded, every=every) as watching:
            seen = _train(coded, steps)
        report = watching.report()
        found = [{"step": step, "message": message} for step, message in seen]
        results[label] = {"scaled_after": steps // 2, "every": every, "warnings": found, **report.to_dict()}
        console.print(f"{label}: weights of {SCALED} times {TIMES:g} after step {steps // 2}, checked every {every} steps")
        for step, message in seen or [(None, "no warning")]:
            console.print(f"  step {step}: {message}" if step else f"  {message}")
        console.print("", str(report), "")
        if seen:
            report.plot(common.RESULTS / "fidelity-drift.png")
    return results


def _train(model: Any, steps: int) -> list[tuple[int, str]]:
    """Run steps of AdamW. Returns the warnings, with the step of each."""
    training, _ = demo.read_text(torch.device("cpu"))
    sampler, seen = torch.Generator().manual_seed(2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            demo.batch_loss(model, demo.sample_batch(training, sampler)).backward()
        seen += [(step, str(each.message)) for each in caught if issubclass(each.category, fewbit.DriftWarning)]
        optimizer.step()
        optimizer.zero_grad()
        if step == steps // 2:
            with torch.no_grad():
                model.get_submodule(SCALED).weight.mul_(TIMES)
    return seen


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], "errors", "drift", "systematic"], help="the first two by default")
    default = Path(tempfile.gettempdir()) / "fewbit-study-gpt.pt"
    parser.add_argument("--weights", type=Path, default=default, help="of the trained model: read, or made (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="that the trained model has seen (%(default)s)")
    parser.add_argument("--batches", type=int, help="to compare gradients on (8, and for the systematic part 64)")
    arguments = parser.parse_args()
    console = terminal.console(at_least=120)
    model = gpt.trained(arguments.weights, arguments.steps)
    results = {}
    if "errors" in (arguments.parts or ["errors"]):
        results["errors"] = errors(console, model, arguments.batches or 8)
    if "drift" in (arguments.parts or ["drift"]):
        results["drift"] = drift(console, model)
    if "systematic" in arguments.parts:
        common.write("fidelity-systematic", systematic(console, model, arguments.batches or 64))
    if not arguments.parts:
        common.write("fidelity", results)


if __name__ == "__main__":
    main()
