"""Activations that are not torch's modules: Hugging Face's classes.

They are recognized by the names of module and class, so transformers is never imported. Each class keeps its own forward, bit
for bit. Backward reads a table of the function that it computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fewbit import activations
from fewbit.nn.activations import CodedActivation
from fewbit.record import Activation

_HOME = "transformers.activations"
# class -> the activation's name, and the attributes that its forward reads (in all versions of transformers)
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "GELUActivation": ("gelu", ("act",)),
    "GELUTanh": ("gelu_tanh", ("act",)),
    "PytorchGELUTanh": ("gelu_tanh", ()),
    "NewGELUActivation": ("gelu_tanh", ()),
    "FastGELUActivation": ("gelu_tanh", ()),
    "AccurateGELUActivation": ("gelu_tanh", ("precomputed_constant",)),
    "QuickGELUActivation": ("quick_gelu", ()),
    "ClippedGELUActivation": ("clipped_gelu", ("min", "max")),
    "SiLUActivation": ("silu", ()),
    "MishActivation": ("mish", ("act",)),
    "ReLUSquaredActivation": ("relu_squared", ()),
    "LaplaceActivation": ("laplace", ()),
    "SqrtSoftplusActivation": ("sqrt_softplus", ()),
}


class OtherActivation(CodedActivation):
    """An activation with the forward of another class. That class is the last base of the class that is made of both."""

    _of_torch = True

    @classmethod
    def record_at(cls, values: dict[str, Any]) -> Activation:
        return _record(cls.name, cls._own(), tuple(values.items()))

    @classmethod
    def _own(cls) -> type[nn.Module]:
        """Hugging Face's class, which has the forward."""
        return next(each for each in cls.__mro__ if not issubclass(each, CodedActivation) and activation_class(each))


def activation_class(cls: type) -> type[OtherActivation] | None:
    """The coded class for one of Hugging Face's activations, to be its first base; None for any other class."""
    if cls.__module__ != _HOME or cls.__name__ not in _CLASSES or issubclass(cls, CodedActivation):
        return None
    return _made(*_CLASSES[cls.__name__])


@cache
def _made(name: str, attributes: tuple[str, ...]) -> type[OtherActivation]:
    return type("OtherActivation", (OtherActivation,), {"__module__": __name__, "name": name, "_taken": attributes})


@dataclass(frozen=True)
class _OwnForward:
    """The forward of a class with these values of the attributes that it reads. Two are equal if class and values are."""

    owner: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...]

    def __call__(self, x: torch.Tensor, **parameters: Any) -> torch.Tensor:
        """Call the forward. The record's parameters are not used, since they are among the attributes."""
        stand_in: Any = SimpleNamespace(**dict(self.attributes))
        return self.owner.forward(stand_in, x)


@lru_cache(maxsize=256)
def _record(name: str, owner: type[nn.Module], attributes: tuple[tuple[str, Any], ...]) -> Activation:
    record = {**activations.UNLISTED, **activations.BUILT_IN}[name]
    record = record.with_parameters(**{key: value for key, value in attributes if key in record.parameters})
    return dataclasses.replace(record, torch_function=_OwnForward(owner, attributes))
