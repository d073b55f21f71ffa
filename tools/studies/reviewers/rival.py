"""Compare 8-bit training with codes: `python -m tools.studies.reviewers rival [--tasks resnet vgg] [--seeds 3] [--steps 1000]`.

The rival is the method of Banner et al. (`baselines.eight_bit_trained`): range batch norm, 8-bit weights and activations, and
8-bit gradients for the layer below. Codes and naive quantization of activations are trained on the same batches from the same
weights. Bytes kept are measured for exact steps and codes, and computed for the rival. Naive runs hold values, so they have
none.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.table import Table

from fewbit import terminal
from tools.studies import baselines
from tools.studies.reviewers import ablation, comparison, pictures_of_cost
from tools.studies.reviewers.comparison import Distance, chosen, distance, losses
from tools.studies.reviewers.memory_ways import Way, coded
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import PLAIN, TASKS
from tools.studies.reviewers.training import EXACT, batches, start, trained

NAME = "rival"
RIVAL = "8-bit training"
NAIVE = {"naive 8 bits": 8, "naive 4 bits": 4}
WAYS: dict[str, Way] = {
    EXACT: lambda model: model,
    "8 bits": coded(8),
    "4 bits": coded(4),
    RIVAL: baselines.eight_bit_trained,
    **{label: partial(ablation.quantized, bits=bits, forward=True, backward=True) for label, bits in NAIVE.items()},
}
STUDIED = {task.name: task for task in (TASKS["resnet"], TASKS["vgg"], TASKS["densenet"], PLAIN)}


def work(task: str, label: str, seed: int, steps: int) -> Run:
    """Train one network in one way. Its bytes kept by a step are None if it holds values."""
    this = STUDIED[task]
    found = trained(this, start(this, label, seed, WAYS), seed, steps)
    if label == RIVAL:
        inputs, _ = batches(this, 1)[0]
        found["kept_bytes"] = baselines.eight_bit_bytes(this.make(), (inputs,))
    return {**found, "kept_bytes": None} if label in NAIVE else found


def distances(runs: Sequence[Run]) -> dict[str, dict[str, Distance]]:
    """task -> label -> how far final losses end above exact ones of the same seeds."""
    found: dict[str, dict[str, Distance]] = {}
    for task, label in dict.fromkeys((each["task"], each["label"]) for each in runs):
        above = distance(losses(runs, task=task, label=label), losses(runs, task=task, label=EXACT))
        if label != EXACT and above:
            found.setdefault(task, {})[label] = above
    return found


def table(runs: Sequence[Run]) -> Table:
    """By task and way: final loss and its distance from exact, held-out accuracy, and bytes kept over exact ones."""
    view = terminal.table(("task", "way"), ("seeds", "final loss", "above exact", "held out", "kept of exact", "seconds"))
    for task in dict.fromkeys(each["task"] for each in runs):
        for label in (each for each in WAYS if chosen(runs, task=task, label=each)):
            own, exact = (chosen(runs, task=task, label=way) for way in (label, EXACT))
            loss, seconds = (statistics.fmean(each[name] for each in own) for name in ("loss", "seconds"))
            above = distances(own + exact).get(task, {}).get(label, "–")
            kept = own[0]["kept_bytes"]
            share = comparison.percent(kept / exact[0]["kept_bytes"]) if kept and exact else "–"
            accuracy = comparison.mean_held_out(own)
            view.add_row(task, label, str(len(own)), f"{loss:.4f}", str(above), accuracy, share, f"{seconds:.0f}")
        view.add_section()
    return view


def sentence(runs: Sequence[Run]) -> str:
    """A sentence that sums up the numbers."""
    found = distances(runs)

    def said(label: str) -> str:
        return ", ".join(f"{ways[label]} ({task})" for task, ways in found.items() if label in ways) or "–"

    return f"Above exact final losses: {RIVAL} {said(RIVAL)}; codes of 8 bits {said('8 bits')}; of 4 bits {said('4 bits')}."


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    parser = comparison.parser(NAME, __doc__, STUDIED, seeds=3, steps=1000)
    comparison.add_labels(parser, WAYS)
    options = parser.parse_args(arguments)
    settings: list[dict[str, Any]] = [{"task": task, "label": label} for task in options.tasks for label in options.labels]
    runs = Runs(NAME)
    runs.fill(comparison.every(options.seeds, options.steps, settings), work)
    found = chosen(runs, steps=options.steps)
    console = terminal.console(at_least=100)
    console.print(table(found))
    console.print(sentence(found))
    comparison.draw(runs, lambda: pictures_of_cost.plot_rival(distances(found), [*WAYS][1:]))
