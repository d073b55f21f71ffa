"""Activations in other forms than torch's modules: Hugging Face's classes.

They are recognized by the names of module and class, so that transformers is never imported. Each computes forward in
its own way, which stays, bit for bit; backward reads a table of the function that it computes.
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
# class -> the activation's name, and the attributes that its forward reads (those of all versions)
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
    """An activation with the forward of another class, the last of the bases of the class that was made of both."""

    _of_torch = True

    @classmethod
    def record_at(cls, values: dict[str, Any]) -> Activation:
        return _record(cls.name, cls._own(), tuple(values.items()))

    @classmethod
    def _own(cls) -> type[nn.Module]:
        """The class of Hugging Face's, which has the forward."""
        return next(each for each in cls.__mro__ if not issubclass(each, CodedActivation) and activation_class(each))


def activation_class(cls: type) -> type[OtherActivation] | None:
    """The class, to be put before it, that codes one of Hugging Face's activations; None for any other class."""
    if cls.__module__ != _HOME or cls.__name__ not in _CLASSES or issubclass(cls, CodedActivation):
        return None
    return _made(*_CLASSES[cls.__name__])


@cache
def _made(name: str, attributes: tuple[str, ...]) -> type[OtherActivation]:
    return type("OtherActivation", (OtherActivation,), {"__module__": __name__, "name": name, "_taken": attributes})


@dataclass(frozen=True)
class _OwnForward:
    """The forward of a class at these values of the attributes that it reads; equal where both are."""

    owner: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...]

    def __call__(self, x: torch.Tensor, **parameters: Any) -> torch.Tensor:
        """The record's parameters are among the attributes."""
        stand_in: Any = SimpleNamespace(**dict(self.attributes))
        return self.owner.forward(stand_in, x)


@lru_cache(maxsize=256)
def _record(name: str, owner: type[nn.Module], attributes: tuple[tuple[str, Any], ...]) -> Activation:
    record = {**activations.UNLISTED, **activations.BUILT_IN}[name]
    record = record.with_parameters(**{key: value for key, value in attributes if key in record.parameters})
    return dataclasses.replace(record, torch_function=_OwnForward(owner, attributes))
