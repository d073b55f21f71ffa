"""Save and load conversions: which modules code what, with which bits and tables. The files belong beside checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fewbit import files
from fewbit.constants import MAX_BITS
from fewbit.design.table import VERSION, CodeTable, parse_entries, read_text
from fewbit.errors import DesignError, InputError, TableError, TableFileError
from fewbit.models.arguments import check_model
from fewbit.models.conversion import again
from fewbit.models.conversion.engine import conversion_of, convert_again
from fewbit.models.conversion.interception import Interception
from fewbit.models.conversion.setting import Setting
from fewbit.text import shown

Model = TypeVar("Model", bound=nn.Module)
FORMAT = "fewbit-conversion"
MOST_BYTES = 1 << 28
_FLAGS = ("shared", "inplace")
_ROUNDINGS = ("nearest", "stochastic")


def save(model: nn.Module, path: str | Path) -> None:
    """Write the conversion of a model to a file: which modules are converted, with their bits and tables.

    The file belongs beside the model's weights. The state_dict is torch's own and holds no codes. To go on with a saved run,
    make the model anew, load its weights, and call `load` with this file. The run then goes on bit for bit.

    Raises InputError if `model` is not a module or is not converted, and OSError as open() does.
    """
    files.write(path, to_text(model))


def to_text(model: nn.Module) -> str:
    """The text that `save` writes, for checkpoints that hold texts."""
    conversion = conversion_of(check_model("save", model))
    if not conversion:
        raise InputError("the model is not converted, so there is nothing to save; call fewbit.convert(model) first")
    lines = ",\n".join("  " + json.dumps({"name": name, **_entries(attributes)}) for name, attributes in conversion.items())
    head = f'"format": "{FORMAT}",\n "version": {VERSION}'
    return f'{{\n {head},\n "modules": [\n{lines}\n ]\n}}\n'


def load(model: Model, path: str | Path) -> Model:
    """Convert a model in the way that `save` wrote to the file. Returns the model.

    A former conversion is undone first. Raises TableFileError, which names the file, if the file is damaged or of another kind.
    Raises InputError if `model` is not a module, lacks modules of the saved names, or has modules of other classes there. The
    model is then as before.
    """
    check_model("load", model)
    return from_text(model, read_text(path, MOST_BYTES), str(path))


def from_text(model: Model, text: str, origin: str) -> Model:
    """Like `load`, from the text that `to_text` gave. origin: the name of the text in errors"""
    inner = check_model("load", model)
    conversion: dict[str, dict[str, Any]] = {}
    interceptions: dict[Setting | None, Interception] = {}  # modules of one setting share one object, as after `convert`
    for each in parse_entries(text, origin, FORMAT, "modules"):
        try:
            name = each.pop("name")
            if "interception" in each:
                setting = _setting(each)
                conversion[name] = {**each, "interception": interceptions.setdefault(setting, Interception(setting))}
            else:
                conversion[name] = _attributes(each)
        except (TableError, DesignError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise TableFileError(
                f"{origin} holds a broken module, {shown(each)} ({error}); save the conversion anew"
            ) from error
    convert_again(inner, conversion)
    return model


def _entries(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that a conversion set on a module, as plain numbers and texts."""
    found = dict(attributes)
    if isinstance(table := found.get("table"), CodeTable):
        found["table"] = table.to_dict()
    if isinstance(interception := found.get("interception"), Interception):
        found["interception"] = _of_interception(interception)
    return found


def _of_interception(interception: Interception) -> dict[str, Any] | None:
    if interception.setting is None:
        return None
    return {"bits": dict(interception.setting.by_kind), "coding": interception.setting.coding}


def _setting(entries: dict[str, Any]) -> Setting | None:
    """The setting of a module whose calls are intercepted. Raises for entries that `_entries` would not have made."""
    if set(entries) - {again.ATTRIBUTE} != {"interception"} or entries.get(again.ATTRIBUTE, True) not in again.VALUES:
        raise ValueError("a module whose calls are intercepted has no codes of its own")
    given = entries["interception"]
    return None if given is None else Setting.of(given["bits"], given["coding"])


def _attributes(entries: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a coded module. Raises for entries that `_entries` would not have made."""
    if unknown := set(entries) - {"bits", "table", "rounding", *_FLAGS}:
        raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
    found = dict(entries)
    if found.get("table") is not None:
        found["table"] = CodeTable.from_dict(found["table"])
        found["table"].check()
    bits = found.get("bits")
    if not (bits is None or (type(bits) is int and 1 <= bits <= MAX_BITS)):
        raise ValueError(f"bits cannot be {shown(bits)}")
    flags = [found[each] for each in _FLAGS if each in found]
    if found.get("rounding", "nearest") not in _ROUNDINGS or any(type(each) is not bool for each in flags):
        raise ValueError("rounding must be nearest or stochastic, shared and inplace must be true or false")
    return found
