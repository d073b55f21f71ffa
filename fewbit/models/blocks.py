"""The blocks that a model repeats, and checkpointing of them."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, level: int = 0) -> nn.Module:
    """The model, each of whose blocks of that level now keeps its input alone and runs again in backward; see `blocks`."""
    for block in blocks(model)[level]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def names_of_blocks(model: nn.Module) -> list[list[str]]:
    """The dotted names of the blocks of each level; see `blocks`."""
    names = {module: name for name, module in model.named_modules()}
    return [[names[block] for block in level] for level in blocks(model)]


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The modules that a model repeats, the outermost first, as stages, their blocks, and what those repeat in turn.

    They are what a ModuleList or Sequential holds that are of one class and have parts of their own. No level is empty.

    >>> norms = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)]
    >>> [len(level) for level in blocks(nn.Sequential(nn.Linear(2, 2), nn.Sequential(*norms)))]
    [3]
    """
    levels: list[dict[nn.Module, None]] = []

    def enter(module: nn.Module, level: int) -> None:
        repeats = _repeats(module)
        if repeats:
            levels.extend({} for _ in range(level + 1 - len(levels)))
            levels[level].update(dict.fromkeys(module.children()))
        for child in module.children():
            enter(child, level + repeats)

    enter(model, 0)
    return [list(level) for level in levels]


def _repeats(module: nn.Module) -> bool:
    parts = list(module.children())
    composite = all(next(part.children(), None) is not None for part in parts)
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and composite and len({type(part) for part in parts}) == 1
