"""Compare runs with exact ones of the same seeds: how far above them they end, and how large the spread of exact runs is."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fewbit.plots import save
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.training import EXACT

Losses = dict[int, float]  # by seed


class Distance(NamedTuple):
    """The relative distance of final losses from exact ones: the mean over seeds, and its standard error (NaN for one seed)."""

    mean: float
    error: float

    def __str__(self) -> str:
        """
        >>> print(Distance(0.0123, 0.0048), Distance(-0.01, math.nan), Distance(math.inf, math.nan))
        +1.23% ± 0.48% -1.00% diverged
        """
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:+.2%}" + (f" ± {self.error:.2%}" if math.isfinite(self.error) else "")


class Line(NamedTuple):
    """Distances by bits, and the spread of exact runs. A picture draws them as a line and a band."""

    distances: dict[int, Distance]
    spread: float


def chosen(runs: Iterable[Run], **wanted: Any) -> list[Run]:
    """The runs that have these values."""
    return [each for each in runs if wanted.items() <= each.items()]


def losses(runs: Iterable[Run], **wanted: Any) -> Losses:
    """Final losses of the chosen runs."""
    return {each["seed"]: each["loss"] for each in chosen(runs, **wanted)}


def distance(coded: Losses, exact: Losses) -> Distance | None:
    """How far coded runs end above exact ones of the same seeds; None if no seed has both."""
    ratios = [coded[seed] / exact[seed] - 1 for seed in coded if seed in exact]
    if not ratios:
        return None
    if not all(map(math.isfinite, ratios)):
        return Distance(math.inf, math.nan)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return Distance(statistics.fmean(ratios), error)


def spread(exact: Losses) -> float:
    """Standard deviation of exact final losses over seeds, relative to their mean; NaN for fewer than two."""
    values = list(exact.values())
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else math.nan


def line(runs: Sequence[Run], labels: dict[int, str], **wanted: Any) -> Line:
    """The line of the chosen runs. labels: bits -> label of the coded runs"""
    exact = losses(runs, label=EXACT, **wanted)
    found = {bits: distance(losses(runs, label=label, **wanted), exact) for bits, label in labels.items()}
    return Line({bits: each for bits, each in found.items() if each}, spread(exact))


def is_noise(found: Distance, spread: float) -> bool:
    """Whether a distance is no greater than the spread of exact runs, or than two of its own standard errors."""
    return found.mean <= max((each for each in (spread, 2 * found.error) if math.isfinite(each)), default=0.0)


def percent(share: float) -> str:
    """
    >>> percent(0.0123), percent(math.nan)
    ('1.2%', '–')
    """
    return f"{share:.1%}" if math.isfinite(share) else "–"


def mean_held_out(runs: Sequence[Run]) -> str:
    """The mean over runs of the accuracy on held-out data, or of the peak signal-to-noise ratio."""
    found = [each["held_out"] for each in runs]
    if not found:
        return "–"
    if "psnr" in found[0]:
        return f"{statistics.fmean(each['psnr'] for each in found):.2f} dB"
    return percent(statistics.fmean(each["accuracy"] for each in found))


def every(seeds: int, steps: int, settings: Iterable[dict[str, Any]]) -> list[Run]:
    """The entries that identify the wanted runs: the first seed of all settings, then the next seed, so that tables are always
    fair."""
    settings = list(settings)
    return [{**each, "seed": seed, "steps": steps} for seed in range(seeds) for each in settings]


def parser(study: str, description: str | None, tasks: Iterable[str], seeds: int, steps: int) -> argparse.ArgumentParser:
    """A parser with the arguments that all studies of final losses take."""
    found = argparse.ArgumentParser(
        f"python -m tools.studies.reviewers {study}", description=(description or "").split("\n")[0]
    )
    tasks = list(tasks)
    found.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, metavar="TASK", help=" ".join(tasks))
    found.add_argument("--seeds", type=int, default=seeds, help="0: show what is there (%(default)s)")
    found.add_argument("--steps", type=int, default=steps, help="of a run (%(default)s)")
    return found


def add_labels(parser: argparse.ArgumentParser, labels: Iterable[str]) -> None:
    """Add the argument that names ways to train."""
    labels = list(labels)
    parser.add_argument("--labels", nargs="+", default=labels, choices=labels, metavar="LABEL", help=", ".join(labels))


def draw(runs: Runs, make: Callable[[], Figure]) -> None:
    """Write the picture beside the runs' file, if there are runs."""
    if any(runs):
        save(make(), Path(runs.directory) / f"{runs.name}.png")
