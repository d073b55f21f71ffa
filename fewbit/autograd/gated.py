"""Gated units, f(gate) * up, that keep codes of gate and up instead of their product.

Backward reads f(gate), f'(gate) and up. One joint code of gate gives the first two, a code of up the third. Layers that read
the product compute it again from both codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbit.autograd.double_backward import differentiable_once
from fewbit.autograd.layout import Arrangement
from fewbit.autograd.quantize import Quantizer, at_least_float32, encode_checked, narrowed, of_layers, scaled, times, values
from fewbit.autograd.sharing import Recipe, attach
from fewbit.kernels import DeviceTable
from fewbit.kernels.layers import Codes, Vectors
from fewbit.torch_internals import EagerFunction, not_a_view

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
    derivative, value  tables of one joint code of gate, with the levels of f' and of f
    normal             table of a standard normal number, for codes of up, which are standardized by channel and scaled by row
    channel            the dimension of the channels
    stochastic         as in `fewbit.autograd.quantize.Quantizer`, for up
    """
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    of_up = scaled(up.detach(), Quantizer(normal, stochastic), channel, marks=False)
    arrangement = Arrangement.of(up, channel % up.dim())
    packed, finite = encode_checked(arrangement.layout.flatten(gate.detach()), derivative)
    if of_up is None or not finite:
        return exact(gate, up)
    codes = _Codes(arrangement, (derivative, value, normal), of_up)
    kept = packed, *of_up.kept
    y, _ = _CodedGate.apply(gate, up, kept, codes, exact)  # type: ignore[misc]
    return attach(y, Recipe(kept, codes.product, hides=True))


class _Codes:
    """Computes the product and the gradients from the codes of gate and up, which are kept as (packed, *up's recipe.kept)."""

    def __init__(self, arrangement: Arrangement, tables: tuple[DeviceTable, DeviceTable, DeviceTable], of_up: Recipe):
        self.arrangement, self.tables = arrangement, tables
        self.up = of_up._replace(kept=())  # it holds no tensors, so saved-tensor hooks may free them

    def product(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """f(gate) * up."""
        (layout, grid), (_, value, normal) = self.arrangement, self.tables
        packed, *of_up = kept
        if not self.up.is_exact:
            packed_up, row, vectors = of_up
            codes = Codes(packed_up, grid, vectors, Vectors(), row, None, normal)
            return layout.unflatten(of_layers(packed).gate_value(codes, packed, value, dtype))
        wide = at_least_float32(dtype)
        return narrowed(values(packed, layout, wide, value).mul_(self.up.rebuild(of_up, wide)), dtype)

    def backward(self, kept: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        (layout, grid), (derivative, value, normal) = self.arrangement, self.tables
        packed, *of_up = kept
        if not self.up.is_exact:
            packed_up, row, vectors = of_up
            given = grad.permute(layout.order).reshape(grid[:3])
            codes = Codes(packed_up, grid, vectors, Vectors(), row, None, normal)
            found = of_layers(grad).gate_backward(codes, packed, given, derivative, value)
            return layout.unflatten(found[0]), layout.unflatten(found[1])
        wide = grad.to(at_least_float32(grad.dtype))
        by_up = self.up.rebuild(of_up, wide.dtype) * wide  # grad may be a batch of gradients
        found = times(packed, by_up, derivative, layout), times(packed, wide, value, layout)
        return narrowed(found[0], grad.dtype), narrowed(found[1], grad.dtype)


class _CodedGate(EagerFunction):
    """The second output is the anchor of `differentiable_once`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        kept: tuple[Tensor, ...],
        codes: _Codes,
        exact: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        anchor = gate.new_empty(0)
        ctx.save_for_backward(anchor, *kept)
        ctx.set_materialize_grads(False)
        ctx.codes = codes
        return not_a_view(exact(gate, up)), anchor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        anchor, *kept = ctx.saved_tensors
        found = zip(ctx.codes.backward(kept, grad), ctx.needs_input_grad, strict=False)
        return *(differentiable_once(each, grad, anchor) if needed else None for each, needed in found), None, None, None
