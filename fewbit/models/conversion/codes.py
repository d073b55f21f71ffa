"""Which codes `bits`, `inputs` and `coding` mean, for `convert` and `patch` alike.

bits    of the codes of activations
inputs  bits of the codes of what weights and norms read; None leaves these exact. Activations then share one code with the
        layers that read them, of the larger of both numbers of bits.
coding  of the tables, None for the optimal one
"""

from __future__ import annotations

from fewbit.coders import JOINT
from fewbit.constants import CODINGS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError
from fewbit.record import Activation
from fewbit.store import load_table


def check(bits: int, inputs: int | None, coding: str | None) -> None:
    """Raise DesignError for numbers of bits other than 1 to 8, or an unknown coding."""
    check_bits(bits, DesignError)
    if inputs is not None:
        try:
            check_bits(inputs, DesignError)
        except DesignError as error:
            raise DesignError(f"inputs: {error}, or None for none") from None
    if coding is not None and coding not in CODINGS:
        raise DesignError(f"coding must be one of {CODINGS}, got {coding!r}")


def activation_bits(bits: int, inputs: int | None) -> int:
    """Of an activation's code.

    >>> activation_bits(3, None), activation_bits(3, 4), activation_bits(5, 4)
    (3, 4, 5)
    """
    return max(bits, inputs or 0)


def activation_table(record: Activation, bits: int, inputs: int | None, coding: str | None) -> CodeTable:
    """The table of an activation."""
    channels = ("derivative",) if inputs is None else JOINT
    return load_table(record, activation_bits(bits, inputs), coding=coding, channels=channels)


def layer_table(gate: str | None, inputs: int, coding: str | None) -> CodeTable:
    """The table of a layer: of the activation of its gate, where it has one, or of values."""
    return load_table(gate or "identity", inputs, coding=coding, channels=JOINT if gate else ("value",))
