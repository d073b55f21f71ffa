"""`fewbit.memory`: what a model keeps for backward, by the module and the operation that keep it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from torch import nn

from fewbit import terminal
from fewbit.constants import DEFAULT_BITS
from fewbit.design.table import write_atomically
from fewbit.errors import InputError
from fewbit.models.grouping import cut, label, pattern, shortened
from fewbit.models.planning.forward import Forward
from fewbit.models.planning.saved import ACTIVATIONS, Saver, Storage
from fewbit.models.report import Report
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from fewbit.models.planning.plan import Plan

KINDS = (ACTIVATIONS, "parameters", "buffers", "inputs", "tables")
NOTE = (
    "Each storage counts once, for the first that saved it. Parameters, buffers and inputs are there anyway; gradients of "
    "parameters and the optimizer's state are not counted."
)
_MODULE_WIDTH, _OPERATION_WIDTH, _TENSOR_WIDTH, _SHARED_WIDTH = 28, 22, 22, 20  # 119 columns with the others


def memory(model: nn.Module, *inputs: Any, fake: bool = False, **kwargs: Any) -> MemoryReport:
    """What one forward pass of a model keeps for backward: every saved tensor, by the module and operation that saved it.

    model    runs once as it is, in training or evaluation mode, with gradients enabled; its buffers, gradients and attributes
             and torch's random numbers are afterwards as before. A compiled model is one module to this.
    inputs   and kwargs: what to call it with
    fake     run on fake tensors, which take neither memory nor time: for models too large for this machine. Tensors of the meta
             device are taken for tensors of the CPU. Not for models whose control flow looks at numbers, nor for compiled ones.
    Returns  a report: print it, or take its `rows()`, `totals()`, `to_json()`, `to_csv()`, `plot()`; its `plan()` predicts what
             `fewbit.convert` would leave. It holds the model and the inputs.

    What autograd is not told of is not seen: tensors that a model keeps for itself, or an autograd Function as attributes; and
    what checkpointed regions hold only while backward runs. The gradients and the optimizer's state are not counted.

    Raises InputError for what is no module and for lazy modules that have not run yet; and what the model itself raises, with
    fake=True also because it cannot run on fake tensors.

    >>> report = memory(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.ones(4, 8))
    >>> report.activation_bytes  # of the GELU's input and of its output: 4 * 16 * 4 bytes each
    512
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"memory takes a torch.nn.Module, got {type(model).__name__}")
    forward = Forward(model, inputs, kwargs)
    return MemoryReport(forward, forward.saved(fake), fake, _classes(model))


@dataclass(repr=False)
class MemoryReport(Report):
    """What a forward pass keeps. See `memory`."""

    forward: Forward
    storages: list[Storage]
    fake: bool
    classes: list[type[nn.Module]]  # of the model's modules

    @property
    def activation_bytes(self) -> int:
        """Bytes of all that is neither parameter, buffer, input nor table."""
        return total(self.storages)

    def by_module(self) -> dict[str, int]:
        """Bytes of activations by dotted name of the module that keeps them; what is shared counts for the first."""
        return kept_by(self.storages)

    def rows(self) -> list[dict[str, Any]]:
        """One storage each, in the order of the forward pass; `share` is of all activations."""
        return [_row(storage, self.activation_bytes) for storage in self.storages]

    def totals(self) -> dict[str, Any]:
        model = self.forward.model
        return {
            "model": type(model).__name__,
            "mode": "training" if model.training else "evaluation",
            "fake": self.fake,
            **{kind: total(self.storages, kind) for kind in KINDS},
            "torch": torch.__version__,
        }

    def view(self, most: int = 20) -> RenderableType:
        """The `most` largest rows, repeated layers as one, and the totals."""
        found = self.totals()
        how = f"{found['model']} in {found['mode']} mode" + (", on fake tensors" if self.fake else "")
        title = f"Kept for backward by {how}: {bytes_label(self.activation_bytes)} of activations"
        others = ", ".join(f"{bytes_label(found[kind])} of {kind}" for kind in KINDS[1:] if found[kind])
        parts = [title, "", _table(self.storages, most)]
        return Group(*parts, "", *([f"besides: {others}"] if others else []), NOTE)

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_memory

        title = f"{type(self.forward.model).__name__}: {bytes_label(self.activation_bytes)} kept for backward"
        return plot_memory(bars_of({"": self.storages}), title, bytes_label)

    def plan(
        self,
        bits: int = DEFAULT_BITS,
        inputs: int | None = None,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ) -> Plan:
        """What would be kept after `fewbit.convert(model, bits, inputs, filter_fn)`, and what is worth coding.

        The converted model runs on fake tensors, and on real ones where it cannot, and is then made what it was. Besides all
        conversions at once, each is tried alone.

        Raises as `fewbit.convert`, before anything is changed, and InputError if the model was converted since.
        """
        from fewbit.models.planning.plan import plan

        if _classes(self.forward.model) != self.classes:
            raise InputError("the model was converted or changed since this report; make a new one with fewbit.memory")
        return plan(self.forward, None if self.fake else self.storages, bits, inputs, filter_fn)

    def to_html(self, path: str | Path | None = None, plan: Plan | None = None) -> str:
        """One self-contained page of the report, and of the plan if one is given; also written to the file, if one is named."""
        from fewbit.models.planning.page import page

        text = page(self, plan)
        if path is not None:
            write_atomically(Path(path), text)
        return text


def _classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def total(storages: Iterable[Storage], kind: str = ACTIVATIONS) -> int:
    """Bytes of one kind."""
    return sum(storage.bytes for storage in storages if storage.kind == kind)


def kept_by(storages: Iterable[Storage]) -> dict[str, int]:
    """Module -> bytes of the activations that it was the first to save."""
    found: Counter[str] = Counter()
    for storage in storages:
        if storage.kind == ACTIVATIONS:
            found[storage.savers[0].module] += storage.bytes
    return dict(found)


def bars_of(runs: Mapping[str, Iterable[Storage]]) -> dict[str, dict[str, dict[str, int]]]:
    """Module, repeated layers as one -> name of the run -> operation -> bytes of activations."""
    names: dict[str, dict[str, None]] = {}
    sums: dict[str, dict[str, Counter[str]]] = {}
    for run, storages in runs.items():
        for storage in storages:
            if storage.kind == ACTIVATIONS and storage.bytes:
                first = storage.savers[0]
                names.setdefault(pattern(first.module), {})[first.module] = None
                bars = sums.setdefault(pattern(first.module), {each: Counter() for each in runs})
                bars[run][first.operation] += storage.bytes
    return {shortened(label(names[key]), 40): {run: dict(stack) for run, stack in bars.items()} for key, bars in sums.items()}


@dataclass(frozen=True)
class Repeated:
    """Storages of activations that differ by the number of the layer alone."""

    module: str
    operation: str
    tensor: str
    count: int
    bytes: int
    shared: str


def repeated(storages: Iterable[Storage]) -> list[Repeated]:
    """The activations, largest first, repeated layers as one."""
    groups: dict[tuple, list[Storage]] = {}
    for storage in storages:
        if storage.kind == ACTIVATIONS and storage.bytes:
            savers = tuple((pattern(saver.module), saver.operation) for saver in storage.savers)
            groups.setdefault((savers, storage.dtype, storage.shape), []).append(storage)
    found = (_repeated(group) for group in groups.values())
    return sorted(found, key=lambda each: -each.bytes)


def _repeated(group: Sequence[Storage]) -> Repeated:
    first = group[0]
    partners = [
        shortened(label(dict.fromkeys(storage.savers[i].module for storage in group)), 14) + f" {saver.operation}"
        for i, saver in enumerate(first.savers)
        if i
    ]
    return Repeated(
        label(dict.fromkeys(storage.savers[0].module for storage in group)),
        first.savers[0].operation,
        tensor_label(first),
        len(group),
        sum(storage.bytes for storage in group),
        ", ".join(dict.fromkeys(partners)),
    )


def tensor_label(storage: Storage) -> str:
    """dtype and shape, such as "float32 4×16"."""
    return f"{storage.dtype} {'×'.join(map(str, storage.shape)) or 'scalar'}"


def saver_label(saver: Saver) -> str:
    """Module and operation."""
    return f"{saver.module or '(model)'} {saver.operation}"


def _row(storage: Storage, activations: int) -> dict[str, Any]:
    is_activation = storage.kind == ACTIVATIONS
    return {
        "module": storage.savers[0].module,
        "operation": storage.savers[0].operation,
        "kind": storage.kind,
        "dtype": storage.dtype,
        "shape": "x".join(map(str, storage.shape)),
        "bytes": storage.bytes,
        "share": storage.bytes / activations if is_activation and activations else None,
        "shared_with": ", ".join(map(saver_label, storage.savers[1:])),
    }


def _table(storages: Iterable[Storage], most: int) -> RenderableType:
    groups = repeated(storages)
    everything = sum(each.bytes for each in groups)
    view = terminal.table(("module", "operation", "tensor"), ("times", "bytes", "share"))
    view.add_column("shared with", no_wrap=True)
    for each in groups[:most]:
        view.add_row(
            shortened(each.module, _MODULE_WIDTH),
            cut(each.operation, _OPERATION_WIDTH),
            cut(each.tensor, _TENSOR_WIDTH),
            str(each.count),
            bytes_label(each.bytes),
            f"{each.bytes / everything:.1%}",
            cut(each.shared, _SHARED_WIDTH),
        )
    rest = groups[most:]
    if rest:
        left = sum(each.bytes for each in rest)
        view.add_row(f"{len(rest)} others", "", "", "", bytes_label(left), f"{left / everything:.1%}", "")
    return view
