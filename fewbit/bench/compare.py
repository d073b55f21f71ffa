"""`fewbit bench --model`: training steps of a model exact, checkpointed and coded, side by side.

Operators and bytes are counted. Times are quantiles over rounds. Each ratio compares two times of the same round.
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

    name  the model's name in reports
    make  a function that makes a new model, in float32 on the CPU, and its batch
    bits  texts for `fewbit.models.conversion.setting.parse_bits`: "4", or "activation=3,linear=4"

    Raises DesignError for bits that are not allowed.
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
        """Settings from the words of a command line. Without `threads`, torch's number. InputError for what torch lacks."""
        places, kinds = [find_device(each) for each in devices], [parse_dtype(each) for each in dtypes]
        return cls(name, make, bits, kinds, places, threads or torch.get_num_threads(), repeats)

    def cases(self) -> list[tuple[torch.device, torch.dtype]]:
        """Every combination, devices outermost."""
        return [(device, dtype) for device in self.devices for dtype in self.dtypes]


@dataclass(frozen=True)
class RunResult:
    """The figures of one run.

    bits         as they were given; None if nothing is coded
    calls        calls of operators that move bytes, except products (matrix products, convolutions and attention)
    moved_bytes  bytes that these operators read and write
    products     name -> calls and bytes of products
    operators    name -> calls and bytes of the other operators
    kept_bytes   bytes that forward keeps for backward
    peak_bytes   peak of a step, beyond the model; None on devices whose memory torch does not track
    seconds      of a step
    ratio        the step's time, relative to the exact step's
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
    """The results, with the devices and versions of the measurement. `notes` says what is checkpointed, if anything is."""

    model: str
    date: str
    versions: dict[str, str]
    devices: dict[str, str]
    threads: int
    repeats: int
    cases: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. All times are in seconds."""
        return {"format": "fewbit-bench-model", "version": 1, **asdict(self)}


def run(settings: Settings, track: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Report:
    """Measure every case. `track` may show the progress.

    Raises InputError if nothing in the model is coded or differentiated, and if it does not take the batch. Raises FewbitError,
    which names the case, if anything else fails.
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
            except Exception as error:  # the model may raise anything
                where = f"{settings.name} in {dtype_name(dtype)} on {device}"
                raise FewbitError(f"cannot measure {where}: {first_line(error)}") from error
    report.notes = list(dict.fromkeys(report.notes))
    return report


def _measure(settings: Settings, device: torch.device, dtype: torch.dtype, notes: list[str]) -> CaseResult:
    torch.manual_seed(0)
    subject = moved(settings.make(), device, dtype)
    steps = {label: Step(subject._replace(model=model)) for label, model in _models(settings, subject, notes).items()}
    for step in steps.values():
        step()  # makes all that is made once, such as tables, before anything is measured
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
    """Label of a run -> its model. Appends to `notes` what is checkpointed."""
    models = {EXACT: subject.model}
    levels = blocks(subject.model)
    for level, found in enumerate(levels):
        label = CHECKPOINT if len(levels) == 1 else f"{CHECKPOINT} {level + 1}"
        models[label] = checkpoint_blocks(copy.deepcopy(subject.model), level)
        notes.append(f"{label}: each of {len(found)} {', '.join(sorted({type(each).__name__ for each in found}))}")
    if not levels:
        notes.append(f"nothing is checkpointed: {settings.name} has no ModuleList or Sequential of blocks of one class")
    for bits in settings.bits:
        models[_label(bits)] = _coded(subject.model, bits)
    return models


def _coded(model: torch.nn.Module, bits: str) -> torch.nn.Module:
    """A converted copy. InputError if nothing in it is coded."""
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
