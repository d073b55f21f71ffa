"""torchvision's models, on small images. Models are made small if their arguments allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tools.studies.zoo.entry import CLASSES, Entry, WithLoss, cross_entropy, images

Tensor = torch.Tensor
FAMILY = "torchvision"
_STEM = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
# function or class of torchvision.models -> arguments, and the side of its images
CLASSIFIERS: dict[str, tuple[Mapping[str, Any], int]] = {
    "resnet18": ({}, 64),
    "densenet.DenseNet": ({"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16, "drop_rate": 0.1}, 64),
    "GoogLeNet": ({"init_weights": False, "aux_logits": False}, 64),
    "squeezenet1_1": ({}, 64),
    "shufflenet_v2_x0_5": ({}, 64),
    "mobilenet_v2": ({"width_mult": 0.25}, 64),
    "mobilenet_v3_small": ({}, 64),
    "mnasnet0_5": ({}, 64),
    "efficientnet_b0": ({}, 32),
    "regnet_y_400mf": ({}, 32),
    "convnext_tiny": ({"stochastic_depth_prob": 0.1}, 32),
    "swin_transformer.SwinTransformer": (_STEM, 64),
    "vision_transformer.VisionTransformer": (
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128, "dropout": 0.1},
        32,
    ),
    "maxvit.MaxVit": (
        {
            **{"input_size": (64, 64), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32]},
            **{"block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.1},
        },
        64,
    ),
}


def masks(count: int = 2, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images, and a class for each place."""
    return torch.randn(count, 3, size, size), torch.randint(CLASSES, (count, size, size))


def videos() -> tuple[Tensor, Tensor]:
    """Short and small videos."""
    return torch.randn(2, 3, 8, 32, 32), torch.randint(CLASSES, (2,))


def build(name: str, options: Mapping[str, Any], loss: Callable[[Any, Tensor], Tensor] = cross_entropy) -> nn.Module:
    """The model of that name with a loss."""
    from torchvision import models  # type: ignore[import-not-found]

    found: Any = models
    for part in name.split("."):
        found = getattr(found, part)
    return WithLoss(found(num_classes=CLASSES, **options), loss)


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, (options, size) in CLASSIFIERS.items():
        yield Entry(name, FAMILY, lambda name=name, options=options: build(name, options), lambda size=size: images(size, 2))
    of_places = lambda output, target: functional.cross_entropy(output["out"], target)  # noqa: E731
    bare = {"weights_backbone": None}
    for name in ("segmentation.lraspp_mobilenet_v3_large", "segmentation.fcn_resnet50"):
        yield Entry(name, FAMILY, lambda name=name: build(name, bare, of_places), masks)
    for name in ("video.r3d_18", "video.mc3_18"):
        yield Entry(name, FAMILY, lambda name=name: build(name, {}), videos)
