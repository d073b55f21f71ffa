"""The modules of activations: torch's classes and constructors, plus `bits`, `table`, `shared` and `inplace`.

They are made from the registry on first use. They have no parameters or buffers beyond torch's.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, ClassVar

import torch

from fewbit import activations, resolve
from fewbit.constants import DEFAULT_BITS
from fewbit.design.table import CodeTable
from fewbit.functional.activations import activation_operation, bind, bound_record, constructor_arguments, docstring_of
from fewbit.functional.operation import run
from fewbit.nn.base import Coded
from fewbit.record import Activation

Tensor = torch.Tensor


class CodedActivation(Coded):
    """Base of the modules of activations.

    bits    bits of one code; None for the table's bits, or 3 without a table
    table   the CodeTable given; None for the ladder of these bits
    shared  whether coded layers that read the output keep the same code
    """

    name: ClassVar[str]  # name of the activation in the registry
    coded_kind: ClassVar[str] = "activation"  # kind of what it keeps, one of fewbit.constants.KINDS
    _of_torch: bool  # whether torch has a module of this name, whose constructor takes torch's arguments
    _taken: tuple[str, ...]  # names of the constructor arguments that the record depends on; they are attributes too
    bits: int | None
    table: CodeTable | None
    shared: bool
    inplace: bool

    def __init__(self, /, *args: Any, **kwargs: Any):
        signature = inspect.signature(type(self))
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        given = {**defaults, **bind(signature, type(self).__name__, *args, **kwargs)}
        super().__init__(**{name: given[name] for name in self._taken if self._of_torch})
        for name, value in given.items():
            setattr(self, name, value)
        resolve.check(self.name, self.record(), self.table_channels, self.bits, self.table)

    @property
    def table_channels(self) -> tuple[str, ...]:
        """The channels of its table: "derivative", and also "value" if layers share the code."""
        joint = self.shared or (self.table is not None and getattr(self.table, "channels", None) == resolve.JOINT)
        return resolve.JOINT if joint else ("derivative",)

    def record(self) -> Activation:
        """The activation's record for this module's parameters, which are torch's attributes (alpha, negative_slope, …)."""
        return self.record_of(self)

    @classmethod
    def record_of(cls, module: torch.nn.Module) -> Activation:
        """The record for the parameters of a module of torch's own class."""
        return cls.record_at(cls._values_of(module))

    @classmethod
    def record_at(cls, values: dict[str, Any]) -> Activation:
        """The record for these values of the attributes that it depends on."""
        return bound_record(activations.get(cls.name), values)

    @classmethod
    def _values_of(cls, module: torch.nn.Module) -> dict[str, Any]:
        return {name: getattr(module, name) for name in cls._taken}

    def forward(self, input: Tensor) -> Tensor:
        values = [(name, getattr(self, name)) for name in self._taken]
        options = type(self), len(self.table_channels) > 1, (), (*values, ("inplace", self.inplace))
        return run(activation_operation, options, (input,), self.bits, self.table, False)

    def extra_repr(self) -> str:
        torchs = (
            super().extra_repr()
            if self._of_torch
            else ", ".join(f"{p}={getattr(self, p)}" for p in type(self).record(self).parameters)
        )
        own = f"table={self.table!r}" if self.table is not None else f"bits={self.bits or DEFAULT_BITS}"
        inplace = "inplace=True" if self.inplace and "inplace" not in torchs else ""
        return ", ".join(filter(None, (torchs, inplace, own, "shared=True" if self.shared else "")))


def module(name: str) -> type[CodedActivation] | None:
    """The module class of that name; None if no activation in the registry has it."""
    for record in map(activations.get, activations.names()):
        if record.module == name:
            return _module_class(record)
    return None


def names() -> list[str]:
    """Names of all module classes of activations."""
    return [activations.get(name).module for name in activations.names()]


@cache
def _module_class(record: Activation) -> type[CodedActivation]:
    """The class `fewbit.nn.Name` for a record: a subclass of torch's class of that name, if there is one."""
    torch_class = getattr(torch.nn, record.module, torch.nn.Module) if record.name in activations.BUILT_IN else torch.nn.Module
    arguments = constructor_arguments(record)
    described = f"torch.nn.{record.module}" if torch_class is not torch.nn.Module else f"The module of {record.torch_name}"
    contents = {
        "__module__": "fewbit.nn",
        "__qualname__": record.module,
        "__doc__": docstring_of(
            record, f"{described} with an exact forward. Backward reads codes of a few bits per element.", module=True
        ),
        "__signature__": inspect.Signature(arguments),
        "_taken": tuple(each.name for each in arguments if each.kind is not each.KEYWORD_ONLY and each.name != "inplace"),
        "name": record.name,
        "_of_torch": torch_class is not torch.nn.Module,
    }
    return type(record.module, (CodedActivation, torch_class), contents)
