"""Where do approximate values do harm: in backward only, in forward only, or in both? On convolutional networks.

`python -m tools.studies.reviewers ablation [--tasks plain resnet] [--labels "both, 4 bits"] [--seeds 3] [--steps 600]`
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import baselines
from tools.studies.reviewers import comparison, pictures, training
from tools.studies.reviewers.comparison import chosen, distance, losses, percent
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import PLAIN, TASKS, Task
from tools.studies.reviewers.training import EXACT

Tensor = torch.Tensor

NAME = "ablation"
BITS = (8, 4, 3, 2)
STUDIED: dict[str, Task] = {"plain": PLAIN, "resnet": TASKS["resnet"]}


def uniform(x: Tensor, bits: int) -> Tensor:
    """x rounded to the nearest of 2**bits even steps from its smallest to its largest value.

    >>> uniform(torch.tensor([0.0, 0.9, 2.2, 3.0]), bits=2)
    tensor([0., 1., 2., 3.])
    """
    return baselines.min_max(x.flatten(), bits, x.numel()).view_as(x)


def quantized(model: nn.Module, bits: int, forward: bool, backward: bool) -> nn.Module:
    """The model, changed so that convolutions and linear layers read quantized inputs in forward, in backward, or in both.

    The first layer reads pictures, which stay exact. Gradients pass straight through the rounding. Norms and ReLU are exact.
    """
    _, *layers = (each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear)))
    for layer in layers:
        layer.forward = partial(_call, layer.forward, bits, forward, backward)
    return model


def _call(layer: Callable[[Tensor], Tensor], bits: int, forward: bool, backward: bool, input: Tensor) -> Tensor:
    rounded = input + (uniform(input, bits) - input).detach()
    values = layer(rounded if forward else input)
    if forward == backward:
        return values
    slopes = layer(rounded if backward else input)
    return slopes + (values - slopes).detach()  # the values of `values`, the gradient of `slopes`


def quantized_norms(model: nn.Module, bits: int) -> nn.Module:
    """The model, changed so that batch norms output values coded by the second method, for both forward and backward."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = baselines.QuantizedBatchNorm2d
            cast(baselines.QuantizedBatchNorm2d, module).bits = bits
    return model


WAYS: dict[str, Callable[..., nn.Module]] = {
    "joint codes, backward": fewbit.convert,
    "uniform codes, backward": partial(fewbit.convert, coding="uniform"),
    "quantized, backward": partial(quantized, forward=False, backward=True),
    "quantized, forward": partial(quantized, forward=True, backward=False),
    "quantized, both": partial(quantized, forward=True, backward=True),
    "norms quantized, both": quantized_norms,
}


def label_of(way: str, bits: int) -> str:
    """
    >>> label_of("quantized, both", 4)
    'quantized, both, 4 bits'
    """
    return f"{way}, {bits} bits"


LABELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    EXACT: lambda model: model,
    **{label_of(way, bits): partial(make, bits=bits) for way, make in WAYS.items() for bits in BITS},
}


def work(task: str, label: str, seed: int, steps: int) -> Run:
    """One run. Bytes kept are left out, since the quantized ways hold values instead of codes."""
    this = STUDIED[task]
    found = training.trained(this, training.start(this, label, seed, LABELS), seed, steps)
    del found["kept_bytes"]
    return found


def table(runs: Sequence[Run]) -> Table:
    """By task and way: final losses above exact, and accuracy on held-out pictures, at each number of bits."""
    columns = [f"{bits} bits" for bits in BITS]
    view = terminal.table(("task", "way"), ("loss, exact", *columns, "held out, exact", *columns))
    for task in (each for each in STUDIED if chosen(runs, task=each)):
        own = chosen(runs, task=task)
        exact = losses(own, label=EXACT)
        if exact:
            view.add_row(task, EXACT, _loss(exact), *[""] * len(BITS), comparison.mean_held_out(chosen(own, label=EXACT)))
        for way in WAYS:
            labels = [label_of(way, bits) for bits in BITS]
            above = [str(distance(losses(own, label=label), exact) or "–") for label in labels]
            view.add_row("", way, "", *above, "", *(comparison.mean_held_out(chosen(own, label=label)) for label in labels))
        view.add_section()
    return view


def _loss(exact: comparison.Losses) -> str:
    return f"{statistics.fmean(exact.values()):.4f} ± {percent(comparison.spread(exact))}"


def lines(runs: Sequence[Run]) -> dict[str, dict[str, comparison.Line]]:
    """The distances by task and way."""
    return {
        task: {way: comparison.line(runs, {bits: label_of(way, bits) for bits in BITS}, task=task) for way in WAYS}
        for task in STUDIED
        if chosen(runs, task=task, label=EXACT)
    }


def sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each task at 4 bits: what codes in backward cost, and what quantized values cost in forward and in
    both."""
    texts = []
    for task, ways in lines(runs).items():
        found = {way: line.distances[4] for way, line in ways.items() if 4 in line.distances}
        if found:
            parts = ", ".join(f"{each} ({way})" for way, each in found.items())
            spread = percent(next(iter(ways.values())).spread)
            texts.append(f"{task} with 4 bits ends above exact by {parts}; exact runs differ by {spread} between seeds.")
    return texts


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    parser = comparison.parser(NAME, __doc__, STUDIED, seeds=3, steps=600)
    comparison.add_labels(parser, LABELS)
    options = parser.parse_args(arguments)
    settings: list[dict[str, Any]] = [{"task": task, "label": label} for task in options.tasks for label in options.labels]
    runs = Runs(NAME)
    runs.fill(comparison.every(options.seeds, options.steps, settings), work)
    found = chosen(runs, steps=options.steps)
    console = terminal.console(at_least=150)
    console.print(table(found))
    for each in sentences(found):
        console.print(each)
    comparison.draw(runs, lambda: pictures.plot_distances(lines(found), "Approximate values in backward, forward and both", 2))
