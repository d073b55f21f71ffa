"""The choices for the blocks of a model that take the least time in a given memory. A dynamic program finds them for all peaks.

A block can be trained in a few ways. Each way has three figures: the bytes kept until the block's backward pass; the most bytes
in use while the block runs forward or backward, beyond what the blocks before it keep; and the time. The peak of a step is the
highest use of any block, or the use at the turn, when all blocks have run forward.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_STATES = 4000
_CELLS = 500  # cells along each axis, to thin states out when there are more


class Point(NamedTuple):
    """Bytes of the peak, seconds, and the way of each block."""

    peak: int
    seconds: float
    ways: tuple[int, ...]


class _States(NamedTuple):
    """Choices for the first blocks: bytes that these blocks keep, the peak so far, seconds, and the ways (states, blocks)."""

    kept: NDArray[np.int64]
    peak: NDArray[np.int64]
    seconds: NDArray[np.float64]
    ways: NDArray[np.int8]

    def __getitem__(self, chosen: NDArray) -> _States:  # type: ignore[override]
        return _States(self.kept[chosen], self.peak[chosen], self.seconds[chosen], self.ways[chosen])


def frontier(kept: NDArray[np.int64], rises: NDArray[np.int64], seconds: NDArray[np.float64], turn: int) -> list[Point]:
    """The choices for which no other one has both a lower peak and a shorter time, the lowest peak first.

    kept, rises, seconds  (blocks, ways): bytes that a block keeps; the most bytes in use while it runs, beyond what the blocks
                          before it keep; and its time
    turn                  bytes in use when all blocks have run forward, beyond what all blocks keep

    >>> kept, rises, seconds = np.array([[4, 1], [4, 1]]), np.array([[4, 5], [4, 5]]), np.array([[1.0, 2], [1, 2]])
    >>> for point in frontier(kept, rises, seconds, 0):
    ...     print(point)
    Point(peak=5, seconds=3.0, ways=(1, 0))
    Point(peak=8, seconds=2.0, ways=(0, 0))

    The result is exact as long as no more than a few thousand choices for the first blocks are worth following. Beyond that,
    each block may raise the peak by up to one part in 500. Of several choices with the same figures only one is given.
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
    """Each state, extended by each way of one more block."""
    count, ways = len(states.kept), len(kept)
    old, way = np.repeat(np.arange(count), ways), np.tile(np.arange(ways, dtype=np.int8), count)
    return _States(
        states.kept[old] + kept[way],
        np.maximum(states.peak[old], states.kept[old] + rises[way]),
        states.seconds[old] + seconds[way],
        np.concatenate([states.ways[old], way[:, None]], axis=1),
    )


def _undominated(states: _States) -> _States:
    """The states that no other one beats or equals in all three figures. They are taken in the order of time: a state stays if
    its peak is below the peaks of all earlier states that keep no more."""
    order = np.lexsort((states.peak, states.kept, np.round(states.seconds, 12)))
    kept, peak = states.kept[order], states.peak[order]
    chosen: list[int] = []
    least = np.full(len(order), np.iinfo(np.int64).max)  # the lowest peak so far, by rank of what is kept
    ranks = np.unique(kept, return_inverse=True)[1]
    for i in range(len(order)):
        if peak[i] < least[ranks[i]]:
            chosen.append(order[i])
            np.minimum(least[ranks[i] :], peak[i], out=least[ranks[i] :])
    return states[np.array(chosen)]


def _thinned(states: _States) -> _States:
    """The states, thinned out if there are too many: of nearly equal ones only the fastest stays."""
    if len(states.kept) <= _MOST_STATES:
        return states
    cells = np.stack([_cell(states.kept), _cell(states.peak)], axis=1)
    order = np.argsort(states.seconds, kind="stable")
    return states[order[np.unique(cells[order], axis=0, return_index=True)[1]]]


def _cell(values: NDArray[np.int64]) -> NDArray[np.int64]:
    low, high = values.min(), values.max()
    return (values - low) * _CELLS // max(1, high - low)
