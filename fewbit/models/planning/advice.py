"""What to do about each module that keeps something, and why, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fewbit.models.grouping import pattern
from fewbit.models.planning.memory import kept_by, total
from fewbit.models.planning.saved import ACTIVATIONS, Storage
from fewbit.models.planning.trials import Outcome
from fewbit.terminal import bytes_label

CODE, LEAVE, RECOMPUTE = "code", "leave", "recompute"
_WORTH = 0.02  # of all that remains: a heuristic, below which recomputing is not worth a word
# nodes that cost a pass over memory and no more, so that to compute them anew in backward is cheap
# fmt: off
_CHEAP = frozenset((
    "Mul", "Div", "Add", "Sub", "Neg", "Abs", "Pow", "Exp", "Log", "Sqrt", "Rsqrt", "Sin", "Cos", "Where", "MaskedFill",
    "Clamp", "Maximum", "Minimum", "Softmax", "SafeSoftmax", "LogSoftmax", "NativeLayerNorm",
    "FusedRmsNorm", "NativeGroupNorm", "NativeBatchNorm", "MaxPool2DWithIndices",
))
# Activations that code calls as functions, which `fewbit.patch` codes
CALLED = frozenset((
    "Gelu", "Silu", "Mish", "Relu", "Hardtanh", "LeakyRelu", "Elu", "Tanh", "Sigmoid", "Softplus", "LogSigmoid", "Hardswish",
    "Glu",
))
# fmt: on


@dataclass(frozen=True)
class Advice:
    """For one module.

    module  dotted name; "" is the model itself
    kind    its class
    before  bytes that it keeps now, of what others save too only where it is the first; after: once all is converted
    saves   bytes that its conversion saves beside the other ones that pay; negative where it adds some, None if it has none
    advice  "code", "leave" or "recompute"
    """

    module: str
    kind: str
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

    classes     of all modules, by name
    candidates  what is converted
    others      what other arguments would convert
    before, after  what is kept with none and with all converted
    """
    remaining, cheap = outcome.storages, Counter[str]()
    for each in remaining:
        if each.kind == ACTIVATIONS and each.savers[0].operation in _CHEAP:
            cheap[pattern(each.savers[0].module)] += each.bytes
    seen = _Sight(classes, _by_module(before), _by_module(remaining), total(remaining), cheap)
    kept_before, kept_after = kept_by(before), kept_by(after)
    found = []
    for name, kind in classes.items():
        if name in candidates:
            saves = outcome.saved.get(name)
            what, reason = _of_candidate(name, saves, name in outcome.chosen, seen)
        elif any(each.kind == ACTIVATIONS for each in seen.now.get(name, ())):
            saves, (what, reason) = None, _of_other(name, name in others, seen)
        else:
            continue
        found.append(Advice(name, kind, kept_before.get(name, 0), kept_after.get(name, 0), saves, what, reason))
    return found


def grouped(advice: Iterable[Advice]) -> list[list[Advice]]:
    """Repeated layers with the same advice together, those that keep or save most first."""
    groups: dict[tuple, list[Advice]] = {}
    for each in advice:
        groups.setdefault((pattern(each.module), each.kind, each.advice, each.reason), []).append(each)
    return sorted(groups.values(), key=lambda group: -sum(max(each.before, each.after, abs(each.saves or 0)) for each in group))


def saves_label(group: Sequence[Advice]) -> str:
    """What a group saves, as people read it; nothing for modules that are not converted."""
    if group[0].saves is None:
        return ""
    number = sum(each.saves or 0 for each in group)
    return f"−{bytes_label(-number)}" if number < 0 else bytes_label(number)


class _Sight(NamedTuple):
    """The classes of modules; by module, the activations and inputs that it saves, now and with what pays converted; the bytes
    that remain then; those among them of cheap operations, by module, repeated layers as one."""

    classes: Mapping[str, str]
    now: dict[str, list[Storage]]
    best: dict[str, list[Storage]]
    remains: int
    cheap: Mapping[str, int]


def _by_module(storages: Iterable[Storage]) -> dict[str, list[Storage]]:
    found: dict[str, list[Storage]] = {}
    for storage in storages:
        if storage.bytes and storage.kind in (ACTIVATIONS, "inputs"):
            for name in dict.fromkeys(saver.module for saver in storage.savers):
                found.setdefault(name, []).append(storage)
    return found


def _of_candidate(name: str, saves: int | None, chosen: bool, seen: _Sight) -> tuple[str, str]:
    now = [each for each in seen.now.get(name, ()) if each.kind == ACTIVATIONS]
    reads_input = any(each.kind == "inputs" for each in seen.now.get(name, ()))
    if saves is None:
        return (CODE, "the model as a whole keeps less") if chosen else (LEAVE, "the model as a whole would keep no less")
    if saves > 0 and chosen:
        partners = _partners(name, now, seen.classes)
        sizes = bytes_label(sum(each.bytes for each in now))
        if partners:
            return CODE, f"keeps {sizes} together with {partners}: coded together, all let it go"
        return CODE, f"keeps {sizes} that nothing else needs"
    adds = f", and codes would add {bytes_label(-saves)}" if saves < 0 else ""
    if reads_input and not now:
        return LEAVE, "reads the model's input, which is there anyway" + adds
    if not now:
        return LEAVE, "keeps nothing that coding could shrink (a frozen weight, or no gradient)" + adds
    if partners := _partners(name, now, seen.classes):
        return LEAVE, f"{partners} keeps that tensor anyway" + (adds or ": to code it changes nothing")
    if saves == 0:
        return LEAVE, "keeps the same bytes coded"
    return LEAVE, f"the tensor is small beside its scales and padding: coding would add {bytes_label(-saves)}"


def _of_other(name: str, convertible: bool, seen: _Sight) -> tuple[str, str]:
    kept = [each for each in seen.best.get(name, ()) if each.kind == ACTIVATIONS]
    if convertible:
        return LEAVE, "stays exact with these arguments"
    called = dict.fromkeys(each.savers[0].operation for each in kept if each.savers[0].module == name)
    if functions := ", ".join(operation for operation in called if operation in CALLED):
        return LEAVE, f"{functions}: called as functions, which fewbit.patch codes, if that pays"
    cheap = [each for each in kept if each.savers[0].module == name and each.savers[0].operation in _CHEAP]
    if cheap and seen.cheap[pattern(name)] >= _WORTH * seen.remains:
        operations = ", ".join(dict.fromkeys(each.savers[0].operation for each in cheap))
        size = bytes_label(sum(each.bytes for each in cheap))
        return RECOMPUTE, f"{size} of {operations}: not coded, but cheap; checkpoint it"
    if not kept:
        return LEAVE, "keeps nothing once its neighbours are coded"
    operations = ", ".join(dict.fromkeys(saver.operation for each in kept for saver in each.savers if saver.module == name))
    return LEAVE, f"{operations}: not coded, and {'small' if cheap else 'costly to compute anew'}"


def _partners(name: str, storages: Iterable[Storage], classes: Mapping[str, str]) -> str:
    """Who else saves these tensors: "down (Addmm)"."""
    found = {saver for each in storages for saver in each.savers if saver.module != name}
    return ", ".join(sorted({f"{_seen_from(name, saver.module, classes)} ({saver.operation})" for saver in found}))


def _seen_from(name: str, other: str, classes: Mapping[str, str]) -> str:
    """How to speak of another module, so that repeated layers are told the same.

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
