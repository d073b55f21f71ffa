"""`fewbit demo` trains a small GPT on the source of the Python standard library: exact, with coded GELUs, and fully coded."""

from __future__ import annotations

import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.errors import FewbitError
from fewbit.measuring import find_device, saved_storages
from fewbit.models.conversion.convert import convert

Tensor = torch.Tensor

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 128, 128, 4, 4, 16
TEXT_BYTES, HELD_OUT_BATCHES, SEED = 4_000_000, 8, 0
EVERYTHING = 5  # bits of the run with everything coded, fewbit's default


class Block(nn.Module):
    """A pre-norm transformer block on (batch, tokens, width)."""

    def __init__(self, activation: nn.Module, width: int = WIDTH, heads: int = HEADS):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Maps bytes (batch, tokens) int64 to logits (batch, tokens, 256) of the next byte. bits=None gives torch's exact GELU."""

    def __init__(self, bits: int | None):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        activations = (nn.GELU() if bits is None else fewbit.GELU(bits=bits) for _ in range(LAYERS))
        self.blocks = nn.ModuleList(Block(activation) for activation in activations)
        self.gelus = [module for module in self.modules() if isinstance(module, nn.GELU)]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Run:
    """One model in training, with its measurements."""

    label: str
    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gelu_bytes: int = 0
    total_bytes: int = 0
    held_out: float = float("nan")


def run(steps: int, bits: list[int], device: str, output: Path, console: Console) -> list[Run]:
    """Train several models side by side, on the same batches, and print the outcome.

    The first model is exact. One model for each of `bits` has GELUs with codes of that many bits. The last is converted as a
    whole, at EVERYTHING bits. A picture of the losses and of the memory kept for backward goes to `output`. Raises InputError
    for a device that torch does not have.
    """
    place = find_device(device)
    training, held_out = read_text(place)
    runs = [_start("exact", None, place), *(_start(f"{b}-bit GELUs", b, place) for b in bits)]
    runs.append(_start(f"{EVERYTHING}-bit model", None, place))
    convert(runs[-1].model, bits=EVERYTHING)
    sampler = torch.Generator().manual_seed(SEED)
    with Live(_progress(runs, 0, steps), console=console, refresh_per_second=4) as live:
        for step in range(steps):
            batch = sample_batch(training, sampler)
            for each in runs:
                _train_step(each, batch)
            live.update(_progress(runs, step + 1, steps))
            if not console.is_terminal and (step + 1) % max(1, steps // 5) == 0 and step + 1 < steps:
                console.print(_progress(runs, step + 1, steps))  # print lines if the display cannot be redrawn
    for each in runs:
        each.held_out = held_out_loss(each.model, held_out)
    terminal.show(_outcome(runs), on=console)
    _draw(runs, output)
    console.print(f"wrote {output}", soft_wrap=True)
    return runs


def read_text(device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules, uint8: the part to train on, and the last twentieth, which is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    content, files = bytearray(), sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    for path in files:
        if "site-packages" not in path.parts and "test" not in path.parts:
            content += path.read_bytes()
        if len(content) >= TEXT_BYTES:
            break
    if len(content) < 100 * CONTEXT * BATCH:
        raise FewbitError(f"the demo reads the standard library's source, but {library} holds only {len(content)} bytes of it")
    data = torch.frombuffer(content[:TEXT_BYTES], dtype=torch.uint8).to(device)
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


def sample_batch(data: Tensor, sampler: torch.Generator) -> Tensor:
    """Random stretches of the text (BATCH, CONTEXT + 1) int64."""
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=sampler)
    return torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()]).long()


def batch_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of a batch's next bytes, in nats."""
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor) -> float:
    """Mean loss over HELD_OUT_BATCHES batches of the data. They are the same at every call."""
    sampler = torch.Generator().manual_seed(SEED)
    return statistics.fmean(batch_loss(model, sample_batch(data, sampler)).item() for _ in range(HELD_OUT_BATCHES))


def _start(label: str, bits: int | None, device: torch.device) -> Run:
    torch.manual_seed(SEED)
    model = GPT(bits).to(device)
    return Run(label, model, torch.optim.AdamW(model.parameters(), lr=2e-3))


def _train_step(each: Run, batch: Tensor) -> None:
    if not each.losses:
        each.gelu_bytes, each.total_bytes = _kept_bytes(each.model, batch)
    start = time.perf_counter()
    loss = batch_loss(each.model, batch)
    loss.backward()
    each.optimizer.step()
    each.optimizer.zero_grad()
    each.losses.append(loss.item())  # waits for the device
    each.seconds.append(time.perf_counter() - start)


def _kept_bytes(model: GPT, batch: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass keeps for backward: those kept by the GELUs, and all. Parameters are not counted.

    These are the storages of all tensors that torch saves, each counted once. A storage that a GELU and another operation
    keep counts for the GELUs, and once in the total.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total: dict[int, int] = {}
    by_gelu: dict[int, int] = {}
    inner = saved_storages(by_gelu, total, leave_out=parameters)
    handles = [gelu.register_forward_pre_hook(lambda *_: inner.__enter__()) for gelu in model.gelus]
    handles += [gelu.register_forward_hook(lambda *_: inner.__exit__()) for gelu in model.gelus]
    with saved_storages(total, leave_out=parameters):
        loss = batch_loss(model, batch)  # held until the count is read, so that no address of a storage is used twice
    for handle in handles:
        handle.remove()
    del loss
    return sum(by_gelu.values()), sum(total.values())


def _progress(runs: list[Run], step: int, steps: int) -> str:
    losses = ", ".join(f"{each.label} {statistics.fmean(each.losses[-20:]):.3f}" for each in runs if each.losses)
    filled = 30 * step // steps
    return f"{'━' * filled}{'╌' * (30 - filled)} step {step} of {steps}\nloss: {losses or '–'}\n"


def _outcome(runs: list[Run]) -> Table:
    measured = ("held-out\nloss", "against\nexact", "GELUs\nkeep MiB", "share of\nexact", "all\nkeep MiB", "share of\nexact")
    view = terminal.table(("\ncoded",), (*measured, "time of\nexact"))
    exact = runs[0]
    for each in runs:
        ratios = [own / base for own, base in zip(each.seconds, exact.seconds, strict=True)]
        view.add_row(
            each.label,
            f"{each.held_out:.4f}",
            f"{each.held_out / exact.held_out - 1:+.2%}",
            f"{each.gelu_bytes / 2**20:.2f}",
            f"{each.gelu_bytes / exact.gelu_bytes:.3f}",
            f"{each.total_bytes / 2**20:.1f}",
            f"{each.total_bytes / exact.total_bytes:.3f}",
            f"{statistics.median(ratios):.2f}",
        )
    return view


def _draw(runs: list[Run], output: Path) -> None:
    from fewbit.plots import plot_training, save

    kept = {each.label: (each.gelu_bytes, each.total_bytes) for each in runs}
    save(plot_training({each.label: each.losses for each in runs}, kept), output)
