"""Choose the bits of each layer: those with the least predicted error of the gradient that fit a number of bytes.

The squared errors of the layers nearly add up: ||g̃ - g||² ≈ Σ_l s_l d_l(bits_l). d_l is the error of the layer's table, known
for every number of bits. The sensitivity s_l says how much that error matters at the layer's place in the model. It is measured
on one batch: 2-bit codes in that layer and 8-bit codes in all others are compared with 8-bit codes everywhere, whose own error
is about 1/60 of that.

Two other ways did worse on a GPT's GELUs, where they chose bits with a larger error than the same bits for all layers. One
measures with 3 bits: it predicts too small errors for fewer bits. The other takes the squared gradient at the layer times d_l:
it needs no measuring, but leaves out the layers upstream.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from fewbit.constants import DEFAULT_MODEL_BITS, MAX_BITS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, InputError
from fewbit.models.arguments import Filter, LossFunction, check_batches, check_filter, check_model, names_passed, no_batch
from fewbit.models.calibration.allocation import AllocatedLayer, Allocation, Outcome
from fewbit.models.calibration.calibrate import layer_of, observe, relative_errors, table_in_use
from fewbit.models.calibration.calibration import CalibratedLayer, Calibration
from fewbit.models.calibration.histogram import StreamingHistogram
from fewbit.models.calibration.knapsack import Choices, choose
from fewbit.models.calibration.sensitivity import Probe, Sensitivity
from fewbit.models.conversion.engine import convert_modules
from fewbit.models.conversion.setting import Setting
from fewbit.models.modules import coded_modules
from fewbit.models.preserve import structure_restored_on_error
from fewbit.terminal import progress


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    budget: str | int | float = "30%",
    *,
    choices: Sequence[int] = range(1, MAX_BITS + 1),
    filter_fn: Filter | None = None,
) -> Allocation:
    """Give each coded layer of a model its own bits and table, such that the gradient's error is least within a budget.

    model      As for `fewbit.calibrate`. A model that is not converted yet is converted with every kind. To choose among some
               kinds only, convert it before, with bits by kind.
    batches    As for `fewbit.calibrate`. Activations and gates are calibrated on all batches. The errors of layers are measured
               on the first one.
    loss_fn    A function of the model and a batch that returns a scalar. Without it, the loss is the `loss` of the model's
               output. If that has none, it is a random projection: the sum of all outputs times fixed normal numbers. A random
               projection shows how an error reaches the parameters, but not which outputs the true loss depends on. Give the
               true loss if you have it.
    budget     The most that the codes of all these layers may take together, for one batch like the first, without their
               scales. It is a share of what the coded tensors take in their own dtype, such as 0.3 or "30%", or a number of
               bytes, such as 1 << 29 or "512 MiB".
    choices    numbers of bits to choose from, each 1 to 8
    filter_fn  A function of a module and its dotted name that says whether to convert the module and choose its bits.
    Returns    the bits chosen, with predicted and measured errors. Its `calibration` saves and loads.

    The choice is optimal for the predicted errors. If the same number of bits in all layers fits the budget and does no worse
    on the first batch, that is taken instead. Layers that keep no codes of their own stay as they are, such as a linear layer
    that reads the code of the activation before it. One forward and one backward pass run for each layer. A table is designed
    for each activation and each number of bits: for 1 to 8 bits, this takes about three seconds of one core for each layer.

    Raises DesignError (a budget that is too small or not a budget, choices) or InputError (not a module, no batch, no
    gradient). The model is then as before.
    """
    inner, share = check_model("allocate", model), parse_budget(budget)
    check_batches("allocate", batches, loss_fn)
    check_filter(filter_fn)
    if not isinstance(choices, Iterable):
        raise DesignError(f"choices must be the numbers of bits to choose from, such as (2, 3, 4), got {choices!r}")
    bits = sorted({check_bits(each, DesignError) for each in choices})
    if not bits:
        raise DesignError("choices must name at least one number of bits, got none")
    with structure_restored_on_error(inner):
        if not coded_modules(inner):
            filter_fn = names_passed(inner, filter_fn)
            convert_modules(inner, Setting.of(DEFAULT_MODEL_BITS), filter_fn)
        coded = coded_modules(inner, filter_fn)
        if not coded:
            raise InputError(
                "allocate found no module that is coded, or that these bits could code: check the kinds in bits, and "
                "filter_fn if you gave one. Activations called as functions all have the same number of bits"
            )
        first, batches = _peeked(batches)
        histograms = observe(inner, model, batches, [each for each in coded if each.calibrates], loss_fn)
        with progress("measuring layers", len(coded)) as advance:
            return _allocated(Probe(inner, model, coded, histograms, loss_fn, first), share, bits, advance)


def _peeked(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise no_batch("allocate")


_UNITS = {"": 1, "B": 1, **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}


def parse_budget(budget: Any) -> Callable[[int], int]:
    """A function from the bytes that the coded tensors take exactly to the bytes for codes. DesignError if it is no budget.

    >>> [parse_budget(each)(1000) for each in (0.3, "0.3", "30%", 2048, "2 KiB")]
    [300, 300, 300, 2048, 2048]
    """
    text = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|[a-zA-Z]*)\s*", budget) if isinstance(budget, str) else None
    number = float(text[1]) if text else budget
    if isinstance(number, bool) or not isinstance(number, int | float | np.integer | np.floating) or not 0 < number < math.inf:
        raise _no_budget(budget)
    if text and text[2] == "%":
        return lambda exact: math.floor(exact * number / 100)
    if text and (text[2] or "." not in text[1]):
        unit = _UNITS.get(text[2].upper())
        if unit is None:
            raise _no_budget(budget)
        return lambda exact: math.floor(number * unit)
    if isinstance(number, float | np.floating):
        if number > 1:
            raise _no_budget(budget)
        return lambda exact: math.floor(exact * float(number))
    return lambda exact: int(number)


def _no_budget(budget: Any) -> DesignError:
    return DesignError(f"budget must be a share such as 0.3 or '30%', or bytes such as 1048576 or '512 MiB'; got {budget!r}")


def _allocated(probe: Probe, share: Callable[[int], int], bits: Sequence[int], advance: Callable[[], None]) -> Allocation:
    former = {
        name: (table_in_use(each, probe.histograms.get(name)), each.module.bits, each.module.table)
        for name, each in probe.coded.items()
    }
    found = {name: each for name, each in probe.sensitivities(advance).items() if each.elements}
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
    """For each number of bits: the bytes of a layer's codes, and the squared relative error that they add to the gradient's."""
    return {b: (-(-found.elements * b // 8), found.factor * probe.table_error(name, b)) for b in bits}


def _check_budget(items: dict[str, Choices], budget: int, exact: int) -> None:
    least = sum(min(size for size, _ in choices.values()) for choices in items.values())
    if budget < least:
        raise DesignError(
            f"the budget must be at least {least} bytes ({least / exact:.2%} of {exact}), which the fewest bits in every layer "
            f"take; got {budget}"
        )


def _outcome(probe: Probe, items: dict[str, Choices], bits: dict[str, int]) -> Outcome:
    chosen = [items[name][number] for name, number in bits.items()]
    predicted = math.sqrt(sum(error for _, error in chosen))
    return Outcome(sum(size for size, _ in chosen), predicted, probe.measured_error(bits))


def _calibrated(probe: Probe, name: str, former: CodeTable) -> CalibratedLayer:
    """The calibration's entry of a layer that already has its table."""
    coded, histogram = probe.coded[name], probe.histograms.get(name)
    if histogram is None or not histogram.elements:
        return layer_of(coded, coded.table, StreamingHistogram())
    seen = histogram.seen(probe.by_gradient[name])
    errors = {when: relative_errors(seen, table, coded) for when, table in (("before", former), ("after", coded.table))}
    return layer_of(coded, coded.table, histogram, mean=histogram.mean, std=histogram.std, **errors)
