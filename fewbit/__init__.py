"""fewbit trains PyTorch models in less memory. The forward pass is exact. Backward reads codes of a few bits per element."""

from importlib import import_module
from typing import Any

from fewbit.design import design  # imported at once, or importing the package fewbit.design would take the name

__version__ = "0.1.0"
_HOMES = {  # public names other than `design`, and their modules; these are imported on first use, to keep `import fewbit` fast
    "ActivationError": "fewbit.errors",
    "Allocation": "fewbit.models.calibration.allocation",
    "Calibration": "fewbit.models.calibration.calibration",
    "CodeTable": "fewbit.design.table",
    "ConversionWarning": "fewbit.errors",
    "DesignError": "fewbit.errors",
    "Drift": "fewbit.models.gradients.watch",
    "DriftWarning": "fewbit.errors",
    "FewbitError": "fewbit.errors",
    "Fidelity": "fewbit.models.gradients.fidelity",
    "InputError": "fewbit.errors",
    "MemoryReport": "fewbit.models.memory.report",
    "Plan": "fewbit.models.memory.plan",
    "TableError": "fewbit.errors",
    "TableFileError": "fewbit.errors",
    "Watch": "fewbit.models.gradients.watch",
    "allocate": "fewbit.models.calibration.allocate",
    "callbacks": "fewbit",
    "calibrate": "fewbit.models.calibration.calibrate",
    "convert": "fewbit.models.conversion.convert",
    "exact": "fewbit.autograd.exact",
    "fidelity": "fewbit.models.gradients.fidelity",
    "functional": "fewbit",
    "load": "fewbit.models.conversion.stored",
    "load_ladder": "fewbit.store",
    "load_table": "fewbit.store",
    "memory": "fewbit.models.memory.report",
    "nn": "fewbit",
    "patch": "fewbit.models.conversion.patch",
    "Preparation": "fewbit.models.prepare",
    "prepare": "fewbit.models.prepare",
    "recompute": "fewbit.functional.recompute",
    "register": "fewbit.activations",
    "revert": "fewbit.models.conversion.convert",
    "save": "fewbit.models.conversion.stored",
    "watch": "fewbit.models.gradients.watch",
}
__all__ = ["design", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use. Names of modules, such as `fewbit.GELU`, come from `fewbit.nn`."""
    home = _HOMES.get(name, "fewbit.nn" if name[:1].isupper() else None)
    if home is None:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    return import_module(f"fewbit.{name}") if home == "fewbit" else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(import_module("fewbit.nn"))})
