"""README.md and the pages of docs/, and the objects that their blocks of Python use."""

import functools
import re
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


class Block(nn.Module):
    """It calls an activation as a function too."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.norm, self.down = nn.Linear(1024, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        return nn.functional.silu(self.down(self.norm(self.act(self.up(x)))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


def loss_of(model, batch):
    return model(batch).square().mean()


def blocks(path):
    """The blocks of Python of a page, in order."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def words(path):
    """The text of a page on one line, with tables as plain text: the figures as a reader sees them."""
    return " ".join(re.sub(r"\|[-:| ]+\|\n|\|", " ", path.read_text(encoding="utf-8")).split())


def commands(path):
    """The commands of `fewbit` that a page shows."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"^    fewbit (\w+)", text, re.MULTILINE)) | set(re.findall(r"`fewbit ([a-z]\w*)", text))


def namespace():
    """What the blocks use: a user's own model and data; and stand-ins for models from other packages."""
    model, same = Model(), MagicMock(side_effect=lambda model, *_: model)
    batches = [torch.randn(16, 1024) for _ in range(3)]
    return {
        "model": model,
        "batch": batches[0],
        "batches": batches,
        "loss_fn": loss_of,
        "train": lambda model: [loss_of(model, batch).backward() for batch in batches],
        "gate": torch.randn(4, 8, requires_grad=True),
        "up": torch.randn(4, 8),
        "names": ["block"],
        "functools": functools,
        "get_peft_model": same,
        "accelerator": MagicMock(prepare=lambda *things: things),
        **{name: MagicMock() for name in ("Trainer", "LoraConfig", "arguments", "data", "optimizer", "loader")},
    }
