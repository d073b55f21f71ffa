"""Only activations are coded, on the GPT: the final loss with each table, and the table's distance from the derivative.

`python -m tools.studies.reviewers sensitivity [--labels exact "level, student, 2 bits"] [--seeds 2] [--steps 600]`
Only the codes of GELU differ; all else is exact.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from rich.table import Table
from torch import nn

import fewbit
from fewbit import terminal
from fewbit.record import plural
from tools.studies.reviewers import comparison, pictures, training
from tools.studies.reviewers.comparison import chosen, distance, losses, percent
from tools.studies.reviewers.runs import Run, Runs
from tools.studies.reviewers.tasks import TASKS
from tools.studies.reviewers.training import EXACT

NAME = "sensitivity"
TASK = "gpt"
BITS = (1, 2, 3, 4)
WIDTH = 20.0  # of the domain of tables, -10 to 10; the error under a uniform weight times it is the plain integral
TABLES = (  # coding and weight; "uniform" codes are equal bins over three deviations to either side
    ("level", "student"),
    ("level", "normal"),
    ("level", "uniform"),
    ("interval", "student"),
    ("interval", "normal"),
    ("interval", "uniform"),
    ("uniform", "normal"),
)
SHIPPED_ELSEWHERE = {("selu", 2): 0.380, ("hardswish", 4): 0.260}  # by the authors of few-bit backward, from gradient descent


def with_tables(model: nn.Module, coding: str, weight: str, bits: int) -> nn.Module:
    """The model with activations coded by tables of that design. All else stays exact."""
    fewbit.convert(model, bits={"activation": bits})
    for module in model.modules():
        if isinstance(module, fewbit.GELU):
            module.table = fewbit.design("gelu", bits=bits, weight=weight, coding=coding)
    return model


def label_of(coding: str, weight: str, bits: int) -> str:
    """
    >>> label_of("level", "student", 2)
    'level, student, 2 bits'
    """
    return f"{coding}, {weight}, {plural(bits, 'bit')}"


LABELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    EXACT: lambda model: model,
    **{
        label_of(*each, bits): partial(with_tables, coding=each[0], weight=each[1], bits=bits)
        for each in TABLES
        for bits in BITS
    },
}


def work(label: str, seed: int, steps: int) -> Run:
    """One run. An exact run also gives the gradient error that its trained model would have with each table."""
    task = TASKS[TASK]
    model = training.start(task, label, seed, LABELS)
    found = training.trained(task, model, seed, steps)
    if label == EXACT:
        found["gradient_errors"] = {
            other: training.gradient_error(task, model, make(copy.deepcopy(model)))
            for other, make in LABELS.items()
            if other != EXACT
        }
    return found


def table(runs: Sequence[Run]) -> Table:
    """By table and bits: final losses above exact, and errors of the gradient."""
    columns = [plural(bits, "bit") for bits in BITS]
    view = terminal.table(("coding", "weight"), (*columns, *(f"gradient, {each}" for each in columns)))
    exact = losses(runs, label=EXACT)
    for coding, weight in TABLES:
        labels = [label_of(coding, weight, bits) for bits in BITS]
        above = [str(distance(losses(runs, label=label), exact) or "–") for label in labels]
        view.add_row(coding, weight, *above, *(_gradient_error(runs, label) for label in labels))
    return view


def _gradient_error(runs: Sequence[Run], label: str) -> str:
    errors = [each["gradient_errors"][label] for each in chosen(runs, label=EXACT)]
    return f"{statistics.fmean(errors):.4f}" if errors else "–"


def integral(activation: str, bits: int, coding: str = "level") -> float:
    """The least ∫ (f' - q)² dx of any table, over the domain of tables."""
    found = fewbit.design(activation, bits=bits, weight="uniform", coding=coding).mse
    assert isinstance(found, float), "a table of the derivative alone has one error"
    return WIDTH * found


def integrals() -> Table:
    """The least integrals, compared with those of tables that others ship."""
    view = terminal.table(("activation", "bits"), ("shipped elsewhere", "interval", "level"))
    for (activation, bits), theirs in SHIPPED_ELSEWHERE.items():
        ours = (f"{integral(activation, bits, coding):.4f}" for coding in ("interval", "level"))
        view.add_row(activation, str(bits), f"{theirs:.3f}", *ours)
    return view


def lines(runs: Sequence[Run]) -> dict[str, dict[str, comparison.Line]]:
    """The distances by table."""
    labels = {each: {bits: label_of(*each, bits) for bits in BITS} for each in TABLES}
    return {TASK: {", ".join(each): comparison.line(runs, by_bits) for each, by_bits in labels.items()}}


def sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each number of bits: the tables that cost least and most, and the spread of exact runs."""
    texts = []
    for bits in BITS:
        found = {name: line.distances[bits] for name, line in lines(runs)[TASK].items() if bits in line.distances}
        if found:
            least, most = (choose(found, key=lambda name: found[name].mean) for choose in (min, max))
            spread = percent(comparison.spread(losses(runs, label=EXACT)))
            texts.append(
                f"With activations of {plural(bits, 'bit')}, the final loss is above exact by {found[least]} ({least}) to "
                f"{found[most]} ({most}); exact runs differ by {spread} between seeds."
            )
    return texts


def main(arguments: list[str]) -> None:
    """Run what is missing, and show all."""
    parser = comparison.parser(NAME, __doc__, (TASK,), seeds=2, steps=600)
    comparison.add_labels(parser, LABELS)
    options = parser.parse_args(arguments)
    runs = Runs(NAME)
    runs.fill(comparison.every(options.seeds, options.steps, ({"label": label} for label in options.labels)), work)
    found = chosen(runs, steps=options.steps)
    console = terminal.console(at_least=130)
    console.print(table(found), "", integrals())
    for each in sentences(found):
        console.print(each)
    comparison.draw(runs, lambda: pictures.plot_distances(lines(found), "GPT with coded activations: final losses above exact"))
