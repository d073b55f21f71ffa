"""The module drop-ins: torch's classes and constructors, plus `bits` and its kin.

`fewbit.GELU(approximate="tanh", bits=3)` and its siblings, one for every activation in the registry; `fewbit.Linear`,
convolutions, norms and gated units; dropout, pooling and padding, whose codes lose nothing and take no `bits`. Each is a
subclass of torch's own module, where there is one, with the same parameters and buffers, so that `state_dict` keys stay the
same.
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
