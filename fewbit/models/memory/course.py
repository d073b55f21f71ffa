"""The course of a training step from block to block, forward and backward: how many bytes are alive, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fewbit.models.memory.alive import Seen
from fewbit.models.memory.rates import Rates


class Moment(NamedTuple):
    """One operator: its phase; the block that it ran in, or -1 outside of all blocks; the bytes alive before and after it; and
    its seconds, which are 0 in the optimizer."""

    phase: str
    block: int
    before: int
    after: int
    seconds: float


class Stretch(NamedTuple):
    """Consecutive operators: the bytes alive before them, at most during them, and after them; and their seconds."""

    before: int
    most: int
    after: int
    seconds: float


@dataclass(frozen=True)
class Course:
    """A step, cut where blocks begin and end.

    forward, backward  the stretch of each block, in the order of the forward pass
    gaps  what runs between the blocks, one entry more than there are blocks. The entry of a block has two stretches: the one
          before its forward pass, and the one after its backward pass. The last entry is the stretch between the forward and
          the backward pass of the last block
    """

    forward: list[Stretch]
    backward: list[Stretch]
    gaps: list[tuple[Stretch, ...]]

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return sum(each.seconds for each in (*self.forward, *self.backward, *(each for gap in self.gaps for each in gap)))


class Recorder:
    """Records the moments of a step. `peak_of` calls it with each operator."""

    def __init__(self, blocks: Sequence[str], rates: Rates):
        """blocks: names of the modules at which the step is cut"""
        self._blocks = {f"{name}.": number for number, name in enumerate(blocks)}
        self._rates = rates
        self._known: dict[str | None, int] = {}
        self.moments: list[Moment] = []

    def __call__(self, seen: Seen) -> None:
        if self.moments and seen.place.phase == "forward" and self.moments[-1].phase == "optimizer":
            self.moments.clear()  # the second of two steps counts
        name = seen.place.module
        if name not in self._known:
            self._known[name] = self._block_of(name)
        in_optimizer = seen.place.phase == "optimizer"
        block, seconds = (-1, 0.0) if in_optimizer else (self._known[name], self._rates.seconds(*seen.call))
        self.moments.append(Moment(seen.place.phase, block, seen.before, seen.after, seconds))

    def _block_of(self, name: str | None) -> int:
        return -1 if name is None else next((i for prefix, i in self._blocks.items() if f"{name}.".startswith(prefix)), -1)


def units_of(moments: Sequence[Moment]) -> list[frozenset[int]]:
    """The blocks that run forward and backward, in order. Blocks whose operators mix form one unit, such as a block that runs
    several times between others. Blocks that run only forward, such as frozen ones at the beginning, are left out."""
    spans = {phase: _spans(moments, phase) for phase in ("forward", "backward")}
    units = [frozenset({block}) for block in spans["forward"] if block in spans["backward"]]
    merged = True
    while merged:
        merged = False
        for found in spans.values():
            for first, second in pairwise(units):
                if _overlap(_union(found, first), _union(found, second)):
                    at = units.index(first)
                    units[at : at + 2] = [first | second]
                    merged = True
                    break
    return units


def course_of(moments: Sequence[Moment], units: Sequence[frozenset[int]]) -> Course:
    """The course of a step with these units as its blocks. ValueError if they do not run one after the other and back."""
    cuts = []
    for phase, ordered in (("forward", units), ("backward", units[::-1])):
        found = _spans(moments, phase)
        for unit in ordered:
            if not any(block in found for block in unit):
                raise ValueError("a block does not run in both directions")
            cuts.append(_union(found, unit))
    if any(before[1] >= after[0] for before, after in pairwise(cuts)):
        raise ValueError("blocks do not run one after the other, and back")
    stretches = [_stretch(moments, first, last + 1) for first, last in cuts]
    ends = [-1, *(last for _, last in cuts)]
    begins = [*(first for first, _ in cuts), len(moments)]
    between = [_stretch(moments, end + 1, begin) for end, begin in zip(ends, begins, strict=True)]
    count = len(units)
    gaps = [(between[i], between[2 * count - i]) for i in range(count)] + [(between[count],)]
    return Course(stretches[:count], stretches[count:][::-1], gaps)


def _spans(moments: Sequence[Moment], phase: str) -> dict[int, tuple[int, int]]:
    """For each block its first and last moment in a phase, in the order of the first moments."""
    found: dict[int, tuple[int, int]] = {}
    for i, each in enumerate(moments):
        if each.phase == phase and each.block >= 0:
            found[each.block] = (found.get(each.block, (i, i))[0], i)
    return found


def _union(spans: dict[int, tuple[int, int]], unit: frozenset[int]) -> tuple[int, int]:
    found = [spans[block] for block in unit if block in spans]
    return min(first for first, _ in found), max(last for _, last in found)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _stretch(moments: Sequence[Moment], begin: int, end: int) -> Stretch:
    after = moments[end].before if end < len(moments) else moments[-1].after
    if begin >= end:
        return Stretch(after, after, after, 0.0)
    part = moments[begin:end]
    return Stretch(part[0].before, max(each.after for each in part), after, sum(each.seconds for each in part))
