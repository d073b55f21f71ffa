"""Estimates how long operators take, from what they compute and move: on a device that was measured, or on a common one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fewbit.terminal import three_figures
from fewbit.traffic import flops, moved_bytes

_LEAST_SECONDS = 0.02  # a measurement takes at least so long


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    products  multiplications and additions in matrix products, convolutions and attention; each counts as one
    bytes     bytes read and written
    calls     calls of operators, one after the other
    device    the device, in words
    """

    products: float
    bytes: float
    calls: float
    device: str

    def seconds(self, operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> float:
        """Seconds of one call. It computes and moves bytes at the same time, so the slower of both counts (the "roofline" of
        Williams, Waterman and Patterson, 2009)."""
        moved = moved_bytes(operator, args, kwargs, output)
        if moved is None:
            return 0.0
        return 1 / self.calls + max(flops(operator, args, kwargs, output) / self.products, moved / self.bytes)

    def __str__(self) -> str:
        return f"{self.device}: {three_figures(self.products / 1e12)} Tflop/s, {three_figures(self.bytes / 1e9)} GB/s"


# what an NVIDIA H100 reaches in common bfloat16 training: more than half of what its data sheet promises
COMMON = Rates(400e12, 2e12, 100e3, "an H100 in bfloat16")


@lru_cache(maxsize=8)
def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device, measured in a fraction of a second; those of a common device for the meta device."""
    if device.type == "meta":
        return COMMON
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    moving = torch.ones(1 << 24 if device.type == "cpu" else 1 << 28, dtype=torch.uint8, device=device)
    other, small = torch.empty_like(moving), torch.ones(1, device=device)
    wait: Callable[[], Any] = (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize
    product = _seconds(lambda: torch.mm(a, b), wait)
    copy = _seconds(lambda: other.copy_(moving), wait)
    call = _seconds(lambda: torch.add(small, 1), lambda: None)
    kind = str(dtype).removeprefix("torch.")
    return Rates(2 * size**3 / product, 2 * moving.numel() / copy, 1 / call, f"this {device.type}, {kind}")


def _seconds(action: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Seconds of one call, the shortest of three measurements."""
    action()
    wait()
    times, count = [], 1
    while len(times) < 3:
        begin = time.perf_counter()
        for _ in range(count):
            action()
        wait()
        taken = time.perf_counter() - begin
        if taken < _LEAST_SECONDS:
            count *= 2
        else:
            times.append(taken / count)
    return min(times)
