"""The order in which recurrent layers take their steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Steps:
    """The order in which a direction takes its steps.

    sizes      how many sequences each step has, never more than the one before
    backwards  whether the last step is taken first
    """

    sizes: tuple[int, ...]
    backwards: bool = False

    def numbered(self) -> range:
        """The steps in their order."""
        return range(len(self.sizes))[:: -1 if self.backwards else 1]

    def before(self, first: Tensor, values: Tensor | None) -> Tensor:
        """Of each row the value of the step before: first (sequences, n), values (rows, n) -> (rows, n)."""
        if values is None or len(self.sizes) == 1:
            return first
        if self.sizes[0] == self.sizes[-1]:
            last = len(values) - len(first)
            return torch.cat([values[len(first) :], first]) if self.backwards else torch.cat([first, values[:last]])
        parts, steps, state = [first] * len(self.sizes), values.split(self.sizes), first
        for step in self.numbered():
            parts[step] = grown(state, first, self.sizes[step])
            state = steps[step]
        return torch.cat(parts)


def grown(state: Tensor, first: Tensor, size: int) -> Tensor:
    """The state of as many sequences: those that begin now have their first."""
    return state[:size] if len(state) >= size else torch.cat([state, first[len(state) : size]])
