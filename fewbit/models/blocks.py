"""The blocks that a model repeats, and checkpointing of them."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, level: int = 0) -> nn.Module:
    """Let each block of that level keep only its input and run again in backward; see `blocks`. Returns the model."""
    for block in blocks(model)[level]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def names_of_blocks(model: nn.Module) -> list[list[str]]:
    """The dotted names of the blocks of each level; see `blocks`."""
    names = {module: name for name, module in model.named_modules()}
    return [[names[block] for block in level] for level in blocks(model)]


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The modules that a model repeats, by level. The outermost come first: stages, then their blocks, then what blocks repeat.

    They are the modules of a ModuleList or Sequential if all of them have one class and have parts of their own. No level is
    empty.

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
