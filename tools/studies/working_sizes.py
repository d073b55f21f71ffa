"""What codes cost at common sizes: `python -m tools.studies.working_sizes [names] [--repeats 10]`, all models by default.

Each is measured as `fewbit bench --model tools.studies.working_sizes:gpt2` does it: exact, with its blocks checkpointed, and
with everything coded at 4 bits. The models are Hugging Face's without a head, from configurations, with random weights and
without dropout: 6 layers on 2,048 tokens or 8 images of 224 x 224, or whole networks of convolutions on 8 images of 128 x 128.
Then comes the small ResNet of `tools.studies.resnet` on scikit-learn's digits. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fewbit import terminal
from fewbit.bench import compare
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


# by the name under which it is reported: the model and the dtype
MODELS: dict[str, tuple[Callable[[], Subject], torch.dtype]] = {
    "GPT-2": (gpt2, torch.float32),
    "GPT-2, bfloat16": (gpt2, torch.bfloat16),
    "BERT": (bert, torch.float32),
    "Llama": (llama, torch.float32),
    "ViT": (vit, torch.float32),
    "ConvNeXt": (convnext, torch.float32),
    "ResNet-18": (resnet18, torch.float32),
    "ResNet, digits": (digits, torch.float32),
}
COLUMNS = ("calls", "moved", "kept", "peak", "time")


def compare_all(console: Console, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Print, and give, what steps take of the exact ones: coded, and checkpointed at the level of blocks that peaks lowest."""
    results: dict[str, Any] = {}
    columns = [f"{kind}\n{column}" for kind in ("coded", "checkpoint") for column in COLUMNS]
    view = terminal.table(("\nmodel",), tuple(columns))
    for name in names:
        make, dtype = MODELS[name]
        cpu, threads = torch.device("cpu"), torch.get_num_threads()
        settings = compare.Settings(name, make, [BITS], [dtype], [cpu], threads, repeats)
        exact, *runs = compare.run(settings).cases[0].runs
        found = [_shares(run, exact) for run in runs]
        *checkpointed, coded = found
        results[name] = {"coded": coded, "checkpoint": min(checkpointed, key=lambda each: each["peak"])}
        results[name]["exact seconds"] = exact.seconds
        view.add_row(name, *(f"{results[name][kind][column]:.2f}" for kind in ("coded", "checkpoint") for column in COLUMNS))
    console.print(view, "")
    return results


def _shares(run: compare.RunResult, exact: compare.RunResult) -> dict[str, Any]:
    """Calls and bytes moved outside of products, bytes kept, peak and time, over those of the exact run."""
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
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help="all by default")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of all steps (%(default)s)")
    arguments = parser.parse_args()
    results = compare_all(terminal.console(at_least=120), arguments.names or list(MODELS), arguments.repeats)
    common.write("working_sizes", results)


if __name__ == "__main__":
    main()
