"""Measures bytes that a forward pass keeps for backward, peaks of memory, and times of several tasks round by round."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewbit.errors import InputError
from fewbit.torch_internals import allocations

Tensor = torch.Tensor
Key = tuple[str, str]  # (phase, label)
Quantiles = dict[str, float]

QUANTILES = {"p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}
LEAST_SECONDS = 200e-6  # least length of one sample; shorter calls are repeated within it
_WARM_UPS = 3


def find_device(name: str) -> torch.device:
    """The device of that name. Raises InputError if torch has no such device, or it cannot compute."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"torch has no device {name!r} here ({str(error).splitlines()[0]}); 'cpu' always works") from error
    return device


def saved_storages(*seen: dict[int, int], leave_out: Collection[int] = ()) -> torch.autograd.graph.saved_tensors_hooks:
    """Within this context, each storage that autograd saves is entered once in each of `seen`: address -> bytes.

    seen       dictionaries to fill. Hold the outputs until they are read, so that no address of a storage is used twice.
    leave_out  addresses not to enter, such as those of parameters
    """

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in leave_out:
            for each in seen:
                each[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is saved as itself would hold its own graph forever

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Bytes of distinct storages that function(x) keeps for backward: all, and those without x's and the output's.

    x requires a gradient.
    """
    seen: dict[int, int] = {}
    with saved_storages(seen):
        y = function(x)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (x, y)}
    return sum(seen.values()), sum(number for address, number in seen.items() if address not in shared)


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch's allocator held on the device during step(), beyond what it held before.

    Memory is followed on the CPU and on CUDA devices; InputError for others.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise InputError(f"torch follows the memory of the CPU and of CUDA devices, not of {device.type!r}; measure there")
    return max(itertools.accumulate(allocations(step), initial=0))


@dataclass(frozen=True)
class Task:
    """The timed call is `action(argument)`. `prepare` makes a new argument for each call, before the clock starts."""

    prepare: Callable[[], Any]
    action: Callable[[Any], Any]


def time_rounds(tasks: dict[Key, Task], repeats: int, device: torch.device) -> dict[Key, np.ndarray]:
    """Mean seconds per call in each sample, (repeats,) for each task, after a warm-up.

    Each round takes one sample of every task, phase by phase. The order of the tasks in a phase is shuffled in every round.
    Element i of every array is from round i, so ratios compare times taken close together. A sample repeats calls until it
    lasts at least LEAST_SECONDS.
    """
    phases = [[key for key in tasks if key[0] == phase] for phase in dict.fromkeys(phase for phase, _ in tasks)]
    calls = {key: _calls(task, device) for key, task in tasks.items()}
    samples = {key: np.empty(repeats) for key in tasks}
    shuffler = random.Random(0)
    for i in range(repeats):
        for keys in phases:
            for key in shuffler.sample(keys, len(keys)):
                samples[key][i] = seconds(tasks[key], calls[key], device) / calls[key]
    return samples


def seconds(task: Task, calls: int, device: torch.device) -> float:
    """Seconds of `calls` calls one after another, by CUDA events on a CUDA device, else by wall-clock time."""
    arguments = [task.prepare() for _ in range(calls)]
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for argument in arguments:
                task.action(argument)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
    wait = getattr(torch, device.type).synchronize
    wait()
    start = time.perf_counter()
    for argument in arguments:
        task.action(argument)
    wait()
    return time.perf_counter() - start


def quantiles(samples: np.ndarray) -> Quantiles:
    """QUANTILES of some numbers, interpolated.

    >>> quantiles(np.arange(11.0))
    {'p10': 1.0, 'p25': 2.5, 'median': 5.0, 'p75': 7.5, 'p90': 9.0}
    """
    return dict(zip(QUANTILES, np.quantile(samples, list(QUANTILES.values())).tolist(), strict=True))


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch uses this number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calls(task: Task, device: torch.device) -> int:
    """The least power of two of calls that makes a sample long enough."""
    seconds(task, _WARM_UPS, device)
    calls = 1
    while seconds(task, calls, device) < LEAST_SECONDS:
        calls *= 2
    return calls
