"""Gated units, f(gate) * up, that keep codes of gate and up, and not their product.

Backward reads f(gate), f'(gate) and up: one joint code of gate carries two of them, a code of up the third; the product that
the next layer reads is made anew from both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Layout
from fewbit.autograd.quantize import Quantizer, at_least_float32, encode, narrowed, scaled, times, values
from fewbit.autograd.sharing import Recipe, attach
from fewbit.kernels import DeviceTable
from fewbit.torch_internals import not_a_view

Tensor = torch.Tensor


def coded_gate(
    gate: Tensor,
    up: Tensor,
    derivative: DeviceTable,
    value: DeviceTable,
    normal: DeviceTable,
    *,
    exact: Callable[[Tensor, Tensor], Tensor],
    channel: int = -1,
    stochastic: bool = False,
) -> Tensor:
    """exact(gate, up) = f(gate) * up, with codes of both for backward and for the coded layers that read the result.

    gate, up           (*) floating-point, of one dtype, and of one shape or broadcast to it
    derivative, value  one joint code of gate, with the levels of f' and of f
    normal             of a standard normal number, for codes of up, standardized by channel and scaled by row
    channel            the dimension of the channels
    stochastic         as in `fewbit.autograd.quantize.Quantizer`, for up
    """
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    of_up = scaled(up.detach(), Quantizer(normal, stochastic), channel)
    y, _, packed, layout = _CodedGate.apply(gate, up, of_up, (derivative, value), exact)  # type: ignore[misc]

    rebuild_up = of_up.rebuild

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        wide = at_least_float32(dtype)
        return narrowed(values(kept[0], layout, wide, value).mul_(rebuild_up(kept[1:], wide)), dtype)

    return attach(y, Recipe((packed, *of_up.kept), rebuild))


class _CodedGate(torch.autograd.Function):
    """Its second output is the anchor of `differentiable_once`; then come the codes of gate and their layout."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        of_up: Recipe,
        tables: tuple[DeviceTable, DeviceTable],
        exact: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Layout]:
        layout = Layout.of(gate)
        packed, anchor = encode(layout.flatten(gate), tables[0]), gate.new_empty(0)
        ctx.save_for_backward(anchor, packed, *of_up.kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(packed)
        ctx.coded = tables, layout, of_up.rebuild
        return not_a_view(exact(gate, up)), anchor, packed, layout

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        anchor, packed, *kept = ctx.saved_tensors
        (derivative, value), layout, rebuild = ctx.coded
        grad_gate, grad_up, wide = None, None, grad.to(at_least_float32(grad.dtype))
        if ctx.needs_input_grad[0]:
            by_up = rebuild(kept, wide.dtype) * wide  # grad may be a batch of gradients
            grad_gate = narrowed(times(packed, by_up, derivative, layout), grad.dtype)
            grad_gate = differentiable_once(grad_gate, grad, anchor)
        if ctx.needs_input_grad[1]:
            grad_up = differentiable_once(narrowed(times(packed, wide, value, layout), grad.dtype), grad, anchor)
        return grad_gate, grad_up, None, None, None
