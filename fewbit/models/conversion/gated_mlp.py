"""Gated MLPs, down(act(gate(x)) * up(x)), whose product becomes a coded gated unit.

They are recognized by what their `forward` does, not by their names: its bytecode is that of one of the patterns below but for
the names of attributes and variables. Any other class stays as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbit.models.conversion.bytecode import Names, names_in
from fewbit.nn.activations import CodedActivation
from fewbit.record import Activation
from fewbit.torch_internals import waits_for_output

# attributes that may have any name; each pattern and step below reads them under these
_ROLES = ("act", "gate", "up", "both", "dropout", "down")


class GatedMLP(nn.Module):
    """Base of the classes made for gated MLPs: act(gate) * up is one coded unit, made by the activation, which has the `bits`
    and the `table`. All else is the MLP's own forward, and that whole where the activation has no codes of its value, or hooks
    that wait for its output."""

    coded_kind = "product"
    _pattern: Pattern
    _names: Names

    def forward(self, x: Tensor) -> Tensor:
        act = self._part("act")
        if not isinstance(act, CodedActivation) or not _is_joint(act) or waits_for_output(act):
            return super().forward(x)
        gate, up = self._pattern.halves(self, x)
        return self._pattern.finish(self, act(gate, up=up))

    def record(self) -> Activation:
        """Of the activation of the gate. Raises AttributeError while that is not a coded one."""
        act = self._part("act")
        return type(act).record(act)

    def extra_repr(self) -> str:
        act = self._part("act")
        unit = f"({self._names['act']}): codes of the gated unit" if isinstance(act, CodedActivation) and _is_joint(act) else ""
        return ", ".join(filter(None, (super().extra_repr(), unit)))

    @classmethod
    def part_of(cls, module: nn.Module, role: str) -> Any:
        """What has that role in a module of the MLP's own class."""
        return getattr(module, cls._names[role])

    def _part(self, role: str) -> Any:
        return self.part_of(self, role)


def _is_joint(act: CodedActivation) -> bool:
    return len(act.table_channels) > 1


def gated_mlp_class(own: type[nn.Module]) -> type[GatedMLP] | None:
    """The class, to be put before it, that codes a gated MLP; None for any other class."""
    found = _found(own) if "forward" in vars(own) else None
    return _made(found[0], tuple(found[1].items())) if found else None


@cache
def _made(pattern: Pattern, names: tuple[tuple[str, str], ...]) -> type[GatedMLP]:
    return type("GatedMLP", (GatedMLP,), {"__module__": __name__, "_pattern": pattern, "_names": dict(names)})


def _found(own: type[nn.Module]) -> tuple[Pattern, Names] | None:
    """The pattern of a class's forward, and the names that its parts have there."""
    function = vars(own)["forward"]
    if not isinstance(function, types.FunctionType):
        return None
    for pattern in PATTERNS:
        if len(pattern.forward.__code__.co_code) == len(function.__code__.co_code):
            names = names_in(function, pattern.forward, _ROLES)
            if names is not None:
                return pattern, names
    return None


# What an MLP does before the product, (gate, up), and after it.


def _separate(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return self._part("gate")(x), self._part("up")(x)


def _first_gates(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = self._part("both")(x).chunk(2, dim=-1)
    return gate, up


def _second_gates(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = self._part("both")(x).chunk(2, dim=-1)
    return gate, up


def _down(self: Any, hidden: Tensor) -> Tensor:
    return self._part("down")(hidden)


def _dropout_down(self: Any, hidden: Tensor) -> Tensor:
    return self._part("down")(self._part("dropout")(hidden))


def _dropout_cast_down(self: Any, hidden: Tensor) -> Tensor:
    hidden, down = self._part("dropout")(hidden), self._part("down")
    if isinstance(down.weight, torch.Tensor) and hidden.dtype != down.weight.dtype and down.weight.dtype != torch.int8:
        hidden = hidden.to(down.weight.dtype)
    return down(hidden)


# How they are written: to be compared, never called. The models named are some of those that write them so.


def _in_one(self: Any, x: Any) -> Any:  # Llama 4 and audio models
    return self.down(self.act(self.gate(x)) * self.up(x))


def _named_result(self: Any, x: Any) -> Any:  # Llama, Mistral, Qwen, Gemma
    down = self.down(self.act(self.gate(x)) * self.up(x))
    return down


def _named_product(self: Any, x: Any) -> Any:  # Llama 4
    hidden = self.act(self.gate(x)) * self.up(x)
    return self.down(hidden)


def _named_gate(self: Any, x: Any) -> Any:  # RecurrentGemma
    gate = self.act(self.gate(x))
    return self.down(gate * self.up(x))


def _with_dropout(self: Any, x: Any) -> Any:  # T5Gemma
    hidden = self.act(self.gate(x)) * self.up(x)
    hidden = self.dropout(hidden)
    down = self.down(hidden)
    return down


def _with_cast(self: Any, hidden: Any) -> Any:  # T5, mT5
    gate = self.act(self.gate(hidden))
    up = self.up(hidden)
    hidden = gate * up
    hidden = self.dropout(hidden)
    if (
        isinstance(self.down.weight, torch.Tensor)
        and hidden.dtype != self.down.weight.dtype
        and self.down.weight.dtype != torch.int8
    ):
        hidden = hidden.to(self.down.weight.dtype)
    hidden = self.down(hidden)
    return hidden


def _without_cast(self: Any, hidden: Any) -> Any:  # LongT5
    gate = self.act(self.gate(hidden))
    up = self.up(hidden)
    hidden = gate * up
    hidden = self.dropout(hidden)
    hidden = self.down(hidden)
    return hidden


def _chunked(self: Any, hidden: Any) -> Any:  # Phi-3, GLM
    up = self.both(hidden)
    gate, up = up.chunk(2, dim=-1)
    up = up * self.act(gate)
    return self.down(up)


def _chunked_tuple(self: Any, hidden: Any) -> Any:  # Granite MoE's shared MLP
    hidden = self.both(hidden)
    chunks = hidden.chunk(2, dim=-1)
    hidden = self.act(chunks[0]) * chunks[1]
    hidden = self.down(hidden)
    return hidden


def _chunked_with_dropout(self: Any, hidden: Any) -> Any:  # ModernBERT
    gate, up = self.both(hidden).chunk(2, dim=-1)
    return self.down(self.dropout(self.act(gate) * up))


def _chunked_second(self: Any, hidden: Any) -> Any:  # Moonshine
    hidden = self.both(hidden)
    hidden, gate = hidden.chunk(2, dim=-1)
    hidden = self.act(gate) * hidden
    hidden = self.down(hidden)
    return hidden


class Pattern(NamedTuple):
    """A way to write a gated MLP, and the same in two steps, around the product."""

    forward: Any  # a function
    halves: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    finish: Callable[[Any, Tensor], Tensor]


_WAYS: tuple[tuple[Any, Any, Any], ...] = (
    (_in_one, _separate, _down),
    (_named_result, _separate, _down),
    (_named_product, _separate, _down),
    (_named_gate, _separate, _down),
    (_with_dropout, _separate, _dropout_down),
    (_with_cast, _separate, _dropout_cast_down),
    (_without_cast, _separate, _dropout_down),
    (_chunked, _first_gates, _down),
    (_chunked_tuple, _first_gates, _down),
    (_chunked_with_dropout, _first_gates, _dropout_down),
    (_chunked_second, _second_gates, _down),
)
PATTERNS = tuple(Pattern(*way) for way in _WAYS)
