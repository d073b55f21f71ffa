"""The result of one network: its failures, each with the smallest network that fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from tools.fuzz.check import Failure, Judge, Way, ways
from tools.fuzz.isolated import silence_torch
from tools.fuzz.networks import Network, network


class Account(NamedTuple):
    """The result of a network."""

    exact: str  # how far the exact network came
    runs: int
    coded: int  # runs in which some gradient came from codes
    failures: list[tuple[Way, Failure, str]]  # one of each kind, with the smallest network found that fails so
    ratios: list[tuple[int, float]]


def account(seed: int, measure: bool = False, shrink: bool = True, device: str = "cpu") -> Account:
    """Run the network of a seed on a device, coded in all its ways."""
    silence_torch()
    judge, found, tried = Judge(network(seed).on(device), measure), [], list(ways(seed))
    for way in tried:
        for failure in {each.kind: each for each in judge.failures(way)}.values():
            smallest, failure = shrunk(judge.net, way, failure) if shrink else (judge.net, failure)
            found.append((way, failure, str(smallest)))
    error = judge.exact.error
    exact = f"exact: {judge.exact.passed}" + ("" if error is None else f", then {type(error).__name__}")
    return Account(exact, len(tried), judge.coded, found, judge.ratios)


def shrunk(net: Network, way: Way, failure: Failure) -> tuple[Network, Failure]:
    """A network with fewer pieces that fails in the same way, and its failure."""
    for smaller in _without_one(net.module):
        less = replace(net, module=smaller)
        for each in Judge(less).failures(way):
            if each.kind == failure.kind:
                return shrunk(less, way, each)
    return net, failure


def _without_one(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with one piece left out, and the module's parts by themselves."""
    parts = module._modules
    for name, part in parts.items():
        if part is not None:
            yield part
        if isinstance(module, nn.Sequential) and len(module) > 1:
            yield _with(module, {key: each for key, each in parts.items() if key != name})
        if part is not None and type(module).__module__ in (nn.Sequential.__module__, Network.__module__):
            for smaller in _without_one(part):
                yield _with(module, {**parts, name: smaller})


def _with(module: nn.Module, parts: dict[str, nn.Module | None]) -> nn.Module:
    """A module like this one, made of these parts."""
    other = type(module).__new__(type(module))
    other.__dict__ = {**vars(module), "_modules": parts}
    return other
