"""Ways to keep less for backward, each a function from a model to the model to train; and batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from tools.studies.reviewers.tasks import Batch, Task

Tensor = torch.Tensor
Way = Callable[[nn.Module], nn.Module]

CHECKPOINTED = "checkpointing"


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that checkpointing runs again, one at a time: modules with parts of their own. A Sequential is replaced by
    the modules in it.

    >>> layers = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)]
    >>> [part in layers for part in parts(nn.Sequential(nn.Linear(2, 2), nn.Sequential(*layers), nn.ReLU()))]
    [True, True, True]
    """
    for child in model.children():
        if next(child.children(), None) is not None:
            inside = list(parts(child)) if isinstance(child, nn.Sequential) else []
            yield from inside or [child]


def checkpointed(model: nn.Module) -> nn.Module:
    """The model itself, changed so that each part keeps only its input and runs again in backward.

    Batch norms then see each batch twice and update their running statistics twice. Training does not read these statistics.
    """
    for part in parts(model):
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    return model


def coded(bits: int) -> Way:
    """`fewbit.convert` with these bits."""
    return partial(fewbit.convert, bits=bits)


def batch_of(task: Task, size: int, sampler: torch.Generator) -> Batch:
    """A training batch of that many samples, put together from as many of the task's own batches as it takes."""
    drawn = [task.sample(sampler)]
    while sum(len(each[0]) for each in drawn) < size:
        drawn.append(task.sample(sampler))
    return tuple(torch.cat(each)[:size] for each in zip(*drawn, strict=True))
