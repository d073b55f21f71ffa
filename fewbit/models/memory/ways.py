"""How the blocks of a model are trained: kept, coded, recomputed, or coded and recomputed. A choice can convert the model, or
be written as lines of Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fewbit.models.arguments import Filter
from fewbit.models.conversion.engine import Converted, convert_modules
from fewbit.models.conversion.setting import Setting
from fewbit.record import plural


class Way(NamedTuple):
    """How a block is trained."""

    coded: bool
    recomputed: bool

    def __str__(self) -> str:
        return {(False, False): "keep", (True, False): "code", (False, True): "recompute"}.get(self, "code and recompute")


WAYS = (KEEP, CODE, RECOMPUTE, BOTH) = Way(False, False), Way(True, False), Way(False, True), Way(True, True)


@dataclass(frozen=True)
class Choice:
    """What happens to each block of a model, and to the rest of it, which is coded or kept.

    blocks  dotted name -> way
    rest    whether what lies outside of the blocks is coded
    """

    blocks: Mapping[str, Way]
    rest: bool

    def convert(self, model: nn.Module, setting: Setting, filter_fn: Filter | None) -> list[Converted]:
        """Convert the model by this choice."""
        return convert_modules(model, setting, self._filter(filter_fn), recompute=self.recomputed)

    @property
    def codes(self) -> bool:
        """Whether anything is coded."""
        return self.rest or any(way.coded for way in self.blocks.values())

    @property
    def recomputed(self) -> list[str]:
        """Names of the blocks that are recomputed."""
        return [name for name, way in self.blocks.items() if way.recomputed]

    @property
    def summary(self) -> str:
        """How many blocks are trained in each way.

        >>> Choice({"0": CODE, "1": KEEP, "2": KEEP}, rest=True).summary
        'of 3 blocks code 1, keep 2; code the rest'
        """
        counts = Counter(map(str, self.blocks.values()))
        rest = f"{'code' if self.rest else 'keep'} the rest"
        if not counts:
            return rest
        listed = ", ".join(f"{way} {number}" for way, number in counts.items())
        return f"of {plural(len(self.blocks), 'block')} {listed}; {rest}"

    def _filter(self, filter_fn: Filter | None) -> Filter:
        coded = {f"{name}.": way.coded for name, way in self.blocks.items()}

        def passes(module: nn.Module, name: str) -> bool:
            here = next((way for prefix, way in coded.items() if f"{name}.".startswith(prefix)), self.rest)
            return here and (filter_fn is None or filter_fn(module, name))

        return passes

    def lines(self, bits: str, is_filtered: bool) -> str:
        """Python that converts a model by this choice.

        bits         the argument as it is written in the code
        is_filtered  whether the user's filter also chooses modules; the code calls it filter_fn
        """
        coded = [name for name, way in self.blocks.items() if way.coded]
        exact = [name for name, way in self.blocks.items() if not way.coded]
        shown, passes = "", "filter_fn(module, name)" if is_filtered else ""
        if not (coded or self.rest or self.recomputed):
            return "# there is nothing to do"
        if not coded and not self.rest:
            arguments = ["filter_fn=lambda module, name: False"]
        else:
            if exact or not self.rest:
                few, word, name = (exact, "not ", "exact") if self.rest else (coded, "", "coded")
                shown = f"{name} = tuple({_names(few, end='.')})\n"
                chosen = f'{word}f"{{name}}.".startswith({name})'
                passes = f"{chosen} and {passes}" if is_filtered else chosen
            arguments = [f"bits={bits}", *([f"filter_fn=lambda module, name: {passes}"] if passes else [])]
        if self.recomputed:
            arguments.append(f"recompute={_names(self.recomputed)}")
        return f"{shown}fewbit.convert(model, {', '.join(arguments)})"


def _names(names: Sequence[str], end: str = "") -> str:
    """Python for a list of names. Names that are numbered in a row become a comprehension.

    >>> _names(["h.0", "h.1", "h.2"]), _names(["h.0", "g"], end=".")
    ('[f"h.{i}" for i in range(0, 3)]', "['h.0.', 'g.']")
    """
    found = [name.rpartition(".") for name in names]
    numbers = [int(last) if last.isdigit() else -1 for _, _, last in found]
    homes = {home for home, _, _ in found}
    if len(names) > 2 and len(homes) == 1 and numbers == [*range(numbers[0], numbers[0] + len(numbers))] and numbers[0] >= 0:
        home = "".join(f"{each}." for each in homes if each)
        return f'[f"{home}{{i}}{end}" for i in range({numbers[0]}, {numbers[-1] + 1})]'
    return repr([f"{name}{end}" for name in names])
