"""An entry of the zoo: a model with random weights, and a batch with which it gives a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

Tensor = torch.Tensor
Loss = Callable[[Any, Tensor], Tensor]  # of the model's output and the target

BATCH, TOKENS, VOCABULARY, WIDTH, CLASSES = 4, 32, 128, 64, 10


class Entry(NamedTuple):
    """A model of the zoo.

    make   builds the model, with weights from torch's random numbers
    batch  draws the arguments of a call; the output then has a `loss`
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]


class WithLoss(nn.Module):
    """A model whose last argument is the target, and whose output has a loss."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *arguments: Tensor) -> dict[str, Any]:
        *inputs, target = arguments
        output = self.model(*inputs)
        return {"loss": self.loss(output, target), "output": output}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The loss over classes in the last dimension."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def images(size: int = 32, count: int = BATCH, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Noise, and a class for each image."""
    return torch.randn(count, channels, size, size), torch.randint(CLASSES, (count,))


def tokens(count: int = BATCH) -> tuple[Tensor, Tensor]:
    """Sequences of tokens, and the next tokens."""
    drawn = torch.randint(VOCABULARY, (count, TOKENS + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def sequences(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Sequences of vectors, and target vectors."""
    return torch.randn(BATCH, TOKENS, width), torch.randn(BATCH, TOKENS, width)
