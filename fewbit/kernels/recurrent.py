"""Backward of recurrent layers, from their inputs and outputs.

The outputs of all steps are known, so one product gives all gates. Only the cells of an LSTM need a scan. The gradients of
pre-activations are gradients of outputs and cells times factors. The factors are computed for all steps at once. Only the
products with these factors and with the recurrent weights are computed step by step.

Rows are ordered step by step, and within a step from the longest sequence to the shortest, as in
`torch.nn.utils.rnn.PackedSequence`. All tensors have one dtype, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fewbit.kernels.steps import Steps, grown
from fewbit.torch_internals import is_watched

Tensor = torch.Tensor
aten = torch.ops.aten  # sigmoid_backward(g, y) is g y (1 - y), tanh_backward(g, y) is g (1 - y²)


class Weights(NamedTuple):
    """The weights of one direction of one layer, with torch's names. hr (out, hidden) projects the outputs of an LSTM."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], has_biases: bool) -> Weights:
        """From a list of weights in torch's order."""
        ih, hh, *others = tensors
        b_ih, b_hh = others[:2] if has_biases else (None, None)
        return cls(ih, hh, b_ih, b_hh, *others[2 * has_biases :])

    def listed(self) -> list[Tensor]:
        """The weights in torch's order."""
        return [each for each in self if each is not None]


class Found(NamedTuple):
    """Gradients for one direction, and the parts from which the gradients of its weights are computed.

    gates        (rows, gates * hidden): gradients with respect to ih x + b_ih
    recurrent    (rows, gates * hidden): gradients with respect to hh h + b_hh
    before       (rows, out): the outputs of the previous step
    states       gradients of the states before the first step: outputs (sequences, out), cells (sequences, hidden)
    outputs      (rows, out): gradients of the outputs, including those from later steps; None without a projection
    unprojected  (rows, hidden): the outputs before their projection; None without one
    """

    gates: Tensor
    recurrent: Tensor
    before: Tensor
    states: list[Tensor]
    outputs: Tensor | None = None
    unprojected: Tensor | None = None

    def weights(self, x: Tensor, like: Weights) -> Weights:
        """Gradients of the weights, for an input x (rows, in)."""
        return Weights(
            self.gates.t() @ x,
            self.recurrent.t() @ self.before,
            None if like.b_ih is None else self.gates.sum(0),
            None if like.b_hh is None else self.recurrent.sum(0),  # a separate tensor, because gradients are changed in place
            None if self.outputs is None or self.unprojected is None else self.outputs.t() @ self.unprojected,
        )


class Recurrence:
    """A kind of recurrent layer.

    states         number of its states: outputs, and for an LSTM also cells
    kept_by_torch  least number of elements that torch's own operation keeps per output element, besides the input
    keeps_signs    whether backward has to know exactly which outputs are positive
    """

    states: ClassVar[int] = 1
    kept_by_torch: ClassVar[int] = 1

    @property
    def keeps_signs(self) -> bool:
        return False

    def backward(
        self,
        x: Tensor,
        y: Tensor | None,
        states: Sequence[Tensor],
        weights: Weights,
        grads: Sequence[Tensor | None],
        steps: Steps,
    ) -> Found:
        """Gradients for one direction, from gradients of its outputs and of its last states, at an input x (rows, in).

        y       (rows, out): the outputs; None for a single step whose signs are not needed
        states  states before the first step
        grads   gradients of y and of the states after the last step; None for zeros
        """
        raise NotImplementedError


class LSTM(Recurrence):
    """Hochreiter and Schmidhuber, "Long short-term memory", 1997, with the forget gates of Gers et al., 2000.

    Each gate has a quarter of a = ih x + b_ih + hh h + b_hh: i = σ(a_i), f = σ(a_f), g = tanh(a_g), o = σ(a_o). The cells
    become c' = f c + i g, and the outputs o tanh(c'), or hr (o tanh(c')) with a projection.
    """

    states, kept_by_torch = 2, 6

    def backward(self, x, y, states, weights, grads, steps) -> Found:
        before = steps.before(states[0], y)
        gates = _product(x, weights.ih, weights.b_ih).addmm_(before, weights.hh.t())
        gates = gates if weights.b_hh is None else gates.add_(weights.b_hh)
        found = _lstm_backend(gates)(gates, states, weights.hh, weights.hr, grads, steps)
        return Found(gates, gates, before, *found)


def lstm_back_through_time(
    gates: Tensor,
    first: Sequence[Tensor],
    recurrent: Tensor,
    projection: Tensor | None,
    grads: Sequence[Tensor | None],
    steps: Steps,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The last three entries of `Found`, from the pre-activations of an LSTM's gates (rows, 4 * hidden).

    gates  overwritten with the gradients of the pre-activations; the other arguments are as in `_propagate`
    """
    of_each = gates.view(len(gates), 4, -1)
    of_each[:, :2].sigmoid_()
    of_each[:, 2].tanh_()
    of_each[:, 3].sigmoid_()
    i, f, g, o = of_each.unbind(1)
    cells = _scan(f, i * g, first[1], steps)
    t = cells.tanh()
    of_i, of_f = aten.sigmoid_backward(g, i), aten.sigmoid_backward(steps.before(first[1], cells), f)
    of_g, of_o = aten.tanh_backward(i, g), aten.sigmoid_backward(t, o)
    unprojected = None if projection is None else o * t
    through = _Factors(torch.cat([of_i, of_f, of_g, of_o], 1), into_cells=aten.tanh_backward(o, t), decay=f)
    found, outputs = _propagate(through, recurrent, projection, grads, first, steps)
    gates.copy_(through.gates)
    return found, outputs, unprojected


def _lstm_backend(gates: Tensor) -> Callable[..., Any]:
    if type(gates) is Tensor and gates.device.type == "cpu" and not is_watched(gates):
        from fewbit.kernels.recurrent_cpu import back_through_time  # imported here because it loads numba

        return back_through_time
    return lstm_back_through_time


class GRU(Recurrence):
    """Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014. r is applied after the product, as in
    torch.

    Each gate has a third of a = ih x + b_ih and b = hh h + b_hh: r = σ(a_r + b_r), z = σ(a_z + b_z), n = tanh(a_n + r b_n). The
    outputs are n + z (h - n).
    """

    kept_by_torch = 6

    def backward(self, x, y, states, weights, grads, steps) -> Found:
        before = steps.before(states[0], y)
        of_x = _product(x, weights.ih, weights.b_ih).view(len(x), 3, -1)
        of_h = _product(before, weights.hh, weights.b_hh).view(len(x), 3, -1)
        r, z = of_x[:, :2].add_(of_h[:, :2]).sigmoid_().unbind(1)
        inner = of_h[:, 2]
        n = of_x[:, 2].addcmul_(r, inner).tanh_()
        # columns: gradients of r, z and n for the recurrent weights, then that of n for the input weights
        of_n = aten.tanh_backward(1 - z, n)
        of_r, of_z = aten.sigmoid_backward(of_n * inner, r), aten.sigmoid_backward(before - n, z)
        through = _Factors(torch.cat([of_r, of_z, of_n * r, of_n], 1), carried=z)
        found, _ = _propagate(through, weights.hh, None, grads, states, steps)
        gates, hidden = through.gates, z.shape[1]
        return Found(torch.cat([gates[:, : 2 * hidden], gates[:, 3 * hidden :]], 1), gates[:, : 3 * hidden], before, found)


@dataclass(frozen=True)
class RNN(Recurrence):
    """Elman, "Finding structure in time", 1990: the outputs are tanh(ih x + b_ih + hh h + b_hh), or relu of the same."""

    relu: bool

    @property
    def keeps_signs(self) -> bool:
        return self.relu

    def backward(self, x, y, states, weights, grads, steps) -> Found:
        before = steps.before(states[0], y)
        if self.relu:
            assert y is not None, "its signs are kept"
            through = _Factors((y > 0).to(y.dtype))
        else:
            a = _product(x, weights.ih, weights.b_ih).add_(_product(before, weights.hh, weights.b_hh))
            through = _Factors(1 - a.tanh_().square_())
        found, _ = _propagate(through, weights.hh, None, grads, states, steps)
        return Found(through.gates, through.gates, before, found)


KINDS: dict[str, Recurrence] = {"lstm": LSTM(), "gru": GRU(), "rnn_tanh": RNN(relu=False), "rnn_relu": RNN(relu=True)}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _scan(decay: Tensor, new: Tensor, first: Tensor, steps: Steps) -> Tensor:
    """c' = decay c + new for all steps: (rows, n), (rows, n), first (sequences, n) -> (rows, n). Overwrites new."""
    decays, values, state = decay.split(steps.sizes), new.split(steps.sizes), first
    for step in steps.order():
        state = values[step].addcmul_(decays[step], grown(state, first, steps.sizes[step]))
    return new


class _Factors(NamedTuple):
    """Factors of gradients. Let h be the gradient of a row's outputs before a projection, and c that of its cells.

    gates       (rows, gates * hidden): times h this is the gradient of the pre-activations, which overwrites it. With cells the
                last gate is multiplied by h, and all others by c.
    carried     (rows, hidden): times h this is a part of the gradient of the outputs one step earlier; None for zeros
    into_cells  (rows, hidden): times h this is added to c; None without cells
    decay       (rows, hidden): times c this is the gradient of the cells one step earlier
    """

    gates: Tensor
    carried: Tensor | None = None
    into_cells: Tensor | None = None
    decay: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[_Factors]:
        """The factors of each step."""
        parts = [[None] * len(sizes) if each is None else each.split(sizes) for each in self]
        return [_Factors(*each) for each in zip(*parts, strict=True)]  # type: ignore[arg-type]


def _propagate(
    factors: _Factors,
    recurrent: Tensor,
    projection: Tensor | None,
    grads: Sequence[Tensor | None],
    first: Sequence[Tensor],
    steps: Steps,
) -> tuple[list[Tensor], Tensor | None]:
    """Go back through time. Gives the gradients of the first states and, with a projection, of the outputs (rows, out).

    recurrent   (seen, out): the weights for the first `seen` columns of the factors' gates
    projection  (out, hidden), of outputs; or None
    grads       as in `Recurrence.backward`
    first       states, of which only the shapes are used
    """
    grad_y, *last = grads
    states = [torch.zeros_like(like) if grad is None else grad.clone() for grad, like in zip(last, first, strict=True)]
    h, c = states[0], states[-1]  # without cells c is h and is not used
    incoming = None if grad_y is None else grad_y.split(steps.sizes)
    outputs = None if projection is None else factors.gates.new_empty(len(factors.gates), len(projection))
    kept, parts, seen = None if outputs is None else outputs.split(steps.sizes), factors.split(steps.sizes), len(recurrent)
    for step in reversed(steps.order()):
        size, part = steps.sizes[step], parts[step]
        now = h[:size] if incoming is None else h[:size] + incoming[step]
        if kept is not None and projection is not None:
            now = kept[step].copy_(now) @ projection
        gates = part.gates.view(size, -1, now.shape[1])
        if part.into_cells is None or part.decay is None:
            gates.mul_(now.unsqueeze(1))
        else:
            cell = c[:size].addcmul_(now, part.into_cells)
            gates[:, -1].mul_(now)
            gates[:, :-1].mul_(cell.unsqueeze(1))
            cell.mul_(part.decay)
        carried = None if part.carried is None else now * part.carried
        torch.mm(part.gates[:, :seen], recurrent, out=h[:size])
        if carried is not None:
            h[:size].add_(carried)
    return states, outputs
