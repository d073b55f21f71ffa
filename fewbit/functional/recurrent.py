"""Recurrent layers and their cells: torch's operations with torch's arguments, and codes for backward.

The operations are those that torch's modules call: `torch.lstm`, `torch.gru`, `torch.rnn_tanh`, `torch.rnn_relu`, and those of
one step. If a compiler traces them, they are torch's own. torch.compile runs modules of recurrent layers outside of its graphs,
so they keep codes there as in eager code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from fewbit.autograd.quantize import Quantizer
from fewbit.autograd.recurrent import Layer, State, coded_layer, states_of
from fewbit.errors import InputError
from fewbit.functional import exact_codes
from fewbit.functional.layers import Code, layer, operation
from fewbit.functional.operation import Operation
from fewbit.kernels.recurrent import KINDS
from fewbit.torch_internals import is_fake

Tensor = torch.Tensor
Sizes = tuple[int, ...] | None
_DESCRIBED = {1: "the outputs", 2: "a pair of outputs and cells"}  # by number of states


class Stack(NamedTuple):
    """torch's operation of one or more layers, with certain options."""

    mode: str
    has_biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    def exact(self, x: Tensor, sizes: Sizes, *others: Any) -> tuple[Tensor, ...]:
        """The outputs of all steps and the states after the last one, by torch's own operation.

        sizes   sizes of the steps of packed sequences, or None
        others  the states before the first step (None for zeros), then the weights
        """
        number = KINDS[self.mode].states
        states, weights = others[:number], others[number:]
        if states[0] is None:
            states = self._zeros(x, sizes, weights)
        hx = states if number > 1 else states[0]
        options = (self.has_biases, self.layers, self.dropout, self.train, self.bidirectional)
        run: Any = getattr(torch, self.mode)
        if sizes is None:
            return run(x, hx, weights, *options, self.batch_first)
        return run(x, torch.as_tensor(sizes, device="cpu"), hx, weights, *options)

    def _zeros(self, x: Tensor, sizes: Sizes, weights: Sequence[Any]) -> list[Tensor]:
        batch = x.shape[0 if self.batch_first else 1] if sizes is None else sizes[0]
        widths = weights[1].shape[1], len(weights[1]) // 4  # cells have no projection
        return [x.new_zeros(self.layers * self.directions, batch, width) for width in widths[: KINDS[self.mode].states]]

    def coded(self, x: Tensor, sizes: Sizes, *others: Any, stochastic: bool) -> tuple[Tensor, ...]:
        """The same, layer by layer. Each layer keeps codes of inputs and outputs. The last argument is a table of values."""
        *tensors, table = others
        quantizer, number = Quantizer(table, stochastic), KINDS[self.mode].states
        states, weights = states_of(tensors[:number], quantizer), tensors[number:]
        if states is None or not self._fits(tensors[:number], weights):
            return self.exact(x, sizes, *tensors)  # torch raises its own error for what does not fit
        per_layer, behind = len(weights) // self.layers, []
        for each in range(self.layers):
            first = [state.part(each * self.directions, (each + 1) * self.directions) for state in states]
            x, *last = self._one(x, sizes, first, weights[each * per_layer : (each + 1) * per_layer], quantizer)
            behind.append(last)
            if self.train and self.dropout > 0 and each < self.layers - 1:
                x = exact_codes.dropout.quietly(x, self.dropout, True)
        return x, *(each[0] if self.layers == 1 else torch.cat(each) for each in zip(*behind, strict=True))

    def _fits(self, states: Sequence[Tensor | None], weights: Sequence[Tensor]) -> bool:
        """Whether the numbers of states and weights are those that the layers take."""
        rows = self.layers * self.directions
        return rows > 0 and len(weights) % rows == 0 and all(each is None or len(each) == rows for each in states)

    def _one(
        self, x: Tensor, sizes: Sizes, states: Sequence[State], weights: Sequence[Tensor], quantizer: Quantizer
    ) -> tuple[Tensor, ...]:
        """Run one of the layers."""
        kind = Layer(KINDS[self.mode], self.has_biases, self.bidirectional, self.batch_first, sizes=sizes)
        exact = partial(self._replace(layers=1, dropout=0.0).exact, x, sizes, *(each.tensor for each in states), *weights)
        return coded_layer(x, states, weights, exact, kind, quantizer)


class OneStep(NamedTuple):
    """torch's operation of one step."""

    mode: str

    def exact(self, x: Tensor, *others: Any) -> Any:
        """The new states, or the new state, by torch's own operation. others: as in `Stack.exact`, the biases last."""
        number = KINDS[self.mode].states
        hx: Any = [x.new_zeros(len(x), others[-3].shape[1]) if each is None else each for each in others[:number]]
        return getattr(torch, f"{self.mode}_cell")(x, hx if number > 1 else hx[0], *others[number:])

    def coded(self, x: Tensor, *others: Any, stochastic: bool) -> Any:
        """The same with codes for backward. The last argument is a table of values."""
        *tensors, table = others
        quantizer, number = Quantizer(table, stochastic), KINDS[self.mode].states
        states, weights = states_of(tensors[:number], quantizer), [each for each in tensors[number:] if each is not None]
        if states is None or len(weights) == 3:  # only one of the two biases is given
            return self.exact(x, *tensors)
        kind = Layer(KINDS[self.mode], len(weights) > 2, is_cell=True)

        def exact() -> tuple[Tensor, ...]:
            made = self.exact(x, *tensors)
            return made if number > 1 else (made,)

        found = coded_layer(x, states, weights, exact, kind, quantizer)
        return found if number > 1 else found[0]


def _stack(rounding: str, *options: Any) -> Operation:
    stack = Stack(*options)
    return operation(stack.mode, rounding, stack.exact, stack.coded)


def _cell(rounding: str, mode: str) -> Operation:
    cell = OneStep(mode)
    return operation(f"{mode}_cell", rounding, cell.exact, cell.coded)


def _states_of(mode: str, hx: Any) -> tuple[Tensor | None, ...]:
    """The states before the first step (None for zeros) from torch's argument. InputError if their number is wrong."""
    number = KINDS[mode].states
    if hx is None:
        return (None,) * number
    found = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if len(found) != number or (number == 1) != isinstance(hx, Tensor):
        wanted = "a tensor, the outputs" if number == 1 else "a pair of tensors, outputs and cells,"
        raise InputError(
            f"{mode} takes as hx {wanted} before the first step, or None for zeros; got {type(hx).__name__} of {len(found)}"
        )
    return found


def _of_layers(mode: str) -> Any:
    def recurrent(
        code: Code,
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        sizes, options = None, (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        if not isinstance(has_biases, bool | int):  # the other form: sizes come second, and the last argument is missing
            sizes, hx, params, options = hx, params, has_biases, (*options[1:], False)
        hx, stack = _states_of(mode, hx), Stack(mode, *options)
        if torch.compiler.is_compiling() or (sizes is not None and is_fake(sizes)):
            return stack.exact(input, sizes, *hx, *params)
        return code.run(_stack, stack, (input, None if sizes is None else tuple(sizes.tolist()), *hx, *params))

    recurrent.__name__ = recurrent.__qualname__ = mode
    recurrent.__doc__ = (
        f"torch.{mode}. Backward uses codes of each layer's inputs and outputs. Nothing else is kept.\n\n"
        "    input          (steps, batch, in), or (batch, steps, in) if batch_first; float16, bfloat16, float32 or float64\n"
        f"    hx             {_DESCRIBED[KINDS[mode].states]} before the first step, (layers * directions, batch, out) each;\n"
        "                   None for zeros\n"
        "    params         the weights, as torch.nn lists them; has_biases: whether biases are among them\n"
        "    num_layers … batch_first   as torch.nn's modules have them; train: whether there is a dropout between layers\n"
        "    Returns        the outputs of all steps, (steps, batch, directions * out), and each state after the last step\n\n"
        "    Packed sequences have torch's arguments: (data, batch_sizes, hx, params, has_biases, num_layers, dropout,\n"
        "    train, bidirectional), with data (rows, in). Backward takes one gradient at a time; is_grads_batched=True\n"
        "    raises InputError.\n"
    )
    return layer("recurrent")(recurrent)


def _of_a_cell(mode: str) -> Any:
    def cell(
        code: Code,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        hx = _states_of(mode, hx)
        operands = input, *hx, w_ih, w_hh, b_ih, b_hh
        if torch.compiler.is_compiling():
            return OneStep(mode).exact(*operands)
        return code.run(_cell, (mode,), operands)

    cell.__name__ = cell.__qualname__ = f"{mode}_cell"
    cell.__doc__ = (
        f"torch.{mode}_cell. Backward uses codes of its inputs. Nothing else is kept.\n\n"
        "    input    (batch, in); float16, bfloat16, float32 or float64\n"
        f"    hx       {_DESCRIBED[KINDS[mode].states]} before the step, (batch, hidden) each; None for zeros\n"
        "    w_ih     (gates * hidden, in), w_hh (gates * hidden, hidden), b_ih and b_hh (gates * hidden,) or None\n"
        "    Returns  the same after the step\n"
    )
    return layer("recurrent")(cell)


lstm, gru, rnn_tanh, rnn_relu = map(_of_layers, KINDS)
lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell = map(_of_a_cell, KINDS)
