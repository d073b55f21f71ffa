"""The plan's advice for each module that keeps something: code it or leave it, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fewbit.models.grouping import pattern
from fewbit.models.memory.operations import plain_operation
from fewbit.models.memory.saved import ACTIVATIONS, Storage
from fewbit.models.memory.storages import kept_by
from fewbit.models.memory.trials import Outcome
from fewbit.terminal import bytes_label

CODE, LEAVE = "code", "leave"


@dataclass(frozen=True)
class Advice:
    """The advice for one module.

    module  dotted name; "" is the model itself
    type    name of its class
    before  bytes that it keeps now; a storage that several modules save counts for the first of them
    after   bytes that it keeps once everything is converted
    saves   bytes that its conversion saves when the other modules that pay are converted too; negative if it adds bytes, None
            if the module is not converted
    advice  "code" or "leave"
    reason  in words
    """

    module: str
    type: str
    before: int
    after: int
    saves: int | None
    advice: str
    reason: str


def of_modules(
    classes: Mapping[str, str],
    candidates: Collection[str],
    others: Collection[str],
    before: Sequence[Storage],
    after: Sequence[Storage],
    outcome: Outcome,
) -> list[Advice]:
    """Advice for each module that can be converted or keeps something, in the order of the model.

    classes     the classes of all modules, by name
    candidates  names of the modules that a conversion converts
    others      names of the modules that a conversion with other bits would convert
    before, after  what is kept with none and with all converted
    """
    seen = _Sight(classes, _by_module(before), _by_module(outcome.storages))
    kept_before, kept_after = kept_by(before), kept_by(after)
    found = []
    for name, cls in classes.items():
        if name in candidates:
            saves = outcome.saved.get(name)
            what, reason = _of_candidate(name, saves, name in outcome.chosen, seen)
        elif any(each.role == ACTIVATIONS for each in seen.now.get(name, ())):
            saves, (what, reason) = None, _of_other(name, name in others, seen)
        else:
            continue
        found.append(Advice(name, cls, kept_before.get(name, 0), kept_after.get(name, 0), saves, what, reason))
    return found


def grouped(advice: Iterable[Advice]) -> list[list[Advice]]:
    """Groups of repeated layers with the same advice. The groups that keep or save most come first."""
    groups: dict[tuple, list[Advice]] = {}
    for each in advice:
        groups.setdefault((pattern(each.module), each.type, each.advice, each.reason), []).append(each)
    return sorted(groups.values(), key=lambda group: -sum(max(each.before, each.after, abs(each.saves or 0)) for each in group))


def saves_label(group: Sequence[Advice]) -> str:
    """What a group saves, as text; empty for modules that are not converted."""
    if group[0].saves is None:
        return ""
    number = sum(each.saves or 0 for each in group)
    return f"−{bytes_label(-number)}" if number < 0 else bytes_label(number)


def reason_label(group: Sequence[Advice]) -> str:
    """The reason for a group. The group's figures are sums, but the bytes in the reason are those of one module: say "each"."""
    reason = group[0].reason
    return f"each {reason}" if len(group) > 1 and reason.startswith("keeps ") else reason


class _Sight(NamedTuple):
    """The classes of the modules, and the activations and inputs that each module saves.

    now   as the model is
    best  once the modules that pay are converted
    """

    classes: Mapping[str, str]
    now: dict[str, list[Storage]]
    best: dict[str, list[Storage]]


def _by_module(storages: Iterable[Storage]) -> dict[str, list[Storage]]:
    found: dict[str, list[Storage]] = {}
    for storage in storages:
        if storage.bytes and storage.role in (ACTIVATIONS, "inputs"):
            for name in dict.fromkeys(saver.module for saver in storage.savers):
                found.setdefault(name, []).append(storage)
    return found


def _of_candidate(name: str, saves: int | None, chosen: bool, seen: _Sight) -> tuple[str, str]:
    now = [each for each in seen.now.get(name, ()) if each.role == ACTIVATIONS]
    reads_input = any(each.role == "inputs" for each in seen.now.get(name, ()))
    if saves is None:
        return (CODE, "the model as a whole keeps less") if chosen else (LEAVE, "the model as a whole would keep no less")
    if saves > 0 and chosen:
        partners = _partners(name, now, seen.classes)
        sizes = bytes_label(sum(each.bytes for each in now))
        if partners:
            return CODE, f"keeps {sizes} together with {partners}: coded together, none of them keeps it"
        return CODE, f"keeps {sizes} that nothing else needs"
    adds = f", and codes would add {bytes_label(-saves)}" if saves < 0 else ""
    if reads_input and not now:
        return LEAVE, "reads the model's input, which stays in memory anyway" + adds
    if not now:
        return LEAVE, "keeps nothing itself that coding could shrink" + adds
    if partners := _partners(name, now, seen.classes):
        return LEAVE, f"{partners} keeps that tensor anyway" + (adds or ", so coding this module saves nothing")
    if saves == 0:
        return LEAVE, "keeps as many bytes when coded"
    return LEAVE, f"the tensor is so small that scales and padding would add {bytes_label(-saves)}"


def _of_other(name: str, convertible: bool, seen: _Sight) -> tuple[str, str]:
    kept = [each for each in seen.best.get(name, ()) if each.role == ACTIVATIONS]
    if convertible:
        return LEAVE, "stays exact with these bits"
    if not kept:
        return LEAVE, "keeps nothing once its neighbours are coded"
    operations = ", ".join(
        dict.fromkeys(plain_operation(saver.operation) for each in kept for saver in each.savers if saver.module == name)
    )
    return LEAVE, f"{operations}: not coded"


def _partners(name: str, storages: Iterable[Storage], classes: Mapping[str, str]) -> str:
    """The other modules that save these tensors, as in "down (matrix product)"."""
    found = {saver for each in storages for saver in each.savers if saver.module != name}
    return ", ".join(
        sorted({f"{_seen_from(name, saver.module, classes)} ({plain_operation(saver.operation)})" for saver in found})
    )


def _seen_from(name: str, other: str, classes: Mapping[str, str]) -> str:
    """The name of another module as seen from this one. Repeated layers get the same text.

    >>> _seen_from("blocks.0.act", "blocks.0.down", {}), _seen_from("blocks.3.act", "blocks.3", {"blocks.3": "Block"})
    ('down', 'the Block around it')
    """
    if other == "" or name.startswith(other + "."):
        return f"the {classes[other]} around it"
    here, there = name.split("."), other.split(".")
    differ = (i for i, parts in enumerate(zip(here, there, strict=False)) if parts[0] != parts[1])
    common = next(differ, min(len(here), len(there)))
    if 0 < common < len(there) and there[common].isdigit():
        common -= 1  # "layer.1.conv" says more than "1.conv"
    return ".".join(there[common:])
