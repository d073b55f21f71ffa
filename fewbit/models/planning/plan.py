"""What `fewbit.convert` would save, found out before: the converted forward pass runs, on fake tensors, and is undone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rich.console import Group
from torch import nn

from fewbit import terminal
from fewbit.errors import InputError
from fewbit.models.grouping import label, shortened
from fewbit.models.planning import advice, trials
from fewbit.models.planning.forward import Forward, arguments_of
from fewbit.models.planning.memory import bars_of, kept_by, total
from fewbit.models.planning.saved import Storage
from fewbit.models.report import Report
from fewbit.models.untouched import preserved
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Filter = Callable[[nn.Module, str], bool]
_log = logging.getLogger("fewbit")
_left_out: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
_LEGEND = "saves: what the conversion saves beside the others that pay; modules that let go of a tensor together each count it."
_AGREEMENT = 0.01  # of fake tensors with what was measured, or else the model itself runs


@dataclass(frozen=True)
class Setting:
    """What `fewbit.convert` takes besides the model."""

    bits: int
    inputs: int | None = None
    filter_fn: Filter | None = None
    coding: str | None = None

    @property
    def arguments(self) -> str:
        """As in a call."""
        return f"bits={self.bits}" + ("" if self.inputs is None else f", inputs={self.inputs}")

    def convert(self, model: nn.Module, names: Collection[str] | None = None) -> list[str]:
        """Convert the model, or those of these names alone; the names of what was converted."""
        from fewbit.models.conversion.convert import convert_modules, is_converted

        asked = {}

        def wanted(module: nn.Module, name: str) -> bool:
            asked[name] = (names is None or name in names) and (self.filter_fn is None or self.filter_fn(module, name))
            return asked[name]

        convert_modules(model, self.bits, self.inputs, wanted, self.coding)
        return [name for name, module in model.named_modules() if asked.get(name) and is_converted(module)]


@dataclass(repr=False)
class Plan(Report):
    """What converting a model would leave to keep, and what is worth it. See `MemoryReport.plan`.

    before   what is kept by the model as it is
    after    with all converted that `fewbit.convert` would
    outcome  with those alone that pay
    candidates  what `fewbit.convert` would convert
    advice   for each module that is converted or keeps something
    how      on what the converted model ran
    """

    model: nn.Module
    setting: Setting
    before: list[Storage]
    after: list[Storage]
    outcome: trials.Outcome
    candidates: frozenset[str]
    advice: list[advice.Advice]
    how: str

    @property
    def before_bytes(self) -> int:
        """Bytes of activations kept as the model is."""
        return total(self.before)

    @property
    def after_bytes(self) -> int:
        """The same after `fewbit.convert(model, bits, inputs, filter_fn)`."""
        return total(self.after)

    @property
    def best_bytes(self) -> int:
        """The same after converting what pays alone: `fewbit.convert(..., sample=...)`, or with this plan's `filter_fn`."""
        return total(self.outcome.storages)

    @property
    def left_out(self) -> dict[str, str]:
        """Modules whose conversion would keep more bytes, and why."""
        worse = -1 if self.after_bytes > self.before_bytes else 0  # of all as a whole, where none was tried alone
        saved = {name: self.outcome.saved.get(name, worse) for name in self.candidates - self.outcome.chosen}
        return {each.module: each.reason for each in self.advice if saved.get(each.module, 0) < 0}

    def filter_fn(self, module: nn.Module, name: str) -> bool:
        """For `fewbit.convert`: whether the conversion of this module pays."""
        return name in self.outcome.chosen

    def by_module(self) -> dict[str, tuple[int, int]]:
        """Bytes before and after by module, of all that are converted; what is shared counts for the first that saves it."""
        before, after = kept_by(self.before), kept_by(self.after)
        return {name: (before.get(name, 0), after.get(name, 0)) for name in dict.fromkeys([*before, *after])}

    def rows(self) -> list[dict[str, Any]]:
        """One module each; `saves` is what its conversion saves beside the others that pay."""
        return [vars(each).copy() for each in self.advice]

    def totals(self) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "bits": self.setting.bits,
            "inputs": self.setting.inputs,
            "before": self.before_bytes,
            "after": self.after_bytes,
            "best": self.best_bytes,
            "how": self.how,
        }

    def view(self, most: int = 30) -> RenderableType:
        """Advice for the `most` modules that keep or save most, repeated layers as one, and the totals."""
        lines = [
            f"kept now: {bytes_label(self.before_bytes)} of activations",
            f"converted with {self.setting.arguments}: {_part(self.after_bytes, self.before_bytes)}",
        ]
        if self.best_bytes != self.after_bytes:
            lines.append(f"only what pays (sample=): {_part(self.best_bytes, self.before_bytes)}")
        return Group(*lines, "", self._table(most), "", _LEGEND, self.how)

    def _table(self, most: int) -> RenderableType:
        view = terminal.table(("module",), ("before", "after", "saves"))
        view.add_column("advice", no_wrap=True)
        view.add_column("because")
        groups = advice.grouped(self.advice)
        for group in groups[:most]:
            first, count = group[0], len(group)
            name = shortened(label(each.module for each in group)) + (f" ({count})" if count > 1 else "")
            sums = [sum(each.before for each in group), sum(each.after for each in group)]
            view.add_row(name, *map(bytes_label, sums), advice.saves_label(group), first.advice, first.reason)
        if groups[most:]:
            view.add_row(f"{len(groups) - most} others")
        return view

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_memory

        title = f"{type(self.model).__name__}: {bytes_label(self.before_bytes)} → {bytes_label(self.after_bytes)}"
        return plot_memory(bars_of({"now": self.before, "converted": self.after}), title, bytes_label)


def plan(
    forward: Forward, measured: list[Storage] | None, bits: int, inputs: int | None, filter_fn: Filter | None = None
) -> Plan:
    """See `MemoryReport.plan`; `measured` is what the model keeps on real tensors, None if it has run on fake ones alone."""
    setting = Setting(bits, inputs, filter_fn)
    with preserved(forward.model):
        candidates = setting.convert(forward.model)
    before, fake, how = _baseline(forward, measured)
    return _plan(forward, setting, candidates, before, fake, how)


def leave_out(model: nn.Module, setting: Setting, sample: Any) -> set[str]:
    """Names of the modules whose conversion would keep more bytes for this batch; why is logged, and told by `left_out`."""
    forward = Forward(model, *arguments_of(sample))
    with preserved(model):
        candidates = setting.convert(model)
    before, fake, how = _baseline(forward, None, strict=False)
    found = _plan(forward, setting, candidates, before, fake, how)
    _left_out[model] = found.left_out
    for name, reason in found.left_out.items():
        _log.info("%s stays exact: %s", name or type(model).__name__, reason)
    return set(found.left_out)


def left_out(model: nn.Module) -> dict[str, str]:
    """The modules that the last `fewbit.convert(model, …, sample=…)` left as they were: dotted name -> why.

    Raises InputError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"left_out takes a torch.nn.Module, got {type(model).__name__}")
    return dict(_left_out.get(model, {}))


def forget_left_out(model: nn.Module) -> None:
    """For a conversion without a sample, which leaves out nothing."""
    _left_out.pop(model, None)


def _plan(forward: Forward, setting: Setting, candidates: list[str], before: list[Storage], fake: bool, how: str) -> Plan:
    model = forward.model
    installed = set(candidates) - {name for name, _ in model.named_modules()}
    before = _attributed(before, installed)

    def run(names: Collection[str]) -> list[Storage]:
        with preserved(model):
            setting.convert(model, names)
            return _attributed(forward.saved(fake), installed)

    after = run(candidates)
    compiled = _is_compiled(model)
    outcome = (trials.all_or_none if compiled else lambda *args: trials.choose(run, *args))(candidates, before, after)
    convertible, classes = _convertible(model, setting)
    found = advice.of_modules(classes, candidates, convertible - set(candidates), before, after, outcome)
    return Plan(model, setting, before, after, outcome, frozenset(candidates), found, how)


def _attributed(storages: list[Storage], installed: set[str]) -> list[Storage]:
    """What modules save by an activation that they hold as a function, as what the module saves that takes its place.

    installed  names of these modules, each the only one in its parent
    """
    parents = {name.rpartition(".")[0]: name for name in installed}

    def moved(storage: Storage) -> Storage:
        names = {saver.module: parents[saver.module] for saver in storage.savers if saver.module in parents}
        if storage.savers[0].operation not in advice.CALLED or not names:
            return storage
        savers = tuple(saver._replace(module=names.get(saver.module, saver.module)) for saver in storage.savers)
        return replace(storage, savers=savers, slots=tuple((names.get(name, name), number) for name, number in storage.slots))

    return [moved(each) for each in storages]


def _convertible(model: nn.Module, setting: Setting) -> tuple[set[str], dict[str, str]]:
    """What `inputs=` would convert besides; and the class of each module then, those in the place of functions among them."""
    with preserved(model):
        names = set(Setting(setting.bits, setting.inputs or setting.bits).convert(model))
        return names, {name: type(module).__name__ for name, module in model.named_modules()}


def _baseline(forward: Forward, measured: list[Storage] | None, strict: bool = True) -> tuple[list[Storage], bool, str]:
    """What is kept now, whether that was found on fake tensors, and words for it.

    strict  whether a model that cannot run on fake tensors is an error where nothing was measured
    """
    reason = "it is compiled" if _is_compiled(forward.model) else ""
    if not reason:
        try:
            found = forward.saved(fake=True)
        except Exception as error:  # whatever the model does that fake tensors cannot
            if measured is None and strict:
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            if measured is None or abs(total(found) - total(measured)) <= _AGREEMENT * total(measured):
                return found, True, "The converted model ran on fake tensors, for its sizes alone."
            reason = f"they keep {bytes_label(total(found))} where {bytes_label(total(measured))} were measured"
    found = forward.saved(fake=False) if measured is None else measured
    return found, False, f"The converted model itself ran, since fake tensors do not serve ({reason})."


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loaded by whoever has compiled something
    wrapper = () if dynamo is None else dynamo.OptimizedModule
    return any(isinstance(each, wrapper) or each._compiled_call_impl is not None for each in model.modules())


def _part(part: int, whole: int) -> str:
    return bytes_label(part) + (f" ({part / whole:.1%})" if whole else "")
