"""The output of `fewbit bench --model`: tables for the terminal, and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fewbit import files, terminal
from fewbit.bench.compare import CaseResult, Report, RunResult
from fewbit.record import plural
from fewbit.terminal import bytes_label, three_figures

_KEY = """\
calls   calls of operators in forward and backward that move bytes, except matrix products, convolutions and attention
moved   bytes that these operators read and write
kept    bytes that forward keeps for backward, without the batch
peak    the most bytes that a step holds beyond the model, gradients included
×       relative to the exact step; for times: median and middle half of the rounds"""


def show(report: Report, console: Console, operators: bool = False) -> None:
    """Print a table for each device and dtype, and the meaning of its columns.

    operators  whether to show each operator too
    """
    on = f"{plural(report.repeats, 'round')}, {plural(report.threads, 'thread')}"
    for case in report.cases:
        size = f"{case.parameters / 1e6:.1f} million parameters, batch of {', '.join(case.batch)}"
        where = f"{case.dtype} on {case.device} ({report.devices[case.device]}), {on}"
        terminal.show(f"{report.model}: {size}\n{where}\n", on=console)
        for view in (_runs(case), _operators(case)) if operators else (_runs(case),):
            terminal.show(view, "", on=console)
    terminal.show(_KEY, *report.notes, on=console)


def write(report: Report, path: Path) -> None:
    """Write all figures as JSON, atomically, and print the file's name."""
    files.write(path, json.dumps(report.to_dict(), indent=1) + "\n")
    terminal.say_written(path)


def _runs(case: CaseResult) -> Table:
    view = terminal.table(("run",), ("calls", "×", "moved", "×", "kept", "×", "peak", "×", "ms", "×", "middle half"))
    for run in case.runs:
        view.add_row(run.run, *_cells(run, case.runs[0]))
    return view


def _cells(run: RunResult, exact: RunResult) -> list[str]:
    cells = [str(run.calls), _times(run.calls, exact.calls)]
    for own, other in (
        (run.moved_bytes, exact.moved_bytes),
        (run.kept_bytes, exact.kept_bytes),
        (run.peak_bytes, exact.peak_bytes),
    ):
        cells += ["–" if own is None else bytes_label(own), _times(own, other)]
    ratio = run.ratio
    cells += [f"{1e3 * run.seconds['median']:.1f}", three_figures(ratio["median"])]
    return [*cells, f"{three_figures(ratio['p25'])}–{three_figures(ratio['p75'])}"]


def _times(own: int | None, exact: int | None) -> str:
    return three_figures(own / exact) if own is not None and exact else "–"


def _operators(case: CaseResult) -> Table:
    """Calls and bytes of each operator in every run. Operators that move most in any run come first."""
    columns = [f"{run.run}\n{column}" for run in case.runs for column in ("calls", "moved")]
    view = terminal.table(("\noperator",), tuple(columns))
    names = {name for run in case.runs for name in run.operators}
    most = {name: max(run.operators.get(name, {"bytes": 0})["bytes"] for run in case.runs) for name in names}
    for name in sorted(names, key=lambda name: (-most[name], name)):
        cells = []
        for run in case.runs:
            use = run.operators.get(name)
            cells += ["", ""] if use is None else [str(use["calls"]), bytes_label(use["bytes"])]
        view.add_row(name, *cells)
    return view
