"""Compare errors with the noise of gradients: `python -m tools.studies.reviewers noise [--tasks gpt resnet lstm]`.

A network is trained exactly for a while. Then its gradient is taken on many batches of one size, exact and coded. The noise is
the gradient's standard deviation between batches; it falls with the size of the batch. One part of the error averages out over
batches, and falls too. The systematic part does not. How large may a batch be before the error matters?

Each size is measured by itself. All figures are relative to the mean gradient of the largest batches. Dropout draws the same
masks for exact and coded steps. For batches above the largest one, the figures are extrapolated: the part that averages out
keeps its share of the noise, and the share of the systematic part grows with the square root of the batch.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fewbit import terminal
from tools.studies import common
from tools.studies.common import ALL
from tools.studies.reviewers import comparison, pictures_of_cost
from tools.studies.reviewers.memory_ways import batch_of
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS, Batch, Task
from tools.studies.reviewers.training import EXACT, start, train

Tensor = torch.Tensor
Parts = dict[str, float]  # "noise", or "error", "systematic" and "averaged": of one group, over the norm of the mean gradient

NAME = "noise"
BITS = (4, 5, 8)
SAMPLES = {4: 32, 16: 32, 64: 16, 256: 12, 1024: 8}  # size of a batch -> how many of them
SHOWN = 64  # the size whose layers are drawn
MARKS = (0.1, 1.0)  # marks of error over noise: an order of magnitude below, and equal
NEGLIGIBLE = 1e-3  # part of the whole gradient's norm; the gradient of layers with less is only rounding


def layer_of(name: str) -> str:
    """The layer of a parameter: its module; in a recurrent module, the layer in it.

    >>> layer_of("between.0.qkv.weight"), layer_of("layers.bias_hh_l1"), layer_of("position")
    ('between.0.qkv', 'layers.l1', 'position')
    """
    owner, _, own = name.rpartition(".")
    within = re.search(r"_(l\d+)", own)
    return ".".join(part for part in (owner, within and within[1]) if part) or name


def gradients(task: Task, model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Layer, or ALL -> the gradient of each batch: (batches, parameters)."""

    def loss(batch: Batch, number: int) -> Tensor:
        torch.manual_seed(number)
        return task.loss(model, batch)

    found = [common.gradients(model, partial(loss, batch, number), layer_of) for number, batch in enumerate(batches)]
    return {group: torch.stack([each[group] for each in found]) for group in found[0]}


def spread(vectors: Tensor) -> tuple[float, float]:
    """The norm of the mean of vectors (n, parameters), without what chance adds to it; and their deviation from the mean.

    The squared norm of the mean of n vectors is on average larger than that of the true mean, by the variance over n.
    """
    variance = float(vectors.var(dim=0).sum())
    mean = float(vectors.mean(0).square().sum()) - variance / len(vectors)
    return math.sqrt(max(mean, 0.0)), math.sqrt(variance)


def parts_of(exact: dict[str, Tensor], other: dict[str, Tensor], norms: dict[str, float]) -> dict[str, Parts]:
    """The error by group: root mean square over batches, its systematic part, and the part that averages out."""
    found = {}
    for group, norm in norms.items():
        errors = other[group] - exact[group]
        systematic, averaged = spread(errors)
        error = float(errors.square().sum(1).mean().sqrt())
        found[group] = {"error": error / norm, "systematic": systematic / norm, "averaged": averaged / norm}
    return found


def study(task: str, steps: int, largest: int) -> dict[str, Any]:
    """Noise and errors of the network after so many exact steps, for batches up to the largest size."""
    chosen = TASKS[task]
    model = start(chosen, EXACT, 0)
    train(chosen, model, steps, 0)
    sizes = [size for size in SAMPLES if size <= largest]
    norms: dict[str, float] = {}
    by_size: dict[str, Any] = {}
    for size in reversed(sizes):  # the norms are those of the largest batches
        sampler = torch.Generator().manual_seed(size)
        batches = [batch_of(chosen, size, sampler) for _ in range(SAMPLES[size])]
        exact = gradients(chosen, model, batches)
        norms = norms or _norms(exact)
        coded = {str(bits): gradients(chosen, common.coded(model, bits=bits), batches) for bits in BITS}
        by_size[str(size)] = {
            "noise": {group: spread(exact[group])[1] / norm for group, norm in norms.items()},
            **{bits: parts_of(exact, each, norms) for bits, each in coded.items()},
        }
    return {"layers": [group for group in norms if group != ALL], "sizes": by_size}


def _norms(exact: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the mean gradient by group, the whole last. Groups without a gradient are left out."""
    norms = {group: spread(vectors)[0] for group, vectors in exact.items()}
    whole = norms.pop(ALL)
    return {**{group: norm for group, norm in norms.items() if norm > NEGLIGIBLE * whole}, ALL: whole}


def ratios(run: Run, part: str = "error") -> dict[str, dict[int, dict[str, float]]]:
    """bits -> size of the batch, from small to large -> group -> that part of the error over the noise."""
    by_size = {int(size): found for size, found in run["sizes"].items()}
    return {
        str(bits): {
            size: {group: each[part] / by_size[size]["noise"][group] for group, each in by_size[size][str(bits)].items()}
            for size in sorted(by_size)
        }
        for bits in BITS
    }


def crossing(points: dict[int, float], mark: float) -> str:
    """The batch at which the ratio first passes the mark, on lines between the points in logarithms.

    Outside of the measured range, it is given as "> largest" or "< smallest".

    >>> crossing({4: 0.1, 16: 0.4, 64: 1.6}, 0.2), crossing({4: 0.1, 16: 0.4}, 1), crossing({4: 0.1, 16: 0.4}, 0.01)
    ('8', '> 16', '< 4')
    """
    sizes = list(points)
    if points[sizes[0]] >= mark:
        return f"< {sizes[0]}"
    for low, high in itertools.pairwise(sizes):
        if points[high] >= mark:
            before, after = (math.log(max(points[each], 1e-30)) for each in (low, high))
            return f"{low * (high / low) ** ((math.log(mark) - before) / (after - before)):.0f}"
    return f"> {sizes[-1]}"


def beyond(run: Run, bits: str, mark: float) -> str:
    """`crossing` of the whole gradient. If it is above the largest batch, also the extrapolated batch."""
    points = _points(run, bits, "error")
    found = crossing(points, mark)
    if not found.startswith(">"):
        return found
    size = max(points)
    averaged, systematic = (_points(run, bits, part)[size] for part in ("averaged", "systematic"))
    return f"{found} (~ {size * (mark**2 - averaged**2) / systematic**2:.2g})" if systematic > 0 else found


def _points(run: Run, bits: str, part: str) -> dict[int, float]:
    return {size: found[ALL] for size, found in ratios(run, part)[bits].items()}


def table(runs: Iterable[Run]) -> Table:
    """One row for each task and bits: error over noise for each size, that of the worst layer, and the batches at which the
    whole gradient passes MARKS."""
    runs = list(runs)
    sizes = sorted({int(size) for each in runs for size in each["sizes"]})
    marks = [f"passes\n{mark:g} at" for mark in MARKS]
    view = terminal.table(("task", "bits", "error over noise"), (*map(str, sizes), *marks))
    for each in runs:
        for bits, by_size in ratios(each).items():
            worst = {size: max(found.values()) for size, found in by_size.items()}
            rows = {
                "whole gradient": (_points(each, bits, "error"), [beyond(each, bits, mark) for mark in MARKS]),
                "of it systematic": (_points(each, bits, "systematic"), ["", ""]),
                "worst layer": (worst, [crossing(worst, mark) for mark in MARKS]),
            }
            for label, (points, crossings) in rows.items():
                cells = [f"{points[size]:.3f}" if size in points else "–" for size in sizes]
                view.add_row(each["task"], bits, label, *cells, *crossings)
    return view


def sentence(runs: Iterable[Run]) -> str:
    """A sentence that sums up the numbers."""
    found = [f"{run['task']}, {bits} bits: {beyond(run, bits, MARKS[0])}" for run in runs for bits in ("4", "8")]
    return f"The error reaches a tenth of the noise at batches of this many samples: {'; '.join(found)}."


def main(arguments: list[str]) -> None:
    """Measure the missing tasks, and show all results."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(f"python -m tools.studies.reviewers {NAME}", description=description)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=["gpt", "resnet", "lstm"], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of exact training before the measurement (%(default)s)")
    parser.add_argument("--largest", type=int, default=max(SAMPLES), help="batch that is measured (%(default)s)")
    chosen = parser.parse_args(arguments)
    store = Runs(NAME)
    case = {"steps": chosen.steps, "largest": chosen.largest}
    store.fill(({"task": task, **case} for task in chosen.tasks), study)
    runs = [each for each in store if case.items() <= each.items()]
    console = terminal.console(at_least=120)
    console.print(table(runs))
    console.print(sentence(runs))
    drawn = {each["task"]: {"layers": each["layers"], "ratios": ratios(each)} for each in runs}
    if drawn:
        comparison.draw(store, lambda: pictures_of_cost.plot_ratios(drawn, min(SHOWN, chosen.largest)))
