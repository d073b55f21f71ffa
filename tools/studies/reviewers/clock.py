"""The loss against seconds: `python -m tools.studies.reviewers clock [--tasks gpt resnet] [--rounds 3] [--steps 1000]`.

`--samples 256` makes batches larger than the task's own. The task's own steps are so short that calls take longer than the
work.

It compares exact steps, codes, checkpointing of every block, and naive quantization. Runs follow one another, each in a process
of its own. A round runs all ways once, from the same weights on the same batches; the next round has other weights and batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from fewbit import terminal
from fewbit.measuring import quantiles
from tools.studies.reviewers import ablation, comparison, pictures_of_cost
from tools.studies.reviewers.memory_ways import CHECKPOINTED, Way, batch_of, checkpointed, coded
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS, Batch, Task
from tools.studies.reviewers.training import EXACT, SHARE, smoothed, start, train

NAME, ALONE = "clock", "--alone"
NAIVE = "naive 4 bits"
WAYS: dict[str, Way] = {
    EXACT: lambda model: model,
    "4 bits": coded(4),
    "5 bits": coded(5),
    CHECKPOINTED: checkpointed,
    NAIVE: partial(ablation.quantized, bits=4, forward=True, backward=True),
}
ROOT = Path(__file__).parents[3]
Summary = dict[str, dict[str, dict[str, Any]]]  # task -> label -> figures


def clocked(task: Task) -> tuple[Task, list[float]]:
    """The task, and a list that training fills with the times at which steps compute their loss."""
    times: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        times.append(time.perf_counter())
        return task.loss(model, batch)

    return task._replace(loss=loss), times


def run(task: str, label: str, round: int, steps: int, samples: int) -> dict[str, Any]:
    """Train in one way. A step lasts from its loss to the next step's loss. It includes sampling and the optimizer."""
    chosen = TASKS[task]
    if samples:
        chosen = chosen._replace(sample=partial(batch_of, chosen, samples))
    model = start(chosen, label, round, WAYS)
    timed, times = clocked(chosen)
    losses = train(timed, model, steps, round)
    seconds = quantiles(np.diff([*times, time.perf_counter()]))
    return {"loss": statistics.fmean(losses[-max(1, steps // SHARE) :]), "step_seconds": seconds, "curve": smoothed(losses)}


def run_alone(**case: Any) -> dict[str, Any]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", __package__ or "", NAME, ALONE, json.dumps(case)]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def summary(runs: Sequence[Run], steps: int) -> Summary:
    """task -> label -> figures over the rounds: seconds of a run (by its median step), quantiles of a step, ratio, loss and
    curve."""
    found: Summary = {}
    for task, label in dict.fromkeys((each["task"], each["label"]) for each in runs):
        own, exact = ({each["round"]: each for each in comparison.chosen(runs, task=task, label=way)} for way in (label, EXACT))
        pairs = [(own[number], exact[number]) for number in own.keys() & exact.keys()]
        times = {name: _median(own.values(), name) for name in ("p25", "median", "p75")}
        found.setdefault(task, {})[label] = {
            "rounds": len(own),
            "step_seconds": times,
            "seconds": steps * times["median"],
            "ratios": sorted(a["step_seconds"]["median"] / b["step_seconds"]["median"] for a, b in pairs),
            "loss": statistics.fmean(each["loss"] for each in own.values()),
            "above": statistics.fmean(a["loss"] / b["loss"] - 1 for a, b in pairs) if pairs else None,
            "curve": np.mean([each["curve"] for each in own.values()], axis=0).tolist(),
        }
    return found


def _median(runs: Iterable[Run], name: str) -> float:
    return statistics.median(each["step_seconds"][name] for each in runs)


def table(found: Summary) -> Table:
    """Milliseconds of a step with their middle half; time relative to exact, with its minimum and maximum over rounds; final
    loss."""
    columns = ("rounds", "ms a step", "middle half", "over exact", "least, most", "final loss", "above exact")
    view = terminal.table(("task", "way"), columns)
    for task, ways in found.items():
        for label, each in ways.items():
            low, middle, high = (f"{1000 * each['step_seconds'][name]:.1f}" for name in ("p25", "median", "p75"))
            ratios = each["ratios"]
            over = (f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}") if ratios else ("–", "–")
            above = "–" if each["above"] is None else f"{each['above']:+.2%}"
            view.add_row(task, label, str(each["rounds"]), middle, f"{low}–{high}", *over, f"{each['loss']:.4f}", above)
    return view


def sentence(found: Summary) -> str:
    """A sentence that sums up the numbers."""

    def said(task: str, label: str) -> str:
        ratios = found[task][label]["ratios"]
        return f"{label} {statistics.median(ratios):.2f} on {task}" if ratios else f"{label} – on {task}"

    parts = [said(task, label) for task, ways in found.items() for label in ways if label != EXACT]
    return f"A step takes, relative to the exact one: {', '.join(parts)}." if parts else "Nothing has been timed yet."


def main(arguments: list[str]) -> None:
    """Time the missing runs, and show all results."""
    if arguments[:1] == [ALONE]:
        print(json.dumps(run(**json.loads(arguments[1]))))
        return
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(f"python -m tools.studies.reviewers {NAME}", description=description)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=["gpt", "resnet"], help="(%(default)s)")
    parser.add_argument("--labels", nargs="*", choices=[*WAYS], default=[*WAYS], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="0: show what is there (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of a run (%(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="in a batch; 0: as many as the task has (%(default)s)")
    chosen = parser.parse_args(arguments)
    runs = Runs(NAME)
    same = {"steps": chosen.steps, "samples": chosen.samples}
    wanted = [
        {"task": task, "label": label, "round": number, **same}
        for number in range(chosen.rounds)
        for task in chosen.tasks
        for label in chosen.labels
    ]
    runs.fill(wanted, run_alone)
    found = summary(comparison.chosen(runs, **same), chosen.steps)
    console = terminal.console(at_least=120)
    console.print(table(found))
    console.print(sentence(found))
    if found:
        comparison.draw(runs, lambda: pictures_of_cost.plot_clock(found))
