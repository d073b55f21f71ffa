"""The meaning of `bits` and `coding` in `convert`, `patch`, plans, `calibrate` and the command line.

bits    one number for every kind of saved tensor, or a mapping from kind to number; kinds that are not named stay exact
coding  of the tables, None for the optimal one

The input of a linear layer is coded once. If the kind "linear" is coded, then activations, norms, products and recurrent layers
make codes that linear layers read too. Such a code has the larger of the two numbers of bits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fewbit.constants import CODINGS, EXACT, KINDS, MAX_BITS, REST_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import DesignError
from fewbit.record import Activation
from fewbit.resolve import JOINT
from fewbit.store import load_table

Bits: TypeAlias = int | Mapping[str, int]


@dataclass(frozen=True)
class Setting:
    """Bits by kind, as (kind, number) in the order of KINDS, and the coding of the tables. `of` takes what users write."""

    by_kind: tuple[tuple[str, int], ...]
    coding: str | None = None

    @classmethod
    def of(cls, bits: Any, coding: Any = None) -> Setting:
        """The setting that bits and coding mean. DesignError for anything else.

        >>> Setting.of({"linear": 4, "activation": 3}).by_kind
        (('activation', 3), ('linear', 4))
        >>> dict(Setting.of(4).by_kind)["rest"]
        8
        """
        if coding is not None and coding not in CODINGS:
            raise DesignError(f"coding must be one of {CODINGS}, got {coding!r}")
        if not isinstance(bits, Mapping):
            number = _checked(bits, bits)
            return cls(tuple((kind, max(number, REST_BITS) if kind == "rest" else number) for kind in KINDS), coding)
        for kind in bits:
            _check_kind(kind)
        if not bits:
            raise DesignError(f"bits must name at least one kind, of {', '.join(KINDS)}; got {dict(bits)}")
        return cls(tuple((kind, _checked(bits[kind], dict(bits))) for kind in KINDS if kind in bits), coding)

    def bits_of(self, kind: str) -> int | None:
        """Bits of the codes that this kind makes; None if the kind stays exact.

        >>> Setting.of({"activation": 3, "linear": 4}).bits_of("activation"), Setting.of({"linear": 4}).bits_of("activation")
        (4, None)
        """
        found = dict(self.by_kind)
        if kind in ("activation", "norm", "product", "recurrent") and kind in found:
            return max(found[kind], found.get("linear", 0))
        return found.get(kind)

    def codes(self, kind: str) -> bool:
        """Whether modules of this kind are converted: exact codes always are.

        >>> setting = Setting.of({"linear": 4})
        >>> setting.codes("linear"), setting.codes("norm"), setting.codes("exact")
        (True, False, True)
        """
        return kind == EXACT or self.bits_of(kind) is not None

    def raised(self, extra: int) -> Setting:
        """The setting with `extra` more bits for each kind, up to 8.

        >>> Setting.of({"linear": 4, "rest": 8}).raised(1).by_kind
        (('linear', 5), ('rest', 8))
        """
        return Setting(tuple((kind, min(MAX_BITS, bits + extra)) for kind, bits in self.by_kind), self.coding)

    @property
    def shares(self) -> bool:
        """Whether activations make one code for their own backward and for the linear layers that read them."""
        return self.bits_of("linear") is not None

    def activation_table(self, record: Activation) -> CodeTable:
        """The table of an activation."""
        return self._table(record, "activation", JOINT if self.shares else ("derivative",))

    def layer_table(self, kind: str, gate: str | Activation | None) -> CodeTable:
        """The table of a layer of a kind: that of its gate's activation if it has a gate, or else a table of values."""
        return self._table(gate or "identity", kind, JOINT if gate else ("value",))

    def _table(self, record: Activation | str, kind: str, channels: tuple[str, ...]) -> CodeTable:
        bits = self.bits_of(kind)
        assert bits is not None, "asked for kinds that are coded"
        return load_table(record, bits, coding=self.coding, channels=channels)

    def __str__(self) -> str:
        """The text of the arguments in a call.

        >>> print(Setting.of(4), Setting.of({"norm": 5}), Setting.of(2, "uniform"))
        bits=4 bits={'norm': 5} bits=2, coding='uniform'
        """
        found = dict(self.by_kind)
        one = found.get("activation", 0)
        bits = f"bits={one if one and Setting.of(one).by_kind == self.by_kind else found}"
        return bits if self.coding is None else f"{bits}, coding={self.coding!r}"


def parse_bits(text: str) -> Bits:
    """The bits that a text of the command line means. DesignError for anything else.

    >>> parse_bits("4"), parse_bits("activation=3,linear=4")
    (4, {'activation': 3, 'linear': 4})
    """
    if "=" not in text:
        return _number(text, text)
    parts = [part.partition("=") for part in text.split(",")]
    return {kind.strip(): _number(number, text) for kind, _, number in parts}


def _number(number: str, text: str) -> int:
    try:
        return int(number)
    except ValueError:
        raise DesignError(f"bits must be a number such as 4, or activation=3,linear=4; got {text!r}") from None


def _check_kind(kind: Any) -> None:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind).lower(), KINDS, n=1)
        hint = f"did you mean {near[0]!r}? The kinds are" if near else "the kinds are"
        raise DesignError(f"bits has an unknown kind {kind!r}; {hint} {', '.join(KINDS)}")


def _checked(number: Any, given: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 1 <= number <= MAX_BITS:
        raise DesignError(
            f"bits must be an integer from 1 to {MAX_BITS}, for every kind, or a mapping from kind to such an integer, as in "
            f"bits={{'activation': 3, 'linear': 4}}; got {given!r}"
        )
    return int(number)
