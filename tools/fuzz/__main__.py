"""Run random networks exact and coded, and print what differs: `python -m tools.fuzz 1000 --first 0 --processes 2`.

python -m tools.fuzz 1000              # a thousand networks; for each kind of failure the seeds and the smallest such network
python -m tools.fuzz --seed 271        # one network again, with all details of its failures
python -m tools.fuzz 1000 --quantiles  # quantiles of the errors of gradients, as multiples of their scale, see check.py

The exit status is 1 if something failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from fewbit import terminal
from tools.fuzz.account import Account, account
from tools.fuzz.isolated import Death, isolated
from tools.fuzz.networks import network


def tell(results: Iterable[tuple[int, Account | Death]]) -> int:
    """Print the results of all networks, or of those that had run before an interrupt. Returns how many failed."""
    outcomes, kinds, ratios, failed, runs, coded = Counter(), defaultdict(list), defaultdict(list), 0, 0, 0
    for seed, result in _until_interrupted(results):
        if isinstance(result, Death):
            kinds[result].append((seed, "", "", ""))
            failed += 1
            continue
        outcomes[result.exact] += 1
        failed += bool(result.failures)
        runs += result.runs
        coded += result.coded
        for bits, ratio in result.ratios:
            ratios[bits].append(ratio)
        for way, failure, smallest in result.failures:
            name = f"{way.by}{', compiled' * way.compiled}: {failure.kind}"
            kinds[name].append((seed, str(way), failure.detail, smallest))
    screen = terminal.console(at_least=160)
    for name, number in outcomes.most_common():
        screen.print(f"{number:7d} networks, {name}")
    screen.print(f"{runs:7d} coded runs; in {coded} of them gradients differ from exact ones")
    screen.print(f"{failed:7d} of {sum(outcomes.values())} networks failed")
    for kind, found in sorted(kinds.items(), key=lambda each: -len(each[1])):
        seed, how, detail, smallest = min(found, key=lambda each: len(each[-1]))
        screen.print(f"\n{len(found):5d}  {kind}")
        screen.print(f"       seeds {', '.join(str(each[0]) for each in found[:8])}")
        screen.print(f"       {seed}: {how}: {detail}\n       {smallest}", soft_wrap=True)
    if ratios:
        screen.print(quantiles(ratios))
    return failed


def _until_interrupted(results: Iterable[Any]) -> Iterator[Any]:
    with suppress(KeyboardInterrupt):
        yield from results


def quantiles(ratios: dict[int, list[float]]) -> Table:
    """Quantiles of the errors of gradients, as multiples of their scale, for each number of bits."""
    levels = (0.5, 0.9, 0.99, 0.999, 1.0)
    view = terminal.table(("bits",), ("gradients", *(f"{each:.1%}" for each in levels)))
    for bits, found in sorted(ratios.items()):
        view.add_row(str(bits), str(len(found)), *(f"{each:.3g}" for each in np.quantile(found, levels, method="higher")))
    return view


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", type=int, nargs="?", default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="run this network alone, in this process")
    parser.add_argument("--device", default="cpu", help="where they run (%(default)s)")
    parser.add_argument("--quantiles", action="store_true", help="measure how far gradients err")
    parser.add_argument("--whole", action="store_true", help="show networks as drawn, not the smallest ones that fail")
    given = parser.parse_args(arguments)
    run = partial(account, measure=given.quantiles, shrink=not given.whole, device=given.device)
    if given.seed is not None:
        print(network(given.seed))
        return bool(tell([(given.seed, run(given.seed))]))
    seeds = range(given.first, given.first + given.networks)
    with terminal.progress("networks", given.networks) as advance:
        return bool(tell(_advancing(isolated(run, seeds, given.processes), advance)))


def _advancing(results: Iterable[Any], advance: Callable[[], None]) -> Iterator[Any]:
    for each in results:
        advance()
        yield each


if __name__ == "__main__":
    sys.exit(main())
