"""The multiple-choice knapsack: one choice for each item, with the least total cost, such that the sizes fit a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fewbit.errors import DesignError

Choices = Mapping[int, tuple[int, float]]  # a choice -> its size and its cost


def choose(items: Sequence[Choices], budget: int) -> list[int]:
    """The choice for each item. Of choices that cost the same, a smaller one is taken.

    items   the choices of each item; sizes are whole numbers, costs are finite and not negative
    budget  the most that the chosen sizes may add up to

    It is solved to the optimum as an integer program. Raises DesignError if even the smallest choices do not fit.
    """
    items = [_useful(choices) for choices in items]
    least = sum(min(size for size, _ in choices.values()) for choices in items)
    if least > budget:
        raise DesignError(f"the budget must be at least {least}, the size of the smallest choices, got {budget}")
    options = [(item, choice) for item, choices in enumerate(items) for choice in choices]
    if not options:
        return []
    sizes = [items[item][choice][0] for item, choice in options]
    step = gcd(*sizes) or 1
    costs = np.array([items[item][choice][1] for item, choice in options])
    # the solver stops within 1e-6 of the optimum; in units of the smallest costs, two answers differ by far more than that
    smallest, largest = sum(min(cost for _, cost in choices.values()) for choices in items), costs.max(initial=0.0)
    scale = max(min(smallest, 1e-4 * largest), 1e-9 * largest) or 1.0
    belongs = np.array([[float(owner == item) for owner, _ in options] for item in range(len(items))])
    fits = LinearConstraint(np.array(sizes, float) / step, -np.inf, budget // step)
    result = milp(
        costs / scale,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(belongs, 1, 1), fits],
        options={"mip_rel_gap": 0.0},
    )
    assert result.x is not None, f"the smallest choices fit, but {result.message}"
    chosen = {options[at][0]: options[at][1] for at in np.nonzero(result.x > 0.5)[0]}
    return [chosen[item] for item in range(len(items))]


def _useful(choices: Choices) -> Choices:
    """The choices that cost less than every smaller choice."""
    useful: dict[int, tuple[int, float]] = {}
    for choice, (size, cost) in sorted(choices.items(), key=lambda each: each[1]):
        if cost < min((known for _, known in useful.values()), default=np.inf):
            useful[choice] = size, cost
    return useful
