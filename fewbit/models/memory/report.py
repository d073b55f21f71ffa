"""`fewbit.memory`: what a model keeps for backward, and which module and operation keep it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Group
from torch import nn

from fewbit import files, terminal
from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.models.arguments import Filter, LossFunction, check_filter, check_model
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.memory.budget import BudgetPlan
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.largest import LargestBatch, largest
from fewbit.models.memory.operations import KIND_WORDS, plain_operation
from fewbit.models.memory.page import page
from fewbit.models.memory.peak import MakeOptimizer, Optimizer, Peak, optimizer_of, peak_of
from fewbit.models.memory.plan import Plan, plan
from fewbit.models.memory.saved import ACTIVATIONS, Storage
from fewbit.models.memory.search import Searches
from fewbit.models.memory.storages import (
    NOTE,
    ROLES,
    kept_by,
    most_kept,
    note_on_workspaces,
    picture_of,
    repeated,
    saver_label,
    total,
)
from fewbit.models.report import Report
from fewbit.terminal import bytes_label, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


def memory(
    model: nn.Module,
    batch: Any,
    *,
    fake: bool = False,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
) -> MemoryReport:
    """Find what one forward pass of a model keeps for backward: every saved tensor, by the module and operation that saved it.

    model    It runs once, in its current mode (training or evaluation), with gradients enabled. Its buffers, gradients and
             attributes are restored afterwards, and so are torch's random numbers. The contents of lists and other objects in
             attributes are not restored. A compiled model counts as one module.
    batch    What to call the model with: a tensor, a tuple (or list) of arguments, or a mapping of named arguments. With a
             loss_fn, a batch is whatever loss_fn takes.
    fake     Run on fake tensors, which take neither memory nor time. Use it for models too large for this machine. Tensors of
             the meta device count as tensors of the CPU. It does not work for compiled models, or for models whose control flow
             depends on numbers in tensors.
    loss_fn  A function of the model and a batch, called instead of the model. Without it, the backward pass of `peak` and
             `largest_batch` begins at the `loss` of the model's output, or at the whole output if that has none.
    optimizer  The optimizer of the training step in `peak` and `largest_batch`: the name of one of torch's, such as "adamw";
             an optimizer, whose class and settings are copied; or a function that makes one from the parameters. Without it,
             the step has no optimizer.
    Returns  a report. Print it, or use its `rows()`, `totals()`, `to_json()`, `to_csv()` and `plot()`. Its `plan()` predicts
             what a model converted by `fewbit.convert` would keep. The report holds the model and the batch.

    The report does not see tensors that a model keeps for itself, tensors that an autograd Function keeps as attributes, and
    what checkpointed regions hold while backward runs. Gradients and the optimizer's state count only in `peak`.

    Raises InputError if `model` is not a module, if lazy modules have not run yet, or if the model does not take the batch. It
    passes on what the model itself raises. With fake=True the model may raise because it cannot run on fake tensors.

    >>> report = memory(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.ones(4, 8))
    >>> report.activation_bytes  # the GELU's input and its output: 4 * 16 * 4 bytes each
    512
    """
    check_model("memory", model)
    make_optimizer, forward = optimizer_of(optimizer), Forward.of(model, batch, loss_fn)
    with terminal.progress(f"running the {type(model).__name__}"):
        storages = forward.saved(fake)
    if fake and (note := note_on_workspaces(storages)):
        warnings.warn(note, UserWarning, stacklevel=2)
    return MemoryReport(forward, storages, fake, make_optimizer)


@dataclass(repr=False)
class MemoryReport(Report):
    """What a forward pass keeps for backward. `fewbit.memory` makes it."""

    forward: Forward
    storages: list[Storage]
    fake: bool
    make_optimizer: MakeOptimizer | None = None

    @cached_property
    def peak(self) -> Peak:
        """The peak of a training step: how many bytes are in use then, what they are, and where in the model it happens.

        The step runs on fake tensors, when `peak` is first read. Raises what the model raises on fake tensors, and InputError
        if the model was converted after the report was made.
        """
        self.forward.check_unchanged()
        return peak_of(self.forward, self.make_optimizer)

    @cached_property
    def _searches(self) -> Searches:
        return Searches(self.forward, not self.fake, self.make_optimizer)

    @property
    def activation_bytes(self) -> int:
        """Bytes of everything kept that is not a parameter, buffer, input or table."""
        return total(self.storages)

    @property
    def note(self) -> str:
        """What the run on fake tensors could not find out; empty if it found out everything."""
        return note_on_workspaces(self.storages) if self.fake else ""

    def by_module(self) -> dict[str, int]:
        """Bytes of activations by the module's dotted name. A tensor that several modules save counts for the first of them."""
        return kept_by(self.storages)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each storage, in the order of the forward pass. `share` is its part of all bytes of activations."""
        return [_row(storage, self.activation_bytes) for storage in self.storages]

    def totals(self) -> dict[str, Any]:
        model = self.forward.model
        return {
            "model": type(model).__name__,
            "mode": "training" if model.training else "evaluation",
            "fake": self.fake,
            "note": self.note,
            **{role: total(self.storages, role) for role in ROLES},
            "torch": torch.__version__,
        }

    def view(self, most: int = 20) -> RenderableType:
        """The `most` largest rows, where repeated layers share a row, and the totals."""
        found = self.totals()
        others = ", ".join(f"{bytes_label(found[role])} of {role}" for role in ROLES[1:] if found[role])
        notes = [f"also saved: {others}"] if others else []
        parts = [self.verdict, f"  {self.forward.words}", "", _table(self.storages, most), "", *notes, NOTE]
        return Group(*parts, *([self.note] if self.note else []))

    @property
    def verdict(self) -> str:
        """One sentence: what is kept, and what keeps most of it."""
        model, most_of_it = self.forward.model, most_kept(self.storages)
        how = f"{'training' if model.training else 'evaluation'} mode" + (", on fake tensors" if self.fake else "")
        kept = f"{type(model).__name__} keeps {bytes_label(self.activation_bytes)} for backward, in {how}"
        return f"{kept}; most of it for {most_of_it}" if most_of_it else kept

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_memory

        title = f"{type(self.forward.model).__name__}: {bytes_label(self.activation_bytes)} kept for backward"
        return plot_memory(picture_of({"": self.storages}), KIND_WORDS, title, bytes_label)

    @overload
    def plan(
        self, bits: Bits = ..., filter_fn: Filter | None = ..., *, coding: str | None = ..., budget: None = None
    ) -> Plan: ...

    @overload
    def plan(
        self, bits: Bits = ..., filter_fn: Filter | None = ..., *, coding: str | None = ..., budget: int | str
    ) -> BudgetPlan: ...

    def plan(
        self,
        bits: Bits = DEFAULT_MODEL_BITS,
        filter_fn: Filter | None = None,
        *,
        coding: str | None = None,
        budget: int | str | None = None,
    ) -> Plan | BudgetPlan:
        """Find what to convert, before anything changes. Call `convert()` of the returned report to do it.

        Without a budget, the plan says what would be kept after `fewbit.convert(model, bits, filter_fn)`, and which modules are
        worth coding. The converted model runs on fake tensors, or on real ones if it cannot run on fake ones. Then it is
        restored. The plan also tries to convert each module or leave it, while its neighbours are converted. A compiled model
        is judged as a whole.

        budget  Bytes that a training step may take at its peak, as a number or a text such as "8 GiB". The plan then chooses
                for each block that the model repeats: keep it, code it, recompute it (its input is kept exactly), or code and
                recompute it. It takes the fastest choice that fits. For each of these four ways, one step runs on fake tensors,
                and a few run on real ones, to be timed. If this report was made with fake=True, times are estimated from the
                operators instead. Planning again for another budget needs no more timed steps.

        Raises what `fewbit.convert` raises, before anything is changed, and InputError if the model was converted after the
        report was made. With a budget, it also raises what `peak` raises, and InputError if the budget is no number of bytes.
        """
        setting = Setting.of(bits, coding)
        check_filter(filter_fn)
        if budget is not None:
            return self._searches.plan(budget, setting, filter_fn)
        return plan(self.forward, None if self.fake else self.storages, setting, filter_fn, self.make_optimizer)

    def largest_batch(
        self,
        budget: int | str,
        bits: Bits = DEFAULT_MODEL_BITS,
        filter_fn: Filter | None = None,
        *,
        coding: str | None = None,
    ) -> LargestBatch:
        """Find the largest batch whose training step fits a budget. Four ways of training are compared: exact, coded by
        `fewbit.convert(model, bits, filter_fn)`, with the model's blocks checkpointed, and both coded and checkpointed.

        The batch grows along the first dimension. This changes each tensor whose first dimension is as long as that of the
        largest tensor. Steps run on fake tensors, and the model stays as it is. Blocks are the modules of one class that a
        ModuleList or Sequential of the model holds.

        budget  bytes, or a text such as "24 GiB", for everything that `peak` counts

        Raises what `peak` raises, and InputError if the budget is no number of bytes.
        """
        setting = Setting.of(bits, coding)
        check_filter(filter_fn)
        return largest(self.forward, self.make_optimizer, budget, setting, filter_fn)

    def longest_sequence(
        self,
        budget: int | str,
        bits: Bits = DEFAULT_MODEL_BITS,
        filter_fn: Filter | None = None,
        *,
        coding: str | None = None,
    ) -> LargestBatch:
        """Find the longest sequence that fits a budget. This is `largest_batch` along the second dimension.

        It lengthens each tensor whose second dimension is as long as that of the largest tensor. A tensor with a single
        dimension of that length, such as positions, grows along it. It does not check whether the model accepts such long
        sequences: its configuration may allow fewer positions.
        """
        setting = Setting.of(bits, coding)
        check_filter(filter_fn)
        return largest(self.forward, self.make_optimizer, budget, setting, filter_fn, dimension=1)

    def to_html(
        self,
        path: str | Path | None = None,
        plan: Plan | BudgetPlan | None = None,
        largest_batch: LargestBatch | None = None,
    ) -> str:
        """Make one self-contained HTML page of the report and the peak of a step. A plan and a largest batch are added to it if
        they are given. If `path` is given, the page is also written to that file."""
        text = page(self, plan, largest_batch)
        if path is not None:
            files.write(path, text)
        return text


def _row(storage: Storage, activations: int) -> dict[str, Any]:
    is_activation = storage.role == ACTIVATIONS
    return {
        "module": storage.savers[0].module,
        "operation": storage.savers[0].operation,
        "role": storage.role,
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
    some_are_shared = any(each.shared for each in groups[:most])
    if some_are_shared:
        view.add_column("shared with")
    for each in groups[:most]:
        view.add_row(
            each.module,
            plain_operation(each.operation),
            each.tensor,
            str(each.count),
            bytes_label(each.bytes),
            percent(each.bytes / everything),
            *([each.shared] if some_are_shared else []),
        )
    rest = groups[most:]
    if rest:
        left = sum(each.bytes for each in rest)
        view.add_row(f"{len(rest)} others", "", "", "", bytes_label(left), percent(left / everything))
    return view
