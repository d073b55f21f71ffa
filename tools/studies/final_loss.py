"""What codes cost in final loss: `python -m tools.studies.final_loss [--bits 8 6 5] [--starts 5] [--orders 2] [--steps 1200]`.

The demo's GPT is trained to the end of a schedule, exact and with everything coded. Runs differ in their start (the same seed,
with weights changed by 1 %) and in the order of batches. The spread between starts shows which differences between losses are
significant. Each run is written to tools/results/ as soon as it is finished, and is not run again. So the study may be stopped
at any time, and the same command continues it. All settings finish one start before the next one begins, so the table is fair
at any time. If codes change, remove the file first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fewbit
from fewbit import demo, terminal
from tools.studies import common

Run = dict[str, Any]

NAME = "final_loss"
EXACT = "exact"
LEARNING_RATE, LEAST_RATE = 1e-3, 2e-5
DIFFERENCE = 0.01  # difference between starts, relative to the standard deviation of each parameter
SHARE = 12  # the warm-up is 1/SHARE of all steps; the final loss is the mean over the last 1/SHARE of them
IDENTITY = ("label", "order", "start", "steps")  # the entries that identify a run


def rate(step: int, steps: int) -> float:
    """The learning rate of a step. It rises linearly, then falls along half a cosine to LEAST_RATE.

    >>> [round(1e3 * rate(step, 1200), 3) for step in (0, 99, 649, 1199)]
    [0.01, 1.0, 0.511, 0.02]
    """
    warm_up = max(1, steps // SHARE)
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    height = (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2
    return LEAST_RATE + (LEARNING_RATE - LEAST_RATE) * height


def start(number: int) -> demo.GPT:
    """The exact model of that start. Number 0 has the weights of the seed, all others differ from it a little."""
    torch.manual_seed(0)
    model = demo.GPT(None)
    noise = torch.Generator().manual_seed(number)
    for parameter in model.parameters() if number else ():
        size = DIFFERENCE * parameter.detach().std(correction=0)
        parameter.data.add_(size * torch.randn(parameter.shape, generator=noise))
    return model


def train(model: nn.Module, steps: int, order: int) -> list[float]:
    """Losses of so many steps of AdamW on the batches of that order."""
    training, _ = demo.read_text(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    sampler, losses = torch.Generator().manual_seed(order), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = demo.batch_loss(model, demo.sample_batch(training, sampler))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def setting(text: str) -> int | dict[str, int]:
    """The bits of `fewbit.convert` that a text of the command line means.

    >>> setting("4"), setting("activation=3,norm=8")
    (4, {'activation': 3, 'norm': 8})
    """
    if "=" not in text:
        return int(text)
    return {kind: int(number) for kind, number in (each.split("=") for each in text.split(","))}


def run(label: str, order: int, number: int, steps: int) -> Run:
    """Train one model. label: EXACT or the text of a `setting`"""
    model = start(number)
    if label != EXACT:
        fewbit.convert(model, bits=setting(label))
    began = time.perf_counter()
    losses = train(model, steps, order)
    last = max(1, steps // SHARE)
    _, held_out = demo.read_text(torch.device("cpu"))
    return {
        **dict(zip(IDENTITY, (label, order, number, steps), strict=True)),
        "loss": statistics.fmean(losses[-last:]),
        "held_out": demo.held_out_loss(model, held_out),
        "means": [statistics.fmean(losses[first : first + last]) for first in range(0, steps, last)],
        "seconds": time.perf_counter() - began,
        **{name: value for name, value in common.stamp().items() if name != "threads"},
    }


def finished(directory: Path = common.RESULTS) -> list[Run]:
    """The runs in the file of results, if there is one."""
    path = directory / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]["runs"] if path.exists() else []


def run_all(
    console: Console, labels: Sequence[str], starts: int, orders: int, steps: int, directory: Path = common.RESULTS
) -> list[Run]:
    """All runs of these labels, starts and orders. Runs that are not in the file are made and added to it one by one."""
    wanted = [(label, order, number, steps) for number in range(starts) for order in range(orders) for label in labels]
    for each in wanted:
        if each not in map(_identity, finished(directory)):  # read each time, since another process may have added some
            found = run(*each)
            common.write(NAME, {"runs": [*finished(directory), found]}, directory)
            console.print(table(finished(directory), steps), "")
    return [each for each in finished(directory) if _identity(each) in wanted]


def _identity(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in IDENTITY)


def table(runs: Iterable[Run], steps: int) -> Table:
    """One row for each setting: the mean final loss for each order of batches, and its distance from exact runs with standard
    error."""
    runs = [each for each in runs if each["steps"] == steps]
    labels = dict.fromkeys(each["label"] for each in runs)
    orders = sorted({each["order"] for each in runs})
    columns = (*(f"order {order}" for order in orders), "runs", "above exact", "held out")
    view = terminal.table((f"{steps} steps, bits",), columns)
    for label in labels:
        losses = [_losses(runs, label, order) for order in orders]
        cells = [f"{statistics.fmean(each):.4f}" if each else "–" for each in losses]
        distances = [_shown(distance(runs, label, name)) for name in ("loss", "held_out")]
        view.add_row(label, *cells, str(sum(map(len, losses))), *distances)
    return view


def distance(runs: Sequence[Run], label: str, name: str = "loss") -> tuple[float, float] | None:
    """How far the runs of a label end above exact ones, relative, on average over orders; and its standard error.

    Each label and order has few starts, so one spread between starts is assumed for all of them. None for exact runs, if there
    are no runs, and if every label and order has only one start.
    """
    cells = {key: _losses(runs, *key, name) for key in {(each["label"], each["order"]) for each in runs}}
    orders = [order for one, order in cells if one == label and (EXACT, order) in cells]
    freedom = sum(len(each) - 1 for each in cells.values())
    if label == EXACT or not orders or not freedom:
        return None
    variance = sum(statistics.pvariance(each) * len(each) for each in cells.values()) / freedom
    pairs = [(cells[label, order], cells[EXACT, order]) for order in orders]
    base = statistics.fmean(statistics.fmean(exact) for _, exact in pairs)
    found = statistics.fmean(statistics.fmean(coded) - statistics.fmean(exact) for coded, exact in pairs)
    error = math.sqrt(variance * sum(1 / len(each) for pair in pairs for each in pair)) / len(pairs)
    return found / base, error / base


def _losses(runs: Iterable[Run], label: str, order: int, name: str = "loss") -> list[float]:
    return [each[name] for each in runs if (each["label"], each["order"]) == (label, order)]


def _shown(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:+.2%} ± {found[1]:.2%}"


def main() -> None:
    """Run what is missing, and show all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--bits", nargs="*", default=["8", "6", "5", "4", "3"], help='numbers, or kinds: "norm=4,linear=5" (%(default)s)'
    )
    parser.add_argument("--starts", type=int, default=5, help="0: show what is there (%(default)s)")
    parser.add_argument("--orders", type=int, default=2, help="of batches (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="of a run (%(default)s)")
    arguments = parser.parse_args()
    console = terminal.console(at_least=100)
    run_all(console, [EXACT, *arguments.bits], arguments.starts, arguments.orders, arguments.steps)
    console.print(table(finished(), arguments.steps))


if __name__ == "__main__":
    main()
