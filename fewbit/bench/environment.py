"""The machine, versions and time of a measurement."""

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
    """The time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> Iterator[tuple[str, str]]:
    """Versions of fewbit, Python and the packages that compute, as far as they are installed."""
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
    """The dtype of that name. InputError if activations of it are not coded."""
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
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
