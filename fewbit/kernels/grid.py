"""Assigns the elements of a layer's input to channels and rows. Each channel and each row has its own center and scale."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Numbers of places of each channel from which statistics are taken. They are primes, so that no period of rows or images falls
# in step. Norms have nearly normal numbers. Other tensors may be mostly zeros and need a larger sample.
SAMPLE, LARGE_SAMPLE = 509, 1361


class Grid(NamedTuple):
    """A tensor (outer, channels, inner), packed in this order: element (o, c, i) is number (o * channels + c) * inner + i.

    Its row is (o // per_row) * groups + c // (channels // groups). A row is a group of channels in a token of
    (tokens, channels, 1) or in an image, which is (images, channels, places) or, with the channels last,
    (images * places, channels, 1).
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
        """Number of places from which statistics are taken; all if the sample would be most of them.

        Number k is place k * places // sampled, which is the element (place // inner, channel, place % inner).
        """
        return self.places if 2 * self.places < 3 * self.sample else self.sample


def row_numbers(grid: Grid, outer: torch.Tensor) -> torch.Tensor:
    """The rows of all channels at these indices of the outer dimension: (k,) -> (k, channels)."""
    group = torch.arange(grid.channels, device=outer.device) // (grid.channels // grid.groups)
    return (outer // grid.per_row).unsqueeze(1) * grid.groups + group
