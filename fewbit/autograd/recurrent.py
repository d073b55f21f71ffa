"""Recurrent layers that keep codes of their inputs and outputs, and nothing of gates and cells.

Backward rebuilds the input and the outputs of all steps from codes. One product of these then gives all gates. Errors do not
accumulate from step to step, because each step starts from the code of the exact output before it. Layers that read the output
(the next layer, a linear layer) keep the same codes.

A cell module takes one step. It keeps codes of its input, of the previous output and of the previous cell state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.quantize import Quantizer, at_least_float32, nan_if_not_finite, recipe_of, scaled
from fewbit.autograd.rest import as_bits
from fewbit.autograd.sharing import Recipe, as_it_is, attach
from fewbit.errors import InputError
from fewbit.kernels.recurrent import Recurrence, Weights
from fewbit.kernels.steps import Steps
from fewbit.torch_internals import EagerFunction, is_legacy_batch, not_a_view, without_graph

Tensor = torch.Tensor


class Layer(NamedTuple):
    """One recurrent layer, or a cell of one.

    recurrence     its kind
    has_biases     whether its weights include biases
    bidirectional  whether it also takes the steps backwards, with separate weights
    batch_first    whether tensors are (batch, steps, n) instead of (steps, batch, n)
    is_cell        whether it takes one step, of tensors (batch, n)
    sizes          for packed sequences (rows, n), the number of sequences in each step; None if all have the same length
    """

    recurrence: Recurrence
    has_biases: bool
    bidirectional: bool = False
    batch_first: bool = False
    is_cell: bool = False
    sizes: tuple[int, ...] | None = None

    def steps(self, x: Tensor) -> list[Steps]:
        """The steps of each direction for an input x."""
        sizes = self.sizes
        if self.is_cell:
            sizes = (len(x),)
        elif sizes is None:
            batch, steps = x.shape[:2] if self.batch_first else x.shape[1::-1]
            sizes = (batch,) * steps
        return [Steps(sizes, backwards) for backwards in (False, True)[: 1 + self.bidirectional]]

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as (rows, n), one step after another."""
        return (tensor.transpose(0, 1) if self.batch_first else tensor).reshape(-1, tensor.shape[-1])

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of that shape from its rows (rows, n), without a copy."""
        if self.batch_first:
            return rows.view(shape[1], shape[0], shape[2]).transpose(0, 1)
        return rows.view(shape)


class State(NamedTuple):
    """Outputs or cell states before the first step, (directions, batch, n), and what to keep of them. For cell modules the
    shape is (batch, n). Both are None for zeros."""

    tensor: Tensor | None = None
    recipe: Recipe | None = None

    def part(self, begin: int, end: int) -> State:
        """The states of one layer, from the states of all layers."""
        if self.tensor is None or self.recipe is None or end - begin == len(self.tensor):
            return self
        rebuild = self.recipe.rebuild
        return State(self.tensor[begin:end], Recipe(self.recipe.kept, lambda kept, dtype: rebuild(kept, dtype)[begin:end]))


def states_of(tensors: Sequence[Tensor | None], quantizer: Quantizer) -> list[State] | None:
    """The states for tensors, where None stands for zeros. The result is None if a tensor is seen not to be finite."""
    recipes = [None if each is None else recipe_of(each, quantizer, _by_last) for each in tensors]
    if any(tensor is not None and recipe is None for tensor, recipe in zip(tensors, recipes, strict=True)):
        return None
    return [State(*each) for each in zip(tensors, recipes, strict=True)]


def coded_layer(
    x: Tensor,
    states: Sequence[State],
    weights: Sequence[Tensor],
    exact: Callable[[], tuple[Tensor, ...]],
    layer: Layer,
    quantizer: Quantizer,
) -> tuple[Tensor, ...]:
    """exact(), differentiated at the tensors that codes of x, states and outputs give.

    It is torch's own if x or an output is seen not to be finite, or if torch keeps less because weights are frozen.

    x        input in the layer's form
    weights  weights of each direction, as torch lists them
    exact    torch's operation; gives the outputs and the states after the last step, or for a cell only the states
    """
    of_x = recipe_of(x, quantizer, _by_last)
    if of_x is not None and of_x.hides and nan_if_not_finite(x.detach(), -1) is not None:
        of_x = _by_last(x.detach(), quantizer)
    if of_x is None or _keeps_more(of_x, x, weights, layer, quantizer.table.bits):
        return exact()
    with without_graph():
        made = exact()
    of_y = None if layer.is_cell else recipe_of(made[0], quantizer, _by_last, is_own=True)
    if of_y is None and not layer.is_cell:
        return exact()
    if of_y is not None and of_y.is_exact:  # a small output is kept itself; a copy survives in-place changes of the output
        of_y = as_it_is(made[0].clone())
    if layer.recurrence.keeps_signs:
        of_y = _with_signs(made[0], of_y)
    recipes, tensors = [of_x, of_y, *(each.recipe for each in states)], [each.tensor for each in states]
    *found, _ = _CodedRecurrent.apply(tuple(made), recipes, layer, x, *tensors, *weights)  # type: ignore[misc]
    if of_y is not None and not of_y.is_exact and not layer.is_cell:
        attach(found[0], of_y)
    return tuple(found)


def _keeps_more(of_x: Recipe, x: Tensor, weights: Sequence[Tensor], layer: Layer, bits: int) -> bool:
    """Whether codes take more than torch keeps. This may be so if the weights of the input are frozen: torch then keeps no
    input."""
    if weights[0].requires_grad:
        return False
    rows, width = x.numel() // x.shape[-1], weights[1].shape[1] * (1 + layer.bidirectional)
    states = layer.recurrence.states * rows * width * x.element_size()  # an upper bound
    own = states if layer.is_cell else rows * width * (bits + 1) // 8 + 4 * rows + 8 * width
    kept = sum(tensor.nbytes for tensor in of_x.kept) + own
    return kept > layer.recurrence.kept_by_torch * rows * width * x.element_size()


def _with_signs(y: Tensor, recipe: Recipe | None) -> Recipe:
    """The recipe of outputs y >= 0 that rebuilds zeros as zeros and all others as positive numbers. Without a given recipe it
    rebuilds only signs."""
    if recipe is not None and recipe.is_exact:
        return recipe
    signs = as_bits(y > 0)
    rebuild_all, rebuild_signs = recipe and recipe.rebuild, signs.rebuild

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        *of_values, of_signs = kept
        positive = rebuild_signs([of_signs], dtype).to(dtype)
        if rebuild_all is None:
            return positive
        return rebuild_all(of_values, dtype).clamp_min_(torch.finfo(dtype).tiny).mul_(positive)

    return Recipe((*(recipe.kept if recipe else ()), *signs.kept), rebuild)


def _by_last(x: Tensor, quantizer: Quantizer) -> Recipe | None:
    return scaled(x, quantizer, -1)


class _CodedRecurrent(EagerFunction):
    """The last output is the anchor of `differentiable_once`."""

    @staticmethod
    def forward(
        ctx: Any,
        made: tuple[Tensor, ...],
        recipes: Sequence[Recipe | None],
        layer: Layer,
        x: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        anchor, weights = x.new_empty(0), others[layer.recurrence.states :]
        ctx.save_for_backward(anchor, *weights, *(tensor for each in recipes if each is not None for tensor in each.kept))
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.weights = layer, len(weights)
        ctx.parts = [(None, 0) if each is None else (each.rebuild, len(each.kept)) for each in recipes]
        ctx.given = [(None, None) if each is None else (each.shape, each.dtype) for each in (x, *others)]
        return *map(not_a_view, made), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [each for each in grads[:-1] if each is not None]
        if not given:
            return (None,) * (3 + len(ctx.given))
        if any(map(is_legacy_batch, given)):
            raise InputError(
                "gradients of recurrent layers from codes are taken one at a time, got a batch of them (is_grads_batched=True, "
                "or vectorize=True); take them one by one, or within `with fewbit.exact():` around the forward pass"
            )
        anchor, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.weights], saved[ctx.weights :]
        with torch.no_grad():  # much is computed in place; the loop below ties the results to the graph
            wide, rebuilt = at_least_float32(weights[0].dtype), []
            for rebuild, number in ctx.parts:
                rebuilt.append(None if rebuild is None else rebuild(kept[:number], wide))
                kept = kept[number:]
            weights = [each.to(wide) for each in weights]
            incoming = [None if each is None else each.to(wide) for each in grads[:-1]]
            found = _backward(ctx.layer, rebuilt, weights, incoming, ctx.needs_input_grad[3:])
        results: list[Tensor | None] = []
        for each, (shape, dtype), needs in zip(found, ctx.given, ctx.needs_input_grad[3:], strict=True):
            if each is None or not needs:
                results.append(None)
                continue
            each = each.reshape(shape).to(dtype)
            for grad in given:
                each = differentiable_once(each, grad, anchor)
            results.append(each)
        return *(None,) * 3, *results


def _backward(
    layer: Layer,
    rebuilt: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, of the states before the first step, and of the weights. All tensors have one dtype.

    rebuilt  x, the outputs (None for most cells), and the states (None for zeros)
    grads    gradients of the outputs of torch's operation
    needed   which gradients are needed; the others may be None
    """
    x, y, *states = rebuilt
    assert x is not None, "it is what the layer reads"
    directions, rows, outputs = layer.steps(x), layer.rows(x), None if y is None else layer.rows(y)
    grad_y = None if grads[0] is None else layer.rows(grads[0])
    last = [None, *grads[1:]] if layer.is_cell else grads[1:]
    of_x, of_states, of_weights, number = None, [], [], len(weights) // len(directions)
    for d, steps in enumerate(directions):
        own = Weights.of(weights[d * number : (d + 1) * number], layer.has_biases)
        out = own.hh.shape[1]
        first = [
            x.new_zeros(steps.sizes[0], width) if state is None else _of_direction(state, d)
            for state, width in zip(states, (out, len(own.hh) // 4), strict=False)
        ]
        place = slice(d * out, (d + 1) * out)
        incoming = [
            None if grad_y is None else grad_y[:, place],
            *(grad if grad is None else _of_direction(grad, d) for grad in last),
        ]
        found = layer.recurrence.backward(rows, None if outputs is None else outputs[:, place], first, own, incoming, steps)
        if needed[0]:
            of_x = found.gates @ own.ih if of_x is None else of_x.addmm_(found.gates, own.ih)
        of_states.append(found.states)
        of_weights += found.weights(rows, own).listed() if any(needed[1 + len(states) :]) else [None] * number
    return [
        None if of_x is None else layer.from_rows(of_x, x.shape),
        *map(torch.stack, zip(*of_states, strict=True)),
        *of_weights,
    ]


def _of_direction(state: Tensor, number: int) -> Tensor:
    """(batch, n): the part of a state or its gradient for one direction. For a cell it is the whole tensor."""
    return state[number] if state.dim() == 3 else state
