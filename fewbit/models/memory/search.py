"""The search for a plan that fits a number of bytes.

One step runs for each way of training the blocks. From these steps the search predicts the costs of all mixtures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fewbit import terminal
from fewbit.models.arguments import Filter, roots_of
from fewbit.models.blocks import names_of_blocks
from fewbit.models.conversion.setting import Setting
from fewbit.models.memory.budget import BudgetPlan, Cost
from fewbit.models.memory.choices import Point, frontier
from fewbit.models.memory.course import Course, Recorder, course_of, units_of
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.peak import MakeOptimizer, Peak, main_device, peak_of
from fewbit.models.memory.rates import rates_of
from fewbit.models.memory.saved import tensors_in
from fewbit.models.memory.ways import CODE, KEEP, WAYS, Choice, Way
from fewbit.models.preserve import preserved_structure

_ROUNDS, _ENOUGH_SECONDS = 5, 20.0  # timed steps of each way; after so many seconds no further round begins
_TRIES = 8  # choices that run on fake tensors at most, until one fits
_MOST_BLOCKS = 200


class Searches:
    """Plans for any budget. The steps that they need run once for each setting and filter."""

    def __init__(self, forward: Forward, measure: bool, make_optimizer: MakeOptimizer | None):
        """measure: whether the model may run on real tensors, to be timed"""
        self._forward, self._measure, self._make_optimizer = forward, measure, make_optimizer
        self._known: dict[Any, list[_Search]] = {}

    def plan(self, budget: int | str, setting: Setting, filter_fn: Filter | None) -> BudgetPlan:
        """See `MemoryReport.plan`."""
        self._forward.check_unchanged()
        limit, key = terminal.parse_bytes(budget), (setting, id(filter_fn))  # the search holds the filter: its id stays valid
        with terminal.progress("choosing what to keep, code and recompute") as advance:
            if key not in self._known:
                self._known[key] = [self._search(level, setting, filter_fn, advance) for level in self._levels()]
            found = [search.best(limit, advance) for search in self._known[key]]
        return min(found, key=lambda plan: (not plan.fits, plan.time if plan.fits else plan.peak.bytes))

    def _levels(self) -> list[list[str]]:
        """Names of the blocks to choose for: the outermost ones; and those inside of them, if there are more of these."""
        outer, *inner = names_of_blocks(self._forward.model) or [[]]
        return [outer, *(level for level in inner[:1] if len(outer) < len(level) <= _MOST_BLOCKS)]

    def _search(self, names: Sequence[str], setting: Setting, filter_fn: Filter | None, advance: Callable[[], None]) -> _Search:
        return _Search(self._forward, self._measure, setting, filter_fn, self._make_optimizer, names, advance)


class _Search:
    """The search for the blocks of one level."""

    def __init__(
        self,
        forward: Forward,
        measure: bool,
        setting: Setting,
        filter_fn: Filter | None,
        make_optimizer: MakeOptimizer | None,
        names: Sequence[str],
        advance: Callable[[], None],
    ):
        self._forward, self._setting, self._filter = forward, setting, filter_fn
        self._make_optimizer, self._names, self._advance = make_optimizer, names, advance
        self._rates = rates_of(*main_device(forward.model))
        self._peaks: dict[Way, Peak] = {}
        self._courses: dict[Way, Course] = {}
        self._units: list[frozenset[int]] = []
        self._reason = ""
        for way in WAYS if names else WAYS[:2]:
            self._run(way)
        self._scales, how = self._times(measure)
        self.how = how + self._reason

    def best(self, budget: int, advance: Callable[[], None]) -> BudgetPlan:
        """The fastest choice that fits, checked by a run on fake tensors. If none fits, the choice with the lowest peak."""
        self._advance = advance
        points, exact = self._frontier(), self._seconds(KEEP)
        found = [(each, self._seconds(way), self._alike(way)) for way, each in self._peaks.items()]
        limit = budget
        for _ in range(_TRIES):
            fitting = [each for each in points if each[0].peak <= limit]
            point, choice = min(fitting, key=lambda each: each[0].seconds) if fitting else points[0]
            peak = self._peak(choice)
            found.append((peak, point.seconds, choice))
            if peak.bytes <= budget or not fitting:
                break
            limit = min(limit, point.peak) - max(1, (peak.bytes - budget) // 2)
        fitting = [each for each in found if each[0].bytes <= budget]
        least = min(found, key=lambda each: (each[0].bytes, each[1]))
        peak, seconds, choice = min(fitting, key=lambda each: each[1], default=least)
        costs = [Cost(each.peak, each.seconds / exact) for each, _ in points]
        uniform = {way: Cost(each.bytes, self._seconds(way) / exact) for way, each in self._peaks.items()}
        return BudgetPlan(
            self._forward,
            self._filter,
            choice,
            self._setting,
            budget,
            peak,
            seconds / exact,
            self._peaks[KEEP],
            uniform,
            costs,
            self.how,
        )

    def _run(self, way: Way) -> None:
        """Run a step with all blocks trained in this way, and the rest coded if they are."""
        recorder = Recorder(self._names, self._rates)
        try:
            peak = self._peak(self._alike(way), recorder)
            if way == KEEP:
                self._units = units_of(recorder.moments)
            self._courses[way] = course_of(recorder.moments, self._units)
        except Exception as error:  # a block may do anything when it runs a second time
            if not way.recomputed:
                raise
            self._reason = f"; blocks cannot be recomputed ({type(error).__name__}: {str(error).splitlines()[0]})"
            return
        self._peaks[way] = peak

    def _peak(self, choice: Choice, recorder: Recorder | None = None) -> Peak:
        with preserved_structure(self._forward.model):
            choice.convert(self._forward.model, self._setting, self._filter)
            found = peak_of(self._forward, self._make_optimizer, tell=recorder)
        self._advance()
        return found

    def _choice(self, ways: Sequence[Way], rest: bool) -> Choice:
        return Choice(dict(zip(self._names, ways, strict=True)), rest)

    def _alike(self, way: Way) -> Choice:
        """The choice with all blocks trained in this way, and the rest coded if they are."""
        return self._choice([way] * len(self._names), way.coded)

    def _times(self, measure: bool) -> tuple[dict[Way, float], str]:
        """For each way the factor from estimated to measured seconds; and words that say where the times come from."""
        counted = f"times are estimated from the operators of a step, for {self._rates}"
        if not measure:
            return dict.fromkeys(self._courses, 1.0), counted
        ways = [*self._courses]
        choices = [self._alike(way) for way in ways]
        try:
            seconds = _measured_seconds(self._forward, choices, self._setting, self._filter, self._advance)
        except RuntimeError as error:  # memory may be too small for it, which may be why a plan is wanted
            return dict.fromkeys(self._courses, 1.0), f"{counted}, as the model cannot run ({str(error).splitlines()[0]})"
        scales = {way: each / self._courses[way].seconds for way, each in zip(ways, seconds, strict=True)}
        how = "times were measured on this machine, in steps with all blocks alike; the optimizer's time is not counted"
        return scales, how

    def _seconds(self, way: Way) -> float:
        return self._courses[way].seconds * self._scales[way]

    def _frontier(self) -> list[tuple[Point, Choice]]:
        """The choices for which no other one has both a lower peak and a shorter time, the lowest peak first."""
        found = []
        for rest in (KEEP, CODE):
            course = self._courses[rest]
            outside = course.seconds - sum(each.seconds for each in (*course.forward, *course.backward))
            ways = [*self._courses]
            for point in _points(course, [self._courses[way] for way in ways], [self._scales[way] for way in ways]):
                seconds = point.seconds + outside * self._scales[rest]
                of_units = dict(zip(self._units, (ways[i] for i in point.ways), strict=True))
                of_blocks = [next((way for unit, way in of_units.items() if i in unit), rest) for i in range(len(self._names))]
                found.append((Point(point.peak, seconds, point.ways), self._choice(of_blocks, rest.coded)))
        found.sort(key=lambda each: (each[0].peak, each[0].seconds))
        best: list[tuple[Point, Choice]] = []
        for each in found:
            if not best or each[0].seconds < best[-1][0].seconds:
                best.append(each)
        return best


def _points(rest: Course, courses: Sequence[Course], scales: Sequence[float]) -> list[Point]:
    """The frontier of choices for the blocks.

    rest     the course of a step in which the rest of the model is coded, or not, as it will be
    courses  for each way, the course of a step with all blocks trained in it
    scales   for each way, the factor from estimated to measured seconds
    """
    before = np.cumsum([0, *(each.after - each.before for each in rest.forward)])  # what the blocks before each block keep
    count = len(rest.forward)
    shape = count, len(courses)
    kept, rises, seconds = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    for i in range(count):
        around = max(each.most for each in rest.gaps[i]) - before[i]
        for j, course in enumerate(courses):
            there, back = course.forward[i], course.backward[i]
            kept[i, j] = there.after - there.before
            ahead = rest.forward[i].before - before[i] + there.most - there.before
            behind = rest.backward[i].before - before[i + 1] + back.most - back.before + kept[i, j]
            rises[i, j] = max(around, ahead, behind)
            seconds[i, j] = (there.seconds + back.seconds) * scales[j]
    return frontier(kept, rises, seconds, rest.gaps[-1][0].most - int(before[-1]))


def _measured_seconds(
    forward: Forward, choices: Sequence[Choice], setting: Setting, filter_fn: Filter | None, advance: Callable[[], None]
) -> list[float]:
    """Seconds of a step, forward and backward, with each of these choices.

    Rounds run all choices one after the other. Each time is taken relative to that of the first choice in the same round, and
    the median over the rounds is given.
    """
    taken: list[list[float]] = [[] for _ in choices]
    begin = time.perf_counter()
    with forward.untouched():
        for turn in range(_ROUNDS + 1):  # the first round is not counted
            for choice, seconds in zip(choices, taken, strict=True):
                with preserved_structure(forward.model):
                    choice.convert(forward.model, setting, filter_fn)
                    seconds.append(_step_seconds(forward))
                advance()
            if turn and time.perf_counter() - begin > _ENOUGH_SECONDS:
                break
    first, unit = taken[0][1:], statistics.median(taken[0][1:])
    return [unit * statistics.median(one / other for one, other in zip(each[1:], first, strict=True)) for each in taken]


def _step_seconds(forward: Forward) -> float:
    device = main_device(forward.model)[0]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    leaves = [each for each in (*forward.model.parameters(), *tensors_in(forward.batch)) if each.requires_grad]
    before = [each.grad for each in leaves]
    for each in leaves:
        each.grad = None
    try:
        wait()
        begin = time.perf_counter()
        roots = roots_of(forward.model, forward.batch, forward.loss_fn)
        torch.autograd.backward(roots, [torch.ones_like(each) for each in roots])
        wait()
        return time.perf_counter() - begin
    finally:
        for each, gradient in zip(leaves, before, strict=True):
            each.grad = gradient
