"""Watch a training run: do the inputs of coded activations still look like what their tables were designed for?"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Group, RenderableType
from torch import nn

from fewbit import terminal
from fewbit.autograd import exact as exact_mode
from fewbit.autograd import sharing
from fewbit.design.table import CodeTable
from fewbit.errors import DesignError, DriftWarning, InputError
from fewbit.models.arguments import check_model
from fewbit.models.modules import CodedModule, describe, pre_activation
from fewbit.models.report import Report
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer
from fewbit.record import Activation, plural
from fewbit.torch_internals import is_watched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tensor = torch.Tensor
Array = np.ndarray
# Heuristic. Twice an error of 1e-3 does no harm. Tables with smaller design errors are compared with this one instead: tables
# of many bits, and exact ones such as ReLU's.
SMALLEST_DESIGN = 1e-3
SMALLEST_TRUE = 1e-6  # so that the relative error is finite where all derivatives are 0


def watch(model: nn.Module, every: int = 100, *, factor: float = 2.0, samples: int = 1024, history: int = 200) -> Watch:
    """Check now and then, in training, whether the inputs of coded activations have drifted away from their tables.

    A check takes a random sample of a layer's input. It compares what backward will read with the exact numbers: the
    derivative, and with shared codes also the value. A `fewbit.DriftWarning` says what was seen and what to do if the relative
    error is more than `factor` times the error of the table's design, and chance in the sample does not explain it. The same
    layer warns again only after its error has been below the limit.

    model    A model with coded activations or gated units (GLU, SwiGLU, GEGLU, ReGLU) as modules. Linear layers, convolutions
             and norms are not watched: what they keep is standardized in every pass, so a drift of scale does not reach it.
    every    Forward passes of a layer between checks, on average. The moment is random, so that all calls of a shared module
             get their turn. Only passes that make codes count.
    factor   A check warns above this multiple of the design's error. The default 2 is a heuristic. A table without a known
             design error is compared with its first check.
    samples  how many elements of the input a check looks at
    history  how many checks of each layer are remembered
    Returns  the Watch. `report()` tells what was seen. `remove()` ends it, and so does the end of a `with` block.

    Gradients, `state_dict` and the global random numbers stay as they are. Copies and pickles of the model are not watched. A
    check waits for the device, other passes do not. Compiled code is not watched: it skips the checks, without a graph break.

    Raises InputError if the model has nothing to watch, and DesignError for numbers out of range.

    >>> import fewbit
    >>> model = nn.Sequential(nn.Linear(8, 8), fewbit.Tanh(table=fewbit.load_table("tanh", 3)))
    >>> with watch(model, every=1) as watching, warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = model(100 * torch.randn(64, 8))
    >>> str(caught[0].message).partition(":")[0]
    '1 (Tanh) drifted away from its table'
    """
    check_model("watch", model)
    for name, value in (("every", every), ("samples", samples), ("history", history)):
        if not isinstance(value, int) or value < 1:
            raise DesignError(f"{name} must be a positive integer, got {value!r}")
    if not factor > 1:
        raise DesignError(f"factor must be more than 1, the design's own error, got {factor!r}")
    return Watch(model, every, factor, samples, history)


class Check(NamedTuple):
    """What a check saw.

    call       number of the forward pass
    mean, std  of the sampled inputs
    channel    the channel with the largest error: "derivative" or "value"
    error      its relative error
    design     the error that it is compared with: the design's, or a substitute
    drifted    whether the layer has drifted
    """

    call: int
    mean: float
    std: float
    channel: str
    error: float
    design: float
    drifted: bool

    @property
    def ratio(self) -> float:
        return self.error / self.design


@dataclass
class Layer:
    """One watched module: how often it ran, and its last checks."""

    name: str
    module: nn.Module
    checks: deque[Check]
    calls: int = 0
    next_check: int = 1
    drifted: bool = False
    warnings: int = 0
    baseline: dict[str, float] = field(default_factory=dict)  # channel -> error of the first check, for tables without one


class Watch:
    """A running watch, as `watch` starts it. It ends at `remove()`, or at the end of a `with` block."""

    def __init__(self, model: nn.Module, every: int, factor: float, samples: int, history: int):
        self.every, self.factor, self.samples = every, factor, samples
        self._generator = np.random.default_rng(0)
        self.layers = [
            Layer(name, module, deque(maxlen=history)) for name, module in model.named_modules() if _gate(module) is not None
        ]
        if not self.layers:
            raise InputError(
                "watch looks at coded activations and gated units, and the model has none; fewbit.convert(model) converts "
                "activations that are modules. Activations that code calls as functions cannot be watched"
            )
        self._handles = [each.module.register_forward_pre_hook(_Hook(self, each), with_kwargs=True) for each in self.layers]

    def remove(self) -> None:
        """Stop watching. `report()` still tells what was seen."""
        for each in self._handles:
            each.remove()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Watch of {plural(len(self.layers), 'layer')}: {self.report().verdict}"

    def report(self) -> Drift:
        """What was seen of each layer so far."""
        return Drift([copy.copy(each) for each in self.layers], self.factor)

    def see(self, layer: Layer, x: Any) -> None:
        """Count a forward pass on x, and look at it if a check is due."""
        if not isinstance(x, Tensor) or not x.requires_grad or x.numel() == 0 or is_watched(x) or exact_mode.is_active():
            return
        layer.calls += 1
        if layer.calls < layer.next_check:
            return
        layer.next_check = layer.calls + int(self._generator.integers(1, 2 * self.every))
        gate = _gate(layer.module)
        if gate is None or _has_its_sign_from_before(layer.module, x):
            return
        sample = self._sample(x)
        if sample.size:
            self._note(layer, _check(layer, sample, gate.record, gate.table_for(_spread(sample)), self.factor))

    def _sample(self, x: Tensor) -> Array:
        """Finite elements of x in float64, drawn at random if it has more than `samples`."""
        x = x.detach()
        if x.numel() > self.samples:
            x = x.take(torch.from_numpy(self._generator.integers(x.numel(), size=self.samples)).to(x.device))
        found = x.double().cpu().numpy().ravel()
        return found[np.isfinite(found)]

    def _note(self, layer: Layer, check: Check) -> None:
        layer.checks.append(check)
        warns = check.drifted and not layer.drifted
        layer.drifted = check.drifted or (layer.drifted and check.ratio > self.factor)
        if warns:
            layer.warnings += 1
            warnings.warn(_message(layer, check), DriftWarning, stacklevel=2)


class _Hook:
    """What a watched module calls before each forward pass. Copies and pickles of it do nothing."""

    def __init__(self, watching: Watch, layer: Layer):
        self._watching, self._layer = watching, layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if module.training and torch.is_grad_enabled():
            self._watching.see(self._layer, pre_activation(module, args, kwargs))

    def __deepcopy__(self, memo: dict) -> Any:
        return _not_watched

    def __reduce__(self) -> Any:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Any:
    return _not_watched


def _not_watched(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Replaces the hook in a copy of a watched model."""


def _gate(module: nn.Module) -> CodedModule | None:
    """The description of a module that codes what it reads; None for other modules."""
    if not isinstance(module, CodedActivation | CodedLayer):
        return None
    coded = describe("", module)
    return coded if coded.calibrates else None


def _spread(x: Array) -> float:
    """The spread of the sample x (n,), by which the table of a ladder is chosen."""
    with np.errstate(over="ignore"):
        return float((np.square(np.square(x)).mean() / 3) ** 0.25)


def _has_its_sign_from_before(module: nn.Module, x: Tensor) -> bool:
    """Whether an activation of two straight lines reads the codes of the norm before it, so that its table is not used."""
    recipe = sharing.find(x)
    return isinstance(module, CodedActivation) and recipe is not None and recipe.by_sign is not None and bool(module.shared)


def _check(layer: Layer, x: Array, record: Activation, table: CodeTable, factor: float) -> Check:
    """Check the sample x (n,): the channel whose error is the largest multiple of its design's error."""
    found = []
    designs = np.atleast_1d(table.relative_rms)
    read = np.atleast_2d(table(x))
    for channel, design, values in zip(table.channels, designs, read, strict=True):
        true = record.df(x) if channel == "derivative" else record.f(x)
        error = _relative_rms(values - true, true)
        if not math.isfinite(design):
            design = layer.baseline.setdefault(channel, error)
        design = max(float(design), SMALLEST_DESIGN)
        drifted = _beyond_chance(values - true, true, factor * design)
        found.append(Check(layer.calls, float(x.mean()), float(x.std()), channel, error, design, drifted))
    return max(found, key=lambda check: (check.drifted, check.ratio))


def _relative_rms(error: Array, true: Array) -> float:
    """As CodeTable.relative_rms: root mean square of the error over that of the true values, or over SMALLEST_TRUE."""
    return float(np.sqrt(np.square(error).mean() / max(np.square(true).mean(), SMALLEST_TRUE**2)))


def _beyond_chance(error: Array, true: Array, limit: float) -> bool:
    """Whether the relative error is above the limit by more than chance explains in a sample of this size.

    The mean of error² - limit² true² must be positive by more than three of its standard errors. Fieller (1954) compares a
    ratio of means in this way. Inputs just on the limit give one false alarm in some 700 checks. Inputs as designed for, with
    errors of half the limit, give far fewer: `tests/models/gradients/test_watch.py` counts them.
    """
    excess = np.square(error) - limit**2 * np.square(true)
    return bool(excess.mean() > 3 * excess.std() / math.sqrt(excess.size))


def _message(layer: Layer, check: Check) -> str:
    name = layer.name or "the model itself"
    return (
        f"{name} ({type(layer.module).__name__}) drifted away from its table: in forward pass {check.call} the error of its "
        f"{check.channel} is {check.error:.3g}, {check.ratio:.1f} times the design's {check.design:.3g}, for inputs of mean "
        f"{check.mean:.3g} and standard deviation {check.std:.3g}; design its table for such inputs with fewbit.calibrate, or "
        "give the layer more bits"
    )


class Drift(Report):
    """What a Watch saw.

    It prints one row for each layer, the worst first. It exports all remembered checks and plots them over time.
    """

    def __init__(self, layers: list[Layer], factor: float):
        self.layers, self.factor = [copy.copy(each) for each in layers], factor
        self._checks = {each.name: list(each.checks) for each in layers}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer, with its last check, or None if there was none."""
        return [self._row(layer) for layer in self.layers]

    def _row(self, layer: Layer) -> dict[str, Any]:
        row = {"layer": layer.name, "type": type(layer.module).__name__, "calls": layer.calls, "warnings": layer.warnings}
        checks = self._checks[layer.name]
        names = ("channel", "error", "design", "mean", "std")
        last = {name: getattr(checks[-1], name) if checks else None for name in names}
        ratios = {"ratio": checks[-1].ratio, "largest_ratio": max(each.ratio for each in checks)} if checks else {}
        return {
            **row,
            "drifted": layer.drifted,
            **last,
            "ratio": ratios.get("ratio"),
            "largest_ratio": ratios.get("largest_ratio"),
        }

    def totals(self) -> dict[str, Any]:
        """The number of layers, which of them have drifted, and `factor`."""
        drifted = [layer.name for layer in self.layers if layer.drifted]
        return {"layers": len(self.layers), "drifted": drifted, "factor": self.factor, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One line."""
        drifted = [layer.name for layer in self.layers if layer.drifted]
        if drifted:
            more = ", …" if len(drifted) > 5 else ""
            return f"{len(drifted)} of {len(self.layers)} layers drifted away from their tables: {', '.join(drifted[:5])}{more}"
        if not any(self._checks.values()):
            return "nothing checked yet: only training in eager code, with gradients, is watched"
        return f"none of {len(self.layers)} layers drifted: all errors are within {self.factor:g} times the designs' errors"

    def view(self) -> RenderableType:
        """The layers, and what the columns mean."""
        table = terminal.table(
            ("layer",), ("calls", "channel", "error", "design", "ratio", "largest", "inputs'\nmean", "std", "warnings")
        )
        for row in sorted(self.rows(), key=lambda row: -(row["ratio"] or 0))[:30]:
            figures = [_cell(row[name]) for name in ("error", "design", "ratio", "largest_ratio", "mean", "std")]
            table.add_row(row["layer"] or "(model)", str(row["calls"]), row["channel"] or "–", *figures, str(row["warnings"]))
        more = [f"{len(self.layers) - 30} more layers have smaller ratios"] if len(self.layers) > 30 else []
        return Group(self.verdict, "", table, *more)

    def figure(self) -> Figure:
        """Error over the design's error, against forward passes, one line for each layer."""
        from fewbit.plots.gradients import plot_drift

        courses = {name or "(model)": [(each.call, each.ratio) for each in checks] for name, checks in self._checks.items()}
        return plot_drift(courses, self.factor, self.verdict)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
