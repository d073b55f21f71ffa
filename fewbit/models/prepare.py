"""One call that converts a model safely: convert it, check its gradients, give more bits if needed, and report the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from torch import nn

from fewbit import terminal
from fewbit.constants import DEFAULT_MODEL_BITS, MAX_BITS
from fewbit.errors import InputError
from fewbit.models.arguments import Filter, LossFunction, check_batches, check_filter, check_model, model_loss, names_passed
from fewbit.models.calibration.calibrate import calibrate
from fewbit.models.conversion.engine import conversion_of, convert_again, is_converted, revert_modules
from fewbit.models.conversion.interception import Interception
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.gradients.fidelity import JUDGED, SAFE, Fidelity, Part, fidelity
from fewbit.models.memory.budget import BudgetPlan
from fewbit.models.memory.peak import Optimizer, Peak, peak_of
from fewbit.models.memory.plan import Plan
from fewbit.models.memory.report import MemoryReport, memory
from fewbit.models.preserve import structure_restored_on_error
from fewbit.models.report import Report
from fewbit.record import plural
from fewbit.terminal import bytes_label, parse_bytes, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

_ROUNDS = 4  # more bits are given so often at most
_HELPS = 0.95  # calibration is worth its tables if the error becomes less than this part of what it was


@dataclass(frozen=True, repr=False)
class Preparation(Report):
    """What `prepare` did. It prints as a few lines. `fidelity` has the gradients in full, `plan` has the memory.

    plan        the plan that was made before the conversion; a plan for each block if codes alone do not fit the budget
    kept        bytes of activations that forward keeps, before and after
    peaks       peaks of a training step, before and after; None if the model does not run on fake tensors
    fidelity    the report on the gradients of the converted model
    setting     bits and coding of the conversion
    raised      names of the modules that have more bits than the setting says
    calibrated  whether activations have tables for their own inputs
    budget      in bytes, if one was given
    """

    plan: Plan | BudgetPlan
    kept: tuple[int, int]
    peaks: tuple[Peak, Peak] | None
    fidelity: Fidelity
    setting: Setting
    raised: list[str]
    calibrated: bool
    budget: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the budget. None without a budget or a peak."""
        return None if self.budget is None or self.peaks is None else self.peaks[1].bytes <= self.budget

    @property
    def verdict(self) -> str:
        """One line: what is kept, the peak, and whether that is safe."""
        before, after = self.kept
        text = f"{self.fidelity.level}: keeps {percent(after / before if before else 1)} of what exact training keeps"
        if self.peaks is None:
            return text
        peaks = [bytes_label(each.bytes) for each in self.peaks]
        alone = "" if self.peaks[0].parts["optimizer"] else ", without an optimizer's state,"
        return f"{text}; the peak of a training step{alone} goes from {peaks[0]} to {peaks[1]}"

    @property
    def next_step(self) -> str:
        """What to do now."""
        if not conversion_of(self.plan.forward.model):
            return "coding pays nowhere in this model; train it as it is"
        if self.fidelity.level == "unknown":
            return f"find out whether it is safe: {self.fidelity.verdict}"
        if self.fidelity.level != "safe":
            weakest = self.fidelity.weakest
            where = "more of the model" if weakest is None else weakest.group
            return f"leave {where} exact, with filter_fn; or give more batches, which measure the noise better"
        if self.fits is False:
            return "the peak is above the budget: take a smaller batch; fewbit.memory(…).largest_batch(…) finds one that fits"
        if self.peaks and self.peaks[1].bytes >= self.peaks[0].bytes:
            return (
                "train it as it is: coding does not lower the peak of a step; fewbit.revert(model) makes the model exact again"
            )
        return "train; fewbit.save(model, path) keeps this conversion beside a checkpoint"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each group of parameters, as in `fidelity`."""
        return self.fidelity.rows()

    def totals(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "next_step": self.next_step,
            "bits": dict(self.setting.by_kind),
            "raised": self.raised,
            "calibrated": self.calibrated,
            "budget": self.budget,
            "kept": list(self.kept),
            "peaks": self.peaks and [each.to_dict() for each in self.peaks],
            "fidelity": self.fidelity.totals(),
        }

    def view(self) -> RenderableType:
        """The verdict, what was done, the gradients in one line, and the next step."""
        more = f"; more bits for {plural(len(self.raised), 'module')}" if self.raised else ""
        ways = f"; {self.plan.choice.summary}" if isinstance(self.plan, BudgetPlan) else ""
        tables = "; tables calibrated" if self.calibrated else ""
        lines = [self.verdict, f"  {self.setting}{more}{tables}{ways}", f"  {self.fidelity.verdict}"]
        if self.budget is not None:
            no_peak = "cannot be checked: the model does not run on fake tensors, so its peak is not known"
            said = {None: no_peak, True: "is met", False: "is exceeded"}[self.fits]
            lines.append(f"  the budget of {bytes_label(self.budget)} {said}")
        return Group(*lines, f"next: {self.next_step}")

    def figure(self) -> Figure:
        return self.fidelity.figure()


def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    budget: int | str | None = None,
    *,
    bits: Bits = DEFAULT_MODEL_BITS,
    filter_fn: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Preparation:
    """Convert a model for training, in place, as far as that pays and is safe, and report what was done.

    1. Plan the conversion, so that only modules that pay are coded. If that does not fit the budget, blocks are also
       recomputed, as `MemoryReport.plan` chooses.
    2. Compare gradients from codes with exact ones on the batches (`fewbit.fidelity`). If the error of a module, or of the
       whole model, is more than a tenth of its noise, its codes get more bits, up to 8.
    3. Calibrate tables of activations on the batches. They stay if they make the error smaller.

    model      A model in training mode, if you are going to train it. A former conversion is undone.
    batches    Two batches or more, like those of training. Eight give a better estimate.
    loss_fn    A function of the model and a batch. Without it, the loss is the `loss` of the model's output.
    budget     Bytes that a training step may take, or a text such as "24 GiB". The report says whether the peak fits.
    bits       bits to begin with, as in `fewbit.convert`
    filter_fn  a function of a module and its dotted name that says whether the module may be converted
    optimizer  the optimizer that the peak counts, as in `fewbit.memory`

    Raises InputError (fewer than two batches, no loss, not a budget) and what the model raises. The model is then as before.
    """
    inner = check_model("prepare", model)
    check_batches("prepare", batches, loss_fn)
    check_filter(filter_fn)
    limit, given = None if budget is None else parse_bytes(budget), list(batches)
    if len(given) < 2:
        raise InputError(f"prepare needs two batches or more, to tell noise from error; got {len(given)}")
    with structure_restored_on_error(inner), terminal.progress("preparing the model"):
        revert_modules(inner)
        passes = names_passed(inner, filter_fn)
        report = memory(inner, given[0], loss_fn=loss_fn, optimizer=optimizer)
        before = _peak(report)
        target = limit if before is not None else None
        plan, found, more = _converted(report, bits, passes, target, given)
        setting = plan.setting.raised(more)
        if target is not None and more and _peak_now(report) > target:  # the additional bits take too much
            revert_modules(inner)
            plan, found, more = _converted(report, dict(setting.by_kind), passes, target, given)
            setting = plan.setting.raised(more)
        own = [name for name, module in inner.named_modules() if _has_more_bits(module, setting)]
        found, calibrated = _calibrated(inner, given, loss_fn, found)
        other = memory(inner, given[0], loss_fn=loss_fn, optimizer=optimizer)
        after = _peak(other)
    kept = report.activation_bytes, other.activation_bytes
    peaks = None if before is None or after is None else (before, after)
    return Preparation(plan, kept, peaks, found, setting, own, calibrated, limit)


def _converted(
    report: MemoryReport, bits: Bits, filter_fn: Filter | None, budget: int | None, batches: list[Any]
) -> tuple[Plan | BudgetPlan, Fidelity, int]:
    """Plan and convert, and give more bits until the gradients are safe. Returns the plan, the report on the gradients, and how
    many bits all codes have gained."""
    model, loss_fn = report.forward.model, report.forward.loss_fn
    plan: Plan | BudgetPlan = report.plan(bits, filter_fn)
    if budget is not None and plan.peak.bytes > budget:
        plan = report.plan(bits, filter_fn, budget=budget)
    plan.convert()
    found, more = fidelity(model, batches, loss_fn, by="module"), 0
    for _ in range(_ROUNDS):
        extra, wanted = _missing(found.whole), {part.group: _missing(part) for part in found.parts}
        wanted = {name: bits for name, bits in wanted.items() if bits > extra}
        if not (extra or wanted) or not _give_bits(model, extra, wanted):
            break
        more += extra
        found = fidelity(model, batches, loss_fn, by="module")
    return plan, found, more


def _peak_now(report: MemoryReport) -> int:
    return peak_of(report.forward, report.make_optimizer).bytes


def _peak(report: MemoryReport) -> Peak | None:
    """The peak; None if the model does not run on fake tensors. The model has run on real ones, so any other error comes from
    the optimizer."""
    try:
        return report.peak
    except Exception as error:  # the model may do anything that fake tensors cannot
        if isinstance(error, InputError) and error.__cause__ is None:
            raise
        return None


def _missing(part: Part) -> int:
    """How many more bits make the error of a group safe: each bit halves the error."""
    if part.share is None or (part.weight is not None and part.weight < JUDGED):
        return 0
    share = max(part.share, part.systematic or 0.0)
    return max(0, math.ceil(math.log2(share / SAFE))) if math.isfinite(share) and share > SAFE else 0


def _give_bits(model: nn.Module, extra: int, of_modules: Mapping[str, int]) -> bool:
    """Give more bits to all codes, and still more to those of some modules. Returns whether any changed: 8 is the most."""
    conversion, interceptions = conversion_of(model), dict[Setting, Interception]()
    before = _bits_in(conversion)
    for name, attributes in conversion.items():
        most = max(extra, of_modules.get(name, 0))
        interception = attributes.get("interception")
        if isinstance(interception, Interception) and interception.setting is not None:
            setting = interception.setting.raised(extra)
            attributes["interception"] = interceptions.setdefault(setting, Interception(setting))
        elif attributes.get("bits") is not None:
            attributes["bits"] = min(MAX_BITS, attributes["bits"] + most)
    convert_again(model, conversion)
    return _bits_in(conversion) != before


def _has_more_bits(module: nn.Module, setting: Setting) -> bool:
    """Whether a module that was converted with the setting has more bits than the setting says."""
    bits, kind = getattr(module, "bits", None), getattr(module, "coded_kind", None)
    return is_converted(module) and bits is not None and kind is not None and bits > (setting.bits_of(kind) or MAX_BITS)


def _bits_in(conversion: Mapping[str, dict[str, Any]]) -> list[Any]:
    return [(each.get("bits"), getattr(each.get("interception"), "setting", None)) for each in conversion.values()]


def _calibrated(model: nn.Module, batches: list[Any], loss_fn: LossFunction | None, found: Fidelity) -> tuple[Fidelity, bool]:
    """Calibrate, and undo that if it does not help. Returns the report on the gradients, and whether calibration helped."""
    conversion = conversion_of(model)
    try:
        calibrate(model, batches, loss_fn or model_loss)
    except InputError:  # nothing to calibrate
        return found, False
    other = fidelity(model, batches, loss_fn, by="module")
    if other.whole.error is not None and found.whole.error is not None and other.whole.error < _HELPS * found.whole.error:
        return other, True
    convert_again(model, conversion)
    return found, False
