"""The result of a calibration: a table for each coded module of a model. It can be printed, saved to a file, and installed on a
model again."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fewbit import files, terminal
from fewbit.constants import CHANNELS
from fewbit.design.table import VERSION, CodeTable, finite, parse_entries, read_text
from fewbit.errors import InputError, TableError, TableFileError
from fewbit.models.arguments import check_model
from fewbit.models.conversion.engine import convert_modules
from fewbit.models.conversion.setting import Setting
from fewbit.models.modules import CodedModule, coded_modules
from fewbit.models.preserve import structure_restored_on_error
from fewbit.models.report import Report
from fewbit.record import label, plural
from fewbit.resolve import JOINT
from fewbit.text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

FORMAT = "fewbit-calibration"
MOST_BYTES = 1 << 28  # largest file that is read: tables of 8 bits for twenty thousand layers
_NUMBER = (int, float, type(None))
_TYPES = {"name": str, "activation": str, "parameters": dict, "elements": int, "not_finite": int}
_TYPES |= {"mean": _NUMBER, "std": _NUMBER}


@dataclass(frozen=True)
class CalibratedLayer:
    """One coded module, the table that it now has, and what was seen of its inputs.

    name                   the module's name in the model
    activation, parameters  what the table is for; "identity" for layers that standardize what they code
    elements, not_finite   how many finite pre-activations were seen, and how many others
    mean, std              of the finite ones; None if there were none
    before, after          relative rms errors by channel, of the former table and of this one, weighted by the histogram of
                           what was seen; None if nothing was seen
    """

    name: str
    activation: str
    parameters: dict[str, float]
    table: CodeTable
    elements: int = 0
    not_finite: int = 0
    mean: float | None = None
    std: float | None = None
    before: tuple[float, ...] | None = None
    after: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**entries, "table": self.table.to_dict(), "before": _listed(self.before), "after": _listed(self.after)}

    @classmethod
    def from_dict(cls, entries: Any) -> CalibratedLayer:
        """The inverse of `to_dict`. Raises TableError for anything else."""
        known = {field.name for field in fields(cls)}
        if not isinstance(entries, dict) or set(entries) != known:
            raise TableError(f"a layer has the entries {', '.join(sorted(known))}; got {shown(entries)}")
        table = CodeTable.from_dict(entries["table"])
        table.check()
        for name, kinds in _TYPES.items():
            if not isinstance(entries[name], kinds) or isinstance(entries[name], bool):
                raise TableError(f"{name} of a layer cannot be {shown(entries[name])}")
        parameters = {name: finite(f"parameter {name}", value) for name, value in entries["parameters"].items()}
        if table.activation is not None and (table.activation, dict(table.parameters)) != (entries["activation"], parameters):
            wanted = label(entries["activation"], parameters)
            raise TableError(f"the table is for {label(table.activation, table.parameters)}, its layer is {wanted}")
        errors = {name: _numbers(name, entries[name]) for name in ("before", "after")}
        if {None if each is None else len(each) for each in errors.values()} not in ({None}, {len(table.channels)}):
            raise TableError(f"before and after of a layer have a number for each of {table.channels}, or both are null")
        single = {name: entries[name] and finite(name, entries[name]) for name in ("mean", "std")}
        return cls(**{**entries, **errors, **single, "parameters": parameters, "table": table})


@dataclass(frozen=True, repr=False)
class Calibration(Report):
    """The tables of a model's coded modules, and how well they fit the inputs that were seen.

    layers       in the order of the model's modules
    by_gradient  whether tables of derivatives and their errors are weighted by the squared gradient at each pre-activation
    """

    layers: tuple[CalibratedLayer, ...]
    by_gradient: bool = False

    def save(self, path: str | Path) -> None:
        """Write the tables and the figures to one JSON file, completely or not at all. Raises OSError as open() does."""
        lines = ",\n".join("  " + json.dumps(layer.to_dict()) for layer in self.layers)
        head = f'"format": "{FORMAT}",\n "version": {VERSION},\n "by_gradient": {json.dumps(self.by_gradient)}'
        files.write(path, f'{{\n {head},\n "layers": [\n{lines}\n ]\n}}\n')

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote. For any other file it raises TableFileError, which names the file and the remedy."""
        text = read_text(path, MOST_BYTES)
        entries = parse_entries(text, str(path), FORMAT, "layers")
        try:
            layers = tuple(CalibratedLayer.from_dict(each) for each in entries)
        except TableError as error:
            raise TableFileError(f"{path} holds a broken layer: {error}; calibrate the model anew") from error
        return cls(layers, json.loads(text).get("by_gradient") is True)

    def install(self, model: nn.Module) -> nn.Module:
        """Put the tables on the modules of the same names. Modules that are not coded yet are converted. Returns the model.

        Raises InputError if a module is missing or cannot be coded. Raises TableError if a module is another activation, has
        other parameters, or codes something else. The model is then as before.
        """
        inner = check_model("install", model)
        with structure_restored_on_error(inner):
            self._convert(inner)
            modules = dict(inner.named_modules())
            if missing := [layer.name for layer in self.layers if layer.name not in modules]:
                raise InputError(
                    f"the model has no module {missing[0]!r} ({len(missing)} of {plural(len(self.layers), 'name')} missing); "
                    "install a calibration on a model of the architecture that it was made with"
                )
            found = {coded.module: coded for coded in coded_modules(inner)}
            for layer in self.layers:
                _install(layer, found.get(modules[layer.name]))  # type: ignore[arg-type]
        return model

    def _convert(self, model: nn.Module) -> None:
        """Convert the modules that are not coded yet; they get their tables later."""
        coded = {id(each.module) for each in coded_modules(model)}
        for setting, joint in ((Setting.of({"activation": 1}), False), (Setting.of(1), True)):
            names = {layer.name for layer in self.layers if (layer.table.channels != ("derivative",)) == joint}

            def wanted(module: nn.Module, name: str, names: set[str] = names) -> bool:
                return name in names and id(module) not in coded

            convert_modules(model, setting, wanted, keep_others=True)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for layer in self.layers:
            row = {"layer": layer.name, "activation": label(layer.activation, layer.parameters), "bits": layer.table.bits}
            row |= {name: getattr(layer, name) for name in ("elements", "not_finite", "mean", "std")}
            for channel in CHANNELS:
                row |= {f"{channel}_{when}": _error(layer, when, channel) for when in ("before", "after")}
            rows.append(row)
        return rows

    def totals(self) -> dict[str, Any]:
        found = {"layers": len(self.layers), "elements": sum(layer.elements for layer in self.layers)}
        found |= {"not_finite": sum(layer.not_finite for layer in self.layers), "by_gradient": self.by_gradient}
        return found | {"rms_before": self._mean("before"), "rms_after": self._mean("after")}

    def _mean(self, when: str) -> float | None:
        """The root mean square over the errors of all layers that ran and all channels."""
        errors = [error for layer in self.layers for error in getattr(layer, when) or ()]
        return sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None

    def view(self) -> RenderableType:
        from rich.console import Group

        joint = any(layer.table.channels == JOINT for layer in self.layers)
        columns = ("elements", "mean", "std", "f' before", "f' after", *(("f before", "f after") if joint else ()))
        view = terminal.table(("layer", "activation"), ("bits", *columns))
        for layer in self.layers:
            cells = [f"{layer.elements:,}" if layer.elements else "–", _number(layer.mean, ".3g"), _number(layer.std, ".3g")]
            for channel in CHANNELS[: 1 + joint]:
                cells += [_number(_error(layer, when, channel), ".4f") for when in ("before", "after")]
            view.add_row(layer.name, label(layer.activation, layer.parameters), str(layer.table.bits), *cells)
        return Group(view, "", self._key())

    def _key(self) -> str:
        totals = self.totals()
        weighted = "; for tables of f' alone also by the squared gradient" if self.by_gradient else ""
        lines = [f"before, after: relative rms error of the table, weighted by the layer's own histogram of inputs{weighted}"]
        if totals["rms_before"] is not None:
            before, after = totals["rms_before"], totals["rms_after"]
            lines.append(f"{plural(len(self.layers), 'layer')}: rms {before:.4f} before, {after:.4f} after")
        if totals["not_finite"]:
            lines.append(f"{totals['not_finite']:,} elements were NaN or infinite and were left out")
        if any(not layer.elements and layer.activation != "identity" for layer in self.layers):
            lines.append("layers that saw no elements keep their former tables")
        return "\n".join(lines)

    def figure(self) -> Figure:
        from fewbit.plots.calibration import plot_calibration

        seen = [layer for layer in self.layers if layer.after is not None]
        panels = {
            channel: [(_error(layer, "before", channel), _error(layer, "after", channel)) for layer in seen]
            for channel in CHANNELS
            if any(channel in layer.table.channels for layer in seen)
        }
        return plot_calibration([layer.name for layer in seen], [layer.table.bits for layer in seen], panels)


def _install(layer: CalibratedLayer, coded: CodedModule | None) -> None:
    if coded is None:
        raise InputError(f"module {layer.name!r} cannot be coded, but the calibration has {layer.activation} there")
    wanted, got = label(layer.activation, layer.parameters), str(coded.record)
    if (layer.activation, layer.parameters) != (coded.record.name, dict(coded.record.parameters)):
        raise TableError(f"module {layer.name!r} is {got}, the calibration's table is for {wanted}; calibrate this model anew")
    if layer.table.channels != coded.channels:
        raise TableError(
            f"module {layer.name!r} needs a table with the channels {coded.channels}, but the calibration's table has "
            f"{layer.table.channels}; revert the model first, or convert it with the same kinds as the calibrated model"
        )
    coded.install(layer.table)


def _error(layer: CalibratedLayer, when: str, channel: str) -> float | None:
    errors = getattr(layer, when)
    return errors[layer.table.channels.index(channel)] if errors and channel in layer.table.channels else None


def _number(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    if values is not None and not (isinstance(values, list) and len(values) <= len(CHANNELS)):
        raise TableError(f"{name} of a layer cannot be {shown(values)}")
    return None if values is None else tuple(finite(name, value) for value in values)


def _listed(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)
