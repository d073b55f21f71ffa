"""The functional drop-ins: torch's names and signatures, plus `bits`, `table` and their kin.

`fewbit.functional.gelu(x, bits=3)` and its siblings, one for every activation in the registry, made from its record when
first asked for; and the layers of `fewbit.layers`: linear, convolutions, norms and gated units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbit import activations as _activations
from fewbit import drop_in as _drop_in
from fewbit import layers as _layers


def __getattr__(name: str) -> Callable[..., Any]:
    if name in _layers.FUNCTIONS:
        return _layers.FUNCTIONS[name]
    if name in _activations.names():
        return _drop_in.function(_activations.get(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_activations.names(), *_layers.FUNCTIONS]
