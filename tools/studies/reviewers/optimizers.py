"""Four optimizers on three networks, exact and with 8 to 3 bits.

`python -m tools.studies.reviewers optimizers [--tasks gpt resnet lstm] [--optimizers sgd adam] [--labels exact 4] [--seeds 3]`
Runs that the study of architectures has made with the same optimizer and rate are taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fewbit import terminal
from tools.studies.reviewers import architectures, comparison, pictures, training
from tools.studies.reviewers.comparison import chosen, distance, losses, percent
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS
from tools.studies.reviewers.training import EXACT, OPTIMIZERS

NAME = "optimizers"
LABELS = (EXACT, "8", "5", "4", "3")
RATES = {  # by task and optimizer: the best of three or so for exact training, tried once
    "gpt": {"sgd": 0.5, "adam": 4e-3, "adamw": 4e-3, "rmsprop": 2e-3},
    "resnet": {"sgd": 0.05, "adam": 5e-3, "adamw": 5e-3, "rmsprop": 3e-3},
    "lstm": {"sgd": 2.0, "adam": 1e-2, "adamw": 1e-2, "rmsprop": 4e-3},
}


def work(task: str, optimizer: str, label: str, seed: int, steps: int) -> Run:
    """One run. It is taken from the study of architectures if that has the same run."""
    this, rate = TASKS[task], RATES[task][optimizer]
    if (optimizer, rate) == (this.optimizer, this.rate):
        for same in chosen(Runs(architectures.NAME), task=task, label=label, seed=seed, steps=steps):
            return {name: value for name, value in same.items() if name != "gradient_errors"}
    return training.trained(this, training.start(this, label, seed), seed, steps, optimizer, rate)


def table(runs: Sequence[Run]) -> Table:
    """By task and optimizer: exact losses, and how far above them coded runs end."""
    view = terminal.table(("task", "optimizer"), ("exact loss", "spread", *(f"{label} bits" for label in LABELS[1:])))
    for task in RATES:
        for optimizer in OPTIMIZERS:
            own = chosen(runs, task=task, optimizer=optimizer)
            exact = losses(own, label=EXACT)
            if exact:
                above = (distance(losses(own, label=label), exact) for label in LABELS[1:])
                mean = sum(exact.values()) / len(exact)
                view.add_row(
                    task, optimizer, f"{mean:.4f}", percent(comparison.spread(exact)), *(str(each or "–") for each in above)
                )
    return view


def lines(runs: Sequence[Run]) -> dict[str, dict[str, comparison.Line]]:
    """The distances by task and optimizer."""
    labels = {int(label): label for label in LABELS[1:]}
    return {
        task: {
            optimizer: comparison.line(runs, labels, task=task, optimizer=optimizer)
            for optimizer in OPTIMIZERS
            if chosen(runs, task=task, optimizer=optimizer, label=EXACT)
        }
        for task in RATES
        if chosen(runs, task=task, label=EXACT)
    }


def sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each number of bits: for how many pairs of network and optimizer coded runs end where exact runs end."""
    found = [line for by_optimizer in lines(runs).values() for line in by_optimizer.values()]
    texts = []
    for bits in map(int, LABELS[1:]):
        there = [(distances[bits], spread) for distances, spread in found if bits in distances]
        if there:
            quiet = sum(comparison.is_noise(*each) for each in there)
            texts.append(
                f"With {bits} bits, {quiet} of {len(there)} pairs of network and optimizer end no further above exact than "
                "exact runs differ by seed, or than two standard errors."
            )
    return texts


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    parser = comparison.parser(NAME, __doc__, RATES, seeds=3, steps=1000)
    comparison.add_labels(parser, LABELS)
    parser.add_argument("--optimizers", nargs="+", default=[*OPTIMIZERS], choices=[*OPTIMIZERS])
    options = parser.parse_args(arguments)
    settings: list[dict[str, Any]] = [
        {"task": task, "optimizer": optimizer, "label": label}
        for task in options.tasks
        for optimizer in options.optimizers
        for label in options.labels
    ]
    runs = Runs(NAME)
    runs.fill(comparison.every(options.seeds, options.steps, settings), work)
    found = chosen(runs, steps=options.steps)
    console = terminal.console(at_least=120)
    console.print(table(found))
    for each in sentences(found):
        console.print(each)
    comparison.draw(
        runs, lambda: pictures.plot_distances(lines(found), "Final losses of coded training above exact", columns=3)
    )
