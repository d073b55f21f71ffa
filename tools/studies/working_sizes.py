"""Models of common size as `fewbit bench --model` takes them: `fewbit bench --model tools.studies.working_sizes:gpt2`.

Hugging Face's models without a head, from configurations, with random weights and without dropout: 6 layers on 2,048 tokens or
8 images of 224 x 224, or whole networks of convolutions on 8 images of 128 x 128. Then the small ResNet of
`tools.studies.resnet` on scikit-learn's digits. Nothing is downloaded.
"""

from __future__ import annotations

from functools import partial

import torch

from fewbit.bench.models import Subject
from tools.studies import huggingface, resnet
from tools.studies.huggingface import Batch, Case

BATCH, TOKENS, VOCABULARY = 8, 256, 1024
_TEXT = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": VOCABULARY}
_TEXT |= {"max_position_embeddings": TOKENS}
_GPT2 = {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": TOKENS, "vocab_size": VOCABULARY}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
_VIT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
_RESNET18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}


def sample_tokens(sampler: torch.Generator) -> Batch:
    """Random ones."""
    return {"input_ids": torch.randint(VOCABULARY, (BATCH, TOKENS), generator=sampler)}


def sample_images(sampler: torch.Generator, size: int) -> Batch:
    """Noise, of size x size."""
    return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=sampler)}


CASES = {
    "gpt2": Case("GPT2Model", _GPT2, sample_tokens),
    "bert": Case("BertModel", {**_TEXT, "intermediate_size": 2048}, sample_tokens),
    "llama": Case("LlamaModel", {**_TEXT, "intermediate_size": 1408, "use_cache": False}, sample_tokens),
    "vit": Case("ViTModel", _VIT, partial(sample_images, size=224)),
    "resnet18": Case("ResNetModel", _RESNET18, partial(sample_images, size=128)),
    "convnext": Case("ConvNextModel", {}, partial(sample_images, size=128)),  # the smallest that there is by default
}


def subject(name: str) -> Subject:
    """The model of that name in CASES, and a batch."""
    case = CASES[name]
    return Subject(huggingface.build(case), case.sample(torch.Generator().manual_seed(0)))


gpt2, bert, llama, vit, resnet18, convnext = (partial(subject, name) for name in CASES)


def digits() -> Subject:
    """The ResNet of `tools.studies.resnet` and its loss, on a batch of digits."""
    (images, labels), _ = resnet.digits()
    batch = images[: resnet.BATCH], labels[: resnet.BATCH]
    return Subject(resnet.ResNet(), batch, lambda model, batch: resnet.loss_of(model, *batch))
