"""The largest batch whose training step fits a number of bytes, found on fake tensors: exact, coded, checkpointed, and both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group

from fewbit import terminal
from fewbit.errors import InputError
from fewbit.models.arguments import Filter
from fewbit.models.blocks import blocks, checkpoint_blocks
from fewbit.models.conversion.engine import convert_modules
from fewbit.models.conversion.setting import Setting
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.peak import MakeOptimizer, Peak, peak_of
from fewbit.models.memory.saved import tensors_in
from fewbit.models.preserve import preserved_structure
from fewbit.models.report import Report
from fewbit.terminal import bytes_label, parse_bytes
from fewbit.torch_internals import map_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

EXACT, CODED, CHECKPOINTED, BOTH = "exact", "coded", "checkpointed", "coded and checkpointed"
_LARGEST = 2**20  # samples of a batch that are looked for


@dataclass(frozen=True)
class Fitting:
    """The largest batch of one way of training.

    samples  in it; 0 where not even one fits
    bytes    of the peak with so many, or with one
    moment   of the peak
    """

    samples: int
    bytes: int
    moment: str


@dataclass(frozen=True, repr=False)
class LargestBatch(Report):
    """The largest batches that fit a number of bytes, by way of training. See `MemoryReport.largest_batch`."""

    model: str
    budget: int
    setting: Setting
    ways: Mapping[str, Fitting]

    def rows(self) -> list[dict[str, Any]]:
        """One way each."""
        return [{"way": way, **asdict(found)} for way, found in self.ways.items()]

    def totals(self) -> dict[str, Any]:
        return {"model": self.model, "budget": self.budget, "bits": dict(self.setting.by_kind)}

    def view(self) -> RenderableType:
        """A line for each way, and against exact how many times as large its batch is."""
        view = terminal.table(("training",), ("batch", "of exact", "its peak"))
        view.add_column("when")
        exact = self.ways[EXACT].samples
        for way, found in self.ways.items():
            times = f"{found.samples / exact:.1f} ×" if exact and way != EXACT else ""
            view.add_row(way, str(found.samples or "none"), times, bytes_label(found.bytes), found.moment)
        title = f"The largest batch of {self.model} whose training step fits {bytes_label(self.budget)}"
        return Group(f"{title}; coded: {self.setting}", "", view)

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_counts

        return plot_counts({way: found.samples for way, found in self.ways.items()}, "samples in the largest batch")


def largest_batch(
    forward: Forward, make_optimizer: MakeOptimizer | None, budget: int | str, setting: Setting, filter_fn: Filter | None = None
) -> LargestBatch:
    """See `MemoryReport.largest_batch`."""
    forward.check_unchanged()
    limit, model, size = parse_bytes(budget), forward.model, batch_size(forward.batch)
    ways: dict[str, Callable[[], Any]] = {EXACT: lambda: None, CODED: lambda: convert_modules(model, setting, filter_fn)}
    if blocks(model):
        ways[CHECKPOINTED] = lambda: checkpoint_blocks(model)
        ways[BOTH] = lambda: (convert_modules(model, setting, filter_fn), checkpoint_blocks(model))
    found: dict[str, Fitting] = {}
    with terminal.progress("trying batches") as advance:
        for way, change in ways.items():

            def peak(samples: int, change: Callable[[], Any] = change) -> Peak:
                with preserved_structure(model):
                    change()
                    found = peak_of(forward, make_optimizer, lambda batch: with_samples(batch, size, samples))
                advance()
                return found

            found[way] = _search(peak, limit, size)
    return LargestBatch(type(model).__name__, limit, setting, found)


def batch_size(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its largest tensor. InputError where there is none.

    >>> batch_size({"input_ids": torch.zeros(4, 128), "position": torch.zeros(128)})
    4
    """
    found = [each for each in tensors_in(batch) if each.dim() and each.numel()]
    if not found:
        raise InputError("the batch holds no tensor with a dimension and numbers in it, along which it could grow")
    return max(found, key=lambda each: each.numel()).shape[0]


def with_samples(batch: Any, size: int, samples: int) -> Any:
    """The batch, of new tensors with so many samples in the place of those that have `size` of them."""

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size:
            return tensor
        other = torch.empty_like(tensor.detach()[:1].expand(samples, *tensor.shape[1:]), memory_format=torch.contiguous_format)
        return other.requires_grad_(tensor.requires_grad)

    return map_tensors(resized, batch)


def _search(peak: Callable[[int], Peak], limit: int, start: int) -> Fitting:
    """The largest number of samples whose peak is within the limit. The peak grows with it as one line, or several, each
    steeper than the one before."""
    tried: dict[int, Peak] = {}
    low, high, guess = 0, _LARGEST + 1, start  # the largest that is known to fit, the smallest that is known not to
    while high - low > 1:
        tried[guess] = peak(guess)
        low, high = (guess, high) if tried[guess].bytes <= limit else (low, guess)
        guess = _next(tried, limit, low, high)
    found = tried[low or 1]
    return Fitting(low, found.bytes, found.moment)


def _next(tried: Mapping[int, Peak], limit: int, low: int, high: int) -> int:
    """Where a line through two numbers that were tried crosses the limit; every third time the middle between both bounds."""
    if low == 0:
        return max(1, high // 4)
    if high > _LARGEST and len(tried) == 1:
        return min(2 * low, _LARGEST)
    if high <= _LARGEST and len(tried) % 3 == 0:
        return (low + high) // 2
    a, b = (low, high) if high <= _LARGEST else sorted(tried)[-2:]
    slope = (tried[b].bytes - tried[a].bytes) / (b - a)
    crossing = int(a + (limit - tried[a].bytes) / slope) if slope > 0 else 4 * b
    return max(low + 1, min(crossing, high - 1))
