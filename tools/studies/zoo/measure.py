"""Measure one coded model of the zoo: bytes, errors of gradients, and what is still kept exactly."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import nn

import fewbit
from fewbit.models.arguments import loss_in, run
from fewbit.models.memory import saved, trials
from fewbit.models.memory.saved import ACTIVATIONS, Slot, Storage, tensors_in
from fewbit.models.preserve import preserved_state, preserved_structure
from fewbit.torch_internals import storage_key
from tools.studies import common
from tools.studies.zoo.entry import Entry

Tensor = torch.Tensor
Row = dict[str, Any]

BITS, MORE_BITS = 4, 8
NEAR_ZERO = 1e-3
TRIED = 60  # modules; in larger models, a plan does not try single conversions, which takes long


class Pass(NamedTuple):
    """The results of a forward and a backward pass."""

    output: list[Tensor]
    buffers: dict[str, Tensor]
    random_numbers: Tensor
    gradients: dict[str, Tensor]


def measure(entry: Entry) -> Row:
    """All figures of a model. If something goes wrong, `failure` says in which step, and what was raised."""
    row: Row = {"family": entry.family}
    steps = _steps(entry, row)
    doing = "building it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for doing in steps:  # noqa: B007  told where a step raises
                pass
        except Exception as error:
            text = " ".join(str(error).split())
            row["failure"] = f"{doing}: {type(error).__name__}: {text[:300]}"
    return row


def _steps(entry: Entry, row: Row) -> Iterator[str]:
    """Measure step by step, and enter the figures into the row. Before each step, its name is yielded."""
    _seed(0)
    exact = entry.make().train()
    _without_zeros(exact)
    batch = entry.batch()
    yield "exact pass"
    reference = one_pass(copy.deepcopy(exact), batch)
    yield "memory"
    report = _memory(exact, batch)
    row["kept_bytes"] = {"exact": report.activation_bytes}
    yield "conversion"
    models = {bits: common.coded(exact, bits=bits) for bits in (BITS, MORE_BITS)}
    yield "memory of the coded model"
    coded = _memory(models[BITS], batch)
    row["kept_bytes"]["coded"] = coded.activation_bytes
    row["left"], row["codes"] = left(models[BITS], coded.storages, masks(models[BITS], batch))
    yield "plan"
    _seed(1)
    with nullcontext() if len(list(exact.modules())) <= TRIED else mock.patch.object(trials, "choose", _without_trials):
        row["kept_bytes"]["predicted"] = report.plan(bits=BITS).after_bytes
    yield "patch"
    with fewbit.patch(bits=BITS):
        row["kept_bytes"]["patched"] = _memory(models[BITS], batch).activation_bytes
    yield "copy of the coded model"
    duplicate = copy.deepcopy(models[BITS])
    same = _memory(duplicate, batch).activation_bytes == coded.activation_bytes
    found = [*differences(reference, one_pass(duplicate, batch)), *([] if same else ["kept bytes"])]
    row["gradient_errors"], row["differ"] = {}, [f"copy's {each}" for each in found]
    for bits, model in models.items():
        yield f"coded pass, {bits} bits"
        found = one_pass(model, batch)
        row["differ"] += [each for each in differences(reference, found) if each not in row["differ"]]
        row["gradient_errors"][str(bits)] = gradient_error(reference, found)
    if row["differ"]:
        row["exact differs from itself"] = differences(reference, one_pass(exact, batch))


def one_pass(model: nn.Module, batch: Any) -> Pass:
    """Run a pass with the same random numbers each time. It changes the model's buffers and gradients."""
    _seed(1)
    output = run(model, batch)
    loss = loss_in(output)
    assert loss is not None, "the output has no loss"
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    random_numbers = torch.get_rng_state()
    model.zero_grad()
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return Pass([each.detach().clone() for each in tensors_in(output)], buffers, random_numbers, gradients)


def differences(one: Pass, other: Pass) -> list[str]:
    """The names of results of the forward pass that do not have the same bits in both."""
    same = {
        "output": _same(one.output, other.output),
        "buffers": list(one.buffers) == list(other.buffers) and _same(one.buffers.values(), other.buffers.values()),
        "random numbers": torch.equal(one.random_numbers, other.random_numbers),
    }
    return [name for name, equal in same.items() if not equal]


def gradient_error(exact: Pass, other: Pass) -> float:
    """||other - exact|| / ||exact||, over all parameters."""
    missing = exact.gradients.keys() ^ other.gradients.keys()
    assert not missing, f"{', '.join(sorted(missing)[:3])} got a gradient in only one of the two passes"
    both = [
        {common.ALL: torch.cat([each.gradients[name].flatten().double() for name in exact.gradients])}
        for each in (exact, other)
    ]
    error = common.gradient_errors(both[:1], both[1:])[common.ALL]
    assert np.isfinite(error), "the gradient is not finite, or zero"
    return error


def left(model: nn.Module, storages: Iterable[Storage], masks: set[Slot]) -> tuple[dict[str, dict[str, int]], int]:
    """Bytes kept by torch's own operations: operation -> class of the module that runs it -> bytes. And the bytes of all the
    rest: codes, and what is kept with them.

    A storage that several operations keep counts for each of them in equal parts. Operations on masks are listed separately.
    """
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    found: dict[str, Counter[str]] = {}
    codes, own = 0, _own_operations()
    for storage in storages:
        if storage.role != ACTIVATIONS:
            continue
        savers = {each.operation: each.module for each in reversed(storage.savers) if each.operation not in own}
        of_mask = " of a mask" if masks.intersection(storage.slots) else ""
        for operation, module in savers.items():
            by_class = found.setdefault(operation + of_mask, Counter())
            by_class[classes.get(module, "")] += storage.bytes / len(savers)  # type: ignore[assignment]
        codes += 0 if savers else storage.bytes
    by_size = sorted(found.items(), key=lambda each: -sum(each[1].values()))
    return {operation: {name: round(part) for name, part in parts.most_common()} for operation, parts in by_size}, codes


def masks(model: nn.Module, batch: Any) -> set[Slot]:
    """The saved tensors that only hold 0 and one other number, as dropout's masks do."""

    def roles() -> dict[int, str]:
        # the hooks of `record` made tokens of the saved tensors; the graph holds them, and the garbage collector finds them
        tensors = [each.tensor for each in gc.get_objects() if type(each) is saved._Token]
        return {storage_key(each.untyped_storage()): "mask" for each in tensors if _is_mask(each)}

    with preserved_state(model), preserved_structure(model):
        _seed(1)
        storages = saved.record(model, lambda: run(model, batch), roles)
    return {slot for each in storages if each.role == "mask" for slot in each.slots}


def _is_mask(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return True
    least, most = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() > 1 else (tensor, tensor)
    return least.numel() == 1 and bool(least == 0) and bool(most > 0) and bool(((tensor == 0) | (tensor == most)).all())


def _own_operations() -> set[str]:
    """The names of fewbit's autograd functions in reports."""
    pending, found = [torch.autograd.Function], set()
    while pending:
        for each in pending.pop().__subclasses__():
            pending.append(each)
            if each.__module__.startswith("fewbit."):
                found.add(each.__name__.lstrip("_"))
    return found


def _without_trials(_: Any, *arguments: Any) -> trials.Outcome:
    return trials.all_or_none(*arguments)


def _without_zeros(model: nn.Module) -> None:
    """Draw new weights where they begin at zero or close to it, as in many heads and in scales of blocks. Hardly any gradient
    would pass through them, and errors would not be visible."""
    for name, parameter in model.named_parameters():
        if "bias" not in name and bool((parameter.abs() < NEAR_ZERO).all()):
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.constant_(parameter, 0.1)


def _memory(model: nn.Module, batch: Any) -> fewbit.MemoryReport:
    _seed(1)
    return fewbit.memory(model, batch)


def _same(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(map(_same_bits, some, others))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _seed(number: int) -> None:
    """Seed all random numbers that models draw: torch's for dropout, the others for skipped layers and masked spans."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  the one that models draw from
    torch.manual_seed(number)
