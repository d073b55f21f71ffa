"""A plan for a number of bytes: which blocks of a model to keep, to code, to recompute, or both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.text import Text
from torch import nn

from fewbit import terminal
from fewbit.models.arguments import Filter
from fewbit.models.conversion.convert import log_conversion
from fewbit.models.conversion.setting import Setting
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.peak import Peak
from fewbit.models.memory.ways import CODE, KEEP, Choice, Way
from fewbit.models.report import Report
from fewbit.record import plural
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

_log = logging.getLogger("fewbit")
_SHOWN = 12  # points of the frontier in a table
_TIGHT = 0.97  # of a budget
OUTSIDE = "outside of blocks"


class Cost(NamedTuple):
    """The bytes of a step's peak, and its time as a multiple of exact's."""

    peak: int
    time: float


@dataclass(frozen=True, repr=False)
class BudgetPlan(Report):
    """How to train a model within a number of bytes, as fast as that goes. See `MemoryReport.plan`.

    choice    for each block, and the rest
    setting   of what is coded
    budget    in bytes
    peak      of a step so trained, on fake tensors
    time      of a step so trained, predicted, as a multiple of exact's
    exact     the peak with nothing changed
    uniform   what each way costs if it is that of all blocks; the rest is coded where they are
    frontier  what is predicted of the choices that none beats in both
    how       where times are from, in words
    """

    forward: Forward
    filter_fn: Filter | None
    choice: Choice
    setting: Setting
    budget: int
    peak: Peak
    time: float
    exact: Peak
    uniform: Mapping[Way, Cost]
    frontier: Sequence[Cost]
    how: str

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget; if not, it is the lowest that was found."""
        return self.peak.bytes <= self.budget

    def convert(self) -> nn.Module:
        """Convert the model so, its blocks that recompute included. Returns it; the logger "fewbit" tells what was done.

        Raises InputError if the model was converted or changed since its report.
        """
        self.forward.check_unchanged()
        model = self.forward.model
        converted = self.choice.convert(model, self.setting, self.filter_fn)
        if converted or self.choice.recomputed:
            log_conversion(model, self.setting, converted, self.choice.recomputed)
        else:
            _log.info("the %s stays exact: it fits the budget as it is", type(model).__name__)
        return model

    @property
    def lines(self) -> str:
        """What to paste into a program in the place of `convert()`: Python."""
        least, by_kind = self._least, dict(self.setting.by_kind)
        bits = str(least if Setting.of(least).by_kind == self.setting.by_kind else by_kind)
        bits += "" if self.setting.coding is None else f", coding={self.setting.coding!r}"
        return self.choice.lines(bits, self.filter_fn is not None)

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits, the peak, the time, and what is done."""
        peaks = f"{bytes_label(self.peak.bytes)}, where exact training takes {bytes_label(self.exact.bytes)}"
        time = f"forward and backward take {self.time:.2f} of the exact time"
        if self.fits:
            tight = "; leave a few percent for what a process holds besides" if self.peak.bytes > _TIGHT * self.budget else ""
            return f"fits {bytes_label(self.budget)}: the peak is {peaks}; {time}{tight}"
        fewer = ", or fewer bits" if self.choice.codes else ""
        least = f"nothing fits {bytes_label(self.budget)}: the least peak that was found is {peaks}; {time}"
        return f"{least}. Take a smaller batch{fewer}"

    def rows(self) -> list[dict[str, Any]]:
        """A block each, and the rest."""
        ways = (*self.choice.blocks.items(), (OUTSIDE, CODE if self.choice.rest else KEEP))
        return [{"module": name, "choice": str(way), "bits": self._least if way.coded else None} for name, way in ways]

    def totals(self) -> dict[str, Any]:
        return {
            "model": type(self.forward.model).__name__,
            "budget": self.budget,
            "fits": self.fits,
            "bits": dict(self.setting.by_kind),
            "coding": self.setting.coding,
            "peak": self.peak.to_dict(),
            "time": self.time,
            "exact": self.exact.to_dict(),
            "uniform": {str(way): each._asdict() for way, each in self.uniform.items()},
            "frontier": [each._asdict() for each in self.frontier],
            "lines": self.lines,
            "how": self.how,
        }

    def view(self) -> RenderableType:
        """The verdict, the choice, what else there is, and the lines to paste."""
        chosen = terminal.table(("blocks",), ("number",))
        chosen.add_column("choice")
        for names, way in self._runs():
            label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
            chosen.add_row(label, str(len(names)) if names[0] != OUTSIDE else "", self._label(way))
        others = terminal.table(("way",), ("peak", "time of exact"))
        for what, cost in self._costs():
            others.add_row(what, bytes_label(cost.peak), f"{cost.time:.2f}")
        lines = Text(self.lines, no_wrap=True, overflow="ignore")  # which are pasted
        head = "plan.convert() does it, and so do these lines" + (", with your filter_fn:" if self.filter_fn else ":")
        return Group(self.verdict, f"  {self.forward.words}", "", chosen, "", others, "", self.how, "", head, "", lines)

    def _costs(self) -> list[tuple[str, Cost]]:
        """What is shown beside each other: this plan, all blocks alike with the rest coded where they are, and mixtures."""
        found = [("this plan", Cost(self.peak.bytes, self.time))]
        found += [(f"all blocks: {way}", cost) for way, cost in self.uniform.items()]
        known = {_shown(cost) for _, cost in found}
        mixtures = [each for each in thinned(self.frontier, _SHOWN) if _shown(each) not in known]
        return found + [("a mixture, about", each) for each in mixtures]

    def _label(self, way: Way) -> str:
        return str(way).replace("code", f"code at {plural(self._least, 'bit')}")

    @property
    def _least(self) -> int:
        """Bits of the codes; where kinds differ, of those that have the fewest."""
        return min(bits for _, bits in self.setting.by_kind)

    def _runs(self) -> list[tuple[list[str], Way]]:
        """Blocks one after the other of one way and one home, and the rest."""
        pairs = list(self.choice.blocks.items())
        runs = [[*group] for _, group in groupby(pairs, key=lambda pair: (pair[0].rpartition(".")[0], pair[1]))]
        rest = ([OUTSIDE], CODE if self.choice.rest else KEEP)
        return [*(([name for name, _ in run], run[0][1]) for run in runs), rest]

    def figure(self) -> Figure:
        from fewbit.plots.frontier import plot_frontier

        name = type(self.forward.model).__name__
        uniform = {str(way): (each.peak, each.time) for way, each in self.uniform.items()}
        return plot_frontier(
            [*self.frontier], uniform, (self.peak.bytes, self.time), self.budget, f"{name}: memory against time"
        )


def _shown(cost: Cost) -> tuple[str, str]:
    return bytes_label(cost.peak), f"{cost.time:.2f}"


def thinned(costs: Sequence[Cost], most: int) -> list[Cost]:
    """So many of them, the peaks at about equal distances."""
    if len(costs) <= most:
        return list(costs)
    wanted = np.linspace(costs[0].peak, costs[-1].peak, most)
    peaks = np.array([each.peak for each in costs])
    return [costs[i] for i in sorted({int(np.abs(peaks - each).argmin()) for each in wanted})]
