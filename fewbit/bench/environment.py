"""On what and when a measure was taken, and the words that name it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from fewbit import __version__
from fewbit.constants import DTYPES
from fewbit.errors import InputError


def now() -> str:
    """The time, as in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> Iterator[tuple[str, str]]:
    """Of fewbit, Python and what they compute with, where it is installed."""
    yield "fewbit", __version__
    yield "python", platform.python_version()
    for name in ("torch", "numpy", "numba", "triton"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if device.type != "cpu" or not information.exists():
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
    return model[1] if model else platform.machine()


def parse_dtype(text: str) -> torch.dtype:
    """The dtype of that name; InputError for one that activations are not coded for."""
    if text not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {text!r}")
    return getattr(torch, text)


def dtype_name(dtype: torch.dtype) -> str:
    """
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    """What an error says, without what follows on more lines."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
