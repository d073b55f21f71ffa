"""A ResNet with joint codes on the digits of scikit-learn: `python -m tools.studies.resnet`.

It measures the accuracy on held-out digits, and the bytes that a step keeps for backward. The network trains exactly, with
joint codes, with the second method's uniform codes, and with activations quantized in both forward and backward.

The network is pre-activated: batch norm and ReLU come before each convolution, and sums carry the residual. Tables are printed,
and written to tools/results/ as JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import baselines, common

Tensor = torch.Tensor
Norm = Callable[[int], nn.Module]

WIDTHS, BLOCKS = (16, 32, 64), 3  # channels of each stage, blocks in each
BATCH, EPOCHS, TRAINING_IMAGES, LEARNING_RATE = 64, 15, 1437, 0.1


class Residual(nn.Module):
    """Twice batch norm, ReLU and convolution, added to the input: (n, c_in, h, w) to (n, c_out, h / stride, w / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm):
        super().__init__()
        self.norm1, self.relu1 = norm(c_in), nn.ReLU()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm2, self.relu2 = norm(c_out), nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.project = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.norm1(x))
        shortcut = x if self.project is None else self.project(activated)
        return shortcut + self.conv2(self.relu2(self.norm2(self.conv1(activated))))


class ResNet(nn.Module):
    """Digits (n, 1, 8, 8) to logits (n, 10)."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS, norm: Norm = nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        stages, c_in = [], widths[0]
        for c_out in widths:
            for i in range(blocks):
                stages.append(Residual(c_in, c_out, 2 if i == 0 and c_out != widths[0] else 1, norm))
                c_in = c_out
        self.blocks = nn.Sequential(*stages)
        self.norm, self.relu, self.head = norm(c_in), nn.ReLU(), nn.Linear(c_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def _coded(**options: Any) -> Callable[..., nn.Module]:
    return lambda *sizes: common.coded(ResNet(*sizes), **options)


def _naive(bits: int) -> Callable[..., nn.Module]:
    return partial(ResNet, norm=partial(baselines.QuantizedBatchNorm2d, bits=bits))


CODED: dict[str, Callable[..., nn.Module]] = {
    "exact": ResNet,
    "joint codes, 8 bits": _coded(bits=8),
    "joint codes, 4 bits": _coded(bits=4),
    "uniform codes, 8 bits": _coded(bits=8, coding="uniform"),
    "uniform codes, 4 bits": _coded(bits=4, coding="uniform"),
}
NAIVE = {"naive, 8 bits": _naive(8), "naive, 4 bits": _naive(4)}  # they hold values, so their bytes do not count


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) of mean 0 and deviation 1 with their labels: for training, and for testing."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None]  # type: ignore[attr-defined]
    labels = torch.tensor(found.target)  # type: ignore[attr-defined]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - images.mean()) / images.std())[order], labels[order]
    cut = TRAINING_IMAGES
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(images), labels)


class WithLoss(nn.Module):
    """A module of a model and its loss: it maps images and labels to the loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return loss_of(self.model, images, labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train with SGD with momentum. The learning rate falls to 0 along a cosine. The seed determines the order of images."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sampler = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=sampler)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss_of(model, images[chosen], labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model classifies correctly. The model is in evaluation mode afterwards."""
    return float((model.eval()(images).argmax(1) == labels).double().mean())


def accuracy(
    console: Console, seeds: int = 3, epochs: int = EPOCHS, widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS
) -> dict[str, Any]:
    """Accuracy on held-out digits with each seed, bytes kept by a step, and the gradient's error on a half-trained network."""
    training, test = digits()
    images, labels = training[0][:BATCH], training[1][:BATCH]
    halfway = _trained(lambda: ResNet(widths, blocks), training, epochs // 2, seed=0)
    expected = gradient(halfway, training)
    results: dict[str, Any] = {}
    columns = ("accuracy %", "least", "most", "gradient error", "kept KiB", "of exact", "s a run")
    view = terminal.table((f"{seeds} seeds, {epochs} epochs",), columns)
    for label, make in (CODED | NAIVE).items():
        start = time.perf_counter()
        percent = []
        for seed in range(seeds):
            model = _trained(lambda make=make: make(widths, blocks), training, epochs, seed)
            percent.append(100 * accuracy_of(model, *test))
        taken = (time.perf_counter() - start) / seeds
        model = make(widths, blocks)
        model.load_state_dict(halfway.state_dict())
        error = common.gradient_errors(expected, gradient(model, training))[common.ALL]
        kept = kept_bytes(model, images, labels) if label in CODED else None
        results[label] = {"accuracy_percent": percent, "gradient_error": error, "kept_bytes": kept, "seconds": taken}
        memory = ("–", "–")
        if kept:
            memory = f"{kept['all'] / 1024:.0f}", f"1/{results['exact']['kept_bytes']['all'] / kept['all']:.1f}"
        spread = f"{statistics.fmean(percent):.2f} ± {statistics.pstdev(percent):.2f}"
        view.add_row(label, spread, f"{min(percent):.2f}", f"{max(percent):.2f}", f"{error:.4f}", *memory, f"{taken:.0f}")
    console.print(view, "")
    return results


def _trained(make: Callable[[], nn.Module], training: tuple[Tensor, Tensor], epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    train(model, *training, epochs, seed)
    return model


def gradient(model: nn.Module, training: tuple[Tensor, Tensor], batches: int = 4) -> list[common.Gradients]:
    """The gradients of the loss of each of the first batches."""
    pairs = list(zip(*(each.split(BATCH) for each in training), strict=True))[:batches]
    return [common.gradients(model, lambda pair=pair: loss_of(model, *pair), lambda _: "network") for pair in pairs]


def kept_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, int]:
    """Bytes that a step keeps: by the kind of module that saved them first, and in total."""
    kinds: dict[str, int] = {"all": 0}
    modules = dict(model.named_modules())
    for part, number in fewbit.memory(WithLoss(model), (images, labels)).by_module().items():
        kind = type(modules[part.removeprefix("model.")]).__name__ if part else "loss"
        kinds[kind] = kinds.get(kind, 0) + number
        kinds["all"] += number
    return kinds


if __name__ == "__main__":
    common.write("resnet", accuracy(terminal.console(at_least=100)))
