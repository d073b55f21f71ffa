"""torch's functions whose backward reads codes: torch's names and signatures, plus `bits`, `table` and their kin.

`fewbit.functional.gelu(x, bits=3)` and its siblings, one for every activation in the registry, made from its record when
first asked for; the layers of `fewbit.functional.layers`: linear, convolutions, norms and gated units; and, with torch's
signatures alone, dropout, pooling and padding, of `fewbit.functional.exact_codes`.

    operation.py    the one way of every call: check, decide, resolve, run
    activations.py  what an activation is to it
    layers.py       what a layer is to it
    recurrent.py    what a recurrent layer and a cell of one are to it
    exact_codes.py  what dropout, pooling and padding are to it
    products.py     what products and casts are to it, in compiled code
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbit import activations as _registry
from fewbit.functional import activations as _activations
from fewbit.functional import exact_codes as _exact_codes
from fewbit.functional import layers as _layers
from fewbit.functional import recurrent as _recurrent  # noqa: F401  # which adds its functions to those of layers


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
