"""Convert small Hugging Face models, made from configurations: `python -m tools.studies.huggingface [NAME ...]`.

The figures of each model, at 4 bits, are: whether the output has the same bits and the state the same keys; the bytes kept for
backward before and after, and the error of `fewbit.memory(...).plan(...)` in predicting the latter; the error of the gradient
with the shipped tables, and with tables that `fewbit.calibrate` makes from another batch; and the loss after 50 steps from the
same seed, exact, coded and calibrated. The data can be learnt: models of text continue sequences with equal steps, or fill gaps
in sequences of equal tokens; models of images find the brighter colour.

The table is printed, and written to tools/results/ as JSON.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import common

Tensor = torch.Tensor
Batch = dict[str, Tensor]

BITS, STEPS, LEARNING_RATE = 4, 50, 3e-3
BATCH, TOKENS, VOCABULARY, CLASSES = 16, 64, 64, 3
_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_ENCODER = {**_TEXT, "intermediate_size": 256, "max_position_embeddings": 2 * TOKENS}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": TOKENS}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


class Case(NamedTuple):
    """The class of a model in transformers, its configuration's arguments, and a function that draws its batches."""

    model: str
    options: dict[str, Any]
    sample: Callable[[torch.Generator], Batch]


def sample_text(sampler: torch.Generator) -> Batch:
    """Sequences that increase by one of three steps, modulo the vocabulary. The target is each token, or the next one."""
    start = torch.randint(1, VOCABULARY, (BATCH, 1), generator=sampler)
    step = torch.randint(1, 4, (BATCH, 1), generator=sampler)
    tokens = 1 + (start + step * torch.arange(TOKENS)) % (VOCABULARY - 1)
    return {"input_ids": tokens, "labels": tokens}


def sample_masked(sampler: torch.Generator) -> Batch:
    """Sequences that repeat a single token. A fifth of the places is hidden, and their tokens are the target."""
    tokens = torch.randint(1, VOCABULARY, (BATCH, 1), generator=sampler).repeat(1, TOKENS)
    hidden = torch.rand(tokens.shape, generator=sampler) < 0.2
    return {"input_ids": tokens.masked_fill(hidden, 0), "labels": tokens.masked_fill(~hidden, -100)}


def sample_images(sampler: torch.Generator) -> Batch:
    """Noise in which one colour is brighter. That colour is the target."""
    labels = torch.randint(CLASSES, (BATCH,), generator=sampler)
    pixels = torch.randn(BATCH, 3, 32, 32, generator=sampler)
    pixels[torch.arange(BATCH), labels] += 0.5
    return {"pixel_values": pixels, "labels": labels}


_IMAGES = {"image_size": 32, "num_channels": 3, "num_labels": CLASSES}
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 192, "num_layers": 2, "num_heads": 4}
CASES = {
    "BERT": Case("BertForMaskedLM", _ENCODER, sample_masked),
    "RoBERTa": Case("RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}, sample_masked),
    "GPT-2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TOKENS, **_SPECIAL},
        sample_text,
    ),
    "Llama": Case("LlamaForCausalLM", {**_LLAMA, **_SPECIAL}, sample_text),
    "Qwen2": Case("Qwen2ForCausalLM", {**_LLAMA, **_SPECIAL}, sample_text),
    "Gemma": Case("GemmaForCausalLM", {**_LLAMA, **_SPECIAL, "head_dim": 16}, sample_text),
    "T5, gated": Case(
        "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}, sample_masked
    ),
    "ViT": Case("ViTForImageClassification", {**_ENCODER, **_IMAGES, "patch_size": 4}, sample_images),
    "ResNet": Case(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic", "num_labels": CLASSES},
        sample_images,
    ),
    "ConvNeXt": Case(
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "patch_size": 2, "num_labels": CLASSES},
        sample_images,
    ),
}


def build(case: Case) -> nn.Module:
    """The model in training mode, with seeded weights. It has no dropout, so that two forward passes can be compared."""
    import transformers

    cls = getattr(transformers, case.model)
    config = cls.config_class(**case.options)
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return cls(config).train()


def train(model: nn.Module, case: Case, steps: int) -> list[float]:
    """Losses of so many steps of AdamW; the batches are the same for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    sampler = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = model(**case.sample(sampler)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """All figures of one model."""
    exact = build(case)
    coded = common.coded(exact, bits=BITS)
    batch = case.sample(torch.Generator().manual_seed(1))
    same_keys = list(exact.state_dict()) == list(coded.state_dict())
    kept = {label: common.kept_bytes(model, batch) for label, model in (("exact", exact), ("coded", coded))}
    kept["predicted"] = fewbit.memory(exact, batch).plan(bits=BITS).after_bytes
    calibrated = copy.deepcopy(coded)
    fewbit.calibrate(calibrated, [case.sample(torch.Generator().manual_seed(2))])
    outputs = [model(**batch) for model in (exact, coded)]
    equal = all(torch.equal(one, other) for one, other in zip(*(output[:2] for output in outputs), strict=True))
    gradients = []
    for model in (exact, coded, calibrated):
        model.zero_grad()
        loss = model(**batch).loss
        gradients.append({common.ALL: torch.cat([each.flatten() for each in _gradients(loss, model)]).double()})
    labels = ("coded", "calibrated")
    errors = {
        label: common.gradient_errors(gradients[:1], [each])[common.ALL]
        for label, each in zip(labels, gradients[1:], strict=True)
    }
    models = {"exact": exact, "coded": coded, "calibrated": calibrated}
    losses = {label: train(copy.deepcopy(model), case, steps) for label, model in models.items()}
    return {"bits equal": equal, "keys equal": same_keys, "kept_bytes": kept, "gradient_errors": errors, "losses": losses}


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad], allow_unused=True)
    return [each for each in found if each is not None]


def compare_all(console: Console, names: list[str], steps: int = STEPS) -> dict[str, Any]:
    """Print and return the figures of these models."""
    kept_columns = ("kept, KiB\nexact", "\ncoded", "pre-\ndicted", "devi-\nation", "of\nexact")
    loss_columns = ("first\nloss", "last\nexact", "\ncoded", "cali-\nbrated")
    columns = ("bits", "keys", *kept_columns, "gradient\nerror", "cali-\nbrated", *loss_columns)
    view = terminal.table((f"{BITS} bits, {steps} steps",), columns)
    results = {}
    for name in names:
        found = results[name] = compare(CASES[name], steps)
        kept, losses = found["kept_bytes"], found["losses"]
        last = {label: statistics.fmean(each[-5:]) for label, each in losses.items()}
        view.add_row(
            name,
            *("same" if found[key] else "DIFFER" for key in ("bits equal", "keys equal")),
            *(f"{kept[label] / 1024:.0f}" for label in ("exact", "coded", "predicted")),
            f"{kept['predicted'] / kept['coded'] - 1:.1%}",
            f"{kept['coded'] / kept['exact']:.3f}",
            *(f"{error:.4f}" for error in found["gradient_errors"].values()),
            f"{losses['exact'][0]:.4f}",
            *(f"{each:.4f}" for each in last.values()),
        )
    console.print(view, "\nlast: the mean of five steps", "")
    return results


def conversion_seconds(console: Console) -> dict[str, float]:
    """Seconds of converting a Llama of 1.1 billion parameters on the meta device."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    start = time.perf_counter()
    fewbit.convert(model, bits=BITS)
    seconds, parameters = time.perf_counter() - start, sum(each.numel() for each in model.parameters())
    console.print(f"conversion of a Llama of {parameters / 1e9:.2f} billion parameters: {seconds:.3f} s\n")
    return {"parameters": parameters, "seconds": seconds}


def main() -> None:
    """Run on the models asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CASES], help="all by default")
    arguments = parser.parse_args()
    console = terminal.console(at_least=120)
    results = {"models": compare_all(console, arguments.names or list(CASES)), "conversion": conversion_seconds(console)}
    common.write("huggingface", results)


if __name__ == "__main__":
    main()
