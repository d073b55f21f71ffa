"""The result of an allocation: the bits of each layer, and the predicted and measured errors."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from fewbit import terminal
from fewbit.models.calibration.calibration import Calibration
from fewbit.models.calibration.knapsack import Choices
from fewbit.models.report import Report
from fewbit.record import plural
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class AllocatedLayer:
    """The bits of one layer.

    activation  what its table is for; "identity" for layers that standardize what they code
    elements    how many numbers it keeps codes of, for one batch
    choices     number of bits -> bytes, and the squared relative error that they add to the gradient's
    """

    name: str
    activation: str
    bits: int
    elements: int
    choices: Choices

    @property
    def bytes(self) -> int:
        """Bytes of its codes."""
        return self.choices[self.bits][0]

    def error(self, bits: int) -> float:
        """The predicted relative error of the gradient from this layer alone."""
        return sqrt(self.choices[bits][1])


class Outcome(NamedTuple):
    """Bytes of all codes, and the relative error ||g̃ - g|| / ||g|| of the gradient of the first batch."""

    bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True, repr=False)
class Allocation(Report):
    """The bits of each coded layer that keeps codes of its own.

    calibration   the tables of these layers, to save, load and install
    budget        bytes that the codes of one batch may take
    exact_bytes   bytes that the coded tensors of one batch take in their own dtype
    outcome       bytes and errors with the chosen bits
    uniform_bits  the largest number of bits that fits the budget if all layers have it
    uniform       bytes and errors with these bits in all layers
    """

    layers: tuple[AllocatedLayer, ...]
    calibration: Calibration
    budget: int
    exact_bytes: int
    outcome: Outcome
    uniform_bits: int
    uniform: Outcome

    @property
    def bits(self) -> dict[str, int]:
        """Bits of each layer, by its name."""
        return {layer.name: layer.bits for layer in self.layers}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer.name,
                "activation": layer.activation,
                "bits": layer.bits,
                "elements": layer.elements,
                "bytes": layer.bytes,
                "predicted_error": layer.error(layer.bits),
                "uniform_predicted_error": layer.error(self.uniform_bits),
            }
            for layer in self.layers
        ]

    def totals(self) -> dict[str, Any]:
        found = {"budget_bytes": self.budget, "exact_bytes": self.exact_bytes, "uniform_bits": self.uniform_bits}
        for prefix, outcome in (("", self.outcome), ("uniform_", self.uniform)):
            found |= {f"{prefix}bytes": outcome.bytes}
            found |= {f"{prefix}predicted_error": outcome.predicted, f"{prefix}measured_error": outcome.measured}
        return found

    def view(self) -> RenderableType:
        from rich.console import Group

        uniform = f"at {plural(self.uniform_bits, 'bit')}"
        view = terminal.table(("layer", "activation"), ("bits", "bytes", "error", uniform))
        for layer in self.layers:
            errors = (f"{layer.error(bits):.4f}" for bits in (layer.bits, self.uniform_bits))
            view.add_row(layer.name, layer.activation, str(layer.bits), f"{layer.bytes:,}", *errors)
        for name, index in (("all, predicted", 1), ("all, measured", 2)):
            errors = (f"{outcome[index]:.4f}" for outcome in (self.outcome, self.uniform))
            view.add_row(name, "", "", f"{self.outcome.bytes:,}", *errors)
        key = (
            "error: predicted error of the gradient, ||g̃ - g|| / ||g||, from this layer alone; "
            "all: from all layers, on the first batch\n"
            f"budget: {self.budget:,} bytes for codes of tensors that take {self.exact_bytes:,} exactly; "
            f"{plural(self.uniform_bits, 'bit')} in every layer take {self.uniform.bytes:,}"
        )
        return Group(view, "", key)

    def figure(self) -> Figure:
        from fewbit.plots.calibration import plot_allocation

        bits, sizes = [layer.bits for layer in self.layers], [bytes_label(layer.bytes) for layer in self.layers]
        errors = [(layer.error(self.uniform_bits), layer.error(layer.bits)) for layer in self.layers]
        taken, budget, exact = map(bytes_label, (self.outcome.bytes, self.budget, self.exact_bytes))
        uniform = f"{self.uniform.measured:.3f} with {plural(self.uniform_bits, 'bit')} everywhere"
        errors_of_all = f"error of the gradient: {self.outcome.measured:.3f}, or {uniform}"
        title = f"Bits of each layer: {taken} of the budget of {budget}; exact tensors take {exact}\n{errors_of_all}"
        return plot_allocation([layer.name for layer in self.layers], bits, sizes, errors, self.uniform_bits, title)
