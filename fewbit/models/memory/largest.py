"""The largest batch, or the longest sequence, whose training step fits a number of bytes: exact, coded, checkpointed, and both.
Found on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group

from fewbit import terminal
from fewbit.errors import InputError
from fewbit.models.arguments import Filter
from fewbit.models.blocks import names_of_blocks
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
_UNSEEN = "This does not check whether the model accepts such long sequences: it may have fewer positions."
_LARGEST = 2**20  # no larger batch is looked for


@dataclass(frozen=True)
class Fitting:
    """The largest batch, or longest sequence, of one way of training.

    samples  samples in the batch, or elements of each sequence; 0 if not even one fits
    bytes    the peak with so many samples; with one, if not even one fits
    moment   of that peak
    """

    samples: int
    bytes: int
    moment: str


@dataclass(frozen=True, repr=False)
class LargestBatch(Report):
    """The largest batch, or the longest sequence, that fits a number of bytes, for each way of training. See
    `MemoryReport.largest_batch` and `longest_sequence`.

    grows  what grows, "batch" or "sequence"
    """

    model: str
    grows: str
    budget: int
    setting: Setting
    ways: Mapping[str, Fitting]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each way of training."""
        return [{"way": way, **asdict(found)} for way, found in self.ways.items()]

    def totals(self) -> dict[str, Any]:
        return {"model": self.model, "grows": self.grows, "budget": self.budget, "bits": dict(self.setting.by_kind)}

    def view(self) -> RenderableType:
        """One row for each way, with its batch as a multiple of the exact one."""
        view = terminal.table(("training",), (self.grows, "of exact", "its peak"))
        view.add_column("when")
        exact = self.ways[EXACT].samples
        for way, found in self.ways.items():
            times = f"{found.samples / exact:.1f} ×" if exact and way != EXACT else ""
            view.add_row(way, str(found.samples or "none"), times, bytes_label(found.bytes), found.moment)
        unseen = ["", _UNSEEN] if self.grows == "sequence" else []
        return Group(f"{self.title}; coded: {self.setting}", "", view, *unseen)

    @property
    def title(self) -> str:
        """What the figures are, and for which budget."""
        what = "largest batch" if self.grows == "batch" else "longest sequence"
        return f"The {what} of {self.model} whose training step fits {bytes_label(self.budget)}"

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_counts

        what = "samples in the largest batch" if self.grows == "batch" else "the longest sequence"
        return plot_counts({way: found.samples for way, found in self.ways.items()}, what, self.title)


def largest(
    forward: Forward,
    make_optimizer: MakeOptimizer | None,
    budget: int | str,
    setting: Setting,
    filter_fn: Filter | None = None,
    dimension: int = 0,
) -> LargestBatch:
    """See `MemoryReport.largest_batch` for dimension 0, and `longest_sequence` for dimension 1."""
    forward.check_unchanged()
    limit, model, size = parse_bytes(budget), forward.model, size_of(forward.batch, dimension)
    ways: dict[str, Callable[[], Any]] = {EXACT: lambda: None, CODED: lambda: convert_modules(model, setting, filter_fn)}
    if levels := names_of_blocks(model):
        names = levels[0]
        ways[CHECKPOINTED] = lambda: convert_modules(model, setting, lambda module, name: False, recompute=names)
        ways[BOTH] = lambda: convert_modules(model, setting, filter_fn, recompute=names)
    found: dict[str, Fitting] = {}
    with terminal.progress("trying batches") as advance:
        for way, change in ways.items():

            def peak(samples: int, change: Callable[[], Any] = change) -> Peak:
                with preserved_structure(model):
                    change()
                    found = peak_of(forward, make_optimizer, lambda batch: resized(batch, dimension, size, samples))
                advance()
                return found

            found[way] = _search(peak, limit, size)
    return LargestBatch(type(model).__name__, ("batch", "sequence")[dimension], limit, setting, found)


def size_of(batch: Any, dimension: int) -> int:
    """The size of this dimension of the largest tensor of a batch. InputError if no tensor has it.

    >>> size_of({"input_ids": torch.zeros(4, 128), "position": torch.zeros(128)}, 0)
    4
    """
    found = [each for each in tensors_in(batch) if each.dim() > dimension and each.numel()]
    if not found:
        which = "a dimension" if dimension == 0 else "two dimensions"
        raise InputError(f"the batch holds no tensor with {which} and numbers in it, along which it could grow")
    return max(found, key=lambda each: each.numel()).shape[dimension]


def resized(batch: Any, dimension: int, size: int, wanted: int) -> Any:
    """The batch with each tensor that has `size` in this dimension replaced by a new one that has `wanted` there. In a tensor
    of a single dimension, such as positions, that dimension counts."""

    def made_anew(tensor: torch.Tensor) -> torch.Tensor:
        grown = 0 if tensor.dim() == 1 else dimension
        if tensor.dim() <= grown or tensor.shape[grown] != size:
            return tensor
        shape = [wanted if i == grown else each for i, each in enumerate(tensor.shape)]
        return tensor.detach().new_empty(shape).requires_grad_(tensor.requires_grad)

    return map_tensors(made_anew, batch)


def _search(peak: Callable[[int], Peak], limit: int, start: int) -> Fitting:
    """The largest number of samples whose peak is within the limit. The peak is a piecewise linear function of that number, and
    each piece is steeper than the one before."""
    tried: dict[int, Peak] = {}
    low, high, guess = 0, _LARGEST + 1, start  # low: the largest known to fit; high: the smallest known not to fit
    while high - low > 1:
        tried[guess] = peak(guess)
        low, high = (guess, high) if tried[guess].bytes <= limit else (low, guess)
        guess = _next(tried, limit, low, high)
    found = tried[low or 1]
    return Fitting(low, found.bytes, found.moment)


def _next(tried: Mapping[int, Peak], limit: int, low: int, high: int) -> int:
    """The next number to try: where a line through two tried ones crosses the limit; every third time the middle of the
    bounds."""
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
