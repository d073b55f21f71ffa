"""Gradients from codes can be taken once: codes carry no second derivative."""

from __future__ import annotations

from typing import Any

import torch

from fewbit.kernels import ops
from fewbit.torch_internals import unwatched

Tensor = torch.Tensor
with unwatched():
    _NOTHING = torch.empty(0, device="cpu")


def new_anchor() -> Tensor:
    """An output without elements of an operation in plain eager code, for `differentiable_once`; it shares no more than an
    empty storage with others, which costs a third of a tensor made anew."""
    return _NOTHING.data


def differentiable_once(result: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    """The gradient `result` that a backward pass made of `grad`; differentiating it again, by whatever way, raises InputError.

    anchor  an output without elements of the operation whose backward this is: it ties the result to its graph, as `grad` does
            to that of the incoming gradient, so that no second derivative passes it by
    """
    return _Once.apply(result, grad, anchor) if torch.is_grad_enabled() else result  # type: ignore[return-value]


class _Once(torch.autograd.Function):
    """The identity, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        ops.refuse_second_derivative()
