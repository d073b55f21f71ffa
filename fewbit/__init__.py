"""fewbit: train PyTorch models with a few bits per saved activation. Forward stays exact; backward reads codes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbit.design import design  # now, not on first use: importing the package fewbit.design must not take the name
from fewbit.errors import (
    ActivationError,
    DesignError,
    DriftWarning,
    FewbitError,
    InputError,
    TableError,
    TableFileError,
)

if TYPE_CHECKING:
    from fewbit import functional, nn
    from fewbit.activations import register
    from fewbit.autograd.switch import exact
    from fewbit.design.table import CodeTable
    from fewbit.models.calibration.allocate import Allocation, allocate
    from fewbit.models.calibration.calibrate import calibrate
    from fewbit.models.calibration.calibration import Calibration
    from fewbit.models.conversion.convert import convert, revert
    from fewbit.models.conversion.patch import patch
    from fewbit.models.planning.memory import memory
    from fewbit.models.planning.plan import left_out
    from fewbit.models.safety.fidelity import Fidelity, fidelity
    from fewbit.models.safety.watch import Watch, watch
    from fewbit.store import load_table

__version__ = "0.1.0"
__all__ = [
    "ActivationError",
    "Allocation",
    "Calibration",
    "CodeTable",
    "DesignError",
    "DriftWarning",
    "FewbitError",
    "Fidelity",
    "InputError",
    "TableError",
    "TableFileError",
    "Watch",
    "allocate",
    "calibrate",
    "convert",
    "design",
    "exact",
    "fidelity",
    "functional",
    "left_out",
    "load_table",
    "memory",
    "nn",
    "patch",
    "register",
    "revert",
    "watch",
]
_HOMES = {
    "Allocation": "fewbit.models.calibration.allocate",
    "Calibration": "fewbit.models.calibration.calibration",
    "CodeTable": "fewbit.design.table",
    "Fidelity": "fewbit.models.safety.fidelity",
    "Watch": "fewbit.models.safety.watch",
    "allocate": "fewbit.models.calibration.allocate",
    "calibrate": "fewbit.models.calibration.calibrate",
    "convert": "fewbit.models.conversion.convert",
    "exact": "fewbit.autograd.switch",
    "fidelity": "fewbit.models.safety.fidelity",
    "left_out": "fewbit.models.planning.plan",
    "load_table": "fewbit.store",
    "memory": "fewbit.models.planning.memory",
    "patch": "fewbit.models.conversion.patch",
    "register": "fewbit.activations",
    "revert": "fewbit.models.conversion.convert",
    "watch": "fewbit.models.safety.watch",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fewbit` is quick: the names above, and modules such as `fewbit.GELU`."""
    if name in ("functional", "nn"):
        return import_module(f"fewbit.{name}")
    if name in _HOMES or name[:1].isupper():
        return getattr(import_module(_HOMES.get(name, "fewbit.nn")), name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(import_module("fewbit.nn"))})
