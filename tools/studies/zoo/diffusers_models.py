"""diffusers' models, small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tools.studies.zoo.entry import Entry

Tensor = torch.Tensor
FAMILY = "diffusers"
_TEXT = 32  # width of what text gives
_SIDE = 16


class Denoiser(nn.Module):
    """A model whose output has a `sample`, and the mean square of how far that is from the target."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, target: Tensor, **arguments: Tensor) -> dict[str, Tensor]:
        sample = self.model(**arguments).sample
        return {"loss": functional.mse_loss(sample[:, : target.shape[1]], target), "sample": sample}


def _images(channels: int = 4, name: str = "sample", **others: Callable[[], Tensor]) -> dict[str, Tensor]:
    shape = (2, channels, _SIDE, _SIDE)
    return {"target": torch.randn(shape), name: torch.randn(shape), **{key: draw() for key, draw in others.items()}}


def _times() -> Tensor:
    return torch.randint(1000, (2,))


def _words() -> Tensor:
    return torch.randn(2, 8, _TEXT)


_guided = partial(_images, timestep=_times, encoder_hidden_states=_words)
_DOWN_UP: Mapping[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": _SIDE,
}
_ATTENDED: Mapping[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_HEADS: Mapping[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "sample_size": _SIDE}
MODELS: dict[str, tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]] = {
    "UNet2DModel": ({**_DOWN_UP, **_ATTENDED, "in_channels": 4, "out_channels": 4}, partial(_images, timestep=_times)),
    "UNet2DConditionModel": (
        {
            **_DOWN_UP,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **{"cross_attention_dim": _TEXT, "attention_head_dim": 8},
        },
        _guided,
    ),
    "UNet1DModel": (
        {
            **{
                "block_out_channels": (16, 32),
                "in_channels": 4,
                "out_channels": 4,
                "extra_in_channels": 32,
                "norm_num_groups": 8,
            },
            **{"down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"), "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip")},
        },
        lambda: {"target": torch.randn(2, 4, 64), "sample": torch.randn(2, 4, 64), "timestep": _times()},
    ),
    "AutoencoderKL": (
        {
            **{"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4},
            **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        },
        lambda: _images(3),
    ),
    "VQModel": (
        {
            **{"block_out_channels": (16, 32), "norm_num_groups": 8, "num_vq_embeddings": 32},
            **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        },
        lambda: _images(3),
    ),
    "AutoencoderTiny": (
        {
            **{"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)},
            **{"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        },
        lambda: _images(3),
    ),
    "AutoencoderDC": (
        {
            **{"encoder_block_out_channels": (16, 32), "decoder_block_out_channels": (16, 32), "attention_head_dim": 8},
            **{"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "latent_channels": 4},
            **{
                "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
                "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            },
            **{"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
        },
        lambda: _images(3),
    ),
    "DiTTransformer2DModel": (
        {**_HEADS, "in_channels": 4, "num_layers": 2, "num_embeds_ada_norm": 1000, "out_channels": 4},
        lambda: {**_images(name="hidden_states", timestep=_times), "class_labels": torch.randint(10, (2,))},
    ),
    "PixArtTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": _TEXT,
            "caption_channels": _TEXT,
        },
        partial(_guided, name="hidden_states"),
    ),
    "SanaTransformer2DModel": (
        {
            **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": _TEXT, "patch_size": 1},
            **{"num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32},
        },
        partial(_guided, name="hidden_states"),
    ),
    "SD3Transformer2DModel": (
        {
            **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": _TEXT},
            **{"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 16},
        },
        partial(_guided, name="hidden_states", pooled_projections=lambda: torch.randn(2, 16)),
    ),
    "FluxTransformer2DModel": (
        {
            **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
            **{
                "attention_head_dim": 16,
                "joint_attention_dim": _TEXT,
                "pooled_projection_dim": 16,
                "axes_dims_rope": (4, 4, 8),
            },
        },
        lambda: {
            **{"target": torch.randn(2, 16, 4), "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": _words()},
            **{"pooled_projections": torch.randn(2, 16), "timestep": torch.rand(2)},
            **{"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(8, 3)},
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            **{**_HEADS, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1},
            **{"joint_attention_dim": _TEXT, "caption_projection_dim": 32, "pos_embed_max_size": 64, "patch_size": 2},
        },
        partial(_guided, name="hidden_states"),
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8},
            **{"text_embed_dim": _TEXT, "time_embed_dim": 16, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8},
        },
        lambda: {
            **_guided(name="hidden_states"),
            **{"original_size": torch.ones(2, 2), "target_size": torch.ones(2, 2), "crop_coords": torch.zeros(2, 2)},
        },
    ),
    "CogVideoXTransformer3DModel": (
        {
            **{"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8},
            **{"text_embed_dim": _TEXT, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 5},
            **{"patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8},
        },
        lambda: {
            **{"target": torch.randn(2, 2, 4, 8, 8), "hidden_states": torch.randn(2, 2, 4, 8, 8)},
            **{"encoder_hidden_states": _words(), "timestep": _times()},
        },
    ),
    "WanTransformer3DModel": (
        {
            **{"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": _TEXT},
            **{"freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 32},
        },
        lambda: {
            **{"target": torch.randn(2, 4, 2, 8, 8), "hidden_states": torch.randn(2, 4, 2, 8, 8)},
            **{"encoder_hidden_states": _words(), "timestep": _times()},
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1},
            **{"cross_attention_dim": 32, "caption_channels": _TEXT},
        },
        lambda: {
            **{"target": torch.randn(2, 32, 4), "hidden_states": torch.randn(2, 32, 4), "encoder_hidden_states": _words()},
            **{"timestep": _times(), "encoder_attention_mask": torch.ones(2, 8)},
            **{"num_frames": 2, "height": 4, "width": 4},
        },
    ),
}


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model of that name with a loss."""
    import diffusers  # type: ignore[import-not-found]

    return Denoiser(getattr(diffusers, name)(**options))


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, (options, batch) in MODELS.items():
        yield Entry(name, FAMILY, partial(build, name, options), batch)
