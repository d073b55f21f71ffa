"""The picture of README, docs/pictures/memory_and_loss.svg: `python -m tools.pictures`.

Peaks come from tools/results/working_sizes.json, losses from tools/results/final_loss.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "results"
PICTURE = ROOT / "docs" / "pictures" / "memory_and_loss.svg"
MODELS = ("GPT-2", "BERT", "ViT", "ResNet-18")
# from dark to light, so that grey tells them apart; the paper is white in light and dark surroundings
WAYS = {"exact": "#3b3b3b", "checkpointed": "#78909c", "coded at 4 bits": "#ffd27f"}
# the curves lie on each other: a broad pale line for exact, and thin ones on it
LINES: dict[str, dict[str, Any]] = {
    "exact": {"color": "#b0bec5", "linewidth": 6},
    "5": {"color": "#000000", "linewidth": 1.2},
    "4": {"color": "#d55e00", "linewidth": 1.6, "linestyle": (0, (4, 3))},
}
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fewbit", "font.family": "sans-serif", "font.size": 9}


def peaks() -> dict[str, tuple[float, float, float]]:
    """Peak memory of a training step over the exact one: exact, checkpointed, coded."""
    results = _read("working_sizes")
    return {name: (1.0, results[name]["checkpoint"]["peak"], results[name]["coded"]["peak"]) for name in MODELS}


def losses() -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and the mean training loss up to each for every label of LINES, over starts and orders that all labels have."""
    runs = _read("final_loss")["runs"]
    places = set.intersection(*({_place(run) for run in runs if run["label"] == label} for label in LINES))
    chosen = {label: [run["means"] for run in runs if run["label"] == label and _place(run) in places] for label in LINES}
    count, steps = len(runs[0]["means"]), runs[0]["steps"]
    means = {label: [statistics.fmean(part) for part in zip(*found, strict=True)] for label, found in chosen.items()}
    return [steps * (i + 1) // count for i in range(count)], means


def _place(run: dict[str, Any]) -> tuple[int, int]:
    return run["order"], run["start"]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def picture() -> Figure:
    """Bars of the peaks, and beside them curves of the losses."""
    figure = Figure(figsize=(9, 3), layout="constrained", facecolor="white")
    memory, loss = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_peaks(memory)
    _draw_losses(loss)
    return figure


def _draw_peaks(axes: Axes) -> None:
    found = peaks()
    for i, (way, color) in enumerate(WAYS.items()):
        places = [model + 0.28 * (i - 1) for model in range(len(found))]
        bars = axes.bar(
            places, [each[i] for each in found.values()], 0.26, label=way, color=color, edgecolor="black", linewidth=0.6
        )
        axes.bar_label(bars, [f"{each[i]:.2f}" for each in found.values()], padding=1)
    axes.set_xticks(range(len(found)), MODELS)
    axes.set(ylim=(0, 1.3), yticks=(), ylabel="peak over exact")
    axes.set_title("Peak memory of a training step beside its weights, two CPU cores", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", ncols=len(WAYS))


def _draw_losses(axes: Axes) -> None:
    steps, found = losses()
    for label, style in LINES.items():
        name = label if label == "exact" else f"everything at {label} bits"
        axes.plot(steps, found[label], label=name, solid_capstyle="round", **style)
    axes.set(xlabel="step", ylabel="training loss, nats", xticks=steps[2::3])
    axes.set_title("Training a small GPT", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")


def draw(path: Path = PICTURE) -> None:
    """Write the picture, with the same bytes at each run."""
    with mpl.rc_context(_STYLE):
        picture().savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw()
    print(PICTURE.relative_to(ROOT))
