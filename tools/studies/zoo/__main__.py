"""Convert a zoo of models: `python -m tools.studies.zoo [NAME or family ...] [--list]`.

The models are tiny and have random weights. They run in training mode with their own dropout. They are made of torch's layers,
written out by hand, or come from transformers, timm, torchvision and diffusers, if these are installed. The figures of each
model, at 4 bits, are: the bytes kept for backward relative to the exact model, with `fewbit.convert` alone and with
`fewbit.patch` in addition; the error of the plan in predicting these bytes; the error of the gradient over all parameters, also
at 8 bits, with the same random numbers for dropout; whether the output, the buffers and the state of random numbers have the
same bits, also in a deep copy; and which of torch's own operations still keep something. Failures are printed and do not stop
other models. At the end there are quantiles over models, and what is still kept, by operation.

Tables are printed. Those of the whole zoo are also written to tools/results/ as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console

from fewbit import terminal
from tools.studies import common
from tools.studies.zoo import (
    diffusers_models,
    packages,
    report,
    timm_models,
    torch_models,
    torchvision_models,
    transformers_models,
    written_models,
)
from tools.studies.zoo.entry import Entry
from tools.studies.zoo.measure import Row, measure

# the package that models need, and the function that lists them
SOURCES: list[tuple[str | None, Callable[[], Iterator[Entry]]]] = [
    (None, torch_models.entries),
    (None, written_models.entries),
    ("transformers", transformers_models.entries),
    ("timm", timm_models.entries),
    ("torchvision", torchvision_models.entries),
    ("diffusers", diffusers_models.entries),
]


def available() -> tuple[list[Entry], dict[str, str]]:
    """The models that can be built here; and family -> why its models are left out."""
    entries, reasons = [], {}
    for package, listed in SOURCES:
        reason = packages.missing(package) if package else ""
        for each in listed():
            if reason:
                reasons[each.family] = reason
            else:
                entries.append(each)
    return entries, reasons


def chosen(entries: Iterable[Entry], names: list[str]) -> list[Entry]:
    """The models of these names or families; all models if there are no names."""
    return [each for each in entries if not names or each.name in names or each.family in names]


def measure_all(console: Console, entries: list[Entry]) -> dict[str, Any]:
    """Print and return the figures of these models. After an interrupt, only of those that were measured."""
    rows: dict[str, Row] = {}
    with terminal.progress("models", len(entries)) as advance, suppress(KeyboardInterrupt):
        for each in entries:
            rows[_label(each, rows)] = measure(each)
            advance()
    console.print(report.table(rows), "")
    for name, row in rows.items():
        if "failure" in row:
            console.print(f"{name} failed: {row['failure']}", soft_wrap=True)
        elif row["differ"]:
            itself = row["exact differs from itself"]
            console.print(f"{name}: {', '.join(row['differ'])} differ" + (f"; exact from itself: {itself}" if itself else ""))
    left, found = report.what_is_left(rows), report.summary(rows)
    console.print("\nWhat coded models keep, by operation: mean over models\n", report.left_table(left), "")
    for line in report.lines(found):
        console.print(line, soft_wrap=True)
    return {"summary": found, "left": left, "models": rows}


def _label(entry: Entry, rows: dict[str, Row]) -> str:
    return f"{entry.name} ({entry.family})" if entry.name in rows else entry.name


def main(arguments: list[str] | None = None) -> None:
    """Run on the models asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.studies.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="of models or families, all by default")
    parser.add_argument("--list", action="store_true", help="name them, and stop")
    given = parser.parse_args(arguments)
    console = terminal.console(at_least=140)
    entries, reasons = available()
    for family, reason in reasons.items():
        console.print(f"{family}: left out, since {reason}")
    unknown = set(given.names) - {each.name for each in entries} - {each.family for each in entries} - set(reasons)
    if unknown:
        parser.error(f"no model and no family is called {', '.join(sorted(unknown))}; --list names them")
    entries = chosen(entries, given.names)
    if given.list:
        for family in dict.fromkeys(each.family for each in entries):
            console.print(f"{family}: " + "; ".join(each.name for each in entries if each.family == family), soft_wrap=True)
        return
    results = measure_all(console, entries)
    if len(results["models"]) == len(entries) and not given.names:
        common.write("zoo", {"packages": packages.versions(), "left out": reasons, **results})


if __name__ == "__main__":
    main()
