"""Whole models: make torch's modules keep codes, in place, and make them torch's again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn

from fewbit import activations
from fewbit.coders import JOINT
from fewbit.constants import CODINGS, DEFAULT_BITS
from fewbit.design.table import CodeTable, check_bits
from fewbit.errors import DesignError, InputError
from fewbit.nn import activations as activation_modules
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CLASSES, CodedLayer
from fewbit.store import load_table

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]
_BEFORE = "_before_fewbit"  # the attribute of a converted module that holds what `revert` needs


def convert(
    model: Model,
    bits: int = DEFAULT_BITS,
    inputs: int | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    coding: str | None = None,
    sample: Any = None,
) -> Model:
    """Let the modules of a model keep codes for backward, in place. The forward pass stays as it is, bit for bit.

    model      its modules are converted by type, those of exactly a class in torch.nn: activations, and with `inputs` linear
               layers, convolutions, norms and GLU too. Subclasses stay as they are. Each module remains the same object, with
               its weights, hooks, names and state, and only changes its class. What was converted before is converted anew.
    bits       of the codes of activations, 1 to 8
    inputs     bits of the codes of what weights and norms read, 1 to 8; None leaves these layers exact. Activations then make
               one code for their own backward and for the layers that read them, of the larger of both numbers of bits.
    filter_fn  of a module and its dotted name: whether to convert it
    coding     of the tables, as in `fewbit.design`; None for the optimal one
    sample     a batch, by which conversions that would keep more bytes are found and left out: a tensor, a tuple or list of
               arguments, or a mapping of them. `fewbit.left_out(model)` tells why, and so does the log "fewbit".
    Returns    the model

    Raises DesignError (bits, coding) or InputError (no module) before anything is changed.

    >>> model = convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), bits=4, inputs=4)
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True, bits=4)
      (1): GELU(approximate='none', bits=4, shared=True)
      (2): Linear(in_features=16, out_features=8, bias=True, bits=4)
    )
    >>> revert(model)[1]
    GELU(approximate='none')
    """
    _check_model("convert", model)
    check_bits(bits, DesignError)
    if coding is not None and coding not in CODINGS:
        raise DesignError(f"coding must be one of {CODINGS}, got {coding!r}")
    if inputs is not None:
        check_bits(inputs, DesignError)
    filter_fn = _with_sample(model, bits, inputs, filter_fn, coding, sample)
    twins = _twins()
    plan: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    for name, module in model.named_modules():
        torch_class, *_ = vars(module).get(_BEFORE, (type(module),))
        coded_class = twins.get(torch_class)
        if coded_class is None or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if issubclass(coded_class, CodedActivation):
            plan.append((module, coded_class, _activation_attributes(module, coded_class, bits, inputs, coding)))
        elif inputs is not None:
            plan.append((module, coded_class, _layer_attributes(coded_class, inputs, coding)))
    for module, coded_class, attributes in plan:
        _revert_module(module)
        attributes = {name: value for name, value in attributes.items() if vars(module).get(name, _BEFORE) != value}
        before = {name: vars(module)[name] for name in attributes if name in vars(module)}
        module.__dict__.update({_BEFORE: (type(module), before, tuple(attributes)), **attributes})
        module.__class__ = coded_class
    return model


def revert(model: Model) -> Model:
    """Make what `convert` changed torch's own again, in place; modules that were built as fewbit's stay. Returns the model."""
    _check_model("revert", model)
    for module in model.modules():
        _revert_module(module)
    return model


def is_converted(module: nn.Module) -> bool:
    """Whether `revert` would change it."""
    return _BEFORE in vars(module)


def _with_sample(
    model: nn.Module, bits: int, inputs: int | None, filter_fn: Filter | None, coding: str | None, sample: Any
) -> Filter | None:
    """The filter, less what would keep more bytes for this sample."""
    from fewbit.models import plan

    if sample is None:
        plan.forget_left_out(model)
        return filter_fn
    left_out = plan.leave_out(model, plan.Setting(bits, inputs, filter_fn, coding), sample)
    return lambda module, name: name not in left_out and (filter_fn is None or filter_fn(module, name))


def _revert_module(module: nn.Module) -> None:
    if _BEFORE in vars(module):
        module.__class__, before, names = vars(module).pop(_BEFORE)
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(before)


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} takes a torch.nn.Module, got {type(model).__name__}")


@cache
def _layer_twins() -> dict[type[nn.Module], type[nn.Module]]:
    return {getattr(nn, name): coded for name, coded in CLASSES.items() if hasattr(nn, name)}


def _twins() -> dict[type[nn.Module], type[nn.Module]]:
    """fewbit's class for each of torch's."""
    names = {activations.get(name).module for name in activations.names() if name in activations.BUILT_IN}
    found = {getattr(nn, name): activation_modules.module(name) for name in names if hasattr(nn, name)}
    return {**{torchs: ours for torchs, ours in found.items() if ours is not None}, **_layer_twins()}


def _activation_attributes(
    module: nn.Module, coded_class: type[CodedActivation], bits: int, inputs: int | None, coding: str | None
) -> dict[str, Any]:
    shared = inputs is not None
    if shared:
        bits = max(bits, inputs)
    table = None
    if coding is not None:
        record = coded_class.record_of(module)
        table = load_table(record, bits, coding=coding, channels=JOINT if shared else ("derivative",))
    return {"inplace": getattr(module, "inplace", False), "shared": shared, **_code(bits, table)}


def _layer_attributes(coded_class: type[nn.Module], inputs: int, coding: str | None) -> dict[str, Any]:
    assert issubclass(coded_class, CodedLayer), "all but activations are"
    table = None
    if coding is not None:
        gate = coded_class.gate
        table = load_table(gate or "identity", inputs, coding=coding, channels=JOINT if gate else ("value",))
    return {"rounding": "nearest", **_code(inputs, table)}


def _code(bits: int, table: CodeTable | None) -> dict[str, Any]:
    return {"bits": bits if table is None else None, "table": table}
