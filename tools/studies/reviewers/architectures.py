"""Ten networks trained exactly and with 8 to 2 bits: final losses, held-out accuracy, kept bytes, errors of the gradient.

`python -m tools.studies.reviewers architectures [--tasks gpt resnet] [--labels exact 4] [--seeds 3] [--steps 1000]`
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fewbit import terminal
from tools.studies import common
from tools.studies.reviewers import comparison, pictures, training
from tools.studies.reviewers.comparison import chosen, losses, percent
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS
from tools.studies.reviewers.training import BITS, EXACT, WAYS

NAME = "architectures"


def work(task: str, label: str, seed: int, steps: int) -> Run:
    """One run. An exact run also gives the gradient error that its trained model would have with each number of bits."""
    this = TASKS[task]
    model = training.start(this, label, seed)
    found = training.trained(this, model, seed, steps)
    if label == EXACT:
        found["gradient_errors"] = {
            bits: training.gradient_error(this, model, common.coded(model, bits=int(bits))) for bits in BITS
        }
    return found


def table(runs: Sequence[Run]) -> Table:
    """By task and bits."""
    columns = ("seeds", "final loss", "above exact", "spread of exact", "held out", "kept of exact", "gradient error")
    view = terminal.table(("task", "bits"), columns)
    for task in (each for each in TASKS if chosen(runs, task=each)):
        for label in (each for each in WAYS if chosen(runs, task=task, label=each)):
            view.add_row(task, label, *_cells(chosen(runs, task=task), label))
        view.add_section()
    return view


def _cells(runs: Sequence[Run], label: str) -> list[str]:
    own, exact = chosen(runs, label=label), chosen(runs, label=EXACT)
    mean = statistics.fmean(each["loss"] for each in own)
    above = None if label == EXACT else comparison.distance(losses(own), losses(exact))
    errors = [each["gradient_errors"][label] for each in exact if label != EXACT]
    return [
        str(len(own)),
        f"{mean:.4f}",
        str(above or "–"),
        percent(comparison.spread(losses(exact))),
        comparison.mean_held_out(own),
        percent(own[0]["kept_bytes"] / exact[0]["kept_bytes"]) if exact else "–",
        f"{statistics.fmean(errors):.4f}" if errors else "–",
    ]


def lines(runs: Sequence[Run]) -> dict[str, dict[str, comparison.Line]]:
    """The distances by task."""
    labels = {int(bits): bits for bits in BITS}
    return {task: {"coded": comparison.line(runs, labels, task=task)} for task in TASKS if chosen(runs, task=task)}


def sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence on the distances for each number of bits, over all tasks that have been run with it."""
    found = lines(runs)
    return [text for bits in BITS if (text := _sentence(found, int(bits)))]


def _sentence(found: dict[str, dict[str, comparison.Line]], bits: int) -> str | None:
    there = {
        task: (line.distances[bits], line.spread)
        for task, by_way in found.items()
        for line in by_way.values()
        if bits in line.distances
    }
    if not there:
        return None
    quiet = sum(comparison.is_noise(*each) for each in there.values())
    worst = max(there, key=lambda task: there[task][0].mean)
    middle = statistics.median(each.mean for each, _ in there.values())
    return (
        f"With {bits} bits, {quiet} of {len(there)} networks end no further above exact than exact runs differ by seed, or "
        f"than two standard errors; the median network ends {middle:+.1%} from exact, the worst, {worst}, {there[worst][0]}."
    )


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    parser = comparison.parser(NAME, __doc__, TASKS, seeds=3, steps=1000)
    comparison.add_labels(parser, WAYS)
    options = parser.parse_args(arguments)
    runs = Runs(NAME)
    settings: list[dict[str, Any]] = [{"task": task, "label": label} for task in options.tasks for label in options.labels]
    runs.fill(comparison.every(options.seeds, options.steps, settings), work)
    found = chosen(runs, steps=options.steps)
    console = terminal.console(at_least=120)
    console.print(table(found))
    for each in sentences(found):
        console.print(each)
    comparison.draw(runs, lambda: pictures.plot_distances(lines(found), "Final losses of coded training above exact"))
