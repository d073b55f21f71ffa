"""The modules of a model that keep codes: the function that they code, their bits and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbit import activations
from fewbit.constants import DEFAULT_BITS, DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable
from fewbit.models.arguments import Filter
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer
from fewbit.record import Activation
from fewbit.resolve import JOINT
from fewbit.store import load_ladder, load_table, rung_for


@dataclass(frozen=True, eq=False)
class CodedModule:
    """A coded module of a model.

    name      the module's name in the model
    record    the activation; for a layer the activation of its gate, or the identity
    channels  the channels of its table
    """

    name: str
    module: CodedActivation | CodedLayer
    record: Activation
    channels: tuple[str, ...]

    @property
    def table(self) -> CodeTable:
        """Its own table, or the shipped one of its bits."""
        return self.module.table or self.shipped(self.module.bits or self._default_bits)

    def table_for(self, spread: float) -> CodeTable:
        """The table that it uses for inputs of this spread: its own, or one from the ladder of its bits."""
        if self.module.table is not None or not self.calibrates:
            return self.table
        return rung_for(load_ladder(self.record, self.table.bits, channels=self.channels), spread)

    @property
    def calibrates(self) -> bool:
        """Whether its table codes the input as it is. Layers standardize their input first, so they need no calibration."""
        return self.record != activations.IDENTITY

    def shipped(self, bits: int) -> CodeTable:
        """The table of this number of bits that `fewbit.load_table` gives."""
        return load_table(self.record, bits, channels=self.channels)

    def install(self, table: CodeTable) -> None:
        """Let the module use this table."""
        self.module.table, self.module.bits = table, None

    @property
    def _default_bits(self) -> int:
        return DEFAULT_BITS if isinstance(self.module, CodedActivation) else DEFAULT_LAYER_BITS


def coded_modules(model: nn.Module, filter_fn: Filter | None = None) -> list[CodedModule]:
    """The coded modules of a model that the filter lets pass. A module with several names is given once, under the first."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, CodedActivation | CodedLayer) and (filter_fn is None or filter_fn(module, name)):
            found.append(describe(name, module))
    return found


def describe(name: str, module: CodedActivation | CodedLayer) -> CodedModule:
    """The description of a coded module."""
    if isinstance(module, CodedActivation):
        return CodedModule(name, module, type(module).record(module), module.table_channels)
    return CodedModule(name, module, activations.get(module.gate or activations.IDENTITY), JOINT if module.gate else ("value",))


def pre_activation(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The tensor to which a coded module, called with these arguments, applies its activation or that of its gate."""
    x = args[0] if args else kwargs.get("input", kwargs.get("gate"))
    return x.tensor_split(2, module.dim)[1] if isinstance(module, nn.GLU) and isinstance(x, torch.Tensor) else x
