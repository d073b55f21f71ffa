"""Ten small tasks: a network, its batches, its loss, and a measure of how well it does on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from tools.studies.reviewers import data, networks

Tensor = torch.Tensor
Batch = tuple[Tensor, ...]

STRETCHES, TOKENS, STEPS_BACK = 12, 64, 48  # parts of text in a batch; characters of each; the same for recurrent networks
PICTURES, CROPS, SIDE = 24, 6, 32
MASK, MASKED = 0, 0.15  # the character that masks others, and the share that is masked
NO_TARGET = -100  # cross_entropy's ignore_index
NOISE = 0.15  # standard deviation of the noise; colours go from -0.5 to 0.5
HELD_OUT_BATCHES = 8


class Task(NamedTuple):
    """What a network learns, and how it is usually trained."""

    name: str
    make: Callable[[], nn.Module]  # a new model; its weights are from torch's global seed
    sample: Callable[[torch.Generator], Batch]  # a training batch
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Callable[[nn.Module], dict[str, float]]  # the loss and "accuracy" (from 0 to 1) or "psnr" (dB)
    optimizer: str
    rate: float


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """A context with the model in evaluation mode and without gradients. Afterwards it is in its former mode."""
    mode = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(mode)


def next_characters(text: Tensor, tokens: int, sampler: torch.Generator) -> Batch:
    """Random parts of the text (STRETCHES, tokens), and the same moved by one character."""
    stretches = _stretches(text, tokens + 1, sampler)
    return stretches[:, :-1], stretches[:, 1:]


def masked_characters(text: Tensor, tokens: int, sampler: torch.Generator) -> Batch:
    """Parts of the text with some characters masked. The target has these characters in their places, and NO_TARGET
    elsewhere."""
    stretches = _stretches(text, tokens, sampler)
    masked = torch.rand(stretches.shape, generator=sampler) < MASKED
    return stretches.masked_fill(masked, MASK), stretches.masked_fill(~masked, NO_TARGET)


def _stretches(text: Tensor, length: int, sampler: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - length + 1, (STRETCHES, 1), generator=sampler)
    return text[starts + torch.arange(length)]


def some_pictures(sampler: torch.Generator) -> Batch:
    """Random training pictures, shifted, with their labels."""
    (images, labels), _ = data.pictures()
    chosen = torch.randint(len(labels), (PICTURES,), generator=sampler)
    return data.shifted(images[chosen], sampler), labels[chosen]


def some_crops(sampler: torch.Generator) -> Batch:
    """Random crops of the training photographs, half of them from each: noisy, and without noise."""
    photographs, _ = data.photographs()
    return _noisy(torch.cat([data.crops(each, CROPS // 2, SIDE, sampler) for each in photographs]), sampler)


def _noisy(crops: Tensor, sampler: torch.Generator) -> Batch:
    return crops + NOISE * torch.randn(crops.shape, generator=sampler), crops


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats. Classes are the last dimension of the model's output."""
    inputs, targets = batch
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET)


def denoising_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    noisy, clean = batch
    return mse_loss(model(noisy), clean)


def classified(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """The mean loss over the targets of all batches, and the share of them with the largest logit."""
    total, right, number = 0.0, 0, 0
    with evaluation(model):
        for inputs, targets in batches:
            there = targets != NO_TARGET
            logits, wanted = model(inputs)[there], targets[there]
            total += float(cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            number += len(wanted)
    return {"loss": total / number, "accuracy": right / number}


def held_out_text(make: Callable[[Tensor, int, torch.Generator], Batch], tokens: int, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on characters of the held-out text, always the same ones."""
    sampler = torch.Generator().manual_seed(0)
    return classified(model, [make(data.text()[1], tokens, sampler) for _ in range(HELD_OUT_BATCHES)])


def held_out_pictures(model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on the labels of the held-out pictures."""
    return classified(model, [data.pictures()[1]])


def held_out_crops(model: nn.Module) -> dict[str, float]:
    """The mean squared error and the peak signal-to-noise ratio in dB on noisy held-out crops, always the same ones."""
    sampler = torch.Generator().manual_seed(0)
    batch = _noisy(data.crops(data.photographs()[1], CROPS * HELD_OUT_BATCHES, SIDE, sampler), sampler)
    with evaluation(model):
        loss = float(denoising_loss(model, batch))
    return {"loss": loss, "psnr": -10 * math.log10(loss)}


def _on_text(
    name: str,
    make: Callable[[], nn.Module],
    rate: float,
    tokens: int = TOKENS,
    characters: Callable[..., Batch] = next_characters,
) -> Task:
    def sample(sampler: torch.Generator) -> Batch:
        return characters(data.text()[0], tokens, sampler)

    return Task(name, make, sample, classification_loss, partial(held_out_text, characters, tokens), "adamw", rate)


def _on_pictures(name: str, make: Callable[[], nn.Module], optimizer: str, rate: float) -> Task:
    return Task(name, make, some_pictures, classification_loss, held_out_pictures, optimizer, rate)


_ALL = (
    _on_text("gpt", networks.gpt, 4e-3),
    _on_text("bert", networks.bert, 2e-3, characters=masked_characters),
    _on_pictures("vit", networks.ViT, "adamw", 2e-3),
    _on_pictures("resnet", networks.resnet, "sgd", 0.05),
    _on_pictures("vgg", networks.vgg, "sgd", 0.05),
    _on_pictures("densenet", networks.densenet, "sgd", 0.1),
    _on_text("lstm", partial(networks.Recurrent, nn.LSTM), 1e-2, STEPS_BACK),
    _on_text("gru", partial(networks.Recurrent, nn.GRU), 1e-2, STEPS_BACK),
    _on_text("swiglu", networks.swiglu, 4e-3),
    Task("unet", networks.UNet, some_crops, denoising_loss, held_out_crops, "adamw", 5e-3),
)
PLAIN = _on_pictures("plain", networks.plain, "sgd", 0.05)  # deep and without shortcuts, for the ablation
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
