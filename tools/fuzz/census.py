"""Run every layer and activation on empty inputs and inputs of size 1, exact and coded: `python -m tools.fuzz.census`.

Each layer runs in every dtype, mode and way to code, on all shapes in which some dimensions are set to 0 or 1; in compiled code
one dimension at a time. The coded run must agree with torch: the same outputs and state, bit for bit; the same kind of
exception; and gradients that are NaN or infinite in the same places. Gradients of empty inputs must be the same, others near
the exact ones. Each group runs in a process of its own, which may die. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fewbit import activations, terminal
from tools.fuzz.check import Outcome, Way, run, same
from tools.fuzz.isolated import Death, isolated, silence_torch
from tools.fuzz.networks import Network

WAYS = (Way("convert", 8), Way("patch", 8))
NEAR = 0.1  # the largest error of a gradient, absolute or relative
DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "Linear, no features": (lambda: nn.Linear(0, 3), (2, 0)),
    "Linear, one row": (lambda: nn.Linear(4, 3), (4,)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 2, stride=2, padding=1), (2, 4, 5, 5)),
    "Conv2d, same": (lambda: nn.Conv2d(4, 3, 2, padding="same"), (2, 4, 5, 5)),
    "Conv2d, unbatched": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "LayerNorm, two dims": (lambda: nn.LayerNorm([3, 4], elementwise_affine=False), (2, 3, 4)),
    "LayerNorm of 1": (lambda: nn.LayerNorm(1), (2, 3, 1)),
    "LayerNorm of 0": (lambda: nn.LayerNorm(0), (2, 3, 0)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "RMSNorm of 1": (lambda: nn.RMSNorm(1), (2, 3, 1)),
    "RMSNorm of 0": (lambda: nn.RMSNorm(0), (2, 3, 0)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "GroupNorm, rows": (lambda: nn.GroupNorm(4, 4, affine=False), (2, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (2, 4, 3)),
    "BatchNorm1d, rows": (lambda: nn.BatchNorm1d(4, affine=False), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "BatchNorm2d, no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, momentum=None), (2, 2, 3, 3, 3)),
    "GLU": (lambda: nn.GLU(1), (2, 4, 3)),
    "GLU, last": (lambda: nn.GLU(), (3, 4)),
    "Linear, LayerNorm, GELU, Linear": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2)),
        (2, 3, 4),
    ),
    "Conv2d, BatchNorm2d, ReLU, Conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        (2, 4, 3, 3),
    ),
}
for _name in sorted({each.module for each in activations.BUILT_IN.values()}):
    if hasattr(nn, _name):
        LAYERS[_name] = ((lambda name: lambda: getattr(nn, name)(*(0.1, 0.0) * (name == "Threshold")))(_name), (2, 3))


class Group(NamedTuple):
    """What runs in one process."""

    layer: str
    way: Way
    dtype: str
    training: bool
    shapes: tuple[tuple[int, ...], ...]


def groups(compiled: bool, dtypes: Iterable[str], turns: int = 1) -> Iterator[Group]:
    """All groups. With several turns, a group has only every so many-th of the shapes, and the next group has other ones."""
    for (i, way), layer, (j, dtype), training in itertools.product(enumerate(WAYS), LAYERS, enumerate(dtypes), (True, False)):
        base = LAYERS[layer][1]
        shapes = list(itertools.product(*({size, 0, 1} for size in base)))
        if compiled:
            shapes = [shape for shape in shapes if sum(a != b for a, b in zip(shape, base, strict=True)) == 1]
        if chosen := sorted(shapes)[(i + j + training) % turns :: turns]:
            yield Group(layer, replace(way, compiled=compiled), dtype, training, tuple(chosen))


def differences(group: Group) -> list[str]:
    """The differences, for each shape."""
    silence_torch()
    return [f"{list(shape)}: {each}" for shape in group.shapes for each in _differences_at(group, shape)]


def _differences_at(group: Group, shape: tuple[int, ...]) -> Iterator[str]:
    torch.manual_seed(0)
    dtype = getattr(torch, group.dtype)
    exact = LAYERS[group.layer][0]().to(dtype).train(group.training)
    net = Network(0, exact, (torch.randn(shape) + 0.1).to(dtype), True, "normal")
    if group.way.compiled:
        torch.compiler.reset()
    coded = group.way.outcome(net, copy.deepcopy(exact))
    yield from compared(run(net, exact, compiled=group.way.compiled), coded, 0 in shape, group.way.compiled)


def compared(exact: Outcome, coded: Outcome, empty: bool, compiled: bool) -> Iterator[str]:
    """The differences of two outcomes. Compilers sometimes wrap exceptions, so in compiled code it only counts whether there is
    one."""
    if (exact.error is None) != (coded.error is None) if compiled else type(exact.error) is not type(coded.error):
        yield f"{_words(coded.error)}, exact {_words(exact.error)}"
    if exact.y is None or coded.y is None:
        return
    if not same(exact.y, coded.y) or exact.y.stride() != coded.y.stride():
        yield "another output"
    for name, tensor in exact.state.items():
        if not same(tensor, coded.state[name]):
            yield f"other {name}"
    if exact.gradients.keys() != coded.gradients.keys():
        yield f"gradients of {sorted(coded.gradients)}, exact of {sorted(exact.gradients)}"
        return
    for name, grad in exact.gradients.items():
        other = coded.gradients[name]
        if grad.shape != other.shape or grad.dtype != other.dtype:
            yield f"gradient of {name}: other shape or dtype"
        elif not torch.equal(grad.isnan(), other.isnan()) or not torch.equal(grad.isinf(), other.isinf()):
            yield f"gradient of {name}: NaN or infinite in other places"
        elif empty and not same(grad, other):
            yield f"gradient of {name}: other numbers"
        elif not empty and ((grad - other).abs() > NEAR * (1 + grad.abs())).any():
            yield f"gradient of {name}: off by {(grad - other).abs().max():.3g}"


def _words(error: BaseException | None) -> str:
    return "no exception" if error is None else f"{type(error).__name__}: {' '.join(str(error).split()[:12])}"


def main(arguments: list[str] | None = None) -> int:
    """Print how many runs there were, and what differed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz.census", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compiled", action="store_true", help="compiled code, with fewer shapes")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--turns", type=int, default=1, help="a group runs one of so many shapes, the next group another")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(arguments)
    chosen = [*groups(given.compiled, given.dtypes.split(","), given.turns)]
    counts, screen = Counter(), terminal.console(at_least=160)
    pending = chosen
    while pending:
        died = []
        for group, found in isolated(differences, pending, given.processes):
            if isinstance(found, Death):
                died.append(group)
                found = [f"{list(group.shapes[0])}: {found}"] if len(group.shapes) == 1 else []
                counts["deaths"] += bool(found)
            counts["runs"] += len(group.shapes)
            counts["differences"] += len(found)
            for each in found:
                mode = "train" if group.training else "eval"
                screen.print(f"{group.layer}, {group.way.by}, {group.dtype}, {mode}: {each}", soft_wrap=True)
        pending = [group._replace(shapes=(shape,)) for group in died if len(group.shapes) > 1 for shape in group.shapes]
        counts["runs"] -= len(pending)
    screen.print(f"{len(chosen)} groups, {counts['runs']} runs, {counts['differences']} differences, {counts['deaths']} deaths")
    return bool(counts["differences"])


if __name__ == "__main__":
    sys.exit(main())
