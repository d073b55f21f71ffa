"""How many bits each layer gets: those of least predicted error of the gradient that fit into a number of bytes.

The layers' errors add up as squares, nearly: ||g̃ - g||² ≈ Σ_l s_l d_l(bits_l). d_l is the error of the layer's table, known for
every number of bits; s_l, what the layer's place in the model makes of it, is measured: on one batch, with 2-bit codes in
that layer and 8-bit codes in all others, against 8-bit codes everywhere, whose own error is some 1/60 of that. Other ways
did worse on a GPT's GELUs, where they chose bits with a larger error than the same bits for all: to measure with 3 bits, since
errors with fewer are larger than that foretells, and to take the squared gradient at the layer times d_l, which needs no
measuring but leaves out what lies upstream.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from fewbit.constants import DEFAULT_BITS, DEFAULT_LAYER_BITS, MAX_BITS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, InputError
from fewbit.models.calibration.allocation import AllocatedLayer, Allocation, Outcome
from fewbit.models.calibration.calibrate import LossFunction, layer_of, observe, relative_errors
from fewbit.models.calibration.calibration import CalibratedLayer, Calibration
from fewbit.models.calibration.histogram import StreamingHistogram
from fewbit.models.calibration.knapsack import Choices, choose
from fewbit.models.calibration.sensitivity import Probe, Sensitivity
from fewbit.models.coded import Filter, coded_modules, without_compiler
from fewbit.models.conversion.convert import convert
from fewbit.models.untouched import restored_on_error


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    budget: str | int = "30%",
    *,
    bits: Sequence[int] = range(1, MAX_BITS + 1),
    inputs: bool = False,
    filter_fn: Filter | None = None,
) -> Allocation:
    """Give each coded layer of a model the bits and the table that make the error of the gradient least within a budget.

    model      as for `fewbit.calibrate`
    batches    likewise: activations and gates are calibrated on them. The layers' errors are measured on the first.
    loss_fn    of the model and a batch, a scalar. Left out, it is the `loss` of what the model returns, or, where it has none,
               a random projection of the outputs: the sum of all their elements times fixed normal numbers. That tells how an
               error reaches the parameters, but not which outputs the true loss depends on; give the loss if you have one.
    budget     for the codes of all these layers together, kept for one batch like the first: bytes, or "30%" of what the coded
               tensors take in their own dtype
    bits       to choose from
    inputs     whether a model that is converted now is to code what linear layers, convolutions and norms read, too
    filter_fn  of a module and its dotted name: whether to convert it and choose its bits
    Returns    the bits chosen, with predicted and measured errors; its `calibration` saves and loads

    The choice is the optimum of the prediction. Where the same number of bits in all layers fits the budget and turns out no
    worse on the first batch, it is taken instead. Layers that keep no codes of their own, such as a linear layer that reads
    those of the activation before it, stay as they are. All that takes a forward and backward pass for each layer, and for each
    activation the design of a table for each number of bits: for 1 to 8 some three seconds of one core a layer.

    Raises DesignError (a budget that is too small, or none; bits) or InputError (no such module, no batch, no gradient); the
    model is then as it was before.
    """
    inner, share = without_compiler("allocate", model), _budget(budget)
    if not isinstance(inputs, bool):
        raise DesignError(f"inputs must be True or False, since allocate chooses the bits, got {inputs!r}")
    if not isinstance(bits, Iterable):
        raise DesignError(f"bits must be the numbers to choose from, such as (2, 3, 4), got {bits!r}")
    bits = sorted({check_bits(each, DesignError) for each in bits})
    if not bits:
        raise DesignError("bits must name at least one number of bits, got none")
    with restored_on_error(inner):
        if not coded_modules(inner):
            convert(inner, DEFAULT_BITS, DEFAULT_LAYER_BITS if inputs else None, filter_fn)
        coded = coded_modules(inner, filter_fn)
        if not coded:
            raise InputError("allocate found no module in the model that is coded or can be; check its filter_fn")
        first, batches = _peeked(batches)
        histograms = observe(inner, model, batches, [each for each in coded if each.calibrates], loss_fn)
        return _allocated(Probe(inner, model, coded, histograms, loss_fn, first), share, bits)


def _peeked(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise InputError("batches gave no batch to run the model on; a generator can be used once")


def _budget(budget: Any) -> Callable[[int], int]:
    """Bytes for codes, of the bytes that the coded tensors would take. DesignError for what is no budget.

    >>> _budget("30%")(1000), _budget(2048)(1000)
    (300, 2048)
    """
    if isinstance(budget, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", budget)):
        return lambda exact: math.floor(exact * float(match[1]) / 100)
    if isinstance(budget, int | np.integer) and not isinstance(budget, bool) and budget > 0:
        return lambda exact: int(budget)
    raise DesignError(f"budget must be a positive number of bytes or a text such as '30%', got {budget!r}")


def _allocated(probe: Probe, share: Callable[[int], int], bits: Sequence[int]) -> Allocation:
    former = {name: (each.table, each.module.bits, each.module.table) for name, each in probe.coded.items()}
    found = {name: each for name, each in probe.sensitivities().items() if each.elements}
    if not found:
        raise InputError("no coded layer of the model keeps codes for backward; does its gradient reach them?")
    exact = sum(each.elements * each.itemsize for each in found.values())
    budget = share(exact)
    items = {name: _choices(probe, name, each, bits) for name, each in found.items()}
    _check_budget(items, budget, exact)
    chosen = dict(zip(items, choose(list(items.values()), budget), strict=True))
    level = max(b for b in bits if sum(choices[b][0] for choices in items.values()) <= budget)
    uniform = _outcome(probe, items, dict.fromkeys(items, level))
    outcome = _outcome(probe, items, chosen)
    if uniform.measured <= outcome.measured:
        chosen, outcome = dict.fromkeys(items, level), uniform
    for name, (_, own_bits, own_table) in former.items():
        probe.coded[name].module.bits, probe.coded[name].module.table = own_bits, own_table
    probe.install(chosen)
    layers = [
        AllocatedLayer(name, str(probe.coded[name].record), chosen[name], found[name].elements, choices)
        for name, choices in items.items()
    ]
    tables = Calibration(tuple(_calibrated(probe, name, former[name][0]) for name in chosen), any(probe.by_gradient.values()))
    return Allocation(tuple(layers), tables, budget, exact, outcome, level, uniform)


def _choices(probe: Probe, name: str, found: Sensitivity, bits: Sequence[int]) -> Choices:
    """For each number of bits the bytes of a layer's codes and its squared relative error of the gradient."""
    return {b: (-(-found.elements * b // 8), found.factor * probe.table_error(name, b)) for b in bits}


def _check_budget(items: dict[str, Choices], budget: int, exact: int) -> None:
    least = sum(min(size for size, _ in choices.values()) for choices in items.values())
    if budget < least:
        raise DesignError(
            f"the budget must be at least {least} bytes ({least / exact:.2%} of {exact}), the fewest bits in every layer; "
            f"got {budget}"
        )


def _outcome(probe: Probe, items: dict[str, Choices], bits: dict[str, int]) -> Outcome:
    chosen = [items[name][number] for name, number in bits.items()]
    predicted = math.sqrt(sum(error for _, error in chosen))
    return Outcome(sum(size for size, _ in chosen), predicted, probe.measured_error(bits))


def _calibrated(probe: Probe, name: str, former: CodeTable) -> CalibratedLayer:
    """What the calibration says of a layer that has its table."""
    coded, histogram = probe.coded[name], probe.histograms.get(name)
    if histogram is None or not histogram.elements:
        return layer_of(coded, coded.table, StreamingHistogram())
    seen = histogram.seen(probe.by_gradient[name])
    errors = {when: relative_errors(seen, table, coded) for when, table in (("before", former), ("after", coded.table))}
    return layer_of(coded, coded.table, histogram, mean=histogram.mean, std=histogram.std, **errors)
