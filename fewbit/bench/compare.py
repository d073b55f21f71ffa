"""`fewbit bench --model`: training steps of a model exact, checkpointed and coded, side by side.

Operators and bytes are counted. Times are quantiles over rounds, and each ratio of times is of two of one round.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fewbit.bench.environment import device_name, dtype_name, first_line, now, parse_dtype, versions
from fewbit.bench.models import Subject
from fewbit.bench.step import Step, moved
from fewbit.errors import ConversionWarning, FewbitError, InputError
from fewbit.measuring import Key, Quantiles, Task, find_device, quantiles, time_rounds, torch_threads
from fewbit.models.blocks import blocks, checkpoint_blocks
from fewbit.models.conversion.convert import convert
from fewbit.models.conversion.setting import Setting, parse_bits
from fewbit.models.memory.saved import tensors_in
from fewbit.record import plural
from fewbit.traffic import Traffic, traffic

EXACT, CHECKPOINT = "exact", "checkpoint"


@dataclass(frozen=True)
class Settings:
    """What to measure: a model at every dtype and on every device, exact, checkpointed, and coded with all `bits`.

    name  what reports call the model
    make  makes it anew, in float32 on the CPU, with its batch
    bits  as `fewbit.models.conversion.setting.parse_bits` takes them: "4", or "activation=3,linear=4"

    Raises DesignError for bits that cannot be.
    """

    name: str
    make: Callable[[], Subject]
    bits: Sequence[str]
    dtypes: Sequence[torch.dtype]
    devices: Sequence[torch.device]
    threads: int
    repeats: int

    def __post_init__(self):
        for each in ("bits", "dtypes", "devices"):
            object.__setattr__(self, each, tuple(dict.fromkeys(getattr(self, each))))
        for bits in self.bits:
            Setting.of(parse_bits(bits))

    @classmethod
    def of(
        cls,
        name: str,
        make: Callable[[], Subject],
        bits: Sequence[str],
        dtypes: Sequence[str],
        devices: Sequence[str],
        threads: int | None,
        repeats: int,
    ) -> Settings:
        """From the words of a command line; `threads` None: as many as torch has. InputError for what torch does not have."""
        places, kinds = [find_device(each) for each in devices], [parse_dtype(each) for each in dtypes]
        return cls(name, make, bits, kinds, places, threads or torch.get_num_threads(), repeats)

    def cases(self) -> list[tuple[torch.device, torch.dtype]]:
        """Every combination, devices outermost."""
        return [(device, dtype) for device in self.devices for dtype in self.dtypes]


@dataclass(frozen=True)
class RunResult:
    """What was seen of one run.

    bits         as they were given; None where nothing is coded
    calls        of all operators but products: matrix products, convolutions and attention; and the bytes they move
    products     calls of those and their bytes
    operators    by name, calls and bytes: of the rest, with what they sum up to
    kept_bytes   by forward, for backward
    peak_bytes   of a step, beyond the model; None on devices whose memory torch does not follow
    ratio        of the step's time to the exact one's
    """

    run: str
    bits: str | None
    calls: int
    moved_bytes: int
    products: dict[str, dict[str, int]]
    operators: dict[str, dict[str, int]]
    kept_bytes: int
    peak_bytes: int | None
    seconds: Quantiles
    ratio: Quantiles


@dataclass(frozen=True)
class CaseResult:
    """All runs of a model at one dtype on one device, the exact one first. batch: shape and dtype of each tensor in it."""

    dtype: str
    device: str
    parameters: int
    batch: list[str]
    runs: list[RunResult]


@dataclass
class Report:
    """The results, and on what they were measured; `notes` says what is checkpointed, or that nothing is."""

    model: str
    date: str
    versions: dict[str, str]
    devices: dict[str, str]
    threads: int
    repeats: int
    cases: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; all times in seconds."""
        return {"format": "fewbit-bench-model", "version": 1, **asdict(self)}


def run(settings: Settings, track: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Report:
    """Measure every case; `track` may show how far it is.

    Raises InputError for a model in which nothing is coded or differentiated, and for a batch that it does not take; for what
    else fails in it FewbitError, which names the case.
    """
    report = Report(
        settings.name,
        now(),
        dict(versions()),
        {str(device): device_name(device) for device in settings.devices},
        settings.threads,
        settings.repeats,
    )
    with torch_threads(settings.threads):
        for device, dtype in track(settings.cases()):
            try:
                report.cases.append(_measure(settings, device, dtype, report.notes))
            except (FewbitError, MemoryError):
                raise
            except Exception as error:  # whatever the model does
                where = f"{settings.name} in {dtype_name(dtype)} on {device}"
                raise FewbitError(f"cannot measure {where}: {first_line(error)}") from error
    report.notes = list(dict.fromkeys(report.notes))
    return report


def _measure(settings: Settings, device: torch.device, dtype: torch.dtype, notes: list[str]) -> CaseResult:
    torch.manual_seed(0)
    subject = moved(settings.make(), device, dtype)
    steps = {label: Step(subject._replace(model=model)) for label, model in _models(settings, subject, notes).items()}
    for step in steps.values():
        step()  # all that is made once, such as tables, is there when anything is measured
    seen = {label: (traffic(step), step.kept_bytes(), step.peak_bytes(device)) for label, step in steps.items()}
    tasks: dict[Key, Task] = {("step", label): Task(lambda: None, lambda _, step=step: step()) for label, step in steps.items()}
    samples = time_rounds(tasks, settings.repeats, device)
    bits = {_label(each): each for each in settings.bits}
    exact = samples["step", EXACT]
    return CaseResult(
        dtype=dtype_name(dtype),
        device=str(device),
        parameters=sum(each.numel() for each in subject.model.parameters()),
        batch=[f"{tuple(each.shape)} {dtype_name(each.dtype)}" for each in tensors_in(subject.batch)],
        runs=[_result(label, bits.get(label), *seen[label], samples["step", label], exact) for label in steps],
    )


def _models(settings: Settings, subject: Subject, notes: list[str]) -> dict[str, torch.nn.Module]:
    """By the run's label. Appends to `notes` what is checkpointed."""
    models = {EXACT: subject.model}
    levels = blocks(subject.model)
    for level, found in enumerate(levels):
        label = CHECKPOINT if len(levels) == 1 else f"{CHECKPOINT} {level + 1}"
        models[label] = checkpoint_blocks(copy.deepcopy(subject.model), level)
        notes.append(f"{label}: around each of {len(found)} {', '.join(sorted({type(each).__name__ for each in found}))}")
    if not levels:
        notes.append(f"nothing is checkpointed: {settings.name} has no blocks, of one class in a ModuleList or Sequential")
    for bits in settings.bits:
        models[_label(bits)] = _coded(subject.model, bits)
    return models


def _coded(model: torch.nn.Module, bits: str) -> torch.nn.Module:
    """A copy; InputError where nothing in it is coded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        try:
            return convert(copy.deepcopy(model), parse_bits(bits))
        except ConversionWarning as warning:
            raise InputError(f"there is nothing to compare: {warning}") from warning


def _label(bits: str) -> str:
    return plural(int(bits), "bit") if "=" not in bits else bits


def _result(
    label: str, bits: str | None, found: Traffic, kept: int, peak: int | None, seconds: np.ndarray, exact: np.ndarray
) -> RunResult:
    return RunResult(
        run=label,
        bits=bits,
        calls=found.total.calls,
        moved_bytes=found.total.bytes,
        products={name: use._asdict() for name, use in found.products.items()},
        operators={name: use._asdict() for name, use in found.others.items()},
        kept_bytes=kept,
        peak_bytes=peak,
        seconds=quantiles(seconds),
        ratio=quantiles(seconds / exact),
    )
