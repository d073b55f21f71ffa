"""Coded recurrent layers: `python -m tools.studies.recurrent [errors] [kept] [time]`, all of them by default.

errors  errors of the gradient, by bits, on sequences of 32 to 1,024 steps, compared with SGD's noise; the language models were
        trained exactly for a while
kept    bytes that the layers keep, by bits, relative to torch's layers
time    time of forward and backward of the layers, relative to torch's layers; both run in turns, five steps at a time

Models have an embedding, two layers of width 128 and a linear head. They read the standard library's source. Each batch has
2,048 characters, so longer sequences make smaller batches. Tables are printed, and written to tools/results/ with a picture of
the errors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import fewbit
from fewbit import demo, terminal
from fewbit.plots import save
from tools.studies import common

Tensor = torch.Tensor
Batch = tuple[Tensor, Tensor]  # characters (batch, steps), and the next ones

NAME = "recurrent"
WIDTH, LAYERS, CHARACTERS, VOCABULARY = 128, 2, 2048, 256
TRAINED, BATCHES, RATE = 120, 4, 2e-3
BITS, STEPS = (3, 4, 5, 6, 8), (32, 64, 256, 1024)
KINDS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN, tanh": nn.RNN,
    "RNN, ReLU": partial(nn.RNN, nonlinearity="relu"),
}
TIMED = ((64, 32, 128), (64, 8, 128), (256, 32, 256))  # steps, batch, width
ROUNDS, TURN = 5, 5  # rounds of turns, and steps in a turn


class LanguageModel(nn.Module):
    """Characters (batch, steps) to logits (batch, steps, VOCABULARY) of the next ones."""

    def __init__(self, kind: str):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = KINDS[kind](WIDTH, WIDTH, LAYERS, batch_first=True)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(characters))[0])


@cache
def _text() -> Tensor:
    return demo.read_text(torch.device("cpu"))[0].long()


def sample(steps: int, sampler: torch.Generator, characters: int = CHARACTERS) -> Batch:
    """Random parts of the text, and the next characters."""
    starts = torch.randint(len(_text()) - steps - 1, (max(1, characters // steps), 1), generator=sampler)
    found = _text()[starts + torch.arange(steps + 1)]
    return found[:, :-1], found[:, 1:]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next characters, in nats."""
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def trained(kind: str, steps: int, number: int = TRAINED) -> LanguageModel:
    """A model after so many exact steps of AdamW, with clipped gradients as usual."""
    torch.manual_seed(0)
    model, sampler = LanguageModel(kind), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for _ in range(number):
        loss_of(model, sample(steps, sampler)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def errors(console: Console, kinds: Sequence[str] = tuple(KINDS), lengths: Sequence[int] = STEPS, number: int = TRAINED) -> Any:
    """Kind -> number of steps -> the gradient's relative error by bits, and its noise between batches."""
    view = terminal.table(("gradient error", "steps"), ("SGD noise", *(f"{bits} bits" for bits in BITS)))
    results: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        for steps in lengths:
            model, sampler = trained(kind, steps, number), torch.Generator().manual_seed(1)
            batches = [sample(steps, sampler) for _ in range(BATCHES)]
            exact = _gradients(model, batches)
            found = {
                bits: common.gradient_errors(exact, _gradients(common.coded(model, bits=bits), batches))[common.ALL]
                for bits in BITS
            }
            noise = common.gradient_noise(exact)[common.ALL]
            results.setdefault(kind, {})[str(steps)] = {"noise": noise, "errors": found}
            view.add_row(kind, str(steps), f"{noise:.2f}", *(f"{error:.4f}" for error in found.values()))
    console.print(view, "")
    return results


def _gradients(model: nn.Module, batches: Sequence[Batch]) -> list[common.Gradients]:
    return [common.gradients(model, partial(loss_of, model, batch), lambda _: "model") for batch in batches]


def kept(console: Console, steps: int = 64) -> dict[str, Any]:
    """Kind -> bytes that the layers keep exactly, and the share of them that coded layers keep, by bits."""
    view = terminal.table((f"kept, {steps} steps",), ("exact, KiB", *(f"{bits} bits" for bits in BITS)))
    results = {}
    x = torch.randn(CHARACTERS // steps, steps, WIDTH, requires_grad=True)
    for kind, make in KINDS.items():
        layers = make(WIDTH, WIDTH, LAYERS, batch_first=True)
        exact = fewbit.memory(layers, x).activation_bytes
        shares = {bits: fewbit.memory(common.coded(layers, bits=bits), x).activation_bytes / exact for bits in BITS}
        results[kind] = {"exact": exact, "shares": shares}
        view.add_row(kind, f"{exact / 1024:,.0f}", *(f"{share:.1%}" for share in shares.values()))
    console.print(view, "")
    return results


def times(console: Console, sizes: Sequence[tuple[int, int, int]] = TIMED, rounds: int = ROUNDS) -> dict[str, Any]:
    """Kind and size -> time of a step at 4 bits relative to torch's: median, minimum and maximum over all rounds."""
    view = terminal.table(("step at 4 bits over torch's", "steps x batch x width"), ("ratio", "least", "most", "torch's, ms"))
    results: dict[str, Any] = {}
    for kind in KINDS:
        for steps, batch, width in sizes:
            layers, x = KINDS[kind](width, width, LAYERS), torch.randn(steps, batch, width, requires_grad=True)
            turns = [(_turn(layers, x), _turn(common.coded(layers, bits=4), x)) for _ in range(rounds)]
            ratios = [ours / torchs for torchs, ours in turns]
            found = statistics.median(ratios), min(ratios), max(ratios), 1e3 * statistics.median(each for each, _ in turns)
            size = f"{steps} x {batch} x {width}"
            results.setdefault(kind, {})[size] = dict(zip(("ratio", "least", "most", "exact ms"), found, strict=True))
            view.add_row(kind, size, *(f"{each:.2f}" for each in found))
    console.print(view, "")
    return results


def _turn(layers: nn.Module, x: Tensor) -> float:
    """The median time of some steps. One step before them is not counted."""
    seconds = []
    for _ in range(TURN + 1):
        began = time.perf_counter()
        y, _ = layers(x * 1)
        y.backward(y.detach())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def plot(results: dict[str, Any]) -> Figure:
    """Errors against the number of steps: a panel for each kind, a line for each number of bits."""
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (kind, by_steps) in zip(axes, results.items(), strict=True):
        lengths = [int(each) for each in by_steps]
        for i, bits in enumerate(BITS):
            values = [found["errors"][bits if bits in found["errors"] else str(bits)] for found in by_steps.values()]
            axis.plot(lengths, values, marker="osD^v"[i], markersize=3.5, linewidth=1.2, label=f"{bits} bits")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(each) for each in lengths])
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("steps", fontsize=9)
        axis.grid(axis="y", color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("error of the gradient, relative", fontsize=9)
    figure.suptitle("Gradient errors of recurrent layers by the length of sequences", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Run the parts asked for. Earlier results of other parts stay in the file."""
    parts: dict[str, Callable[[Console], Any]] = {"errors": errors, "kept": kept, "time": times}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="all by default")
    chosen = parser.parse_args().parts or list(parts)
    console, path = terminal.console(at_least=100), common.RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    for part in chosen:
        found[part] = parts[part](console)
        common.write(NAME, found)
    if "errors" in found:
        save(plot(found["errors"]), common.RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
