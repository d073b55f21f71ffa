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
_TIGHT = 0.97  # part of the budget; the verdict warns of peaks above it
OUTSIDE = "outside of blocks"


class Cost(NamedTuple):
    """The bytes of a step's peak, and its time as a multiple of the exact step's."""

    peak: int
    time: float


@dataclass(frozen=True, repr=False)
class BudgetPlan(Report):
    """The fastest way found to train a model within a number of bytes. See `MemoryReport.plan`.

    choice    what happens to each block, and to the rest of the model
    setting   how modules are coded
    budget    in bytes
    peak      the peak of a step with this choice, on fake tensors
    time      the predicted time of a step with this choice, as a multiple of the exact step's
    exact     the peak with nothing changed
    uniform   what each way costs if all blocks are trained in it; the rest is coded if the blocks are
    frontier  the predicted costs of the best choices: no other choice has both a lower peak and a shorter time
    how       where the times come from, in words
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
        """Whether the peak is within the budget. If not, it is the lowest peak that was found."""
        return self.peak.bytes <= self.budget

    def convert(self) -> nn.Module:
        """Convert the model as planned, and make the chosen blocks recompute. Returns the model. The logger "fewbit" reports
        what was done.

        Raises InputError if the model was converted or changed after its report was made.
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
        """Lines of Python that do the same as `convert()`, to paste into a program."""
        least, by_kind = self._least, dict(self.setting.by_kind)
        bits = str(least if Setting.of(least).by_kind == self.setting.by_kind else by_kind)
        bits += "" if self.setting.coding is None else f", coding={self.setting.coding!r}"
        return self.choice.lines(bits, self.filter_fn is not None)

    @property
    def verdict(self) -> str:
        """Whether the plan fits, its peak, its time, and what to do if it does not fit."""
        peaks = f"{bytes_label(self.peak.bytes)} (exact training: {bytes_label(self.exact.bytes)})"
        time = f"forward and backward take {self.time:.2f} of the exact time"
        if self.fits:
            tight = "; leave a few percent for what else the process holds" if self.peak.bytes > _TIGHT * self.budget else ""
            return f"fits {bytes_label(self.budget)}: the peak is {peaks}; {time}{tight}"
        fewer = ", or fewer bits" if self.choice.codes else ""
        least = f"nothing fits {bytes_label(self.budget)}: the lowest peak found is {peaks}; {time}"
        return f"{least}. Take a smaller batch{fewer}"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each block, and one for the rest."""
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
        """The verdict, the choice, the costs of other choices, and the lines to paste."""
        chosen = terminal.table(("blocks",), ("number",))
        chosen.add_column("choice")
        for names, way in self._runs():
            label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
            chosen.add_row(label, str(len(names)) if names[0] != OUTSIDE else "", self._label(way))
        others = terminal.table(("way",), ("peak", "time (exact = 1)"))
        for what, cost in self._costs():
            others.add_row(what, bytes_label(cost.peak), f"{cost.time:.2f}")
        lines = Text(self.lines, no_wrap=True, overflow="ignore")  # not wrapped, since people paste them
        head = "plan.convert() does this, and so do these lines" + (", with your filter_fn:" if self.filter_fn else ":")
        return Group(self.verdict, f"  {self.forward.words}", "", chosen, "", others, "", self.how, "", head, "", lines)

    def _costs(self) -> list[tuple[str, Cost]]:
        """The rows of the table of costs: this plan, all blocks trained in the same way, and mixtures of ways."""
        found = [("this plan", Cost(self.peak.bytes, self.time))]
        found += [(f"all blocks: {way}", cost) for way, cost in self.uniform.items()]
        known = {_shown(cost) for _, cost in found}
        mixtures = [each for each in thinned(self.frontier, _SHOWN) if _shown(each) not in known]
        return found + [("blocks mixed (predicted)", each) for each in mixtures]

    def _label(self, way: Way) -> str:
        return str(way).replace("code", f"code at {plural(self._least, 'bit')}")

    @property
    def _least(self) -> int:
        """Bits of the codes. If kinds have different bits, the fewest of them."""
        return min(bits for _, bits in self.setting.by_kind)

    def _runs(self) -> list[tuple[list[str], Way]]:
        """Consecutive blocks of the same parent that are trained in the same way, grouped; then the rest."""
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
    """At most `most` of the costs, with peaks at about equal distances."""
    if len(costs) <= most:
        return list(costs)
    wanted = np.linspace(costs[0].peak, costs[-1].peak, most)
    peaks = np.array([each.peak for each in costs])
    return [costs[i] for i in sorted({int(np.abs(peaks - each).argmin()) for each in wanted})]
