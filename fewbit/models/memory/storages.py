"""Sums over kept storages: by role, by module, and over repeated layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fewbit.models.grouping import label, pattern, shortened, some
from fewbit.models.memory.operations import kind_of, plain_operation
from fewbit.models.memory.saved import ACTIVATIONS, Saver, Storage, dtype_and_shape

ROLES = (ACTIVATIONS, "parameters", "buffers", "inputs", "tables")
_LONGEST_NAME = 70  # in a picture
NOTE = (
    "Each storage counts once, for the module that saved it first. Parameters, buffers and inputs exist anyway. Gradients of "
    "parameters and the optimizer's state are not counted."
)


def total(storages: Iterable[Storage], role: str = ACTIVATIONS) -> int:
    """Bytes of one role."""
    return sum(storage.bytes for storage in storages if storage.role == role)


def most_kept(storages: Iterable[Storage]) -> str:
    """The operations that keep most, in words: "attention (41 %), gelu (30 %)"; empty if nothing is kept."""
    found: Counter[str] = Counter()
    for each in storages:
        if each.role == ACTIVATIONS:
            found[plain_operation(each.savers[0].operation)] += each.bytes
    whole = found.total()
    return ", ".join(f"{name} ({100 * size / whole:.0f} %)" for name, size in found.most_common(3)) if whole else ""


def note_on_workspaces(storages: Iterable[Storage]) -> str:
    """A note on modules that keep a workspace, such as an LSTM, since a fake tensor does not tell its size; empty if there are
    none."""
    found = (each for each in storages if (each.role, each.dtype, each.bytes) == (ACTIVATIONS, "uint8", 0))
    names = list(dict.fromkeys(each.savers[0].module for each in found))
    if not names:
        return ""
    return f"More is kept than counted: fake tensors do not tell the size of the workspaces of {some(names)}; real ones do."


def kept_by(storages: Iterable[Storage]) -> dict[str, int]:
    """Module -> bytes of the activations that it was the first to save."""
    found: Counter[str] = Counter()
    for storage in storages:
        if storage.role == ACTIVATIONS:
            found[storage.savers[0].module] += storage.bytes
    return dict(found)


def bars_of(runs: Mapping[str, Iterable[Storage]]) -> dict[str, dict[str, dict[str, int]]]:
    """Module -> name of the run -> operation -> bytes of activations. Repeated layers share an entry."""
    names: dict[str, dict[str, None]] = {}
    sums: dict[str, dict[str, Counter[str]]] = {}
    for run, storages in runs.items():
        for storage in storages:
            if storage.role == ACTIVATIONS and storage.bytes:
                first = storage.savers[0]
                names.setdefault(pattern(first.module), {})[first.module] = None
                bars = sums.setdefault(pattern(first.module), {each: Counter() for each in runs})
                bars[run][first.operation] += storage.bytes
    return {label(names[key]): {run: dict(stack) for run, stack in bars.items()} for key, bars in sums.items()}


def picture_of(runs: Mapping[str, Iterable[Storage]]) -> dict[str, dict[str, dict[str, int]]]:
    """The same by kind of operation, with names short enough for a picture."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, bars in bars_of(runs).items():
        rows = found.setdefault(shortened(name, _LONGEST_NAME), {})
        for run, stack in bars.items():
            kinds = Counter(rows.get(run, {}))
            for operation, number in stack.items():
                kinds[kind_of(operation)] += number
            rows[run] = dict(kinds)
    return found


@dataclass(frozen=True)
class Repeated:
    """Storages of activations that differ only in the number of the layer."""

    module: str
    operation: str
    tensor: str
    count: int
    bytes: int
    shared: str


def repeated(storages: Iterable[Storage]) -> list[Repeated]:
    """The activations, the largest first. Repeated layers are summed."""
    groups: dict[tuple, list[Storage]] = {}
    for storage in storages:
        if storage.role == ACTIVATIONS and storage.bytes:
            savers = tuple((pattern(saver.module), saver.operation) for saver in storage.savers)
            groups.setdefault((savers, storage.dtype, storage.shape), []).append(storage)
    found = (_repeated(group) for group in groups.values())
    return sorted(found, key=lambda each: -each.bytes)


def _repeated(group: Sequence[Storage]) -> Repeated:
    first = group[0]
    partners = [
        f"{label(dict.fromkeys(storage.savers[i].module for storage in group))} {plain_operation(saver.operation)}"
        for i, saver in enumerate(first.savers)
        if i
    ]
    return Repeated(
        label(dict.fromkeys(storage.savers[0].module for storage in group)),
        first.savers[0].operation,
        tensor_label(first),
        len(group),
        sum(storage.bytes for storage in group),
        ", ".join(dict.fromkeys(partners)),
    )


def tensor_label(storage: Storage) -> str:
    """dtype and shape, such as "float32 4×16"."""
    return dtype_and_shape(storage.dtype, storage.shape)


def saver_label(saver: Saver) -> str:
    """Module and operation."""
    return f"{saver.module or '(model)'} {saver.operation}"
