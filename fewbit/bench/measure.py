"""`fewbit bench`: time exact and coded activations, forward and backward, side by side.

All figures are quantiles over rounds. Every ratio compares two times of the same round, since a slow phase of the machine slows
both. Each call makes new outputs and gradients, as in training. Inputs and the copy's target exist before, so small tensors lie
in a cache (on CUDA in the L2 cache), for the copy and for the activation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from fewbit import kernels, resolve
from fewbit.bench.environment import device_name, dtype_name, first_line, now, parse_dtype, versions
from fewbit.constants import DEFAULT_BITS
from fewbit.design.table import check_bits
from fewbit.errors import DesignError, FewbitError, InputError
from fewbit.functional.activations import function
from fewbit.measuring import Key, Quantiles, Task, find_device, kept_bytes, quantiles, time_rounds, torch_threads
from fewbit.record import Activation, plural

Tensor = torch.Tensor
Samples = dict[Key, np.ndarray]

PHASES = ("forward", "backward", "both")
PARTS = ("encode", "decode")
LARGEST = 2**31
_EXACT, _COPY = "exact", ("copy", "copy")


@dataclass(frozen=True)
class Settings:
    """What to measure: every activation at every dtype, number of elements and device, exact and coded with all `bits`.

    parts     whether to time encode and decode alone too
    compiled  whether to time the exact operation under torch.compile too

    Raises DesignError for bits other than 1 to 8.
    """

    records: Sequence[Activation]
    bits: Sequence[int]
    dtypes: Sequence[torch.dtype]
    sizes: Sequence[int]
    devices: Sequence[torch.device]
    threads: int
    repeats: int
    parts: bool = False
    compiled: bool = False

    def __post_init__(self):
        for name in ("records", "bits", "dtypes", "sizes", "devices"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for bits in self.bits:
            check_bits(bits, DesignError)

    def cases(self) -> list[Case]:
        """Every combination: devices and dtypes outermost, sizes innermost."""
        return [
            Case(record, dtype, elements, device)
            for device in self.devices
            for dtype in self.dtypes
            for record in self.records
            for elements in self.sizes
        ]


@dataclass(frozen=True)
class Case:
    """One activation on a tensor (elements,) of one dtype and device."""

    record: Activation
    dtype: torch.dtype
    elements: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.record}, {dtype_name(self.dtype)}, {plural(self.elements, 'element')} on {self.device}"


@dataclass(frozen=True)
class Run:
    """One way to compute an activation; bits None: exactly."""

    label: str
    function: Callable[[Tensor], Tensor]
    bits: int | None = None


@dataclass(frozen=True)
class RunResult:
    """The figures of one run, by phase. Ratios and extra seconds are relative to the exact run.

    moved_bytes  bytes that forward and backward must read and write: x, y, the incoming gradient, the resulting gradient, and
                 what is kept. What is kept is always read, and also written if it is neither x nor y
    copy_share   moved_bytes in a second, relative to what the copy moves in a second
    """

    run: str
    bits: int | None
    kept_bytes: int
    moved_bytes: int
    seconds: dict[str, Quantiles]
    ratio: dict[str, Quantiles]
    extra_seconds: dict[str, Quantiles]
    copy_share: Quantiles


@dataclass(frozen=True)
class PartResult:
    """`encode` alone reads x and writes codes. `decode` alone reads codes and a gradient, and writes a gradient."""

    part: str
    bits: int
    moved_bytes: int
    seconds: Quantiles
    copy_share: Quantiles


@dataclass(frozen=True)
class CaseResult:
    """All runs of one case, the exact one first, and the copy that they are compared with."""

    activation: str
    parameters: dict[str, float]
    dtype: str
    elements: int
    device: str
    copy_bytes: int
    copy_seconds: Quantiles
    runs: list[RunResult]
    parts: list[PartResult]


@dataclass
class Report:
    """The results, with the devices and versions of the measurement. `notes` says what was left out."""

    date: str
    versions: dict[str, str]
    devices: dict[str, str]
    threads: int
    repeats: int
    cases: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. All times are in seconds."""
        return {"format": "fewbit-bench", "version": 1, **asdict(self)}


def settings_of(
    records: Sequence[Activation],
    bits: Sequence[int],
    dtypes: Sequence[str],
    sizes: Sequence[str],
    devices: Sequence[str],
    threads: int | None = None,
    **others: Any,
) -> Settings:
    """Settings from the words of a command line. Without `threads`, torch's number. Raises as the functions below do."""
    places = [find_device(name) for name in devices]
    elements = [parse_size(text) for text in sizes]
    kinds = [parse_dtype(text) for text in dtypes]
    return Settings(records, bits, kinds, elements, places, threads or torch.get_num_threads(), **others)


def parse_size(text: str) -> int:
    """The number of elements that a text means. InputError for anything else.

    >>> parse_size("2^14"), parse_size("16384")
    (16384, 16384)
    """
    match = re.fullmatch(r"(?:2\^(\d{1,2})|(\d{1,10}))", text)
    elements = 0 if match is None else 2 ** int(match[1]) if match[1] else int(match[2])
    if not 1 <= elements <= LARGEST:
        raise InputError(f"a size must be a number of elements from 1 to 2^31, such as 16384 or 2^14; got {text!r}")
    return elements


def run(settings: Settings, track: Callable[[Sequence[Case]], Iterable[Case]] = iter) -> Report:
    """Measure every case. `track` may show the progress.

    Raises FewbitError, which names the case, if torch cannot compute it: too little memory, or an operation without this dtype.
    """
    report = Report(
        now(),
        dict(versions()),
        {str(device): device_name(device) for device in settings.devices},
        settings.threads,
        settings.repeats,
    )
    with torch_threads(settings.threads):
        for case in track(settings.cases()):
            try:
                report.cases.append(measure(case, settings, report.notes))
            except RuntimeError as error:
                raise FewbitError(f"cannot measure {case}: {first_line(error)}") from error
    report.notes = list(dict.fromkeys(report.notes))
    return report


def measure(case: Case, settings: Settings, notes: list[str]) -> CaseResult:
    """All runs of one case. Appends to `notes` what was left out."""
    generator = torch.Generator(case.device).manual_seed(0)
    x, grad = (torch.randn(case.elements, dtype=case.dtype, device=case.device, generator=generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    runs = [Run(_EXACT, case.record.forward)]
    runs += [Run(plural(bits, "bit"), partial(function(case.record), bits=bits), bits) for bits in settings.bits]
    if settings.compiled:
        runs += _compiled(case, leaf, grad, notes)
    kept = {each.label: kept_bytes(each.function, leaf) for each in runs}
    coded = [each for each in runs if each.bits is not None and settings.parts]
    tasks = {_COPY: Task(lambda: x, torch.empty_like(x).copy_)}
    for each in runs:
        tasks |= _run_tasks(each, leaf, grad)
    for each in coded:
        tasks |= _part_tasks(each, case, x, grad)
    samples = time_rounds(tasks, settings.repeats, case.device)
    return CaseResult(
        activation=case.record.name,
        parameters=dict(case.record.parameters),
        dtype=dtype_name(case.dtype),
        elements=case.elements,
        device=str(case.device),
        copy_bytes=2 * x.nbytes,
        copy_seconds=quantiles(samples[_COPY]),
        runs=[_run_result(each, *kept[each.label], 2 * x.nbytes, samples) for each in runs],
        parts=[_part_result(part, each, kept[each.label][0], 2 * x.nbytes, samples) for each in coded for part in PARTS],
    )


def _run_tasks(each: Run, x: Tensor, grad: Tensor) -> dict[Key, Task]:
    def both(x: Tensor) -> object:
        return torch.autograd.grad(each.function(x), x, grad)

    return {
        ("forward", each.label): Task(lambda: x, each.function),
        ("backward", each.label): Task(lambda: each.function(x), lambda y: torch.autograd.grad(y, x, grad)),
        ("both", each.label): Task(lambda: x, both),
    }


def _part_tasks(each: Run, case: Case, x: Tensor, grad: Tensor) -> dict[Key, Task]:
    (device_table,) = resolve.shipped_tables(case.record, ("derivative",), each.bits or DEFAULT_BITS, case.dtype, x.device)
    packed = kernels.encode(x, device_table)
    return {
        ("encode", each.label): Task(lambda: x, lambda x: kernels.encode(x, device_table)),
        ("decode", each.label): Task(lambda: packed, lambda packed: kernels.decode(packed, grad, device_table)),
    }


def _compiled(case: Case, x: Tensor, grad: Tensor, notes: list[str]) -> list[Run]:
    """The exact operation compiled by torch, or a note why it cannot be."""
    torch.compiler.reset()  # without it, torch silently runs the function uncompiled after some shapes
    function = torch.compile(case.record.forward, dynamic=False)
    try:
        torch.autograd.grad(function(x), x, grad)
    except Exception as error:  # the compilers may raise anything
        notes.append(f"torch.compile left out for {case.record} on {case.device}: {first_line(error)}")
        return []
    return [Run("compiled", function)]


def _run_result(each: Run, kept: int, made: int, copy_bytes: int, samples: Samples) -> RunResult:
    own = {phase: samples[phase, each.label] for phase in PHASES}
    exact = {phase: samples[phase, _EXACT] for phase in PHASES}
    moved = 2 * copy_bytes + kept + made
    return RunResult(
        run=each.label,
        bits=each.bits,
        kept_bytes=kept,
        moved_bytes=moved,
        seconds={phase: quantiles(own[phase]) for phase in PHASES},
        ratio={phase: quantiles(own[phase] / exact[phase]) for phase in PHASES},
        extra_seconds={phase: quantiles(own[phase] - exact[phase]) for phase in PHASES},
        copy_share=quantiles(moved / copy_bytes * samples[_COPY] / own["both"]),
    )


def _part_result(part: str, each: Run, kept: int, copy_bytes: int, samples: Samples) -> PartResult:
    own, moved = samples[part, each.label], kept + (copy_bytes // 2 if part == "encode" else copy_bytes)
    share = moved / copy_bytes * samples[_COPY] / own
    return PartResult(part, each.bits or 0, moved, quantiles(own), quantiles(share))
