"""Hugging Face's models from small configurations, with the dropout of their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.studies.zoo.entry import BATCH, CLASSES, TOKENS, VOCABULARY, WIDTH, Entry

Tensor = torch.Tensor
Options = Mapping[str, Any]

TEXT, VISION, SOUND = "text", "vision", "sound"
_HEADS, _SIZE = 4, 32
# names of sizes in configurations; each configuration takes those that it knows
_SMALL: Options = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    "num_decoder_layers": 2,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // _HEADS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "hidden_dim"), 3 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 2 * TOKENS),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "pad_token_id"), 0),
    "eos_token_id": 1,
    "image_size": _SIZE,
}


def _text() -> dict[str, Tensor]:
    numbers = torch.randint(2, VOCABULARY, (BATCH, TOKENS))
    return {"input_ids": numbers, "labels": numbers}


def _images(size: int = _SIZE) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": torch.randint(CLASSES, (BATCH,))}


def _pairs() -> dict[str, Any]:
    images = {"pixel_values": torch.randn(BATCH, 3, _SIZE, _SIZE)}
    return {"input_ids": torch.randint(2, VOCABULARY, (BATCH, 16)), **images, "return_loss": torch.tensor(True)}


def _waves(samples: int = 3200) -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, samples), "labels": torch.randint(CLASSES, (BATCH,))}


def _spectra() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 80, 2 * 2 * TOKENS), "labels": _text()["input_ids"]}


CAUSAL: dict[str, Options] = {
    "GPT2LMHeadModel": {},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTBigCodeForCausalLM": {},
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "OPTForCausalLM": {"word_embed_proj_dim": WIDTH},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {},
    "MptForCausalLM": {"max_seq_len": TOKENS},
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    },
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "OlmoeForCausalLM": {},
    "CohereForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "Glm4ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "NemotronForCausalLM": {},
    "PersimmonForCausalLM": {},
    "JetMoeForCausalLM": {"kv_channels": 16},
    "DbrxForCausalLM": {
        "max_seq_len": TOKENS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV3ForCausalLM": {
        **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 16, "head_dim": 8},
        "num_key_value_heads": 4,
    },
    "GptOssForCausalLM": {"sliding_window": 8},
    "XGLMForCausalLM": {"attention_heads": _HEADS},
    "BioGptForCausalLM": {},
    "CTRLLMHeadModel": {"dff": 2 * WIDTH},
    "OpenAIGPTLMHeadModel": {},
    "MambaForCausalLM": {"time_step_rank": 4, "state_size": 8, "intermediate_size": 2 * WIDTH},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "RwkvForCausalLM": {"attention_hidden_size": WIDTH, "context_length": TOKENS},
    "RecurrentGemmaForCausalLM": {"lru_width": WIDTH, "attention_window_size": 16, "num_hidden_layers": 3},
    "ModernBertDecoderForCausalLM": {"local_attention": 16},
}
MASKED: dict[str, Options] = {
    "BertForMaskedLM": {},
    "RobertaForMaskedLM": {},
    "ElectraForMaskedLM": {},
    "DistilBertForMaskedLM": {},
    "AlbertForMaskedLM": {},
    "DebertaForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "XLNetLMHeadModel": {"d_inner": 3 * WIDTH},
    "LongformerForMaskedLM": {"attention_window": 8},
    "BigBirdForMaskedLM": {"attention_type": "original_full"},
    "ConvBertForMaskedLM": {"conv_kernel_size": 3},
    "MobileBertForMaskedLM": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "FNetForMaskedLM": {},
    "FunnelForMaskedLM": {"block_sizes": [1, 1], "d_head": 16, "d_inner": 3 * WIDTH},
    "LayoutLMForMaskedLM": {},
    "MPNetForMaskedLM": {},
    "ModernBertForMaskedLM": {"local_attention": 16, "cls_token_id": 0, "sep_token_id": 1},
    "NystromformerForMaskedLM": {"num_landmarks": 8, "segment_means_seq_len": TOKENS},
    "RemBertForMaskedLM": {"input_embedding_size": 32, "output_embedding_size": 32},
    "RoFormerForMaskedLM": {},
    "SqueezeBertForMaskedLM": {},
    "YosoForMaskedLM": {"use_expectation": True},
    "EsmForMaskedLM": {"mask_token_id": 2, "position_embedding_type": "rotary"},
    "MegatronBertForMaskedLM": {},
    "IBertForMaskedLM": {},
    "NomicBertForMaskedLM": {},
}
TO_SEQUENCES: dict[str, Options] = {
    "T5ForConditionalGeneration": {"decoder_start_token_id": 0},
    "MT5ForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {"decoder_start_token_id": 0, "local_radius": 7},
    "SwitchTransformersForConditionalGeneration": {
        "decoder_start_token_id": 0,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "BartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "PegasusXForConditionalGeneration": {"block_size": 16, "num_global_tokens": 4},
    "BlenderbotForConditionalGeneration": {},
    "MarianMTModel": {},
    "M2M100ForConditionalGeneration": {},
    "LEDForConditionalGeneration": {
        **{"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    },
    "ProphetNetForConditionalGeneration": {
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), _HEADS),
    },
    "NllbMoeForConditionalGeneration": {
        "num_experts": 4,
        "expert_capacity": 32,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}
_STAGES: Options = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
_FOUR = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
PICTURES: dict[str, Options] = {
    "ViTForImageClassification": {"patch_size": 8},
    "DeiTForImageClassification": {"patch_size": 8},
    "BeitForImageClassification": {"patch_size": 8},
    "Dinov2ForImageClassification": {"patch_size": 8},
    "Dinov2WithRegistersForImageClassification": {"patch_size": 8},
    "ViTMSNForImageClassification": {"patch_size": 8},
    "SiglipForImageClassification": {
        "vision_config": {
            **{"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": _SIZE, "patch_size": 8},
        }
    },
    "CLIPForImageClassification": {
        "vision_config": {
            **{"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": _SIZE, "patch_size": 8},
        }
    },
    "SwinForImageClassification": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    "Swinv2ForImageClassification": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    "ConvNextForImageClassification": {**_STAGES, "patch_size": 2},
    "ConvNextV2ForImageClassification": {**_STAGES, "patch_size": 2},
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "RegNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16},
    "BitForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 4},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "min_depth": 8},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25, "min_depth": 8},
    "EfficientNetForImageClassification": {
        **{"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    },
    "SegformerForImageClassification": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]},
        **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [4, 4]},
    },
    "PvtForImageClassification": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "sequence_reduction_ratios": [2, 1]},
        **{"patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [4, 4]},
    },
    "PvtV2ForImageClassification": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "sr_ratios": [2, 1]},
        **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [4, 4]},
    },
    "PoolFormerForImageClassification": _FOUR,
    "FocalNetForImageClassification": {
        **{"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        "patch_size": 2,
    },
    "CvtForImageClassification": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "LevitForImageClassification": {
        "hidden_sizes": [16, 32, 48],
        "depths": [1, 1, 1],
        "num_attention_heads": [1, 2, 3],
        "key_dim": [8, 8, 8],
    },
    "MobileViTForImageClassification": {
        **{"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64}
    },
    "MobileViTV2ForImageClassification": {"width_multiplier": 0.25, "image_size": 64},
    "SwiftFormerForImageClassification": {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "TextNetForImageClassification": {},
    "HieraForImageClassification": {
        **{"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2]},
        **{"masked_unit_size": [4, 4], "num_query_pool": 1},
    },
    "PerceiverForImageClassificationLearned": {
        "num_latents": 16,
        "d_latents": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
    },
    "HGNetV2ForImageClassification": {
        **{"stem_channels": [3, 8, 16], "hidden_sizes": [16, 32], "depths": [1, 1], "stage_in_channels": [16, 16]},
        **{"stage_mid_channels": [8, 16], "stage_out_channels": [16, 32], "stage_num_blocks": [1, 1]},
        **{"stage_downsample": [False, True], "stage_light_block": [False, True], "stage_kernel_size": [3, 5]},
        **{"stage_numb_of_layers": [2, 2], "num_channels": 3},
    },
}
_WAVES: Options = {
    **{"conv_dim": [32, 32, 32], "conv_stride": [5, 4, 4], "conv_kernel": [10, 4, 4], "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32},
    **{"mask_time_length": 4, "tdnn_dim": [32, 32], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1]},
}
SOUNDS: dict[str, tuple[Options, Callable[[], Any]]] = {
    "WhisperForConditionalGeneration": ({"num_mel_bins": 80, "suppress_tokens": None, "begin_suppress_tokens": None}, _spectra),
    "Wav2Vec2ForSequenceClassification": (_WAVES, _waves),
    "HubertForSequenceClassification": (_WAVES, _waves),
    "WavLMForSequenceClassification": (_WAVES, _waves),
    "SEWForSequenceClassification": ({**_WAVES, "squeeze_factor": 2}, _waves),
    "Wav2Vec2ConformerForSequenceClassification": ({**_WAVES, "conv_depthwise_kernel_size": 7}, _waves),
    "ASTForAudioClassification": (
        {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8},
        lambda: {"input_values": torch.randn(BATCH, 64, 16), "labels": torch.randint(CLASSES, (BATCH,))},
    ),
    "Speech2TextForConditionalGeneration": (
        {"input_feat_per_channel": 16, "input_channels": 1, "conv_channels": 32, "max_source_positions": 128},
        lambda: {"input_features": torch.randn(BATCH, 64, 16), "labels": _text()["input_ids"]},
    ),
}
_TOWER = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT_TOWER: Options = {**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
_IMAGE_TOWER: Options = {**_TOWER, "image_size": _SIZE, "patch_size": 8}
_TOWERS: Options = {"text_config": {**_TEXT_TOWER, "pad_token_id": 0}, "vision_config": _IMAGE_TOWER, "projection_dim": 32}
OTHERS: dict[str, tuple[Options, Callable[[], Any]]] = {
    "CLIPModel": (_TOWERS, _pairs),
    "SiglipModel": (_TOWERS, _pairs),
    "ChineseCLIPModel": (_TOWERS, _pairs),
    "AltCLIPModel": (
        {**_TOWERS, "text_config": {**_TEXT_TOWER, "pad_token_id": 0, "project_dim": 32, "max_position_embeddings": 32}},
        _pairs,
    ),
    "ViTMAEForPreTraining": (
        {
            "patch_size": 8,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
            "decoder_num_attention_heads": 4,
        },
        lambda: {"pixel_values": torch.randn(BATCH, 3, _SIZE, _SIZE)},
    ),
    "TimeSeriesTransformerForPrediction": (
        {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1},
        lambda: {
            "past_values": torch.rand(BATCH, 18),
            "past_time_features": torch.rand(BATCH, 18, 1),
            "past_observed_mask": torch.ones(BATCH, 18),
            "future_values": torch.rand(BATCH, 8),
            "future_time_features": torch.rand(BATCH, 8, 1),
        },
    ),
    "PatchTSTForPrediction": (
        {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8},
        lambda: {"past_values": torch.rand(BATCH, 32, 2), "future_values": torch.rand(BATCH, 8, 2)},
    ),
    "PatchTSMixerForPrediction": (
        {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8},
        lambda: {"past_values": torch.rand(BATCH, 32, 2), "future_values": torch.rand(BATCH, 8, 2)},
    ),
}


def entries() -> Iterator[Entry]:
    """All entries of this file."""
    for name, options in {**CAUSAL, **MASKED, **TO_SEQUENCES}.items():
        yield _entry(name, TEXT, options, _text)
    for name, options in PICTURES.items():
        yield _entry(name, VISION, options, partial(_images, _side(options.get("image_size", _SIZE))))
    for name, (options, batch) in SOUNDS.items():
        yield _entry(name, SOUND, options, batch)
    for name, (options, batch) in OTHERS.items():
        yield _entry(name, "others", options, batch)


def build(name: str, options: Options) -> nn.Module:
    """The model of that class, from a small configuration with these options."""
    import transformers

    cls = getattr(transformers, name)
    known = cls.config_class()
    small = {key: value for key, value in _SMALL.items() if key in vars(known) and key not in options}
    return cls(cls.config_class(num_labels=CLASSES, **small, **options))


def _entry(name: str, family: str, options: Options, batch: Callable[[], Any]) -> Entry:
    return Entry(name, family, lambda: build(name, options), batch)


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]
