"""Functions that the studies share: they count bytes, compare gradients and write results."""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbit
from fewbit import files, resolve
from fewbit.measuring import saved_storages
from fewbit.models.arguments import arguments_of

Tensor = torch.Tensor
Gradients = dict[str, Tensor]  # group -> the gradients of its parameters, one after another; ALL: of every parameter

RESULTS = Path(__file__).parents[1] / "results"
ALL = "all"


def coded(model: nn.Module, **options: Any) -> nn.Module:
    """A converted copy; the options are fewbit.convert's."""
    return fewbit.convert(copy.deepcopy(model), **options)


def kept_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the distinct storages that a forward pass keeps for backward. This count is independent of `fewbit.memory`, so
    that it can check it.

    Parameters, buffers, the batch (as in `fewbit.memory`) and code tables do not count.
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
    del output  # until here it held all that was counted, so that no address was used twice
    return total


def gradients(model: nn.Module, loss: Callable[[], Tensor], group_of: Callable[[str], str]) -> Gradients:
    """The gradients of loss(), by group. group_of: name of a parameter -> name of its group."""
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
    """The standard deviation of the gradient between batches, relative to its mean norm, by group."""
    noise = {}
    for group in exact[0]:
        batches = torch.stack([each[group] for each in exact])
        deviation = batches.var(dim=0).sum().sqrt()
        noise[group] = float(deviation / batches.norm(dim=1).mean())
    return noise


def write(name: str, results: Any, directory: Path = RESULTS) -> None:
    """Write the results to directory/name.json, under the versions and the date of the measurement. Prints the file's name."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    files.write(path, json.dumps({**stamp(), "results": results}, indent=1) + "\n")
    print(f"wrote {os.path.relpath(path)}")


def stamp() -> dict[str, Any]:
    """The head of every file of results."""
    return {
        "version": fewbit.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
    }
