"""The frontier of choices, compared with all choices that exist."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fewbit.models.memory import choices
from fewbit.models.memory.choices import frontier


def cost(kept, rises, seconds, turn, ways):
    """Peak and time of one choice, computed as a step goes on."""
    level = peak = time = 0
    for block, way in enumerate(ways):
        peak = max(peak, level + rises[block][way])
        level, time = level + kept[block][way], time + seconds[block][way]
    return max(peak, level + turn), time


def all_choices(kept, rises, seconds, turn):
    """The peaks and times that no other choice beats."""
    costs = sorted(
        {cost(kept, rises, seconds, turn, ways) for ways in itertools.product(range(len(kept[0])), repeat=len(kept))}
    )
    return [each for i, each in enumerate(costs) if all(each[1] < other[1] for other in costs[:i])]


@st.composite
def problems(draw):
    blocks, ways = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    numbers = st.lists(st.lists(st.integers(0, 12), min_size=ways, max_size=ways), min_size=blocks, max_size=blocks)
    kept, above, seconds = draw(numbers), draw(numbers), draw(numbers)
    return np.array(kept), np.array(kept) + above, np.array(seconds, dtype=float), draw(st.integers(0, 30))


@given(problems())
def test_none_is_missed_and_none_beaten(problem):
    found = frontier(*problem)
    assert [(each.peak, each.seconds) for each in found] == all_choices(*problem)
    assert all(cost(*problem, each.ways) == (each.peak, each.seconds) for each in found)


def test_many_states_are_thinned_near_the_best(monkeypatch):
    rng = np.random.default_rng(0)
    kept = rng.integers(1, 10**9, (16, 4))
    problem = kept, kept + rng.integers(1, 10**9, kept.shape), rng.random(kept.shape), 10**8
    exact = frontier(*problem)
    monkeypatch.setattr(choices, "_MOST_STATES", 50)
    monkeypatch.setattr(choices, "_CELLS", 20)
    thinned = frontier(*problem)
    assert 1 < len(thinned) < len(exact)
    for each in thinned:
        best = min(one.seconds for one in exact if one.peak <= each.peak)
        assert best <= each.seconds <= 1.1 * best


def test_no_blocks():
    assert frontier(np.zeros((0, 2), int), np.zeros((0, 2), int), np.zeros((0, 2)), 7) == [(7, 0.0, ())]
