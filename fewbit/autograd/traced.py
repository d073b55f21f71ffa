"""The coded activation where something looks on: a compiler, a functorch transform, or a mode that sees each operation.

In plain eager code `fewbit.autograd.activation` takes half the time. Its Function in the old style fails under functorch, and
its kernels would disappear from a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from fewbit.errors import InputError
from fewbit.kernels import Coder, ops

Tensor = torch.Tensor
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]  no public name tells which transforms are active


def is_watched(x: Tensor) -> bool:
    """Whether a compiler, a functorch transform or a dispatch mode (fake tensors, a tracer, a counter) is active, or x is a
    batch of the older vmap behind `is_grads_batched` and `jacobian(vectorize=True)`."""
    return (
        torch.compiler.is_compiling()
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.is_legacy_batchedtensor(x)
    )


def wants_gradient(x: Tensor) -> bool:
    """Whether x needs a gradient at any level: under `grad(vmap(f))`, f sees a batch whose own `requires_grad` is False."""
    return any(level.requires_grad for level in _levels(x))


def check_no_tangent(x: Tensor, name: str) -> None:
    """Raise InputError if x takes part in forward-mode differentiation, by `torch.func.jvp` or `torch.autograd.forward_ad`."""
    if forward_ad._current_level >= 0 and _has_tangent(x):  # jvp opens a level too
        raise InputError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual tensors): its codes serve backward alone; "
            "take gradients with grad, vjp or jacrev, or call torch's own operation"
        )


def _has_tangent(x: Tensor) -> bool:
    # a tensor below the innermost transform does not show its tangent, but was wrapped by each jvp that it takes part in
    stack = _functorch.get_interpreter_stack() or []
    jvp_levels = {each.level() for each in stack if each.key() == _functorch.TransformType.Jvp}
    *wrappers, plain = _levels(x)
    if any(_functorch.maybe_get_level(wrapper) in jvp_levels for wrapper in wrappers):
        return True
    return forward_ad.unpack_dual(plain).tangent is not None


def _levels(x: Tensor) -> Iterator[Tensor]:
    """x as each functorch transform wrapped it, from the innermost transform to the plain tensor."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def coded_activation(
    x: Tensor, forward: Callable[[Tensor], Tensor], coder: Coder, forward_inplace: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """As `fewbit.autograd.activation.coded_activation`, differentiable by every reverse-mode transform."""
    tensors = (_as_constant(tensor) for tensor in (coder.thresholds, coder.codes, coder.levels))
    y, _ = _Activation.apply(x, x.reshape(-1)[:0].clone(), forward, *tensors, coder.bits)  # type: ignore[misc]
    # functorch has no rule for a Function that overwrites its input; a compiler makes one kernel of the two operations
    return y if forward_inplace is None else x.copy_(y)


def decode(packed: Tensor, grad: Tensor, coder: Coder) -> Tensor:
    """As `fewbit.kernels.decode`, where a transform of backward alone looks on: vmap over `torch.autograd.grad`."""
    tensors = (_as_constant(tensor) for tensor in (coder.thresholds, coder.codes, coder.levels))
    return torch.ops.fewbit.decode(packed, grad, *tensors, coder.bits)


def _as_constant(tensor: Tensor) -> Tensor:
    """The tensor as fake-tensor modes and tracers take a constant. A compiler has replaced it by an input of its graph."""
    return torch.ops.aten.lift_fresh(tensor) if torch._C._len_torch_dispatch_stack() and type(tensor) is Tensor else tensor


class _Activation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, anchor, forward, thresholds, codes, levels, bits):
        packed = torch.ops.fewbit.encode(x.permute(_memory_order(x)).reshape(-1), thresholds, codes, levels, bits)
        return forward(x), packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, anchor, _, *tensors, bits = inputs
        _, packed = output
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, anchor, *tensors)
        ctx.order, ctx.dtype, ctx.bits = _memory_order(x), x.dtype, bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        if grad is None:
            return (None,) * 7
        packed, anchor, *tensors = ctx.saved_tensors
        by_memory = grad.permute(ctx.order)
        product = _Product.apply(by_memory.reshape(-1), anchor, packed, *tensors, ctx.bits)
        grad_x = product.view(by_memory.shape).permute(inverse(ctx.order)).to(ctx.dtype)  # type: ignore[union-attr]
        return grad_x, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    """The gradient from codes, which cannot be differentiated again: `anchor`, of no elements, ties it to x's graph."""

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


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost, so that a dense x is read without a copy.

    Sorted by insertion, since dynamo cannot sort by symbolic strides, but compares them.
    """
    order: list[int] = []
    if x.is_contiguous():  # also for shapes that depend on data, whose strides cannot be compared
        return list(range(x.dim()))
    for dim, stride in enumerate(x.stride()):
        place = len(order)
        while place and x.stride(order[place - 1]) < stride:
            place -= 1
        order.insert(place, dim)
    return order


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    undone = [0] * len(order)
    for position, dim in enumerate(order):
        undone[dim] = position
    return undone
