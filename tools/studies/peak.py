"""The peak of a training step, predicted and measured: `python -m tools.studies.peak [names]`, all models by default.

The models are those of `tools.studies.working_sizes`, and GPT-2 with a head, whose logits set the peak. They run exact, with
blocks checkpointed, and coded at 4 bits. `fewbit.memory(model, batch).peak` predicts the peak from fake tensors. The measured
peak is what torch's allocator takes on the CPU. Both are beyond the model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.bench.models import Subject
from fewbit.bench.step import Step, moved
from fewbit.models.blocks import checkpoint_blocks
from fewbit.terminal import bytes_label
from tools.studies import common, huggingface, working_sizes
from tools.studies.huggingface import Case

CPU = torch.device("cpu")
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "exact": lambda model: model,
    "checkpointed": checkpoint_blocks,
    "coded": partial(fewbit.convert, bits=4),
}


def language_model() -> Subject:
    """GPT-2 with a head of 16,384 words and its loss, on 2,048 tokens."""
    options = {**working_sizes._GPT2, "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 16384}
    tokens = torch.randint(16384, (working_sizes.BATCH, working_sizes.TOKENS), generator=torch.Generator().manual_seed(0))
    model = huggingface.build(Case("GPT2LMHeadModel", options, working_sizes.sample_tokens))
    return Subject(model, {"input_ids": tokens, "labels": tokens})


MODELS = {**working_sizes.MODELS, "GPT-2, logits": (language_model, torch.float32)}


def compare(subject: Subject) -> dict[str, dict[str, Any]]:
    """Way -> bytes predicted and measured beyond the model, their ratio, and the moment of the peak."""
    found = {}
    for way, change in WAYS.items():
        model = change(copy.deepcopy(subject.model))
        step = Step(subject._replace(model=model))
        step()  # makes all that is made once, before anything is measured
        measured = step.peak_bytes(CPU)
        assert measured is not None, "the CPU's memory is followed"
        peak = fewbit.memory(model, subject.batch, fake=True, loss_fn=subject.loss_fn).peak
        found[way] = {"predicted": peak.beyond_model, "measured": measured, "ratio": peak.beyond_model / measured}
        found[way] |= {"moment": peak.moment, "head": peak.head}
    return found


def compare_all(console: Console, models: dict[str, working_sizes.Make]) -> dict[str, Any]:
    """Print and return the figures of each model."""
    results = {}
    view = terminal.table(("model", "way"), ("predicted", "measured", "ratio"))
    view.add_column("moment")
    for name, (make, dtype) in models.items():
        results[name] = compare(moved(make(), CPU, dtype))
        for way, each in results[name].items():
            labels = map(bytes_label, (each["predicted"], each["measured"]))
            view.add_row(name if way == "exact" else "", way, *labels, f"{each['ratio']:.3f}", each["moment"])
    console.print(view)
    ratios = sorted(abs(each["ratio"] - 1) for found in results.values() for each in found.values())
    close = sum(each <= 0.05 for each in ratios)
    console.print(f"within 5 %: {close} of {len(ratios)}; the largest error is {ratios[-1]:.0%}")
    return results


def main() -> None:
    """Compare the models asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help="all by default")
    names = parser.parse_args().names or list(MODELS)
    common.write("peak", compare_all(terminal.console(at_least=120), {name: MODELS[name] for name in names}))


if __name__ == "__main__":
    main()
