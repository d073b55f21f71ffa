"""One training step of a model, without its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit import measuring
from fewbit.bench.models import Subject
from fewbit.models.arguments import roots_of
from fewbit.models.memory.forward import Forward
from fewbit.models.memory.saved import tensors_in
from fewbit.models.memory.storages import total
from fewbit.torch_internals import map_tensors

Tensor = torch.Tensor


class Step:
    """Forward and backward of a model on one batch. It can be called any number of times.

    Each call begins without gradients, as after an optimizer's `zero_grad()`, and leaves the gradients that it computes. Raises
    InputError if the model does not take the batch, and if there is nothing to differentiate.
    """

    def __init__(self, subject: Subject):
        self.model, self.batch, self.loss_fn = subject
        self._directions: list[Tensor | None] = []  # the gradients that backward begins with, made in the first call

    def __call__(self) -> None:
        self._clear()
        roots = self.forward()
        if not self._directions:
            self._directions = [_direction(each) for each in roots]
        torch.autograd.backward(roots, self._directions)

    def forward(self) -> list[Tensor]:
        """Run forward. Returns the tensors at which backward begins: the loss, or else all outputs."""
        return roots_of(self.model, self.batch, self.loss_fn)

    def kept_bytes(self) -> int:
        """Bytes that forward and the loss keep for backward, without parameters, buffers, the batch and code tables."""
        return total(Forward.of(_Whole(self), self.batch).saved(fake=False))

    def peak_bytes(self, device: torch.device) -> int | None:
        """The most bytes that a step holds beyond the model, gradients included; None if the device's memory is not tracked."""
        self._clear()
        return measuring.peak_bytes(self, device) if device.type in ("cpu", "cuda") else None

    def _clear(self) -> None:
        for tensor in (*self.model.parameters(), *tensors_in(self.batch)):
            tensor.grad = None


class _Whole(nn.Module):
    """A step's forward pass, with its loss, as a module on the batch."""

    def __init__(self, step: Step):
        super().__init__()
        self.model = step.model
        self._run = step.forward

    def forward(self, *_: Any, **__: Any) -> list[Tensor]:
        return self._run()


def _direction(root: Tensor) -> Tensor | None:
    """The gradient at an output: normal numbers, since the sum of a norm's output has no gradient. None for a loss."""
    if root.dim() == 0:
        return None
    return torch.randn(root.shape, generator=torch.Generator().manual_seed(0)).to(root)


def moved(subject: Subject, device: torch.device, dtype: torch.dtype) -> Subject:
    """The subject on the device, with floating-point numbers of that dtype. The batch consists of new tensors."""

    def move(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device, kind).requires_grad_(tensor.requires_grad)

    return subject._replace(model=subject.model.to(device, dtype), batch=map_tensors(move, subject.batch))
