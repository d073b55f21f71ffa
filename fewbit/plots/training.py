"""The figure of the demo: the losses of several runs, and what each run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewbit.plots.style import DARK, LIGHT, LINES, SHADES, styled

Kept = tuple[int, int]  # bytes that the GELUs keep, and bytes that all modules keep


def plot_training(curves: Mapping[str, Sequence[float]], kept: Mapping[str, Kept], smoothing: int = 10) -> Figure:
    """Training loss against steps, a line for each run. Below it the difference from the first run, and beside it what each run
    keeps.

    Lines are moving means over `smoothing` steps, drawn at the last of these steps.
    """
    window = max(1, min(smoothing, *(len(losses) for losses in curves.values())))
    smooth = {label: np.convolve(losses, np.full(window, 1 / window), "valid") for label, losses in curves.items()}
    first, *others = smooth
    with styled():
        figure = Figure(figsize=(9.4, 4.8), layout="constrained")
        axes = figure.subplot_mosaic([["loss", "kept"], ["difference", "kept"]], width_ratios=(3, 2), height_ratios=(2, 1))
        top, bottom = axes["loss"], axes["difference"]
        for i, (label, losses) in enumerate(smooth.items()):
            look = {"linestyle": LINES[i % len(LINES)], "color": SHADES[i % len(SHADES)], "linewidth": 1.6}
            steps = np.arange(window, window + len(losses))
            top.plot(steps, losses, label=label, **look)
            if label in others:
                bottom.plot(steps, losses - smooth[first], **look)
        bottom.sharex(top)
        top.tick_params(labelbottom=False)
        bottom.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        bottom.set_xlabel("step")
        bottom.set_ylabel(f"difference\nfrom {first}")
        top.set_ylabel("training loss, nats per byte")
        top.set_title(f"Training loss, mean of {window} steps", loc="left")
        top.legend()
        _draw_kept(axes["kept"], kept)
        figure.align_ylabels([top, bottom])
        figure.suptitle("A small GPT on the Python standard library: exact, with coded GELUs, everything coded", fontsize=10)
    return figure


def _draw_kept(axis: Axes, kept: Mapping[str, Kept]) -> None:
    own, whole = np.array([*kept.values()], float).T / 2**20
    places = np.arange(len(kept))
    axis.bar(places, whole - own, 0.6, color=LIGHT, label="all else")
    bars = axis.bar(places, own, 0.6, whole - own, color=DARK, label="GELUs")
    axis.bar_label(
        bars, [f"{each:.1f}\nGELUs {part:.1f}" for each, part in zip(whole, own, strict=True)], padding=2, fontsize=8
    )
    axis.set_xticks(places, [*kept])
    axis.set_ylabel("kept for backward, MiB")
    axis.set_title("Memory", loc="left")
    axis.margins(y=0.25)
    axis.legend(ncols=2, loc="upper right")
