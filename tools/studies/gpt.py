"""A GPT with joint codes: `python -m tools.studies.gpt [memory] [errors] [training]`, all of them by default.

memory    bytes that a block keeps, by part of the block
errors    errors of the gradient of a trained model, coded in several ways, by group of parameters, compared with SGD's noise:
          joint codes in all layers, or only in the blocks, with the last norm and the head exact
training  losses from the same seed, exact and coded

The model is the demo's: 4 blocks of width 128 on the standard library's source. Tables are printed, and written to
tools/results/ as JSON with a picture of the errors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import demo, terminal
from fewbit.nn.layers import CodedLayer
from fewbit.plots import save
from tools.studies import baselines, common
from tools.studies.pictures import plot_errors_beside_noise

Tensor = torch.Tensor

TOKENS, BATCH = 128, 16
HEAD_WIDTH = 32
PARTS = {
    "norm1": "norm1",
    "qkv": "qkv",
    "": "attention",
    "proj": "proj",
    "norm2": "norm2",
    "up": "up",
    "act": "GELU",
    "down": "down",
}
GROUPS = ("qkv", "proj", "up", "down", "norms", "embeddings", "head", common.ALL)
LEARNING_RATE = 2e-3


def block(width: int, dtype: torch.dtype = torch.float32) -> demo.Block:
    """One block with exact GELU, its weights seeded."""
    torch.manual_seed(0)
    return demo.Block(nn.GELU(), width, width // HEAD_WIDTH).to(dtype)


def memory(console: Console, widths: tuple[int, ...] = (128, 512), batch: int = 8) -> dict[str, Any]:
    """Units of batch x tokens x width elements that a block keeps, by part, exact and coded."""
    results = {}
    for width in widths:
        columns = {}
        for dtype in (torch.float32, torch.bfloat16):
            exact = block(width, dtype)
            models = {"exact": exact} | {f"{bits} bits": common.coded(exact, bits=bits) for bits in (4, 5)}
            for label, model in models.items():
                columns[f"{str(dtype).removeprefix('torch.')}, {label}"] = _units(model, batch, width, dtype)
        results[str(width)] = columns
        view = terminal.table((f"width {width}: kept by",), tuple(name.replace(", ", "\n") for name in columns))
        for part in (*PARTS.values(), "total", "and the block's input"):
            view.add_row(part, *(f"{column.get(part, 0):.3f}" for column in columns.values()))
        console.print(view, "")
    return results


def _units(model: nn.Module, batch: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """What each part keeps, and all parts together, in units of batch x tokens x width elements.

    The block's own input has an entry of its own. An exact norm1 keeps it: it is the output of the block before.
    """
    x = torch.randn(batch, TOKENS, width, dtype=dtype, requires_grad=True)
    unit = x.untyped_storage().nbytes()
    report = fewbit.memory(model, x)
    kept = {PARTS[part]: number / unit for part, number in report.by_module().items()}
    return kept | {"total": report.activation_bytes / unit, "and the block's input": report.totals()["inputs"] / unit}


def train(model: nn.Module, steps: int) -> list[float]:
    """Losses of so many steps of AdamW; the batches are the same for every model."""
    training, _ = demo.read_text(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    sampler = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = demo.batch_loss(model, demo.sample_batch(training, sampler))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(weights: Path, steps: int) -> demo.GPT:
    """The exact model after so many steps. It is read from `weights`, or trained and written there."""
    torch.manual_seed(0)
    model = demo.GPT(None)
    if weights.exists():
        model.load_state_dict(torch.load(weights))
    else:
        train(model, steps)
        torch.save(model.state_dict(), weights)
    return model


def group_of(name: str) -> str:
    """The group of a parameter of the demo's GPT.

    >>> group_of("blocks.0.qkv.weight"), group_of("blocks.3.norm2.bias"), group_of("position.weight"), group_of("head.bias")
    ('qkv', 'norms', 'embeddings', 'head')
    """
    owner = name.split(".")[-2]
    return {"norm1": "norms", "norm2": "norms", "norm": "norms", "embed": "embeddings", "position": "embeddings"}.get(
        owner, owner
    )


def errors(console: Console, model: demo.GPT, batches: int = 8) -> dict[str, Any]:
    """Errors of the gradient: of all parameters for each way to code, and by group of parameters, compared with SGD's noise."""
    training, _ = demo.read_text(torch.device("cpu"))
    sampler = torch.Generator().manual_seed(1)
    data = [demo.sample_batch(training, sampler) for _ in range(batches)]

    def of(model: nn.Module) -> list[common.Gradients]:
        return [common.gradients(model, lambda batch=batch: demo.batch_loss(model, batch), group_of) for batch in data]

    exact = of(model)
    noise = common.gradient_noise(exact)
    makers: dict[str, Callable[[], nn.Module]] = {}
    for bits in (3, 4, 5):
        makers[f"joint codes, {bits} bits"] = lambda bits=bits: common.coded(model, bits=bits)
        makers[f"blocks alone, {bits} bits"] = lambda bits=bits: common.coded(
            model, bits=bits, filter_fn=lambda _, name: name.startswith("blocks.")
        )
    makers["stochastic rounding, 4 bits"] = lambda: _stochastic(common.coded(model, bits=4))
    makers["uniform codes, 4 bits"] = lambda: common.coded(model, bits=4, coding="uniform")
    makers[f"min-max of groups, {baselines.min_max_bits():g} bits"] = lambda: baselines.min_max_coded(model)
    by_group = {label: common.gradient_errors(exact, of(make())) for label, make in makers.items()}

    joint = by_group["joint codes, 4 bits"][common.ALL]
    view = terminal.table(("what is coded",), ("gradient error", "over 4-bit joint", "over SGD noise"))
    for label, error in by_group.items():
        whole = error[common.ALL]
        view.add_row(label, f"{whole:.4f}", f"{whole / joint:.2f}", f"{whole / noise[common.ALL]:.4f}")
    console.print(view, "")
    view = terminal.table(("by parameters",), GROUPS)
    for label, values in {"SGD noise": noise, **by_group}.items():
        view.add_row(label, *(f"{values[group]:.4f}" for group in GROUPS))
    console.print(view, "")
    return {"batches": batches, "noise": noise, "errors": by_group}


def _stochastic(model: nn.Module) -> nn.Module:
    """The coded model with stochastic rounding of values. Codes of activations stand for intervals and stay as they are."""
    for module in model.modules():
        if isinstance(module, CodedLayer):
            module.rounding = "stochastic"
    return model


def training(console: Console, steps: int = 200) -> dict[str, Any]:
    """The last losses, exact and coded, from the same weights on the same batches."""
    _, held_out = demo.read_text(torch.device("cpu"))
    results: dict[str, Any] = {}
    view = terminal.table((f"{steps} steps",), ("training loss", "held-out loss", "against exact"))
    for bits in (None, 5, 4):
        torch.manual_seed(0)
        model: nn.Module = demo.GPT(None)
        model = model if bits is None else common.coded(model, bits=bits)
        losses = train(model, steps)
        found = {"losses": losses, "last": statistics.fmean(losses[-20:]), "held_out": demo.held_out_loss(model, held_out)}
        label = "exact" if bits is None else f"{bits} bits"
        results[label] = found
        against = found["held_out"] / results["exact"]["held_out"] - 1
        view.add_row(label, f"{found['last']:.4f}", f"{found['held_out']:.4f}", f"{against:+.2%}")
    console.print(view, "")
    return results


def main() -> None:
    """Run the parts asked for."""
    parts = ("memory", "errors", "training")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="all by default")
    default = Path(tempfile.gettempdir()) / "fewbit-study-gpt.pt"
    parser.add_argument("--weights", type=Path, default=default, help="of the trained model: read, or made (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="that the trained model has seen (%(default)s)")
    arguments = parser.parse_args()
    console = terminal.console(at_least=100)
    for part in arguments.parts or parts:
        if part == "errors":
            results = errors(console, trained(arguments.weights, arguments.steps))
            whole = {label: error for label, error in results["errors"].items() if "blocks" not in label}
            save(plot_errors_beside_noise(results["noise"], whole, GROUPS), common.RESULTS / "gpt-errors.png")
        else:
            results = {"memory": memory, "training": training}[part](console)
        common.write(f"gpt-{part}", results)


if __name__ == "__main__":
    main()
