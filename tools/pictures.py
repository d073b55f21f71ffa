"""The picture of README, docs/pictures/peak.svg, from tools/results/working_sizes.json: `python -m tools.pictures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "results" / "working_sizes.json"
PICTURE = ROOT / "docs" / "pictures" / "peak.svg"
MODELS = ("GPT-2", "BERT", "ViT", "ResNet-18")
# from dark to light, so that grey tells them apart; the paper is white in light and dark surroundings
WAYS = {"exact": "#3b3b3b", "checkpointed": "#78909c", "coded at 4 bits": "#ffd27f"}
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fewbit", "font.family": "sans-serif", "font.size": 9}


def peaks() -> dict[str, tuple[float, float, float]]:
    """Peak memory of a training step over the exact one: exact, checkpointed, coded."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    return {name: (1.0, results[name]["checkpoint"]["peak"], results[name]["coded"]["peak"]) for name in MODELS}


def picture() -> Figure:
    """Bars of the peaks."""
    figure = Figure(figsize=(7, 2.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    found = peaks()
    for i, (way, color) in enumerate(WAYS.items()):
        places = [model + 0.28 * (i - 1) for model in range(len(found))]
        bars = axes.bar(
            places, [each[i] for each in found.values()], 0.26, label=way, color=color, edgecolor="black", linewidth=0.6
        )
        axes.bar_label(bars, [f"{each[i]:.2f}" for each in found.values()], padding=1)
    axes.set_xticks(range(len(found)), MODELS)
    axes.set(ylim=(0, 1.15), yticks=(), ylabel="peak over exact")
    axes.set_title("Peak memory of a training step, two CPU cores", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw(path: Path = PICTURE) -> None:
    """Write the picture, with the same bytes at each run."""
    with mpl.rc_context(_STYLE):
        picture().savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw()
    print(PICTURE.relative_to(ROOT))
