"""How a conversion changes the modules of a model, and how it is undone. Users call `convert.py`."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from fewbit.design.request import Request
from fewbit.design.table import CodeTable
from fewbit.errors import ActivationError, DesignError, InputError
from fewbit.models.arguments import Filter
from fewbit.models.conversion import again, classes
from fewbit.models.conversion.interception import Interception
from fewbit.models.conversion.setting import Setting
from fewbit.models.preserve import structure_restored_on_error
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer
from fewbit.record import Activation
from fewbit.torch_internals import registered

_BEFORE = "_before_fewbit"  # the attribute of a converted module that holds what `revert` needs
_NO_FORWARD = nn.Module.forward  # the forward of modules that have none, such as a ModuleList
CALLS = "calls"  # the kind of modules whose calls of torch's functions are intercepted


class Converted(NamedTuple):
    """A module that was converted: its dotted name, the module, and the kind of what it keeps, or CALLS."""

    name: str
    module: nn.Module
    kind: str


def convert_modules(
    model: nn.Module,
    setting: Setting,
    filter_fn: Filter | None = None,
    *,
    recompute: Collection[str] = (),
    keep_others: bool = False,
) -> list[Converted]:
    """Convert the modules whose kind is in the setting, and undo the conversion of all others. Returns what was converted.

    recompute    names of modules whose forward is to run again in backward
    keep_others  leave alone the modules that were converted before

    The filter sees each module as it is without fewbit. After an error the model is as before.
    """
    with structure_restored_on_error(model):
        if not keep_others:
            revert_modules(model)
        changes = _changes(model, setting, filter_fn)
        intercepted = _interceptions(model, setting, filter_fn, {each.name for each in changes}, keep_others)
        _let_run_again(model, recompute, intercepted, {each.name for each in changes})
        changes += intercepted.values()
        for change in changes:
            change.apply()
    return [Converted(each.name, each.module, each.kind) for each in changes if each.kind]


def revert_modules(model: nn.Module) -> list[nn.Module]:
    """Give converted modules their former classes again. Returns the modules that were changed."""
    found = [module for module in model.modules() if is_converted(module)]
    for module in found:
        _revert_module(module)
    return found


def is_converted(module: nn.Module) -> bool:
    """Whether `revert` would change the module."""
    return _BEFORE in vars(module)


def conversion_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Dotted name of each converted module -> the attributes that the conversion set, with their values of now: bits and table
    of a coded module, the interception of a module whose calls are intercepted."""
    return {
        name: again.attributes_meant({each: vars(module)[each] for each in vars(module)[_BEFORE][2]})
        for name, module in model.named_modules()
        if is_converted(module)
    }


def convert_again(model: nn.Module, conversion: Mapping[str, dict[str, Any]]) -> None:
    """Convert exactly the modules of these names, with the attributes that `conversion_of` gave.

    InputError if the model lacks a name, or if a module cannot be converted in this way. The model is then as before.
    """
    with structure_restored_on_error(model):
        revert_modules(model)
        modules, candidates = dict(model.named_modules()), {each.name: each for each in _candidates(model, None)}
        for name, attributes in conversion.items():
            if name not in modules:
                raise InputError(f"the model has no module {name!r}, which the conversion names; is it the model of the file?")
            own, found = classes.own_class(modules[name]), candidates.get(name)
            coded = classes.intercepted_class(own) if "interception" in attributes else found and found.coded
            if coded is None or _names_in_use(modules[name], own, coded, attributes):
                raise InputError(
                    f"{name!r}, a {own.__name__}, cannot be converted as the file says; is it the model of the file?"
                )
            _Change(name, modules[name], "", own, coded, attributes).apply()


def left_exact(model: nn.Module, setting: Setting) -> dict[str, list[str]]:
    """Reason -> names of the modules whose class could be converted with this setting, but that are left exact."""
    twins, found = classes.torch_twins(), defaultdict(list)
    for name, module in model.named_modules():
        own = classes.own_class(module)
        coded = classes.coded_class(own, twins)
        kind = getattr(coded, "coded_kind", "")
        if coded is None or not setting.codes(kind):
            continue
        if not classes.runs_its_forward(module, own):
            found["others have replaced the forward; convert before that"].append(name)
        elif _has_a_table(module, coded):
            used = _names_in_use(module, own, coded, _attributes(module, coded, kind, setting))
            if used:
                found[f"they use names of fewbit's, {', '.join(sorted(used))}; rename those attributes"].append(name)
    return found


@dataclass
class _Change:
    """A conversion of one module: its own class, fewbit's class that replaces it, and the attributes to set."""

    name: str
    module: nn.Module
    kind: str
    own: type[nn.Module]
    coded: type[nn.Module]
    attributes: dict[str, Any]

    def apply(self) -> None:
        state, attributes = vars(self.module), again.attributes_set(self.attributes)
        before = {name: state[name] for name in attributes if name in state}
        state.update({_BEFORE: (self.own, before, tuple(attributes)), **attributes})
        classes.exchange(self.module, self.own, self.coded)


def _revert_module(module: nn.Module) -> None:
    own, before, names = vars(module).pop(_BEFORE)
    coded = classes.fewbits_class(module, own)
    if coded is not None:
        classes.exchange(module, coded, own)
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(before)


def _changes(model: nn.Module, setting: Setting, filter_fn: Filter | None) -> list[_Change]:
    """The changes of modules that become coded modules."""
    found = []
    for name, module, own, coded in _candidates(model, filter_fn):
        kind = coded.coded_kind  # type: ignore[attr-defined]
        if setting.codes(kind) and _has_a_table(module, coded):
            attributes = _attributes(module, coded, kind, setting)
            if not _names_in_use(module, own, coded, attributes):
                found.append(_Change(name, module, kind, own, coded, attributes))
    return found


def _interceptions(
    model: nn.Module, setting: Setting, filter_fn: Filter | None, coded: Collection[str], keep_others: bool
) -> dict[str, _Change]:
    """Name -> change of the modules with a forward of their own, which will run under an interception. Modules inside them that
    must stay exact get an interception that codes nothing.

    coded  names of modules that are coded themselves
    """
    settings, nothing, found = Interception(setting), Interception(None), {}
    for name, module in model.named_modules():
        own = classes.own_class(module)
        passes = filter_fn is None or filter_fn(module, name)
        if name in coded or (passes and not classes.calls_functions(own)) or is_converted(module):
            continue
        if not passes and (keep_others or not any(each in found for each in _around(name))):
            continue
        attributes = {"interception": settings if passes else nothing}
        intercepted = classes.intercepted_class(own) if classes.runs_its_forward(module, own) else None
        if intercepted is not None and not _names_in_use(module, own, intercepted, attributes):
            found[name] = _Change(name, module, CALLS if passes else "", own, intercepted, attributes)
    return found


def _let_run_again(model: nn.Module, names: Collection[str], intercepted: dict[str, _Change], coded: Collection[str]) -> None:
    """Let the modules of these names run again in backward. Their changes in `intercepted` get an attribute that says so;
    modules that are not intercepted yet are added to it.

    coded  names of modules that are coded themselves

    InputError if the model lacks a name, and for modules whose forward is not their class's.
    """
    modules, nothing = dict(model.named_modules()), Interception(None)
    own_names = {module: name for name, module in modules.items()}
    all_names = {name: own_names[module] for name, module in model.named_modules(remove_duplicate=False)}

    def let(name: str, way: bool | str) -> None:
        if name not in intercepted:
            module, own = modules[name], classes.own_class(modules[name])
            around = next((intercepted[each] for each in reversed(_around(name)) if each in intercepted), None)
            attributes = {"interception": nothing if around is None else around.attributes["interception"]}
            may = name not in coded and classes.runs_its_forward(module, own) and own.forward is not _NO_FORWARD
            found = classes.intercepted_class(own) if may else None
            if found is None or is_converted(module) or _names_in_use(module, own, found, attributes):
                raise InputError(
                    f"{name!r}, a {own.__name__}, cannot run again in backward; name a module around it, or those in it"
                )
            intercepted[name] = _Change(name, module, "", own, found, attributes)
        attributes = intercepted[name].attributes
        intercepted[name].attributes = {**attributes, again.ATTRIBUTE: attributes.get(again.ATTRIBUTE, way)}

    for name in names:
        if name not in all_names:
            near = "".join(f"; did you mean {each!r}?" for each in difflib.get_close_matches(name, all_names, n=1))
            raise InputError(f"recompute names a module {name!r}, which the model does not have{near}")
        name = all_names[name]  # the first name, if a module has several
        let(name, way := again.way_of(modules[name]))
        for each in _around(name) if way == again.ITSELF else ():
            if again.follows(modules[each]):
                let(each, again.INSIDE)


def _around(name: str) -> list[str]:
    """The names of the modules around a module, from the outside in. The first is the model's, which is empty.

    >>> _around("blocks.0.norm"), _around("")
    (['', 'blocks', 'blocks.0'], [])
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:number]) for number in range(len(parts))]


class _Candidate(NamedTuple):
    """A module that can be converted: its dotted name, its own class, and the class that will replace it."""

    name: str
    module: nn.Module
    own: type[nn.Module]
    coded: type[nn.Module]


def _candidates(model: nn.Module, filter_fn: Filter | None) -> list[_Candidate]:
    """The modules of the model that can be converted and that the filter lets pass."""
    twins, found = classes.torch_twins(), []
    for name, module in model.named_modules():
        own = classes.own_class(module)
        coded = classes.coded_class(own, twins)
        if coded is not None and classes.runs_its_forward(module, own) and (filter_fn is None or filter_fn(module, name)):
            found.append(_Candidate(name, module, own, coded))
    return found


def _has_a_table(module: nn.Module, coded: type[nn.Module]) -> bool:
    """Whether a table for the module can exist. It cannot for an activation whose parameters make its derivative infinite."""
    try:
        return not issubclass(coded, CodedActivation) or _is_finite(coded.record_of(module))
    except ActivationError:
        return False


@lru_cache(maxsize=256)
def _is_finite(record: Activation) -> bool:
    try:
        Request.of(record).check_finite()
    except DesignError:
        return False
    return True


def _names_in_use(module: nn.Module, own: type[nn.Module], coded: type[nn.Module], attributes: Collection[str]) -> set[str]:
    """Names of attributes that the module would get, or that fewbit's class has, but that the module already uses itself."""
    ours = {name for each in coded.__mro__ if each not in own.__mro__ for name in vars(each) if not name.startswith("__")}
    ours.update(attributes)
    # torch's modules have `inplace`, `name` and `record` are read from the class, and others may wrap `forward`
    plain = vars(module).keys() - {"inplace", "name", "record", "forward"}
    return ours & {*plain, *(name for entries in registered(module).values() for name in entries)}


def _attributes(module: nn.Module, coded: type[nn.Module], kind: str, setting: Setting) -> dict[str, Any]:
    """The attributes that a module of this class and kind gets with this setting."""
    bits = setting.bits_of(kind)
    if issubclass(coded, CodedActivation):
        table = None if setting.coding is None else setting.activation_table(coded.record_of(module))
        of_torch = {} if hasattr(module, "inplace") else {"inplace": False}
        return {**of_torch, "shared": setting.shares, **_code(bits, table)}
    if issubclass(coded, CodedLayer):
        table = None if setting.coding is None else setting.layer_table(kind, coded.gate)
        return {"rounding": "nearest", **_code(bits, table)}
    return {}


def _code(bits: int | None, table: CodeTable | None) -> dict[str, Any]:
    return {"bits": bits if table is None else None, "table": table}
