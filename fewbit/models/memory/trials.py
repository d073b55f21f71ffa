"""Which conversions pay: each is tried in a forward pass, and undone.

What coding a module saves depends on its neighbours, since they may keep the same tensor or the same code. Modules that share a
storage, either now or once all are converted, form a component. Other places that keep that storage belong to it too.
Components share nothing with each other, so one forward pass can try one change in every component.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from fewbit.models.memory.saved import ACTIVATIONS, Slot, Storage
from fewbit.models.memory.storages import total

Node = str | Slot  # a module that can be converted, or a place in another one that saves a tensor
Run = Callable[[Collection[str]], list[Storage]]  # what is kept with these modules converted


@dataclass(frozen=True)
class Outcome:
    """The best set of conversions that was found.

    chosen   names of the modules to convert
    saved    module -> bytes that its conversion saves when the other chosen ones are converted too; negative if it adds bytes
    storages  what is kept with these converted
    """

    chosen: frozenset[str]
    saved: dict[str, int]
    storages: list[Storage]


@dataclass
class _Component:
    """A component, and the best choice in it so far.

    members  names of its modules that can be converted
    linked   these modules, and the other places that share their storages
    chosen   names of the modules to convert
    kept     bytes that the component keeps then
    settled  whether no single change makes it keep less
    """

    members: list[str]
    linked: set[Node]
    chosen: set[str]
    kept: int
    settled: bool = False


def choose(run: Run, candidates: Sequence[str], before: list[Storage], after: list[Storage]) -> Outcome:
    """A local search in each component. It starts from all or none of the conversions, whichever keeps less. Then single
    conversions are added while that keeps fewer bytes, or taken back while that keeps no more.

    before, after  what is kept with none and with all converted
    """
    components = [_start(linked, candidates, before, after) for linked in _linked(candidates, [*before, *after])]
    saved: dict[str, int] = {}
    while not all(each.settled for each in components):
        toggled = _toggled(run, components)
        proposals = {}
        for i, each in enumerate(components):
            if not each.settled:
                better = [name for name in each.members if toggled[name] < each.kept + (name in each.chosen)]
                saved.update((name, (toggled[name] - each.kept) * (1 if name in each.chosen else -1)) for name in each.members)
                each.settled = not better
                if better:
                    proposals[i] = better
        _accept(run, components, proposals, toggled)
    return _verified(run, candidates, components, saved, before, after)


def all_or_none(candidates: Sequence[str], before: list[Storage], after: list[Storage]) -> Outcome:
    """The better of converting all candidates and none, without trials: for models that are too slow to run often."""
    if total(after) < total(before):
        return Outcome(frozenset(candidates), {}, after)
    return Outcome(frozenset(), {}, before)


def _start(linked: set[Node], candidates: Sequence[str], before: list[Storage], after: list[Storage]) -> _Component:
    members = [name for name in candidates if name in linked]
    none, every = _kept(before, linked), _kept(after, linked)
    return _Component(members, linked, set(members) if every < none else set(), min(none, every))


def _toggled(run: Run, components: Sequence[_Component]) -> dict[str, int]:
    """For every module of the components not settled: the bytes that its component keeps if this module's choice is flipped."""
    found = {}
    moving = [each for each in components if not each.settled]
    for i in range(max(len(each.members) for each in moving)):
        now = [each for each in moving if i < len(each.members)]
        names = _chosen(components)
        for each in now:
            names ^= {each.members[i]}
        storages = run(names)
        found.update((each.members[i], _kept(storages, each.linked)) for each in now)
    return found


def _accept(run: Run, components: Sequence[_Component], proposals: dict[int, list[str]], toggled: dict[str, int]) -> None:
    """Make all better changes of a component together, or the best one alone if that keeps less."""
    several = any(len(better) > 1 for better in proposals.values())
    together = run(_chosen(components) ^ {name for better in proposals.values() for name in better}) if several else []
    for i, better in proposals.items():
        each = components[i]
        best = min(better, key=toggled.__getitem__)
        kept = _kept(together, each.linked) if len(better) > 1 else toggled[best]
        each.chosen ^= set(better) if kept <= toggled[best] else {best}
        each.kept = min(kept, toggled[best])


def _verified(
    run: Run,
    candidates: Sequence[str],
    components: Sequence[_Component],
    saved: dict[str, int],
    before: list[Storage],
    after: list[Storage],
) -> Outcome:
    chosen = frozenset(_chosen(components))
    storages = after if len(chosen) == len(candidates) else run(chosen) if chosen else before
    simple = all_or_none(candidates, before, after)
    if total(simple.storages) < total(storages):  # components shared storages in a way that neither run showed
        return Outcome(simple.chosen, saved, simple.storages)
    return Outcome(chosen, saved, storages)


def _chosen(components: Iterable[_Component]) -> set[str]:
    return {name for each in components for name in each.chosen}


def _kept(storages: Iterable[Storage], linked: Collection[Node]) -> int:
    return sum(
        storage.bytes
        for storage in storages
        if storage.role == ACTIVATIONS and any(slot in linked or slot[0] in linked for slot in storage.slots)
    )


def _linked(candidates: Sequence[str], storages: Iterable[Storage]) -> list[set[Node]]:
    """The components: each candidate with everything that shares a storage with it, directly or through others."""
    known = set(candidates)
    home: dict[Node, set[Node]] = {name: {name} for name in candidates}
    for storage in storages:
        if storage.role == ACTIVATIONS and storage.bytes:
            nodes: list[Node] = [slot[0] if slot[0] in known else slot for slot in storage.slots]
            merged = set().union(*(home.get(node, {node}) for node in nodes))
            home.update((node, merged) for node in merged)
    found = {id(group): group for group in (home[name] for name in candidates)}
    return list(found.values())
