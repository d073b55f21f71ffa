"""How the tasks are trained. For every way, the same seed gives the same batches, dropout masks and first weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import fewbit
from tools.studies import common
from tools.studies.reviewers.runs import Run
from tools.studies.reviewers.tasks import Batch, Task

Tensor = torch.Tensor

EXACT = "exact"
BITS = ("8", "6", "5", "4", "3", "2")
LEAST = 0.02  # the last learning rate, relative to the largest
SHARE = 12  # the warm-up is 1/SHARE of all steps; the final loss is the mean over the last 1/SHARE of them
CURVE = 50  # points of a curve, each the mean of its share of the losses

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    EXACT: lambda model: model,
    **{bits: partial(fewbit.convert, bits=int(bits)) for bits in BITS},
}


class WithLoss(nn.Module):
    """A module of a model and its task. It maps a batch to the loss."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.task.loss(self.model, batch)


def height(step: int, steps: int) -> float:
    """The learning rate of a step, relative to the largest. It rises linearly, then falls along half a cosine to LEAST.

    >>> [round(height(step, 1200), 3) for step in (0, 99, 649, 1199)]
    [0.01, 1.0, 0.511, 0.02]
    """
    warm_up = max(1, steps // SHARE)
    if step < warm_up:
        return (step + 1) / warm_up
    return LEAST + (1 - LEAST) * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def train(
    task: Task, model: nn.Module, steps: int, seed: int, optimizer: str | None = None, rate: float | None = None
) -> list[float]:
    """Train for so many steps, and return the losses. The seed determines the batches and the dropout masks."""
    greatest = task.rate if rate is None else rate
    stepper = OPTIMIZERS[optimizer or task.optimizer](model.parameters(), greatest)
    sampler, losses = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = greatest * height(step, steps)
        loss = task.loss(model, task.sample(sampler))
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


def start(task: Task, label: str, seed: int, ways: dict[str, Callable[[nn.Module], nn.Module]] = WAYS) -> nn.Module:
    """The model to train in that way, with weights from the seed."""
    torch.manual_seed(seed)
    return ways[label](task.make())


def trained(
    task: Task, model: nn.Module, seed: int, steps: int, optimizer: str | None = None, rate: float | None = None
) -> Run:
    """Train the model, and return the results."""
    kept = kept_bytes(task, model)
    began = time.perf_counter()
    losses = train(task, model, steps, seed, optimizer, rate)
    seconds = time.perf_counter() - began
    return {
        "loss": statistics.fmean(losses[-max(1, steps // SHARE) :]),
        "held_out": task.held_out(model),
        "kept_bytes": kept,
        "seconds": seconds,
        "curve": smoothed(losses),
    }


def smoothed(losses: list[float], points: int = CURVE) -> list[float]:
    """The losses as `points` means over equal parts, or all losses if there are fewer.

    >>> smoothed([4.0, 2.0, 1.0, 1.0], points=2)
    [3.0, 1.0]
    """
    points = min(points, len(losses))
    cuts = [len(losses) * i // points for i in range(points + 1)]
    return [statistics.fmean(losses[first:last]) for first, last in pairwise(cuts)]


def batches(task: Task, number: int, seed: int = 1000) -> list[Batch]:
    """Training batches with which no run begins."""
    sampler = torch.Generator().manual_seed(seed)
    return [task.sample(sampler) for _ in range(number)]


def kept_bytes(task: Task, model: nn.Module) -> int:
    """Bytes that a step keeps for backward, including those of the loss."""
    return common.kept_bytes(WithLoss(task, model), batches(task, 1)[0])


def gradients(task: Task, model: nn.Module, number: int = 4, group_of: Callable[[str], str] = str) -> list[common.Gradients]:
    """The gradients of the loss of each batch, by groups of parameters."""

    def loss(batch: Batch) -> Tensor:
        torch.manual_seed(0)  # for the same dropout masks
        return task.loss(model, batch)

    return [common.gradients(model, partial(loss, batch), group_of) for batch in batches(task, number)]


def gradient_error(task: Task, model: nn.Module, coded: nn.Module, number: int = 4, **options: Any) -> float:
    """The relative error of the coded model's gradient, averaged over batches."""
    exact, other = (gradients(task, each, number, **options) for each in (model, coded))
    return common.gradient_errors(exact, other)[common.ALL]
