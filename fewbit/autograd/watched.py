"""The coded activation for watched code: under a compiler, a functorch transform, or a mode that sees each operation.

In plain eager code `fewbit.autograd.activation` takes half the time. But its old-style Function fails under functorch, and its
kernels would be missing from a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit import torch_internals
from fewbit.autograd.layout import Layout
from fewbit.errors import InputError
from fewbit.kernels import DeviceTable, ops

Tensor = torch.Tensor


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device. False for devices without autocast, such as meta."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """The dtype in which autocast runs operations of lower precision; None if it leaves the tensors' dtype. A Function asks
    this, because autocast does not affect the operations inside it."""
    if not is_autocast(x) or any(each is not None and each.dtype == torch.float64 for each in (x, *others)):
        return None
    return torch.get_autocast_dtype(x.device.type)


def check_no_tangent(x: Tensor, name: str) -> None:
    """Raise InputError if x takes part in forward-mode differentiation, by `torch.func.jvp` or `torch.autograd.forward_ad`."""
    if torch_internals.in_forward_mode() and torch_internals.has_tangent(x):  # jvp opens a level too
        raise InputError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual tensors): its codes serve backward alone; "
            "take gradients with grad, vjp or jacrev, or call torch's own operation"
        )


def activation(x: Tensor, forward: Callable[[Tensor], Tensor], table: DeviceTable) -> tuple[Tensor, Tensor]:
    """forward(x) and the packed codes of x. Every reverse-mode transform can differentiate it."""
    return _Activation.apply(x, x.reshape(-1)[:0].clone(), forward, *ops.constants(table), table.bits)  # type: ignore[return-value]


def encode(x: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.encode` for (n,), as an operator."""
    return torch.ops.fewbit.encode(x, *ops.constants(table), table.bits)


def decode(packed: Tensor, grad: Tensor, table: DeviceTable) -> Tensor:
    """`fewbit.kernels.decode` for (n,), as an operator."""
    return torch.ops.fewbit.decode(packed, grad, *ops.constants(table), table.bits)


class _Activation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, anchor, forward, thresholds, codes, levels, bits):
        packed = torch.ops.fewbit.encode(Layout.of(x).flatten(x), thresholds, codes, levels, bits)
        return torch_internals.not_a_view(forward(x)), packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, anchor, _, *tensors, bits = inputs
        _, packed = output
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, anchor, *tensors)
        ctx.layout, ctx.dtype, ctx.bits = Layout.of(x), x.dtype, bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        if grad is None:
            return (None,) * 7
        packed, anchor, *tensors = ctx.saved_tensors
        product = _Product.apply(ctx.layout.flatten(grad), anchor, packed, *tensors, ctx.bits)
        return ctx.layout.unflatten(product).to(ctx.dtype), None, None, None, None, None, None


class _Product(torch.autograd.Function):
    """The gradient from codes. It cannot be differentiated again. The empty `anchor` ties it to x's graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, anchor, packed, thresholds, codes, levels, bits):
        return torch.ops.fewbit.decode(packed, grad, thresholds, codes, levels, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        ops.refuse_second_derivative()
