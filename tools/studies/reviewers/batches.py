"""The largest batch that fits a number of bytes: `python -m tools.studies.reviewers batches [--tasks …] [--mebibytes 64 128]`.

The bytes are the measured peak of a step, forward and backward, beyond the model and its batch. Both the batch in the table and
the next larger one are measured: the first fits, and the second does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fewbit import terminal
from fewbit.bench.models import Subject
from fewbit.bench.step import Step
from tools.studies.reviewers import comparison, pictures_of_cost
from tools.studies.reviewers.memory_ways import CHECKPOINTED, Way, batch_of, checkpointed, coded
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS, Task
from tools.studies.reviewers.training import EXACT, start

NAME = "batches"
CODES, BOTH = "4 bits", f"{CHECKPOINTED} and 4 bits"
WAYS: dict[str, Way] = {
    EXACT: lambda model: model,
    CODES: coded(4),
    CHECKPOINTED: checkpointed,
    BOTH: lambda model: checkpointed(coded(4)(model)),
}
DEFAULT_TASKS = ("gpt", "vit", "resnet", "unet")
MEBIBYTES = (64, 128, 256)


def largest(peak: Callable[[int], int], limit: int) -> tuple[int, dict[int, int]]:
    """The largest batch whose peak is within the limit, and the measured peaks. A larger batch must have a larger peak.

    Peaks are nearly linear in the batch. So the next batch to try is where a line through the two around the limit meets it.

    >>> largest(lambda batch: 7 + 3 * batch, 100)
    (31, {1: 10, 2: 13, 4: 19, 8: 31, 16: 55, 32: 103, 31: 100})
    """
    fits, too_large, peaks = 0, 1, {1: peak(1)}
    while peaks[too_large] <= limit:
        fits, too_large = too_large, 2 * too_large
        peaks[too_large] = peak(too_large)
    while too_large - fits > 1:
        share = (limit - peaks[fits]) / (peaks[too_large] - peaks[fits])
        batch = min(max(fits + int(share * (too_large - fits)), fits + 1), too_large - 1)
        peaks[batch] = peak(batch)
        fits, too_large = (batch, too_large) if peaks[batch] <= limit else (fits, batch)
    return fits, peaks


def peak_of(task: Task, model: nn.Module, size: int) -> int:
    """The most bytes that a step on a batch of that size holds beyond the model and the batch."""
    batch = batch_of(task, size, torch.Generator().manual_seed(0))
    found = Step(Subject(model, batch, task.loss)).peak_bytes(torch.device("cpu"))
    assert found is not None, "followed on the CPU"
    return found


def search(task: str, label: str, mebibytes: int) -> dict[str, Any]:
    """The largest batch of a task in one way, its peak, and that of the next larger one."""
    model = start(TASKS[task], label, 0, WAYS)
    batch, peaks = largest(lambda size: peak_of(TASKS[task], model, size), mebibytes * 2**20)
    return {"batch": batch, "peak": peaks.get(batch), "next_peak": peaks[batch + 1]}


def table(runs: Iterable[Run]) -> Table:
    """The largest batches by task and bytes, each also relative to that of the exact step."""
    found = by_case(runs)
    view = terminal.table(
        ("task",), ("MiB", *(f"{label}\nbatch" for label in WAYS), *(f"{label}\n/ exact" for label in (*WAYS,)[1:]))
    )
    for (task, mebibytes), batches in found.items():
        cells = [str(batches.get(label, "–")) for label in WAYS]
        ratios = [f"{batches[label] / batches[EXACT]:.2f}" if _both(batches, label) else "–" for label in (*WAYS,)[1:]]
        view.add_row(task, str(mebibytes), *cells, *ratios)
    return view


def by_case(runs: Iterable[Run]) -> dict[tuple[str, int], dict[str, int]]:
    """(task, MiB) -> label -> batch."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    for each in runs:
        found.setdefault((each["task"], each["mebibytes"]), {})[each["label"]] = each["batch"]
    return found


def _both(batches: dict[str, int], label: str) -> bool:
    return label in batches and batches.get(EXACT, 0) > 0


def sentence(runs: Iterable[Run]) -> str:
    """A sentence that sums up the numbers."""
    cases = list(by_case(runs).values())

    def span(label: str) -> str:
        ratios = [each[label] / each[EXACT] for each in cases if _both(each, label)]
        return f"{min(ratios):.1f} to {max(ratios):.1f} times" if ratios else "– times"

    return (
        f"In the same bytes, 4 bits train on batches {span(CODES)} as large as exact steps, "
        f"checkpointing {span(CHECKPOINTED)}, and both together {span(BOTH)}."
    )


def main(arguments: list[str]) -> None:
    """Make the missing searches, and show all results."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(f"python -m tools.studies.reviewers {NAME}", description=description)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*DEFAULT_TASKS], help="(%(default)s)")
    parser.add_argument("--labels", nargs="*", choices=[*WAYS], default=[*WAYS], help="(%(default)s)")
    parser.add_argument("--mebibytes", nargs="*", type=int, default=[*MEBIBYTES], help="(%(default)s)")
    chosen = parser.parse_args(arguments)
    runs = Runs(NAME)
    wanted = [
        {"task": task, "label": label, "mebibytes": mebibytes}
        for task in chosen.tasks
        for mebibytes in chosen.mebibytes
        for label in chosen.labels
    ]
    runs.fill(wanted, search)
    console = terminal.console(at_least=120)
    console.print(table(runs))
    console.print(sentence(runs))
    comparison.draw(runs, lambda: pictures_of_cost.plot_batches(by_case(runs), [*WAYS]))
