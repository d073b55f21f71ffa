"""What codes cost at common sizes: `python -m tools.studies.working_sizes [names] [--device cuda]`, all models by default.

Each model is measured as by `fewbit bench --model tools.studies.working_sizes:gpt2`: exact, with its blocks checkpointed, and
with everything coded at 4 bits. The models are Hugging Face's without a head, from configurations, with random weights and
without dropout. They have 6 layers on 2,048 tokens or 8 images of 224 x 224, or are whole convolutional networks on 8 images of
128 x 128. Another one is the small ResNet of `tools.studies.resnet` on scikit-learn's digits. On a GPU models have common
widths, 12 layers of transformers (Llama: 8), and 65,536 tokens (Llama: 16,384) or 256 images of 224 x 224, since a GPU with
small steps waits for Python. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fewbit import terminal
from fewbit.bench import compare
from fewbit.bench.environment import device_name, versions
from fewbit.bench.models import Subject
from tools.studies import common, huggingface, resnet
from tools.studies.huggingface import Batch, Case

BITS = "4"
BATCH, TOKENS, VOCABULARY = 8, 256, 1024
_TEXT = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": VOCABULARY}
_TEXT |= {"max_position_embeddings": TOKENS}
_GPT2 = {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": TOKENS, "vocab_size": VOCABULARY}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
_VIT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
_RESNET18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}


def sample_tokens(sampler: torch.Generator, more: int = 1, longer: int = 1) -> Batch:
    """Random tokens. more, longer: factors for the number and the length of sequences"""
    return {"input_ids": torch.randint(VOCABULARY, (more * BATCH, longer * TOKENS), generator=sampler)}


def sample_images(sampler: torch.Generator, size: int, more: int = 1) -> Batch:
    """Noise of size x size. more: factor for the number of images"""
    return {"pixel_values": torch.randn(more * BATCH, 3, size, size, generator=sampler)}


CASES = {
    "gpt2": Case("GPT2Model", _GPT2, sample_tokens),
    "bert": Case("BertModel", {**_TEXT, "intermediate_size": 2048}, sample_tokens),
    "llama": Case("LlamaModel", {**_TEXT, "intermediate_size": 1408, "use_cache": False}, sample_tokens),
    "vit": Case("ViTModel", _VIT, partial(sample_images, size=224)),
    "resnet18": Case("ResNetModel", _RESNET18, partial(sample_images, size=128)),
    "convnext": Case("ConvNextModel", {}, partial(sample_images, size=128)),  # the default configuration is the smallest model
}
_WIDE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "vocab_size": VOCABULARY}
_WIDE |= {"max_position_embeddings": 4 * TOKENS, "intermediate_size": 4096}
_WIDE_GPT2 = {**_GPT2, "n_embd": 1024, "n_layer": 12, "n_head": 16, "n_positions": 4 * TOKENS}
_WIDE_LLAMA = {**_WIDE, "hidden_size": 2048, "num_hidden_layers": 8, "intermediate_size": 5632, "use_cache": False}
LARGE = {  # for GPUs
    "gpt2": Case("GPT2Model", _WIDE_GPT2, partial(sample_tokens, more=8, longer=4)),
    "bert": Case("BertModel", _WIDE, partial(sample_tokens, more=8, longer=4)),
    "llama": Case("LlamaModel", _WIDE_LLAMA, partial(sample_tokens, more=2, longer=4)),
    "vit": Case("ViTModel", {**_WIDE, "image_size": 224}, partial(sample_images, size=224, more=32)),
    "resnet50": Case("ResNetModel", {}, partial(sample_images, size=224, more=32)),
    "convnext": Case("ConvNextModel", {}, partial(sample_images, size=224, more=32)),
}


def subject(case: Case) -> Subject:
    """The model, and a batch."""
    return Subject(huggingface.build(case), case.sample(torch.Generator().manual_seed(0)))


gpt2, bert, llama, vit, resnet18, convnext = (partial(subject, case) for case in CASES.values())


def digits() -> Subject:
    """The ResNet of `tools.studies.resnet` and its loss, on a batch of digits."""
    (images, labels), _ = resnet.digits()
    batch = images[: resnet.BATCH], labels[: resnet.BATCH]
    return Subject(resnet.ResNet(), batch, lambda model, batch: resnet.loss_of(model, *batch))


Make = tuple[Callable[[], Subject], torch.dtype]
Models = dict[str, Make]  # name in the report -> a function that makes the model, and the dtype
MODELS: Models = {
    "GPT-2": (gpt2, torch.float32),
    "GPT-2, bfloat16": (gpt2, torch.bfloat16),
    "BERT": (bert, torch.float32),
    "Llama": (llama, torch.float32),
    "ViT": (vit, torch.float32),
    "ConvNeXt": (convnext, torch.float32),
    "ResNet-18": (resnet18, torch.float32),
    "ResNet, digits": (digits, torch.float32),
}
ON_GPUS: Models = {
    "GPT-2": (partial(subject, LARGE["gpt2"]), torch.bfloat16),
    "GPT-2, float32": (partial(subject, LARGE["gpt2"]), torch.float32),
    "BERT": (partial(subject, LARGE["bert"]), torch.bfloat16),
    "Llama": (partial(subject, LARGE["llama"]), torch.bfloat16),
    "ViT": (partial(subject, LARGE["vit"]), torch.bfloat16),
    "ConvNeXt": (partial(subject, LARGE["convnext"]), torch.bfloat16),
    "ResNet-50": (partial(subject, LARGE["resnet50"]), torch.bfloat16),
    "ResNet-50, float32": (partial(subject, LARGE["resnet50"]), torch.float32),
}
COLUMNS = ("calls", "moved", "kept", "peak", "time")


def compare_all(console: Console, models: Models, repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Print and return the figures of coded and checkpointed steps, relative to exact ones. Of several levels of blocks, the
    one with the lowest checkpointed peak counts."""
    results: dict[str, Any] = {}
    columns = [f"{kind}\n{column}" for kind in ("coded", "checkpoint") for column in COLUMNS]
    view = terminal.table(("\nmodel",), tuple(columns))
    for name, (make, dtype) in models.items():
        settings = compare.Settings(name, make, [BITS], [dtype], [torch.device(device)], torch.get_num_threads(), repeats)
        exact, *runs = compare.run(settings).cases[0].runs
        found = [_shares(run, exact) for run in runs]
        *checkpointed, coded = found
        results[name] = {"coded": coded, "checkpoint": min(checkpointed, key=lambda each: each["peak"])}
        results[name] |= {"exact seconds": exact.seconds, "exact peak bytes": exact.peak_bytes}
        view.add_row(name, *(f"{results[name][kind][column]:.2f}" for kind in ("coded", "checkpoint") for column in COLUMNS))
    console.print(view, "")
    return results


def _shares(run: compare.RunResult, exact: compare.RunResult) -> dict[str, Any]:
    """Calls and bytes moved outside of products, bytes kept, peak and time, relative to the exact run."""
    assert run.peak_bytes is not None, "followed on the CPU"
    assert exact.peak_bytes is not None, "likewise"
    return {
        "calls": run.calls / exact.calls,
        "moved": run.moved_bytes / exact.moved_bytes,
        "kept": run.kept_bytes / exact.kept_bytes,
        "peak": run.peak_bytes / exact.peak_bytes,
        "time": run.ratio["median"],
        "middle half": [run.ratio["p25"], run.ratio["p75"]],
    }


def main() -> None:
    """Measure the models asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}; on GPUs of {', '.join(ON_GPUS)}; all by default")
    parser.add_argument("--device", default="cpu", help="%(default)s by default")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of all steps (%(default)s)")
    arguments = parser.parse_args()
    all_models = MODELS if arguments.device == "cpu" else ON_GPUS
    if unknown := sorted({*arguments.names} - {*all_models}):
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(all_models)}")
    models = {name: all_models[name] for name in arguments.names or all_models}
    results = compare_all(terminal.console(at_least=120), models, arguments.repeats, arguments.device)
    if arguments.device == "cpu":
        common.write("working_sizes", results)
    else:
        where = {"device": device_name(torch.device(arguments.device)), "versions": dict(versions())}
        common.write(f"working_sizes-{arguments.device}", {**where, "models": results})


if __name__ == "__main__":
    main()
