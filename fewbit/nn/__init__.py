"""Modules that replace torch's: the same classes and constructors, plus `bits` and related arguments.

Every activation in the registry has a module, such as `fewbit.GELU(approximate="tanh", bits=3)`. Linear layers, convolutions,
norms, gated units and recurrent layers have modules too. So have dropout, pooling and padding; their codes are exact and take
no `bits`. If torch has a module of the same name, fewbit's is a subclass of it with the same parameters and buffers, so
`state_dict` keys stay the same.
"""

from __future__ import annotations

from typing import Any

from fewbit.nn import activations as _activations
from fewbit.nn import exact_codes as _exact_codes
from fewbit.nn import layers as _layers
from fewbit.nn import recurrent as _recurrent

_CLASSES = {**_layers.CLASSES, **_recurrent.CLASSES, **_exact_codes.CLASSES}


def __getattr__(name: str) -> Any:
    module = _CLASSES.get(name) or _activations.module(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return module


def __dir__() -> list[str]:
    return sorted([*_CLASSES, *_activations.names()])
