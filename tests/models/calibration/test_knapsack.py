"""The knapsack compared with brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import DesignError
from fewbit.models.calibration.knapsack import choose


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_against_brute_force(data):
    sizes, costs = st.integers(0, 60), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 1e-4, 0.5, 1e3]))
    choices = st.dictionaries(st.integers(1, 8), st.tuples(sizes, costs), min_size=1, max_size=4)
    items = data.draw(st.lists(choices, min_size=1, max_size=5))
    budget = data.draw(st.integers(0, 200))
    fitting = [
        sum(item[choice][1] for item, choice in zip(items, picked, strict=True))
        for picked in itertools.product(*items)
        if sum(item[choice][0] for item, choice in zip(items, picked, strict=True)) <= budget
    ]
    if not fitting:
        with pytest.raises(DesignError, match="the budget must be at least"):
            choose(items, budget)
        return
    found = choose(items, budget)
    assert sum(item[choice][0] for item, choice in zip(items, found, strict=True)) <= budget
    cost = sum(item[choice][1] for item, choice in zip(items, found, strict=True))
    assert cost == pytest.approx(min(fitting), rel=1e-9, abs=1e-9 * max(cost for item in items for _, cost in item.values()))


def test_sizes_of_real_layers():
    """Billions of bytes, and errors that fall by a factor of four for each bit."""
    generator = torch.Generator().manual_seed(0)
    weights = (10 ** (4 * torch.rand(40, generator=generator))).tolist()
    elements = (torch.randint(1, 9, (40,), generator=generator) * 2**27).tolist()
    items = [{b: (n * b // 8, w * 4.0**-b) for b in range(1, 9)} for n, w in zip(elements, weights, strict=True)]
    budget = sum(n * 3 // 8 for n in elements)
    found = choose(items, budget)
    used = sum(item[b][0] for item, b in zip(items, found, strict=True))
    assert used <= budget
    total = sum(item[b][1] for item, b in zip(items, found, strict=True))
    for i, j in itertools.permutations(range(40), 2):  # no exchange of bits between two layers is better
        for up, down in itertools.product(range(1, 8), repeat=2):
            changed = {i: found[i] + up, j: found[j] - down}
            if changed[i] > 8 or changed[j] < 1:
                continue
            sizes, costs = zip(*(items[k][changed.get(k, found[k])] for k in (i, j)), strict=True)
            before = [items[k][found[k]] for k in (i, j)]
            if used + sum(sizes) - sum(size for size, _ in before) <= budget:
                assert sum(costs) - sum(cost for _, cost in before) >= -1e-6 * total


def test_small_differences_beside_a_large_cost_count():
    assert choose([{1: (0, 1.0)}, {1: (0, 1e-9), 2: (1, 0.0)}], 1) == [1, 2]


def test_nothing_is_spent_where_it_gains_nothing():
    assert choose([{1: (1, 0.0), 8: (8, 0.0)}, {1: (1, 1.0), 2: (2, 0.5), 3: (3, 0.5)}], 100) == [1, 2]
    assert choose([], 0) == []
