"""Memory against time: the choices that none beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fewbit.plots.style import literal, styled

Cost = tuple[int, float]  # bytes, and time as a multiple of exact's


def plot_frontier(frontier: Sequence[Cost], uniform: Mapping[str, Cost], chosen: Cost, budget: int, title: str) -> Figure:
    """A line through the frontier, a mark for each uniform way with its name, one for what was chosen, and the budget."""
    unit, name = _unit(max(peak for peak, _ in (*frontier, *uniform.values())))
    with styled():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([peak / unit for peak, _ in frontier], [time for _, time in frontier], "-", color="0.55", label="mixtures")
        for (label, (peak, time)), marker in zip(uniform.items(), "os^D", strict=False):
            axes.plot(peak / unit, time, marker, color="0.2", ms=6)
            axes.annotate(literal(label), (peak / unit, time), (6, 5), textcoords="offset points", size=8)
        axes.plot(chosen[0] / unit, chosen[1], "*", color="C1", ms=15, zorder=3, label="chosen")
        axes.axvline(budget / unit, color="C0", ls="--", lw=1, label="budget")
        axes.set_xlabel(f"peak of a training step, {name}")
        axes.set_ylabel("time of a step, of exact")
        axes.set_title(literal(title), loc="left")
        axes.margins(x=0.12, y=0.12)
        axes.legend()
    return figure


def _unit(largest: int) -> tuple[int, str]:
    return next(
        (size, name) for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if largest >= size
    )
