"""The order in which recurrent layers take their steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Steps:
    """The order in which a direction takes its steps.

    sizes      number of sequences in each step, never more than in the previous step
    backwards  whether the last step is taken first
    """

    sizes: tuple[int, ...]
    backwards: bool = False

    def order(self) -> range:
        """The steps in their order."""
        return range(len(self.sizes))[:: -1 if self.backwards else 1]

    def previous(self, step: int) -> int | None:
        """The step that is taken before this one; None for the first step."""
        found = step + 1 if self.backwards else step - 1
        return found if 0 <= found < len(self.sizes) else None

    def before(self, first: Tensor, values: Tensor | None) -> Tensor:
        """For each row, the value of its sequence one step earlier: first (sequences, n), values (rows, n) -> (rows, n)."""
        if values is None or len(self.sizes) == 1:
            return first
        if self.sizes[0] == self.sizes[-1]:
            last = len(values) - len(first)
            return torch.cat([values[len(first) :], first]) if self.backwards else torch.cat([first, values[:last]])
        parts, steps, state = [first] * len(self.sizes), values.split(self.sizes), first
        for step in self.order():
            parts[step] = grown(state, first, self.sizes[step])
            state = steps[step]
        return torch.cat(parts)


def grown(state: Tensor, first: Tensor, size: int) -> Tensor:
    """The state extended to `size` sequences. Sequences that start at this step take their state from `first`."""
    return state[:size] if len(state) >= size else torch.cat([state, first[len(state) : size]])
