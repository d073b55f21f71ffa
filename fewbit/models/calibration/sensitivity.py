"""Measure how much the error of each coded layer adds to the error of the gradient, and how many bytes its codes take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fewbit.autograd.exact import exact
from fewbit.constants import MAX_BITS
from fewbit.design.evaluate import errors_under
from fewbit.design.table import CodeTable
from fewbit.errors import InputError
from fewbit.measuring import saved_storages
from fewbit.models.arguments import LossFunction, check_loss, surrogate_loss, trainable
from fewbit.models.calibration.calibrate import fitted, weighs_gradients
from fewbit.models.calibration.histogram import StreamingHistogram
from fewbit.models.modules import CodedModule
from fewbit.models.preserve import eager, preserved_state

Tensor = torch.Tensor
Gradient = list[Tensor | None]
_COARSE, _FINE = 2, MAX_BITS  # bits of the layer that is measured, and of all others


class Sensitivity(NamedTuple):
    """How large one layer's codes are, and how much their error matters.

    factor    the squared relative error of the gradient, divided by the error of the layer's table
    elements  how many numbers the layer keeps codes of; 0 if it keeps none of its own
    itemsize  bytes of one number before coding
    """

    factor: float
    elements: int
    itemsize: int


class Probe:
    """Runs a model on one batch with different tables in its layers. Buffers and random numbers stay as they are.

    inner       the model without the compiler's wrapper
    model       what loss_fn is called with
    coded       its coded layers
    histograms  name -> histogram, of the layers that read pre-activations
    loss_fn     None for `surrogate_loss`
    """

    def __init__(
        self,
        inner: nn.Module,
        model: nn.Module,
        coded: Sequence[CodedModule],
        histograms: Mapping[str, StreamingHistogram],
        loss_fn: LossFunction | None,
        batch: Any,
    ):
        self.coded, self.histograms = {each.name: each for each in coded}, histograms
        self.by_gradient = {name: weighs_gradients(each, loss_fn is not None) for name, each in histograms.items()}
        self._inner, self._model, self._loss_fn, self._batch = inner, model, loss_fn or surrogate_loss, batch
        self._parameters = trainable(inner)
        self.table: Callable[[str, int], CodeTable] = cache(self._table)
        self._exact: Gradient = []
        self._fine: Gradient = []
        self._power = 0.0

    def _table(self, name: str, bits: int) -> CodeTable:
        coded, histogram = self.coded[name], self.histograms.get(name)
        if histogram is None or not histogram.elements:
            return coded.shipped(bits)
        return fitted(coded, histogram, bits, self.by_gradient[name])

    def table_error(self, name: str, bits: int) -> float:
        """∫ w (g - q)² dx of the layer's table, summed over channels. w is what was seen, or else the weight of the design."""
        table, histogram = self.table(name, bits), self.histograms.get(name)
        if histogram is None or not histogram.elements:
            return sum(table.errors or ())
        return float(errors_under(histogram.seen(self.by_gradient[name]), table, self.coded[name].record)[0].sum())

    def install(self, bits: Mapping[str, int]) -> None:
        """Give the layers of these names their tables of these bits."""
        for name, number in bits.items():
            self.coded[name].install(self.table(name, number))

    def sensitivities(self, advance: Callable[[], None]) -> dict[str, Sensitivity]:
        """The sensitivity of every layer. One pass has fine codes everywhere; one pass for each layer has coarse codes there.

        advance  called after each layer
        """
        itemsizes: dict[str, int] = {}
        handles = [_note_itemsize(each, itemsizes) for each in self.coded.values()]
        fine = dict.fromkeys(self.coded, _FINE)
        self.install(fine)
        try:
            self._fine, kept = self._gradient()
            with exact():
                self._exact, _ = self._gradient()
        finally:
            for handle in handles:
                handle.remove()
        self._power = sum(float(each.double().square().sum()) for each in self._exact if each is not None)
        if not 0 < self._power < float("inf"):
            raise InputError(
                f"the gradient of the first batch must be finite and not zero, got a squared norm of {self._power}"
            )
        found = {}
        for name in self.coded:
            self.install({name: _COARSE})
            error, kept_coarse = self._error(self._fine)
            self.install({name: _FINE})
            table_error = self.table_error(name, _COARSE)
            elements = round((kept - kept_coarse) * 8 / (_FINE - _COARSE))
            found[name] = Sensitivity(error / table_error if table_error else 0.0, max(elements, 0), itemsizes.get(name, 0))
            advance()
        return found

    def measured_error(self, bits: Mapping[str, int]) -> float:
        """The relative error of the gradient with these bits in these layers and fine codes in all others.

        Call `sensitivities` before.
        """
        self.install({**dict.fromkeys(self.coded, _FINE), **bits})
        return self._error(self._exact)[0] ** 0.5

    def _error(self, reference: Gradient) -> tuple[float, int]:
        """||g̃ - reference||² / ||g||², with g the exact gradient, and the bytes kept."""
        gradient, kept = self._gradient()
        pairs = [(a, b) for a, b in zip(gradient, reference, strict=True) if a is not None and b is not None]
        return sum(float((a - b).double().square().sum()) for a, b in pairs) / self._power, kept

    def _gradient(self) -> tuple[Gradient, int]:
        """The gradient of the batch's loss, and the bytes that its forward pass keeps for backward."""
        kept: dict[int, int] = {}
        with preserved_state(self._inner), eager(), torch.enable_grad():
            with saved_storages(kept):
                loss = check_loss(self._loss_fn(self._model, self._batch))
            number = sum(kept.values())
            gradient = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return list(gradient), number


def _note_itemsize(coded: CodedModule, itemsizes: dict[str, int]) -> Any:
    def note(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        itemsizes[coded.name] = next(x.element_size() for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    return coded.module.register_forward_pre_hook(note, with_kwargs=True)
