"""What the studies share: bytes counted, gradients compared, steps timed in turn, results written."""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit import files, resolve, terminal
from fewbit.measuring import Task, peak_bytes, quantiles, saved_storages, time_rounds
from fewbit.models.arguments import arguments_of

Tensor = torch.Tensor
Gradients = dict[str, Tensor]  # group -> the gradients of its parameters, one after another; ALL: of every parameter

RESULTS = Path(__file__).parents[1] / "results"
ALL = "all"


class Checkpointed(nn.Module):
    """The module run under torch.utils.checkpoint: it keeps its input and runs a second time in backward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[return-value]


def coded(model: nn.Module, **options: Any) -> nn.Module:
    """A converted copy; the options are fewbit.convert's."""
    return fewbit.convert(copy.deepcopy(model), **options)


def kept_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the distinct storages that a forward pass keeps for backward: a count of its own, to judge `fewbit.memory` by.

    Neither parameters and buffers, nor the batch, which is as in `fewbit.memory`, nor code tables are counted.
    """
    args, kwargs = arguments_of(batch)
    owned = [*model.parameters(), *model.buffers(), *args, *kwargs.values()]
    seen: dict[int, int] = {}
    with saved_storages(seen, leave_out={each.untyped_storage().data_ptr() for each in owned}):
        output = model(*args, **kwargs)
    for table in list(resolve.in_use):
        for tensor in (table.thresholds, table.codes, table.levels):
            seen.pop(tensor.untyped_storage().data_ptr(), None)
    total = sum(seen.values())
    del output  # which held all that was counted, so that no address was used twice
    return total


def gradients(model: nn.Module, loss: Callable[[], Tensor], group_of: Callable[[str], str]) -> Gradients:
    """Of loss(), by group. group_of: name of a parameter -> name of its group."""
    model.zero_grad()
    loss().backward()
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        for group in (group_of(name), ALL):
            groups.setdefault(group, []).append(parameter.grad.flatten().double())
    model.zero_grad()
    return {group: torch.cat(parts) for group, parts in groups.items()}


def gradient_errors(exact: list[Gradients], other: list[Gradients]) -> dict[str, float]:
    """Mean over batches of ||other - exact|| / ||exact||, by group."""
    return {
        group: statistics.fmean(
            float((b[group] - a[group]).norm() / a[group].norm()) for a, b in zip(exact, other, strict=True)
        )
        for group in exact[0]
    }


def gradient_noise(exact: list[Gradients]) -> dict[str, float]:
    """The gradient's own standard deviation between batches over its mean norm, by group."""
    noise = {}
    for group in exact[0]:
        batches = torch.stack([each[group] for each in exact])
        deviation = batches.var(dim=0).sum().sqrt()
        noise[group] = float(deviation / batches.norm(dim=1).mean())
    return noise


def step_times(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each step, (repeats,): all of them in turn in every round, in an order shuffled anew."""
    tasks = {("step", label): Task(lambda: None, lambda _, step=step: step()) for label, step in steps.items()}
    samples = time_rounds(tasks, repeats, torch.device("cpu"))
    return {label: samples["step", label] for label in steps}


def compare_steps(
    console: Console, title: str, models: dict[str, Callable[[], Tensor]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Print, and give, times and peak memory of forward and backward of each loss; "exact" and "checkpoint" are among them."""

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: loss().backward()

    steps = {label: step(loss) for label, loss in models.items()}
    samples = step_times(steps, repeats)
    view = terminal.table((title,), ("ms a step", "over exact", "over checkpoint", "peak MiB", "of exact"))
    results: dict[str, dict[str, Any]] = {}
    for label, run in steps.items():
        ratios = {base: quantiles(samples[label] / samples[base]) for base in ("exact", "checkpoint")}
        peak = peak_bytes(run, torch.device("cpu"))
        results[label] = {"seconds": quantiles(samples[label]), "ratios": ratios, "peak_bytes": peak}
        cells = [f"{each['median']:.2f} ({each['p25']:.2f}–{each['p75']:.2f})" for each in ratios.values()]
        share = peak / results["exact"]["peak_bytes"]
        view.add_row(label, f"{1e3 * results[label]['seconds']['median']:.1f}", *cells, f"{peak / 2**20:.1f}", f"{share:.2f}")
    console.print(view, "")
    return results


def write(name: str, results: Any, directory: Path = RESULTS) -> None:
    """Write the results, under what they were measured with and when, to directory/name.json; say so."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    files.write(path, json.dumps({**stamp(), "results": results}, indent=1) + "\n")
    print(f"wrote {os.path.relpath(path)}")


def stamp() -> dict[str, Any]:
    """What stands above the results in every file of them."""
    return {
        "version": fewbit.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
    }
