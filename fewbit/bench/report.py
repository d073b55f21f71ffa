"""The output of `fewbit bench`: tables for the terminal, and the picture."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fewbit import files, terminal
from fewbit.bench.measure import PARTS, PHASES, CaseResult, Report, RunResult
from fewbit.plots import RatioPanels, plot_ratios, save
from fewbit.record import plural
from fewbit.terminal import bytes_label, three_figures

_KEY = """\
µs          median time of a call; both: one call that runs forward and backward
over exact  time of both, relative to the exact one in the same round: median and middle half of the rounds
extra       time of both minus the exact one's in the same round
of copy     bytes moved in a second, relative to copy_ on a tensor of that size
kept        bytes that autograd holds for backward"""
_CUDA_KEY = "Caches are not flushed between calls: tensors that fit into the GPU's L2 cache may be read from there."


def show(report: Report, console: Console) -> None:
    """Print a table for each device and dtype, and the meaning of its columns."""
    on = f"{plural(report.repeats, 'round')}, {plural(report.threads, 'thread')}"
    for (device, dtype), group in groupby(report.cases, key=lambda case: (case.device, case.dtype)):
        cases = list(group)
        terminal.show(f"{dtype} on {device} ({report.devices[device]}), {on}\n", _runs(cases), "", on=console)
        if cases[0].parts:
            terminal.show(f"{dtype} on {device}: encode and decode alone\n", _parts(cases), "", on=console)
    cuda = any(device.startswith("cuda") for device in report.devices)
    terminal.show(_KEY, *[_CUDA_KEY] * cuda, *report.notes, on=console)


def write(report: Report, json_path: Path | None, plot_path: Path | None) -> None:
    """Write the files that were asked for, and print their names. The JSON file is written atomically."""
    if json_path:
        files.write(json_path, json.dumps(report.to_dict(), indent=1) + "\n")
        terminal.say_written(json_path)
    if plot_path:
        drawn = panels(report)
        activations = len({case.activation for case in report.cases})
        where = "\n".join(f"{device} ({name})" for device, name in report.devices.items())
        how = f"{plural(report.threads, 'thread')}; medians and middle halves of {plural(report.repeats, 'round')}"
        save(plot_ratios(drawn, min(activations, 4), f"{where}\n{how}"), plot_path)
        terminal.say_written(plot_path)


def panels(report: Report) -> RatioPanels:
    """The data of `plots.plot_ratios`: a panel for each activation, dtype and device; a line for each run except the exact
    one."""
    found: RatioPanels = {}
    for case in report.cases:
        title = f"{case.activation}, {case.dtype}"
        lines = found.setdefault(title if len(report.devices) == 1 else f"{title}, {case.device}", {})
        for run in case.runs[1:]:
            ratio = run.ratio["both"]
            lines.setdefault(run.run, []).append((case.elements, ratio["median"], ratio["p25"], ratio["p75"]))
    return found


def size_label(elements: int) -> str:
    """
    >>> size_label(16384), size_label(1000)
    ('2^14', '1000')
    """
    exponent = elements.bit_length() - 1
    return f"2^{exponent}" if elements == 2**exponent else str(elements)


def _runs(cases: list[CaseResult]) -> Table:
    times = tuple(f"{phase}\nµs" for phase in PHASES)
    others = ("over\nexact", "middle\nhalf", "extra\nµs", "of\ncopy", "\nkept")
    view = terminal.table(("\nactivation", "\nsize", "\nrun"), (*times, *others))
    for case in cases:
        for run in case.runs:
            heading = (case.activation, size_label(case.elements)) if run is case.runs[0] else ("", "")
            view.add_row(*heading, run.run, *_run_cells(run, against_exact=run is not case.runs[0]))
    return view


def _run_cells(run: RunResult, against_exact: bool) -> list[str]:
    ratio = run.ratio["both"]
    against = [
        three_figures(ratio["median"]),
        f"{three_figures(ratio['p25'])}–{three_figures(ratio['p75'])}",
        f"{1e6 * run.extra_seconds['both']['median']:+.{_decimals(run.seconds['both']['median'])}f}",
    ]
    return [
        *(_microseconds(run.seconds[phase]["median"]) for phase in PHASES),
        *(against if against_exact else ["", "", ""]),
        f"{run.copy_share['median']:.2f}",
        bytes_label(run.kept_bytes),
    ]


def _parts(cases: list[CaseResult]) -> Table:
    columns = [column for part in PARTS for column in (f"{part}\nµs", "of\ncopy", "middle\nhalf")]
    view = terminal.table(("\nactivation", "\nsize", "\nbits"), ("copy_\nµs", *columns))
    for case in cases:
        for i in range(0, len(case.parts), len(PARTS)):
            cells = [_microseconds(case.copy_seconds["median"])]
            for part in case.parts[i : i + len(PARTS)]:
                share = part.copy_share
                middle = f"{share['p25']:.2f}–{share['p75']:.2f}"
                cells += [_microseconds(part.seconds["median"]), f"{share['median']:.2f}", middle]
            heading = ("", "") if i else (case.activation, size_label(case.elements))
            view.add_row(*heading, str(case.parts[i].bits), *cells)
    return view


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.{_decimals(seconds)}f}"


def _decimals(seconds: float) -> int:
    return 1 if seconds < 1e-3 else 0
