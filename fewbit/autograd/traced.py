"""The coded activation where something looks on: a compiler, a functorch transform, or a mode that sees each operation.

In plain eager code `fewbit.autograd.activation` takes half the time. Its Function in the old style fails under functorch, and
its kernels would disappear from a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fewbit.autograd.layout import Layout
from fewbit.errors import InputError
from fewbit.kernels import Coder, ops

Tensor = torch.Tensor
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]  no public name tells which transforms are active


def is_watched(x: Tensor) -> bool:
    """Whether a compiler, a functorch transform or a dispatch mode (fake tensors, a tracer, a counter) is active, or x is a
    batch of the older vmap behind `is_grads_batched` and `jacobian(vectorize=True)`."""
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.is_legacy_batchedtensor(x)
    )


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device, which may be one that has none, as meta."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def is_transformed() -> bool:
    """Whether a functorch transform is active, under which tensors change their identity."""
    return _functorch.peek_interpreter_stack() is not None


def wants_gradient(x: Tensor) -> bool:
    """Whether x needs a gradient at any level: under `grad(vmap(f))`, f sees a batch whose own `requires_grad` is False."""
    return any(level.requires_grad for level in _levels(x))


def wants_codes(operands: Sequence[Tensor | None]) -> bool:
    """Whether a layer of these operands is to keep codes: one of them needs a gradient, of the kind that codes can give."""
    given = [each for each in operands if each is not None]
    return (
        torch.is_grad_enabled()
        and any(each.requires_grad for each in given)
        and not is_transformed()
        and forward_ad._current_level < 0
        and not torch.compiler.is_exporting()
        and all(each.layout == torch.strided and not each.is_nested for each in given)
    )


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
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    coder: Coder,
    forward_inplace: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fewbit.autograd.activation.coded_activation`, differentiable by every reverse-mode transform; y and the codes."""
    y, packed = _Activation.apply(x, x.reshape(-1)[:0].clone(), forward, *_constants(coder), coder.bits)  # type: ignore[misc]
    # functorch has no rule for a Function that overwrites its input; a compiler makes one kernel of the two operations
    return (y if forward_inplace is None else x.copy_(y)), packed


def encode(x: Tensor, coder: Coder) -> Tensor:
    """As `fewbit.kernels.encode` of (n,), as an operator."""
    return torch.ops.fewbit.encode(x, *_constants(coder), coder.bits)


def decode(packed: Tensor, grad: Tensor, coder: Coder) -> Tensor:
    """As `fewbit.kernels.decode` of (n,), as an operator."""
    return torch.ops.fewbit.decode(packed, grad, *_constants(coder), coder.bits)


def _constants(coder: Coder) -> tuple[Tensor, ...]:
    return tuple(_as_constant(tensor) for tensor in (coder.thresholds, coder.codes, coder.levels))


def _as_constant(tensor: Tensor) -> Tensor:
    """The tensor as fake-tensor modes and tracers take a constant. A compiler has replaced it by an input of its graph."""
    return torch.ops.aten.lift_fresh(tensor) if torch._C._len_torch_dispatch_stack() and type(tensor) is Tensor else tensor


class _Activation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, anchor, forward, thresholds, codes, levels, bits):
        packed = torch.ops.fewbit.encode(Layout.of(x).flatten(x), thresholds, codes, levels, bits)
        return forward(x), packed

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
