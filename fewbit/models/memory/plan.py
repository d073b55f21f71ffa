"""Predict what `fewbit.convert` would save: convert the model, run a forward pass on fake tensors, and undo the conversion."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from rich.console import Group
from torch import nn

from fewbit import terminal
from fewbit.models.arguments import Filter
from fewbit.models.conversion.convert import log_conversion
from fewbit.models.conversion.engine import convert_modules, is_converted
from fewbit.models.conversion.setting import Setting
from fewbit.models.grouping import label
from fewbit.models.memory import advice, trials
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.operations import KIND_WORDS
from fewbit.models.memory.peak import MakeOptimizer, Peak, peak_of
from fewbit.models.memory.saved import Storage
from fewbit.models.memory.storages import kept_by, most_kept, note_on_workspaces, picture_of, total
from fewbit.models.preserve import preserved_structure
from fewbit.models.report import Report
from fewbit.terminal import bytes_label, percent
from fewbit.text import plain
from fewbit.torch_internals import is_compiled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

_log = logging.getLogger("fewbit")
_AGREEMENT = 0.01  # sizes on fake tensors may differ so much from measured ones; beyond it, the model runs on real tensors


@dataclass(repr=False)
class Plan(Report):
    """What a converted model would keep, and which modules are worth converting. `MemoryReport.plan` makes it.

    forward     the model and its batch
    before      what is kept if nothing is converted
    after       what is kept after `fewbit.convert`
    outcome     what is kept if only the modules that pay are converted
    candidates  names of the modules that `fewbit.convert` would convert
    advice      for each module that is converted or keeps something
    how         whether the converted model ran on fake tensors or on real ones
    filter_fn   the filter that was given
    make_optimizer  a function that makes an optimizer from parameters, for `peak`
    """

    forward: Forward
    setting: Setting
    before: list[Storage]
    after: list[Storage]
    outcome: trials.Outcome
    candidates: frozenset[str]
    advice: list[advice.Advice]
    how: str
    filter_fn: Filter | None = None
    make_optimizer: MakeOptimizer | None = None

    @cached_property
    def peak(self) -> Peak:
        """The peak of a training step after `convert()` of this plan. Raises what `MemoryReport.peak` raises."""
        self.forward.check_unchanged()
        with preserved_structure(self.forward.model):
            self._convert()
            return peak_of(self.forward, self.make_optimizer)

    @property
    def before_bytes(self) -> int:
        """Bytes of activations that are kept if nothing is converted."""
        return total(self.before)

    @property
    def after_bytes(self) -> int:
        """Bytes of activations that are kept after `fewbit.convert`."""
        return total(self.after)

    @property
    def best_bytes(self) -> int:
        """Bytes of activations that are kept after `convert()` of this plan, which converts only what pays."""
        return total(self.outcome.storages)

    def convert(self) -> nn.Module:
        """Convert only the modules that pay, as `fewbit.convert` does. Returns the model.

        The logger "fewbit" reports at level INFO what was done, and why the other modules stay exact.

        Raises InputError if the model was converted or changed after its report was made.
        """
        self.forward.check_unchanged()
        model, converted = self.forward.model, self._convert()
        if converted or not self.candidates:
            log_conversion(model, self.setting, converted)
        for each in self.advice:
            if each.module in self.candidates - self.outcome.chosen:
                _log.info("%s", plain(f"{each.module or type(model).__name__} stays exact: {each.reason}"))
        return model

    def _convert(self) -> list[Any]:
        passes = _choice(self.outcome.chosen, self.candidates, self.filter_fn)
        return convert_modules(self.forward.model, self.setting, passes)

    def by_module(self) -> dict[str, tuple[int, int]]:
        """Bytes of activations before and after, by module. A shared tensor counts for the first module that saves it."""
        before, after = kept_by(self.before), kept_by(self.after)
        return {name: (before.get(name, 0), after.get(name, 0)) for name in dict.fromkeys([*before, *after])}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each module. `saves` is what its conversion saves when the other modules that pay are converted too."""
        return [vars(each).copy() for each in self.advice]

    def totals(self) -> dict[str, Any]:
        return {
            "model": type(self.forward.model).__name__,
            "bits": dict(self.setting.by_kind),
            "coding": self.setting.coding,
            "before": self.before_bytes,
            "after": self.after_bytes,
            "best": self.best_bytes,
            "how": self.how,
        }

    def view(self, most: int = 30) -> RenderableType:
        """Advice for the `most` modules that keep or save most, where repeated layers share a row, and the totals."""
        lines = [self.verdict, f"  {self.forward.words}"]
        if self.best_bytes != self.after_bytes:
            best = _part(self.best_bytes, self.before_bytes)
            lines.append(f"  plan.convert() converts only what pays, and keeps {best}")
        return Group(*lines, "", self._table(most), "", self.how)

    @property
    def verdict(self) -> str:
        """One sentence: what is kept after the conversion, as a part of what was kept, and what keeps most of it."""
        name, kept = type(self.forward.model).__name__, _part(self.after_bytes, self.before_bytes)
        most_of_it = most_kept(self.after)
        rest = f"; most of it for {most_of_it}" if most_of_it else ""
        whole = bytes_label(self.before_bytes)
        return f"converted with {self.setting}, the {name} keeps {kept} of the {whole} that exact training keeps{rest}"

    def _table(self, most: int) -> RenderableType:
        view = terminal.table(("module",), ("before", "after"))
        view.add_column("advice", no_wrap=True)
        view.add_column("because")
        groups = [group for group in advice.grouped(self.advice) if any(each.before or each.after for each in group)]
        for group in groups[:most]:
            first, count = group[0], len(group)
            name = label(each.module for each in group) + (f" ({count})" if count > 1 else "")
            sums = [sum(each.before for each in group), sum(each.after for each in group)]
            view.add_row(name, *map(bytes_label, sums), first.advice, advice.reason_label(group))
        rest = [each for group in groups[most:] for each in group]
        if rest:
            sums = [sum(each.before for each in rest), sum(each.after for each in rest)]
            view.add_row(f"{len(groups) - most} others", *map(bytes_label, sums))
        return view

    def figure(self) -> Figure:
        from fewbit.plots.memory import plot_memory

        name = type(self.forward.model).__name__
        title = f"{name}: kept for backward, exact and converted with {self.setting}"
        return plot_memory(picture_of({"exact": self.before, "converted": self.after}), KIND_WORDS, title, bytes_label)


def plan(
    forward: Forward,
    measured: list[Storage] | None,
    setting: Setting,
    filter_fn: Filter | None = None,
    make_optimizer: MakeOptimizer | None = None,
) -> Plan:
    """See `MemoryReport.plan`. `measured` is what the model keeps on real tensors, or None if it only ran on fake ones."""
    forward.check_unchanged()
    model = forward.model
    with preserved_structure(model):
        candidates = _convert(model, setting, filter_fn)
    before, fake, how = _baseline(forward, measured)
    with terminal.progress("trying conversions") as advance:

        def run(names: Collection[str]) -> list[Storage]:
            with preserved_structure(model):
                _convert(model, setting, _choice(names, frozenset(candidates), filter_fn))
                storages = forward.saved(fake)
            advance()
            return storages

        after = run(candidates)
        if fake and measured is not None and abs(total(before) - total(measured)) > _AGREEMENT * total(after):
            fake, how, before = False, _by_running(_difference(before, measured)), measured
            after = run(candidates)
        was_converted = any(is_converted(module) for module in model.modules())
        before = run(()) if was_converted else before
        compiled = any(is_compiled(module) for module in model.modules())
        outcome = (trials.all_or_none if compiled else partial(trials.choose, run))(candidates, before, after)
    convertible, classes = _convertible(model)
    found = advice.of_modules(classes, candidates, convertible - {*candidates}, before, after, outcome)
    return Plan(forward, setting, before, after, outcome, frozenset(candidates), found, how, filter_fn, make_optimizer)


def _convert(model: nn.Module, setting: Setting, filter_fn: Filter | None) -> list[str]:
    return [each.name for each in convert_modules(model, setting, filter_fn)]


def _choice(chosen: Collection[str], candidates: Collection[str], filter_fn: Filter | None) -> Filter:
    """A filter for the chosen conversions. A candidate passes if it is chosen. Any other module passes if the user's filter
    lets it pass, since a chosen module may call it."""

    def passes(module: nn.Module, name: str) -> bool:
        return name in chosen if name in candidates else filter_fn is None or filter_fn(module, name)

    return passes


def _convertible(model: nn.Module) -> tuple[set[str], dict[str, str]]:
    """The names of what a conversion of every kind would convert; and the class of each module after that conversion, modules
    that replace functions included."""
    with preserved_structure(model):
        names = {*_convert(model, Setting.of(1), None)}
        return names, {name: type(module).__name__ for name, module in model.named_modules()}


def _baseline(forward: Forward, measured: list[Storage] | None) -> tuple[list[Storage], bool, str]:
    """What is kept now, whether that was found on fake tensors, and words for it."""
    reason = "the model is compiled" if any(is_compiled(module) for module in forward.model.modules()) else ""
    if not reason:
        try:
            found = forward.saved(fake=True)
        except Exception as error:  # the model may do anything that fake tensors cannot
            if measured is None:
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            if measured is None or abs(total(found) - total(measured)) <= _AGREEMENT * total(measured):
                how = "Sizes come from a run of the converted model on fake tensors."
                return found, True, f"{how} {note_on_workspaces(found)}".strip()
            reason = _difference(found, measured)
    found = forward.saved(fake=False) if measured is None else measured
    return found, False, _by_running(reason)


def _difference(fake: list[Storage], measured: list[Storage]) -> str:
    return f"they keep {bytes_label(total(fake))}, but {bytes_label(total(measured))} were measured"


def _by_running(reason: str) -> str:
    return f"Sizes come from a run of the converted model on real tensors, since fake tensors do not serve ({reason})."


def _part(part: int, whole: int) -> str:
    return f"{bytes_label(part)} ({percent(part / whole)})" if whole else bytes_label(part)
