"""Design tables for the pre-activations of a model on its own data. They are collected in one histogram for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.design import design
from fewbit.design.evaluate import errors_under
from fewbit.design.table import CodeTable
from fewbit.errors import InputError
from fewbit.functional.operation import is_codable
from fewbit.models.arguments import (
    Filter,
    LossFunction,
    check_batches,
    check_filter,
    check_loss,
    check_model,
    names_passed,
    no_batch,
    run,
    trainable,
)
from fewbit.models.calibration.calibration import CalibratedLayer, Calibration
from fewbit.models.calibration.histogram import StreamingHistogram, bins_of
from fewbit.models.conversion.engine import convert_modules
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.modules import CodedModule, coded_modules, pre_activation
from fewbit.models.preserve import eager, preserved_state, structure_restored_on_error
from fewbit.record import Activation
from fewbit.torch_internals import is_backward
from fewbit.weights import Histogram

Tensor = torch.Tensor
Histograms = dict[str, StreamingHistogram]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    bits: Bits | None = None,
    *,
    filter_fn: Filter | None = None,
) -> Calibration:
    """Give each coded activation and gate of a model the table of least error for its own inputs.

    model      A model that is converted, is built of fewbit's modules, or is neither. In the last case it is converted first,
               in place. It runs in its current mode (training or evaluation), without its compiled code.
    batches    Batches to run the model on, each as in `fewbit.memory`. A few are enough, also early in training. One histogram
               is kept for each layer, and no tensors.
    loss_fn    A function of the model and a batch that returns a scalar. If it is given, backward runs too. Tables of the
               derivative are then designed for the squared gradient at each pre-activation, since the gradient multiplies their
               error. Tables that also hold values are designed for the pre-activations only, since the gradient there does not
               weigh the values.
    bits       Bits of the tables, one number or by kind, as in `fewbit.convert`. With None, modules keep their bits. Modules of
               kinds that are not named keep theirs too. A model that is converted now gets these bits, or 5 for every kind.
    filter_fn  A function of a module and its dotted name that says whether to convert and calibrate the module.
    Returns    what was seen, and the errors before and after. `save` writes the tables to a file, `Calibration.load` reads it,
               and `install` puts them on a model again.

    Layers that never ran keep their table. So do layers for which no better table is found, such as ReLU. Parameters,
    gradients, buffers and the states of random number generators are restored afterwards.

    Raises DesignError (bits) or InputError (not a module, no batch, no gradient). The model is then as before.
    """
    inner = check_model("calibrate", model)
    check_batches("calibrate", batches, loss_fn)
    check_filter(filter_fn)
    setting = None if bits is None else Setting.of(bits)
    with structure_restored_on_error(inner):
        if not coded_modules(inner):
            filter_fn = names_passed(inner, filter_fn)
            convert_modules(inner, setting or Setting.of(DEFAULT_MODEL_BITS), filter_fn)
            setting = None
        coded = [each for each in coded_modules(inner, filter_fn) if each.calibrates]
        if not coded:
            raise InputError(
                "calibrate found no activation or gate that is coded, or that these bits could code: check the kinds in "
                "bits, and filter_fn if you gave one. Activations called as functions cannot be calibrated: their table is "
                "chosen by the scale of their input"
            )
        histograms = observe(inner, model, batches, coded, loss_fn)
        layers = [_calibrated(each, histograms[each.name], _bits_of(each, setting), loss_fn is not None) for each in coded]
        for each, layer in zip(coded, layers, strict=True):
            each.install(layer.table)
    return Calibration(tuple(layers), loss_fn is not None)


def observe(
    inner: nn.Module, model: nn.Module, batches: Iterable[Any], coded: Sequence[CodedModule], loss_fn: LossFunction | None
) -> Histograms:
    """The histograms of what the coded modules read while the model runs on the batches, by name.

    inner  the model without the compiler's wrapper, which holds the coded modules
    model  what loss_fn is called with
    """
    parameters = trainable(inner) if loss_fn is not None else []
    histograms, ran = {each.name: StreamingHistogram() for each in coded}, False
    with preserved_state(inner), eager(), _watched(coded, histograms, loss_fn is not None):
        for ran, batch in enumerate(batches, 1):  # noqa: B007
            if loss_fn is None:
                with torch.no_grad():
                    run(model, batch)
            else:
                with torch.enable_grad():
                    torch.autograd.grad(check_loss(loss_fn(model, batch)), parameters, allow_unused=True)
    if not ran:
        raise no_batch("calibrate")
    return histograms


def _bits_of(coded: CodedModule, setting: Setting | None) -> int:
    """Bits of the table that a module gets: those asked for its kind, or those that it has."""
    asked = None if setting is None else setting.bits_of(coded.module.coded_kind)
    return asked or coded.table.bits


@contextmanager
def _watched(coded: Sequence[CodedModule], histograms: Histograms, with_gradients: bool) -> Iterator[None]:
    handles = []
    for each in coded:
        handles += _watch(each, histograms[each.name], with_gradients)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(coded: CodedModule, histogram: StreamingHistogram, with_gradients: bool) -> list[Any]:
    """Hooks on a module that count what it reads. The gradient at x arrives later, when x may be overwritten or freed, so the
    bins of x are kept until then."""
    waiting: list[Tensor | None] = []
    gradients = with_gradients and coded.channels == ("derivative",)

    def before(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if is_backward():  # checkpointing runs forward again
            return
        x = pre_activation(module, args, kwargs)
        codable = is_codable(x)  # else torch computes the module's output, and no table is used
        if codable:
            histogram.add(x)
        if gradients:
            waiting.append(bins_of(x) if codable else None)

    def after(module: nn.Module, args: tuple, output: Tensor) -> None:
        if gradients and not is_backward():
            bins = waiting.pop()
            if output.requires_grad and bins is not None:
                output.register_hook(lambda gradient: histogram.add_gradient(bins, gradient))

    return [
        coded.module.register_forward_pre_hook(before, with_kwargs=True),
        coded.module.register_forward_hook(after),
    ]


def _calibrated(coded: CodedModule, histogram: StreamingHistogram, bits: int, by_gradient: bool) -> CalibratedLayer:
    """The better one of two tables: the one designed for the histogram, and the one in use (the shipped one if it has other
    bits)."""
    former = table_in_use(coded, histogram)
    table = former if former.bits == bits else coded.shipped(bits)
    facts: dict[str, Any] = {}
    if histogram.elements:
        by_gradient = weighs_gradients(histogram, by_gradient)
        seen = histogram.seen(by_gradient)
        candidates = (table, fitted(coded, histogram, bits, by_gradient))
        table = min(candidates, key=lambda each: errors_under(seen, each, coded.record)[0].sum())
        facts = {"mean": histogram.mean, "std": histogram.std}
        facts |= {when: relative_errors(seen, each, coded) for when, each in (("before", former), ("after", table))}
    return layer_of(coded, table, histogram, **facts)


def table_in_use(coded: CodedModule, histogram: StreamingHistogram | None) -> CodeTable:
    """The table with which a module codes the inputs in the histogram."""
    return coded.table_for(histogram.spread) if histogram is not None and histogram.elements else coded.table


def weighs_gradients(histogram: StreamingHistogram, by_gradient: bool) -> bool:
    """Whether the gradients weigh the errors: if that was asked for, and if there were gradients."""
    return by_gradient and bool(histogram.squares.any())


def fitted(coded: CodedModule, histogram: StreamingHistogram, bits: int, by_gradient: bool) -> CodeTable:
    """The table of this number of bits, designed for the histogram."""
    return _designed(coded.record, bits, histogram.smoothed(by_gradient), coded.channels)


@lru_cache(maxsize=256)
def _designed(record: Activation, bits: int, weight: Histogram, channels: tuple[str, ...]) -> CodeTable:
    """Results are remembered: allocating after a calibration on the same batches, or with another budget, designs nothing
    again."""
    return design(record, bits, weight=weight, channels=channels)


def relative_errors(seen: Histogram, table: CodeTable, coded: CodedModule) -> tuple[float, ...]:
    """The relative rms error of each channel, weighted by what was seen; 0 if there is no error."""
    errors, powers = errors_under(seen, table, coded.record)
    return tuple(np.sqrt(np.divide(errors, powers, out=np.zeros_like(errors), where=errors > 0)).tolist())


def layer_of(coded: CodedModule, table: CodeTable, histogram: StreamingHistogram, **facts: Any) -> CalibratedLayer:
    """The entry of a module in a calibration."""
    numbers = {"elements": histogram.elements, "not_finite": histogram.not_finite}
    return CalibratedLayer(coded.name, coded.record.name, dict(coded.record.parameters), table, **numbers, **facts)
