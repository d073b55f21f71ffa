"""Compare exact and coded gradients, one parameter after the other, while backward makes them.

Two gradients are stored: the exact one of a batch, until the coded one arrives, and the sum of the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.models.arguments import check_loss
from fewbit.torch_internals import has_hook_on_accumulated_gradient

Tensor = torch.Tensor
_CHUNK = 1 << 20  # elements that are converted to a wide dtype at a time


class Figures(NamedTuple):
    """Figures of one or several parameters in one batch.

    exact       squared norm of the exact gradient g
    error       squared norm of the error e
    coded       squared norm of the coded gradient g + e
    product     scalar product of g and g + e
    difference  squared norm of g minus the exact gradient of the batch before
    """

    exact: float = 0.0
    error: float = 0.0
    coded: float = 0.0
    product: float = 0.0
    difference: float = 0.0

    def __add__(self, other: Any) -> Figures:  # type: ignore[override]
        return Figures(*(a + b for a, b in zip(self, other, strict=True)))


class Stream:
    """The gradients of one parameter as they arrive: the exact one of a batch, then the coded one."""

    def __init__(self, name: str, parameter: nn.Parameter):
        self.name, self.parameter = name, parameter
        self._exact: Tensor | None = None  # gradient of the batch before, then of this one; None for zeros
        self._errors: Tensor | None = None  # sum of the errors over the batches, flat, in float32 at least
        self._wide = torch.float32 if parameter.device.type == "mps" else torch.float64
        self.seen = False  # whether the current pass has given a gradient
        self.ever = False  # whether any pass has

    def take_exact(self, gradient: Tensor | None) -> None:
        """Compare with the exact gradient of the batch before, and keep this one in its place."""
        self._figures = self._zeros(len(Figures._fields))
        for _, new, old in self._chunks(gradient, self._exact):
            self._figures[0] += new.square().sum()
            self._figures[4] += (new - old).square().sum()
        self._exact = gradient

    def take_coded(self, gradient: Tensor | None) -> None:
        """Compare with the exact gradient of the same batch."""
        for start, new, exact in self._chunks(gradient, self._exact):
            error = new - exact
            products = error.square().sum(), new.square().sum(), (new * exact).sum()
            self._figures[1:4] += torch.stack(products)
            self._sum_of_errors()[start : start + error.numel()] += error

    def figures(self) -> Figures:
        """The figures of this batch."""
        return Figures(*self._figures.tolist())

    def squared_sum_of_errors(self) -> float:
        """The squared norm of the sum of the errors of all batches."""
        return 0.0 if self._errors is None else float(self._errors.to(self._wide).square().sum())

    def _sum_of_errors(self) -> Tensor:
        if self._errors is None:
            like = _real(self.parameter.detach())
            self._errors = like.new_zeros(like.numel(), dtype=torch.promote_types(like.dtype, torch.float32))
        return self._errors

    def _chunks(self, *gradients: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Parts of the gradients: the index where each part begins, and that part of each gradient, flat and in a wide dtype.
        Yields nothing if no gradient is given."""
        given = next((each for each in gradients if each is not None), None)
        if given is None:
            return
        flat = [None if each is None else _real(each).reshape(-1) for each in gradients]
        for start in range(0, _real(given).numel(), _CHUNK):
            parts = [None if each is None else each[start : start + _CHUNK].to(self._wide) for each in flat]
            size = next(part.numel() for part in parts if part is not None)
            yield start, *(self._zeros(size) if part is None else part for part in parts)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self._wide, device=self.parameter.device)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Streams:
    """The gradients of a model's trainable parameters. Each is taken and freed as soon as backward has made it.

    Raises InputError for a parameter whose gradient others also wait for, such as an optimizer that steps within backward.
    """

    def __init__(self, model: nn.Module):
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        if not named:
            raise InputError("fidelity compares gradients, but no parameter of the model requires one; unfreeze what you train")
        for name, parameter in named:
            if hasattr(parameter, "full_tensor"):
                raise InputError(f"{name} is sharded over processes; compare gradients on one process, with the whole model")
            if has_hook_on_accumulated_gradient(parameter):
                raise InputError(
                    f"{name} has a hook that runs after its gradient is accumulated, such as an optimizer's that steps within "
                    "backward; remove it for the comparison"
                )
        self.streams = [Stream(name, parameter) for name, parameter in named]
        self._backward_runs = False
        self._take: Callable[[Stream, Tensor | None], None] = Stream.take_exact

    def __enter__(self) -> Streams:
        self._handles = [
            stream.parameter.register_post_accumulate_grad_hook(lambda _, stream=stream: self._arrived(stream))
            for stream in self.streams
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, loss_of: Callable[[], Tensor], take: Callable[[Stream, Tensor | None], None]) -> float:
        """Run forward and backward, and take every gradient. Returns the loss."""
        for stream in self.streams:
            stream.seen = False
        self._take = take
        loss = loss_of()
        check_loss(loss)
        self._backward_runs = True
        try:
            loss.backward(inputs=[stream.parameter for stream in self.streams])
        finally:
            self._backward_runs = False
        with torch.no_grad():
            for stream in self.streams:
                if not stream.seen:
                    take(stream, None)
        return float(loss.detach())

    @torch.no_grad()
    def _arrived(self, stream: Stream) -> None:
        if not self._backward_runs:
            raise InputError("loss_fn gives the loss and must not call backward itself")
        if stream.seen:
            raise InputError(
                f"the gradient of {stream.name} came in several parts, as with reentrant checkpointing; use use_reentrant=False"
            )
        gradient, stream.parameter.grad = stream.parameter.grad, None
        assert gradient is not None, "it has just been accumulated"
        stream.seen = stream.ever = True
        self._take(stream, gradient if gradient.layout == torch.strided else gradient.to_dense())
