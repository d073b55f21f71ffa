"""timm's models, each made small by the arguments of its class."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from tools.studies.zoo.entry import CLASSES, Entry, WithLoss, cross_entropy, images

FAMILY = "timm"
_SIZE = 32
_VIT: Mapping[str, Any] = {"img_size": _SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
_DROPS: Mapping[str, Any] = {"drop_rate": 0.1, "drop_path_rate": 0.1}
_STAGES: Mapping[str, Any] = {"img_size": _SIZE, "depths": (1, 1), **_DROPS}
# name in timm, or a class and its module -> arguments that make it small
MODELS: dict[str, Mapping[str, Any]] = {
    "vit_tiny_patch16_224": {**_VIT, **_DROPS},
    "deit3_small_patch16_224": {**_VIT, **_DROPS},
    "beit_base_patch16_224": _VIT,
    "eva02_tiny_patch14_224": _VIT,
    "cait_xxs24_224": {**_VIT, "depth_token_only": 1},
    "convit_tiny": _VIT,
    "xcit_nano_12_p8_224": _VIT,
    "mlp_mixer.MlpMixer": {"img_size": _SIZE, "patch_size": 8, "embed_dim": 64, "num_blocks": 2},
    "vit_relpos_small_patch16_224": _VIT,
    "volo.VOLO": {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "num_heads": (2, 2, 2, 2)},
    "tnt_s_legacy_patch16_224": {"img_size": _SIZE, "patch_size": 8, "embed_dim": 96, "depth": 2, "inner_dim": 16},
    "pit_ti_224": {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 4)},
    "swin_tiny_patch4_window7_224": {**_STAGES, "patch_size": 2, "embed_dim": 16, "num_heads": (2, 4), "window_size": 4},
    "swinv2_tiny_window8_256": {**_STAGES, "patch_size": 2, "embed_dim": 16, "num_heads": (2, 4), "window_size": 4},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), **_DROPS},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), **_DROPS},
    "convmixer.ConvMixer": {"dim": 32, "depth": 2},
    "metaformer.MetaFormer": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), **_DROPS},
    "focalnet.FocalNet": {"depths": (1, 1, 1, 1), "embed_dim": 16, **_DROPS},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
    "nest.Nest": {"img_size": 64, "embed_dims": (16, 16, 32), "num_heads": (1, 2, 2), "depths": (1, 1, 1)},
    "mambaout_femto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "heads": (2, 2, 2, 2)},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
    "repvit_m0_9": {"embed_dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)},
    "starnet_s050": {},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)},
    "seresnet50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)},
    "resnet26t": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},
    "res2net50_26w_4s": {"layers": (1, 1, 1, 1)},
    "skresnet18": {"layers": (1, 1, 1, 1)},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
    "nf_resnet26": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2)},
    "efficientnet_b0": _DROPS,
    "mobilenetv3_small_050": _DROPS,
    "ghostnet_050": {},
    "lcnet_035": {},
    "regnety_002": {},
    "repvgg_a0": {},
    "rexnetr_100": {"width_mult": 0.25},
    "dla34": {},
    "hrnet_w18_small": {},
    "coatnet_pico_rw_224": {"img_size": 64},
    "sequencer2d_s": {"layers": (1, 1, 1, 1), "embed_dims": (32,) * 4, "hidden_sizes": (16,) * 4, "img_size": 56},
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)},
    "efficientvit_b0": {},
    "shvit_s1": {},
    "fasternet_t0": {"depths": (1, 1, 1, 1)},
}


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model of that name with a loss."""
    import timm  # type: ignore[import-not-found]

    module, _, cls = name.partition(".")
    make = getattr(importlib.import_module(f"timm.models.{module}"), cls) if cls else partial(timm.create_model, name)
    return WithLoss(make(num_classes=CLASSES, **options), cross_entropy)


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, options in MODELS.items():
        yield Entry(name, FAMILY, partial(build, name, options), _batch(options.get("img_size", 64)))


def _batch(size: Any) -> Callable[[], Any]:
    return partial(images, size if isinstance(size, int) else size[0], 2)
