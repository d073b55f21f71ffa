"""Whole models: make torch's modules keep codes, in place, and make them torch's again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fewbit.constants import DEFAULT_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import InputError
from fewbit.models.conversion import classes, codes, held
from fewbit.models.conversion.mlp import GatedMLP
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]
_BEFORE = "_before_fewbit"  # the attribute of a converted module that holds what `revert` needs
_FUNCTION = "_function_before_fewbit"  # that of a module in the place of a function: the function


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

    model      its modules are converted by class: activations, torch's and Hugging Face's, and with `inputs` linear layers,
               convolutions, norms, GLU and gated MLPs too, and so are RMS norms and GPT-2's Conv1D as Hugging Face's models
               write them. Subclasses are, if they leave as it is what fewbit replaces: `forward`, mostly. A function that a
               torch.nn.TransformerEncoderLayer or TransformerDecoderLayer has for its activation becomes a module. Each
               module remains the same object, with its weights, hooks, names and state, and only changes its class, for one
               that its own is a base of. What was converted before is converted anew; what was built as fewbit's stays.
    bits       of the codes of activations, 1 to 8
    inputs     bits of the codes of what weights and norms read, 1 to 8; None leaves these layers exact. Activations then make
               one code for their own backward and for the layers that read them, of the larger of both numbers of bits. So
               does the product act(gate) * up in a gated MLP, from codes of gate and up; without `inputs` its activation
               alone is coded, which saves one tensor of the four that such an MLP keeps of its hidden width.
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
    codes.check(bits, inputs, coding)
    filter_fn = _with_sample(model, bits, inputs, filter_fn, coding, sample)
    convert_modules(model, bits, inputs, filter_fn, coding)
    return model


def convert_modules(
    model: nn.Module, bits: int, inputs: int | None, filter_fn: Filter | None = None, coding: str | None = None
) -> None:
    """What `convert` does once its arguments are checked."""
    installed, changes = _plan(model, filter_fn, bits, inputs, coding)
    for layer, name, activation in installed:
        del vars(layer)[name]
        layer.add_module(name, activation)
    for change in changes:
        change.make()


def revert(model: Model) -> Model:
    """Make what `convert` changed torch's own again, in place; modules that were built as fewbit's stay. Returns the model."""
    from fewbit.models.planning.plan import forget_left_out

    _check_model("revert", model)
    forget_left_out(model)
    for module in [*model.modules()]:
        _revert_module(module)
        for name, child in [*module.named_children()]:
            if _FUNCTION in vars(child):
                del module._modules[name]
                setattr(module, name, vars(child)[_FUNCTION])
    return model


def is_converted(module: nn.Module) -> bool:
    """Whether `revert` would change it."""
    return _BEFORE in vars(module)


def _with_sample(
    model: nn.Module, bits: int, inputs: int | None, filter_fn: Filter | None, coding: str | None, sample: Any
) -> Filter | None:
    """The filter, less what would keep more bytes for this sample."""
    from fewbit.models.planning import plan

    if sample is None:
        plan.forget_left_out(model)
        return filter_fn
    left_out = plan.leave_out(model, plan.Setting(bits, inputs, filter_fn, coding), sample)
    return lambda module, name: name not in left_out and (filter_fn is None or filter_fn(module, name))


@dataclass
class _Change:
    """A module's own class, the coded class to take its place, and the attributes to set."""

    module: nn.Module
    own: type[nn.Module]
    coded: type[nn.Module]
    attributes: dict[str, Any]

    def make(self) -> None:
        _revert_module(self.module)
        state = vars(self.module)
        attributes = {name: value for name, value in self.attributes.items() if state.get(name, _BEFORE) != value}
        before = {name: state[name] for name in attributes if name in state}
        state.update({_BEFORE: (self.own, before, tuple(attributes)), **attributes})
        classes.exchange(self.module, self.own, self.coded)


def _revert_module(module: nn.Module) -> None:
    if _BEFORE in vars(module):
        own, before, names = vars(module).pop(_BEFORE)
        coded = classes.fewbits_class(module, own)
        if coded is not None:
            classes.exchange(module, coded, own)
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(before)


def _plan(
    model: nn.Module,
    filter_fn: Filter | None,
    bits: int,
    inputs: int | None,
    coding: str | None,
) -> tuple[list[tuple[nn.Module, str, nn.Module]], list[_Change]]:
    """Modules to install, as (parent, name, module), in the place of functions; and all changes. Nothing is changed yet."""
    twins, known = classes.torch_twins(), {}
    installed, changes = [], {}
    modules = [*model.named_modules()]
    for name, module in modules:
        if function := _activation_function(module):
            installed.append((module, _ACTIVATION, function))
            modules.append((f"{name}.{_ACTIVATION}" if name else _ACTIVATION, function))  # looked at below, in this very loop
        own = vars(module)[_BEFORE][0] if _BEFORE in vars(module) else classes.own_class(module)
        if own not in known:
            known[own] = classes.coded_class(own, twins)
        coded = known[own]
        if coded is None or "forward" in vars(module) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if issubclass(coded, CodedActivation):
            attributes = _activation_attributes(module, coded, bits, inputs, coding)
        elif inputs is not None:
            attributes = _layer_attributes(coded, inputs, coding) if issubclass(coded, CodedLayer) else {}
        else:
            continue
        changes[id(module)] = _Change(module, own, coded, attributes)
    installed = [each for each in installed if id(each[2]) in changes]
    return installed, [each for each in changes.values() if _has_its_gate(each, changes)]


def _has_its_gate(change: _Change, changes: dict[int, _Change]) -> bool:
    """Whether the activation of what may be a gated MLP is, or becomes, a coded one."""
    if not issubclass(change.coded, GatedMLP):
        return True
    activation = change.coded.part_of(change.module, "act")
    return id(activation) in changes or isinstance(activation, CodedActivation)


_ACTIVATION = "activation"  # the attribute of torch's transformer layers


def _activation_function(module: nn.Module) -> nn.Module | None:
    """torch's module for the function that a layer of torch's transformers has for its activation."""
    if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or _ACTIVATION not in vars(module):
        return None
    found = held.module_for(vars(module)[_ACTIVATION])
    if found is not None:
        vars(found)[_FUNCTION] = vars(module)[_ACTIVATION]
        found.train(module.training)
    return found


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} takes a torch.nn.Module, got {type(model).__name__}")


def _activation_attributes(
    module: nn.Module, coded_class: type[CodedActivation], bits: int, inputs: int | None, coding: str | None
) -> dict[str, Any]:
    table = None if coding is None else codes.activation_table(coded_class.record_of(module), bits, inputs, coding)
    code = _code(codes.activation_bits(bits, inputs), table)
    return {"inplace": getattr(module, "inplace", False), "shared": inputs is not None, **code}


def _layer_attributes(coded_class: type[CodedLayer], inputs: int, coding: str | None) -> dict[str, Any]:
    table = None if coding is None else codes.layer_table(coded_class.gate, inputs, coding)
    return {"rounding": "nearest", **_code(inputs, table)}


def _code(bits: int, table: CodeTable | None) -> dict[str, Any]:
    return {"bits": bits if table is None else None, "table": table}
