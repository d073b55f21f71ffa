"""Lets gradients from codes be taken only once, because codes carry no second derivative."""

from __future__ import annotations

from typing import Any

import torch

from fewbit.kernels import ops
from fewbit.torch_internals import unwatched

Tensor = torch.Tensor
with unwatched():
    _NOTHING = torch.empty(0, device="cpu")


def new_anchor() -> Tensor:
    """An empty tensor as an extra output of an operation in plain eager code, for `differentiable_once`. Anchors share one
    empty storage, which costs a third of a new tensor."""
    return _NOTHING.data


def differentiable_once(result: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    """The gradient `result`, which a backward pass made from `grad`. Differentiating it again in any way raises InputError.

    anchor  An empty output of the operation whose backward this is. It ties the result to the operation's graph, as `grad` ties
            it to the graph of the incoming gradient. No second derivative can then bypass the error.
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
