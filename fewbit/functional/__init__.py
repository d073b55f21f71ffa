"""torch's functions with codes for backward: torch's names and signatures, plus `bits`, `table` and related arguments.

Every activation in the registry has a function here, such as `fewbit.functional.gelu(x, bits=3)`. It is made from the
activation's record on first use. Layers (linear, convolutions, norms, gated units, attention, recurrent layers) take the same
extra arguments. Dropout, pooling and padding take torch's arguments alone.

    operation.py    runs every call in four steps: check, decide, resolve, run
    activations.py  defines the operations of activations
    layers.py       defines those of layers
    recurrent.py    defines those of recurrent layers and their cells
    exact_codes.py  defines those of dropout, pooling and padding
    products.py     defines those of products and casts, for compiled code
    recompute.py    runs any function from codes of its inputs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbit import activations as _registry
from fewbit.functional import activations as _activations
from fewbit.functional import exact_codes as _exact_codes
from fewbit.functional import layers as _layers
from fewbit.functional import recurrent as _recurrent  # noqa: F401  # adds its functions to layers.FUNCTIONS


def __getattr__(name: str) -> Callable[..., Any]:
    if name in _layers.FUNCTIONS:
        return _layers.FUNCTIONS[name]
    if name in _exact_codes.FUNCTIONS:
        return _exact_codes.FUNCTIONS[name]
    if name in _registry.names():
        return _activations.function(_registry.get(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_registry.names(), *_layers.FUNCTIONS, *_exact_codes.FUNCTIONS]
