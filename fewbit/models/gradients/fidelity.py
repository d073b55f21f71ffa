"""Is it safe? Compare the gradient from codes with the exact one, and with the noise that gradients have anyway."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from torch import nn

from fewbit import terminal
from fewbit.autograd import exact as exact_mode
from fewbit.errors import InputError
from fewbit.models.arguments import LossFunction, check_batches, check_model, model_loss, no_batch
from fewbit.models.gradients.streams import Figures, Stream, Streams
from fewbit.models.preserve import RandomNumbers, devices_of, preserved_state
from fewbit.models.report import Report
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tensor = torch.Tensor
ALL = "all"
# Heuristics. An error of a tenth of the noise adds 1 % to its variance, an error of half the noise adds 25 %. Chakrabarti and
# Moseley (NeurIPS 2019, section 4) find that errors an order of magnitude below the noise have no effect on training.
SAFE, DOUBTFUL = 0.1, 0.5
# A safe error may still cost a little: a small GPT whose errors were 3.6, 7.0 and 14 % of the noise (5, 4 and 3 bits) ended its
# training 0.2, 0.3 and 0.9 % above the exact loss (`tools.studies.final_loss`).
CHEAP = 0.05
# A group with less than this part of the squared gradient is not judged by itself. For example, the gradient of a bias before a
# batch norm is only rounding, and so is its noise.
JUDGED = 1e-6
RESOLVED = 0.1  # part of a batch's gradient; a smaller mean gradient cannot be told from the noise of a few batches
SHOWN = 30  # groups in the printed table


def fidelity(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    by: str | Callable[[str], str] = "pattern",
) -> Fidelity:
    """Compare the gradient from codes with the exact one and with the noise of SGD, for each group of parameters.

    The gradient of every batch is taken twice, under `fewbit.exact` and with codes, from the same buffers and random numbers
    (dropout). Two gradients are stored: the exact one, and the sum of the errors. Each parameter is compared as soon as
    backward has reached it, and then its coded gradient is freed. Afterwards the model is as before, with its buffers, training
    flags and `.grad`, and so are the random numbers.

    model    A model with coded activations or layers, in training mode if you ask about training. It must not be wrapped for
             several processes, since each process sees only its own part. Compiled code is compiled once more for the exact
             pass.
    batches  An iterable of two batches or more. Eight give a better estimate. Use the batch size that training uses, since the
             noise depends on it.
    loss_fn  A function of the model and a batch that returns the loss, a tensor of one element. It must do the same when it is
             called again. It may use autocast and scale the loss. It must not run backward. Without it, the loss is the `loss`
             of the model's output, and batches are as in `fewbit.memory`.
    by       How to group the parameters. "pattern" makes one group of the modules whose names differ only in the numbers of
             blocks; "module" makes one for each module; "parameter" makes one for each parameter. A function of a parameter's
             name returns the name of its group.
    Returns  a report, whose `verdict` is one line

    `fewbit.models.gradients.fidelity.Part` defines the figures.

    Raises InputError for a model without trainable parameters, for no batches, and for a loss that is not a tensor of one
    element.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> print(fidelity(model, [torch.randn(16, 4), torch.randn(16, 4)], lambda model, x: model(x).square().mean()).verdict)
    nothing in the model is coded: convert it first, with fewbit.convert(model)
    """
    group_of = _grouping(by)
    _check(model)
    check_batches("fidelity", batches, loss_fn)
    loss_of = loss_fn or model_loss
    with preserved_state(model) as state, torch.inference_mode(False), torch.enable_grad(), Streams(model) as streams:
        found = _Sums(streams.streams, group_of)
        devices = devices_of(model)
        for batch in batches:

            def loss(batch: Any = batch) -> Tensor:
                return loss_of(model, batch)

            before = RandomNumbers(devices)
            with exact_mode.exact():
                exact_loss = streams.run(loss, Stream.take_exact)
            state.restore()
            if found.add_exact():
                after = RandomNumbers(devices)
                before.restore()
                found.add_coded(exact_loss, streams.run(loss, Stream.take_coded))
                state.restore()
                after.restore()
    if not found.batches:
        raise no_batch("fidelity")
    coded = [module for module in model.modules() if isinstance(module, CodedActivation | CodedLayer)]
    report = found.report(bool(coded))
    report.bits = tuple(sorted({bits for module in coded if (bits := _bits_of(module))}))
    return report


def _check(model: nn.Module) -> None:
    check_model("fidelity", model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"fidelity takes the model that {type(model).__name__} wraps; pass model.module")
    if exact_mode.is_active():
        raise InputError("fidelity compares with codes, and within fewbit.exact() there are none; call it outside")


def _bits_of(module: CodedActivation | CodedLayer) -> int | None:
    return module.bits or (module.table.bits if module.table is not None else None)


def _grouping(by: str | Callable[[str], str]) -> Callable[[str], str]:
    if not isinstance(by, str) and callable(by):
        return by
    known: dict[Any, Callable[[str], str]] = {
        "pattern": lambda name: block_pattern(_module_of(name)),
        "module": _module_of,
        "parameter": lambda name: name,
    }
    if by not in known:
        raise InputError(f"by must be one of {', '.join(map(repr, known))} or a function of a parameter's name, got {by!r}")
    return known[by]


def _module_of(parameter: str) -> str:
    """The module that holds a parameter. It may be compiled or parametrized. A parameter of the model itself keeps its name.

    >>> _module_of("_orig_mod.blocks.0.up.weight"), _module_of("up.parametrizations.weight.original0"), _module_of("scale")
    ('blocks.0.up', 'up', 'scale')
    """
    parameter = parameter.replace("_orig_mod.", "").partition(".parametrizations.")[0] + ".weight" * (
        ".parametrizations." in parameter
    )
    return parameter.rpartition(".")[0] or parameter


def block_pattern(module: str) -> str:
    """The name with its numbers replaced by *, except for a last one.

    >>> block_pattern("blocks.0.up"), block_pattern("layer1.0")
    ('blocks.*.up', 'layer1.0')
    """
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", module)


@dataclass
class Part:
    """Figures of a group of parameters. A figure is None if its denominator is zero.

    g is the exact gradient of a batch, e its error, ⟨⟩ the mean over the B batches. Everything is computed in float64.

        error       sqrt(⟨‖e‖²⟩ / ⟨‖g‖²⟩); `worst`: the largest ‖e‖ / ‖g‖
        cosine      of g and g + e: ⟨g · (g + e)⟩ / sqrt(⟨‖g‖²⟩ ⟨‖g + e‖²⟩)
        noise       sqrt(V / ⟨‖g‖²⟩). V is half the mean of ‖g − g'‖² over successive batches: the variance, without bias
        share       sqrt(⟨‖e‖²⟩ / V), the error over the noise
        systematic  ‖mean e‖ / ‖mean g‖ in the limit of many batches: the part that does not average out. Both norms are
                    estimated without bias before the square root, as (B² ‖⟨e⟩‖² − Σ‖e‖²) / (B (B − 1)) and ⟨‖g‖²⟩ − V. It is
                    None if ‖mean g‖ is below a tenth of a batch's gradient, too small to be told from the noise, and if a
                    coded gradient was not finite
    """

    group: str
    parameters: int  # how many numbers they hold
    weight: float | None  # the group's part of the mean squared gradient
    error: float | None
    worst: float | None
    cosine: float | None
    noise: float | None
    share: float | None
    systematic: float | None


@dataclass(repr=False)
class Fidelity(Report):
    """What `fidelity` found: figures of the `whole` gradient and of its `parts`, and a `verdict` of one line."""

    whole: Part
    parts: list[Part]
    batches: int
    coded: bool  # whether a module of the model is fewbit's
    not_finite_exact: int = 0  # batches left out since their exact gradient is not finite
    not_finite_coded: int = 0  # batches left out since only their coded gradient is not finite
    losses_differ: float = 0.0  # the largest relative difference between the losses of the two passes
    without_gradient: list[str] = field(default_factory=list)  # parameters that got no gradient in any batch
    bits: tuple[int, ...] = ()  # all numbers of bits that the codes of the model's modules have

    @property
    def level(self) -> str:
        """One word: "safe", "doubtful", "unsafe", or "unknown" if nothing can be said."""
        return self._judged()[0]

    @property
    def verdict(self) -> str:
        """One line: the error, its share of the noise, and whether that is safe.

        An error is safe up to a tenth of the noise, doubtful up to half of it, and unsafe above. These limits are heuristics.
        The first comes from the authors who proposed approximate gradients: they find errors an order of magnitude below the
        noise harmless. The systematic part has the same limits, relative to the mean gradient, since large noise would hide it.
        """
        return self._judged()[1]

    @property
    def weakest(self) -> Part | None:
        """The group whose error is the largest share of its noise.

        Groups with a negligible part of the gradient do not count.
        """
        judged = [part for part in self.parts if part.share is not None and (part.weight or 0) >= JUDGED]
        return max(judged, key=lambda part: part.share or 0.0, default=None)

    def _judged(self) -> tuple[str, str]:
        whole = self.whole
        if self.not_finite_coded:
            return (
                "unsafe",
                f"the coded gradient is not finite in {self._of(self.not_finite_coded)}, though the exact one is: unsafe",
            )
        if self.not_finite_exact == self.batches:
            return "unknown", "the exact gradient is not finite in any batch: nothing can be said; scale the loss less"
        if self.losses_differ > 1e-3:  # far beyond the rounding of fused kernels and of atomic sums
            return "unknown", (
                f"the exact and the coded pass gave losses that differ by {_percent(self.losses_differ)}: loss_fn must do the "
                "same when called again, with torch's, numpy's or Python's global random numbers"
            )
        if whole.error is None:
            return "unknown", "the exact gradient is zero in all batches: nothing can be said"
        if whole.error == 0:
            if not self.coded:
                return "unknown", "nothing in the model is coded: convert it first, with fewbit.convert(model)"
            return "safe", "the coded gradient is the exact one, bit for bit: safe"
        text = f"coded gradient errs by {whole.error:.2g}"
        if whole.share is None:
            why = "one batch shows no SGD noise; give two or more" if self._used() < 2 else "all batches are equal"
            return "unknown", f"{text}: whether that is safe is unknown: {why}"
        systematic = whole.systematic or 0.0
        level = _level(max(whole.share, systematic))
        text += f", {_percent(whole.share)} of the SGD noise {whole.noise:.2g}"
        if systematic > max(SAFE, whole.share):
            text += f", and an error of {_percent(systematic)} of the mean gradient does not average out"
        text += f": {level}"
        if level == "safe" and whole.share > CHEAP:
            text += ", though training may end a few tenths of a percent above the exact loss"
        weakest = self.weakest
        if weakest is not None and _LEVELS.index(_level(weakest.share)) > _LEVELS.index(level):
            text += f", but look at {weakest.group} ({_percent(weakest.share)} of its noise)"
        if self.not_finite_exact:
            text += f"; {self._of(self.not_finite_exact)} left out: their exact gradient is not finite"
        return level, text

    def _used(self) -> int:
        return self.batches - self.not_finite_exact - self.not_finite_coded

    def _of(self, number: int) -> str:
        return f"{number} of {_batches(self.batches)}"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each group: `group`, `parameters` and the figures."""
        return [asdict(part) for part in self.parts]

    def totals(self) -> dict[str, Any]:
        """Verdict, level, the figures of the whole gradient, and the numbers of batches."""
        own = {name: getattr(self, name) for name in ("batches", "not_finite_exact", "not_finite_coded", "losses_differ")}
        whole = {name: value for name, value in asdict(self.whole).items() if name not in ("group", "weight")}
        lists = {"bits": list(self.bits), "without_gradient": list(self.without_gradient)}
        return {"verdict": self.verdict, "level": self.level, **whole, **own, **lists}

    def view(self) -> RenderableType:
        """The verdict, the groups with most of the error, and what the columns mean; the verdict alone if nothing is coded."""
        if not (self.coded or self.whole.error):
            return Group(self.verdict)
        table = terminal.table(
            ("parameters",), ("count", "of ‖g‖²", "error", "worst", "cosine", "SGD noise", "error /\nnoise", "systematic")
        )
        parts = self.parts
        if len(parts) > SHOWN:
            largest = sorted(parts, key=lambda part: -(part.weight or 0) * (part.error or 0) ** 2)[:SHOWN]
            parts = [part for part in parts if part in largest]
        for part in (*parts, self.whole):
            table.add_row(*_cells(part), end_section=part is parts[-1])
        lines = [f"{len(self.parts) - len(parts)} more groups hold less of the error"] if len(parts) < len(self.parts) else []
        if self.without_gradient:
            lines.append(
                f"no gradient in any batch: {', '.join(self.without_gradient[:5])}{' …' * (len(self.without_gradient) > 5)}"
            )
        lines.append(
            f"{_batches(self._used())}. error and SGD noise are relative to the gradient's norm. systematic is the part of the "
            "error that does not average out over batches, relative to the mean gradient's norm. "
            f"An error of up to {100 * SAFE:g} % of the noise is safe. A small GPT with 4, 7 and 14 % ended its training "
            "0.2, 0.3 and 0.9 % above the exact loss."
        )
        return Group(self.verdict, "", table, "", *lines)

    def figure(self) -> Figure:
        """The error over the noise of each group, on a logarithmic scale with the zones of the verdict."""
        from fewbit.plots.gradients import plot_fidelity

        bits = f"codes of {', '.join(map(str, self.bits))} bit{'s' * (self.bits != (1,))}: " if self.bits else ""
        return plot_fidelity([*self.parts, self.whole], f"{bits}{self.verdict}", (SAFE, DOUBTFUL))


_LEVELS = ("safe", "doubtful", "unsafe")


def _level(share: float | None) -> str:
    assert share is not None, "the caller has checked it"
    return _LEVELS[(share > SAFE) + (share > DOUBTFUL)]


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number} batches"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else terminal.percent(ratio)


def _cells(part: Part) -> list[str]:
    numbers = [f"{each:.4f}" if each is not None else "–" for each in (part.error, part.worst, part.cosine)]
    noise, systematic = ("–" if each is None else f"{each:.3f}" for each in (part.noise, part.systematic))
    return [
        part.group,
        f"{part.parameters:,}",
        _percent(part.weight),
        *numbers,
        noise,
        _percent(part.share),
        systematic,
    ]


class _Sums:
    """Sums over the batches, by group."""

    def __init__(self, streams: list[Stream], group_of: Callable[[str], str]):
        self._streams, self._groups = streams, [str(group_of(stream.name)) for stream in streams]
        names = [*dict.fromkeys(self._groups), ALL]
        if ALL in names[:-1]:
            raise InputError(f"the group name {ALL!r} means the whole gradient; `by` must return other names")
        self._sums, self._worst = dict.fromkeys(names, Figures()), dict.fromkeys(names, 0.0)
        self.batches = self._used = self._differences = self._not_finite_exact = self._not_finite_coded = 0
        self._before_was_finite, self._losses_differ = False, 0.0

    def add_exact(self) -> bool:
        """Count the exact pass of a batch. Returns whether its gradient is finite; if not, the coded pass is not needed."""
        self.batches += 1
        figures = self._figures()
        with_difference, self._before_was_finite = self._before_was_finite, math.isfinite(figures[ALL].exact)
        if not self._before_was_finite:
            self._not_finite_exact += 1
        elif with_difference:
            self._differences += 1
            for group, found in figures.items():
                self._sums[group] += Figures(difference=found.difference)
        return self._before_was_finite

    def add_coded(self, exact_loss: float, coded_loss: float) -> None:
        """Count the coded pass of the same batch, unless its gradient is not finite."""
        figures = self._figures()
        if not math.isfinite(figures[ALL].error):
            self._not_finite_coded += 1
            return
        self._used += 1
        self._losses_differ = max(self._losses_differ, abs(coded_loss - exact_loss) / (abs(exact_loss) or 1.0))
        for group, found in figures.items():
            self._worst[group] = max(self._worst[group], _root(found.error, found.exact) or 0.0)
            self._sums[group] += found._replace(difference=0.0)

    def _figures(self) -> dict[str, Figures]:
        """The figures of the batch, by group and for all."""
        figures = dict.fromkeys(self._sums, Figures())
        for stream, group in zip(self._streams, self._groups, strict=True):
            found = stream.figures()
            figures[group], figures[ALL] = figures[group] + found, figures[ALL] + found
        return figures

    def report(self, coded: bool) -> Fidelity:
        sizes, errors = dict.fromkeys(self._sums, 0), dict.fromkeys(self._sums, 0.0)
        for stream, group in zip(self._streams, self._groups, strict=True):
            for name in (group, ALL):
                sizes[name] += stream.parameter.numel()
                errors[name] += stream.squared_sum_of_errors()
        *parts, whole = (self._part(group, sizes[group], errors[group]) for group in self._sums)
        silent = [stream.name for stream in self._streams if not stream.ever]
        counts = self.batches, coded, self._not_finite_exact, self._not_finite_coded
        return Fidelity(whole, parts, *counts, self._losses_differ, silent)

    def _part(self, group: str, size: int, summed_error: float) -> Part:
        sums, used = self._sums[group], self._used
        variance = sums.difference / (2 * self._differences) if self._differences else 0.0
        mean_gradient = sums.exact / max(used, 1) - variance
        mean_error = (summed_error - sums.error) / (used * (used - 1)) if used > 1 else math.nan
        error = _root(sums.error, sums.exact)
        # the sum holds the errors of all coded passes: a single one that is not finite spoils it
        resolved = mean_gradient * used >= RESOLVED**2 * sums.exact and not self._not_finite_coded
        return Part(
            group=group,
            parameters=size,
            weight=sums.exact / self._sums[ALL].exact if self._sums[ALL].exact else None,
            error=error,
            worst=None if error is None else self._worst[group],
            cosine=sums.product / math.sqrt(sums.exact * sums.coded) if sums.exact * sums.coded else None,
            noise=_root(variance, sums.exact / max(used, 1)) if variance else None,
            share=_root(sums.error / used, variance) if used else None,
            systematic=_root(max(mean_error, 0.0), mean_gradient) if used > 1 and resolved else None,
        )


def _root(above: float, below: float) -> float | None:
    """sqrt(above / below), if there is something to divide by."""
    return math.sqrt(above / below) if below > 0 else None
