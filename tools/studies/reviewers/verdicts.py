"""Does `fewbit.fidelity` predict the results of the study of architectures?

`python -m tools.studies.reviewers verdicts [--tasks gpt resnet] [--steps 1000]`
Each network is trained exactly for a part of its schedule, from the first seed. Then fidelity gives a verdict on each number of
bits. The verdict is compared with how far above exact the runs of `architectures` have ended, if these runs exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import fewbit
from fewbit import terminal
from fewbit.models.gradients.fidelity import DOUBTFUL, SAFE
from tools.studies import common
from tools.studies.reviewers import architectures, comparison, training
from tools.studies.reviewers.comparison import Distance, chosen
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS
from tools.studies.reviewers.training import EXACT

NAME = "verdicts"
BITS = (8, 5, 4, 3, 2)
PART, BATCHES = 4, 8  # one of so many parts of the schedule is trained; so many batches are used for the gradient
LEVELS = {"safe": "tab:green", "doubtful": "tab:orange", "unsafe": "tab:red", "unknown": "0.6"}
_MARKERS: dict[int, str] = dict(zip(BITS, "os^Dv", strict=True))


def work(task: str, seed: int, steps: int) -> Run:
    """Bits -> the level of the verdict, and the gradient's error over its noise."""
    this = TASKS[task]
    model = training.start(this, EXACT, seed)
    training.train(this, model, steps // PART, seed)
    batches, found = training.batches(this, BATCHES), {}
    for bits in BITS:
        report = fewbit.fidelity(common.coded(model, bits=bits), batches, this.loss)
        found[str(bits)] = {"level": report.level, "share": report.whole.share, "error": report.whole.error}
    return {"verdicts": found}


class Case(NamedTuple):
    """One network at one number of bits: the verdict, and how far above exact its runs ended."""

    task: str
    bits: int
    level: str
    share: float | None
    found: Distance
    spread: float

    @property
    def is_noise(self) -> bool:
        return comparison.is_noise(self.found, self.spread)


def cases(runs: Sequence[Run], steps: int) -> list[Case]:
    """The cases that both studies know."""
    lines, known = architectures.lines(chosen(Runs(architectures.NAME), steps=steps)), []
    for run in chosen(runs, steps=steps, seed=0):
        if run["task"] not in lines:
            continue
        distances, spread = lines[run["task"]]["coded"]
        for bits in sorted(distances.keys() & set(BITS), reverse=True):
            verdict = run["verdicts"][str(bits)]
            known.append(Case(run["task"], bits, verdict["level"], verdict["share"], distances[bits], spread))
    return known


def table(known: Sequence[Case]) -> Table:
    """One row for each network and number of bits."""
    view = terminal.table(("task", "bits"), ("error over noise", "verdict", "loss above exact", "within the spread of exact"))
    for each in known:
        share = "–" if each.share is None else f"{each.share:.1%}"
        view.add_row(each.task, str(each.bits), share, each.level, str(each.found), "yes" if each.is_noise else "no")
    return view


def sentences(known: Sequence[Case]) -> list[str]:
    """How often each verdict was right, and how large the loss was if it was not."""
    texts = []
    for level in LEVELS:
        own = [each for each in known if each.level == level]
        if own:
            worst = max(own, key=lambda each: each.found.mean)
            texts.append(
                f"{len(own)} {level}: {sum(each.is_noise for each in own)} ended within the spread of exact runs; the worst, "
                f"{worst.task} at {worst.bits} bits, ended {worst.found} from exact."
            )
    return texts


def plot(known: Sequence[Case]) -> Figure:
    """The loss above exact, against the error over noise that was measured before training."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axis = figure.subplots()
    for each in known:
        if each.share and math.isfinite(each.found.mean):
            axis.plot(each.share, 100 * each.found.mean, _MARKERS[each.bits], color=LEVELS[each.level], markersize=5, alpha=0.8)
    spreads = [100 * each.spread for each in known if math.isfinite(each.spread)]
    if spreads:
        middle = float(np.median(spreads))
        axis.axhspan(-middle, middle, color="0.9", linewidth=0, label="spread of exact runs, the median network's")
    for bits, marker in _MARKERS.items():
        axis.plot([], [], marker, color="0.3", markersize=5, label=f"{bits} bits")
    for level in dict.fromkeys(each.level for each in known):
        axis.plot([], [], "s", color=LEVELS[level], markersize=6, label=level)
    for mark in (SAFE, DOUBTFUL):
        axis.axvline(mark, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1.0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axis.set_xlabel("error of the gradient over its noise, a quarter through training")
    axis.set_ylabel("final loss above exact, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.93")
    axis.set_axisbelow(True)
    axis.set_title("What the verdict says beforehand, and how training ends", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    options = comparison.parser(NAME, __doc__, TASKS, seeds=1, steps=1000).parse_args(arguments)
    runs = Runs(NAME)
    runs.fill(comparison.every(options.seeds, options.steps, [{"task": task} for task in options.tasks]), work)
    known, console = cases(list(runs), options.steps), terminal.console(at_least=120)
    console.print(table(known))
    for each in sentences(known):
        console.print(each)
    comparison.draw(runs, lambda: plot(known))
