"""How the elements of a layer's input belong to channels and to rows, which have centers and scales of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch

# places of each channel that statistics are taken of: primes, so that no period of rows or images falls in step. Norms have
# nearly normal numbers; others may be zeros for the most part, of which fewer tell little.
SAMPLE, LARGE_SAMPLE = 509, 1361


class Grid(NamedTuple):
    """A tensor (outer, channels, inner), packed in this order: element (o, c, i) is number (o * channels + c) * inner + i.

    Its row is (o // per_row) * groups + c // (channels // groups): a token of (tokens, channels, 1), an image of
    (images, channels, places) or, with the channels last, of (images * places, channels, 1), and in each of them a group of
    channels.
    """

    outer: int
    channels: int
    inner: int = 1
    per_row: int = 1
    groups: int = 1
    sample: int = SAMPLE

    @property
    def n(self) -> int:
        return self.outer * self.channels * self.inner

    @property
    def rows(self) -> int:
        return self.outer // self.per_row * self.groups

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return self.per_row * (self.channels // self.groups) * self.inner

    @property
    def places(self) -> int:
        """Elements of a channel."""
        return self.outer * self.inner

    @property
    def sampled(self) -> int:
        """How many places statistics are taken of, all where a sample would be most of them: number k of them is place
        k * places // sampled, which is the element (place // inner, channel, place % inner)."""
        return self.places if 2 * self.places < 3 * self.sample else self.sample


def row_numbers(grid: Grid, outer: torch.Tensor) -> torch.Tensor:
    """The rows of all channels at these places of the outer dimension: (k,) -> (k, channels)."""
    group = torch.arange(grid.channels, device=outer.device) // (grid.channels // grid.groups)
    return (outer // grid.per_row).unsqueeze(1) * grid.groups + group
