"""The choices for the blocks of a model that take the least time in a given memory: all of them, by a dynamic program.

A block has a few ways to be trained. Each way leaves so many bytes kept until the block's backward pass, rises so far above
what the blocks before it keep while the block runs, forward or backward, and takes so long. The peak of a step is the highest
of these, and of what the step takes once all blocks have run forward.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_STATES = 4000
_CELLS = 500  # of each axis, where states are more


class Point(NamedTuple):
    """Bytes of the peak, seconds, and the way of each block."""

    peak: int
    seconds: float
    ways: tuple[int, ...]


class _States(NamedTuple):
    """Beginnings of choices: bytes that their blocks keep, the peak so far, seconds, and the ways, (states, blocks)."""

    kept: NDArray[np.int64]
    peak: NDArray[np.int64]
    seconds: NDArray[np.float64]
    ways: NDArray[np.int8]

    def __getitem__(self, chosen: NDArray) -> _States:  # type: ignore[override]
        return _States(self.kept[chosen], self.peak[chosen], self.seconds[chosen], self.ways[chosen])


def frontier(kept: NDArray[np.int64], rises: NDArray[np.int64], seconds: NDArray[np.float64], turn: int) -> list[Point]:
    """The choices that none beats in both peak and time, the smallest peak first.

    kept, rises, seconds  (blocks, ways): bytes that a block keeps, the highest that it gets, beyond what the blocks before it
                          keep, and its time
    turn                  bytes beyond what all blocks keep, once all have run forward

    >>> kept, rises, seconds = np.array([[4, 1], [4, 1]]), np.array([[4, 5], [4, 5]]), np.array([[1.0, 2], [1, 2]])
    >>> for point in frontier(kept, rises, seconds, 0):
    ...     print(point)
    Point(peak=5, seconds=3.0, ways=(1, 0))
    Point(peak=8, seconds=2.0, ways=(0, 0))

    Exact as long as no more than some thousand beginnings of choices are worth following; beyond, the peak is within a part in
    500 of what it could be for each block. A choice whose rises do not set the peak may stand for others of equal figures.
    """
    states = _States(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int8))
    for block in range(len(kept)):
        states = _thinned(_undominated(_extended(states, kept[block], rises[block], seconds[block])))
    peak = np.maximum(states.peak, states.kept + turn)
    order = np.lexsort((states.seconds, peak))
    found: list[Point] = []
    for i in order:
        if not found or states.seconds[i] < found[-1].seconds:
            found.append(Point(int(peak[i]), float(states.seconds[i]), tuple(map(int, states.ways[i]))))
    return found


def _extended(states: _States, kept: NDArray, rises: NDArray, seconds: NDArray) -> _States:
    """Each beginning, with each way of one more block."""
    count, ways = len(states.kept), len(kept)
    old, way = np.repeat(np.arange(count), ways), np.tile(np.arange(ways, dtype=np.int8), count)
    return _States(
        states.kept[old] + kept[way],
        np.maximum(states.peak[old], states.kept[old] + rises[way]),
        states.seconds[old] + seconds[way],
        np.concatenate([states.ways[old], way[:, None]], axis=1),
    )


def _undominated(states: _States) -> _States:
    """Those that no other one beats, or equals, in all three. By time, each keeps its place if its peak is below those of all
    before it that keep no more."""
    order = np.lexsort((states.peak, states.kept, np.round(states.seconds, 12)))
    kept, peak = states.kept[order], states.peak[order]
    chosen: list[int] = []
    least = np.full(len(order), np.iinfo(np.int64).max)  # peak, by rank of what is kept
    ranks = np.unique(kept, return_inverse=True)[1]
    for i in range(len(order)):
        if peak[i] < least[ranks[i]]:
            chosen.append(order[i])
            np.minimum(least[ranks[i] :], peak[i], out=least[ranks[i] :])
    return states[np.array(chosen)]


def _thinned(states: _States) -> _States:
    """No more states than can be followed: of those that are all but equal the fastest."""
    if len(states.kept) <= _MOST_STATES:
        return states
    cells = np.stack([_cell(states.kept), _cell(states.peak)], axis=1)
    order = np.argsort(states.seconds, kind="stable")
    return states[order[np.unique(cells[order], axis=0, return_index=True)[1]]]


def _cell(values: NDArray[np.int64]) -> NDArray[np.int64]:
    low, high = values.min(), values.max()
    return (values - low) * _CELLS // max(1, high - low)
