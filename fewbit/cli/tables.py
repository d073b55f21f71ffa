"""Commands that show and write tables: `fewbit list`, `fewbit table`, `fewbit tables build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.options import (
    Balance,
    Bits,
    Channels,
    Coding,
    Domain,
    Name,
    Parameters,
    Samples,
    TableOptions,
    Weight,
    file_option,
    find_activation,
    folder_option,
)
from fewbit.constants import DEFAULT_BITS, SHIPPED_BITS

if TYPE_CHECKING:
    from fewbit.design import CodeTable


def list_activations() -> None:
    """List all activations, with the error of their shipped tables at 1 to 5 bits."""
    from fewbit import activations, terminal
    from fewbit.record import plural
    from fewbit.store import load_table

    view = terminal.table(("activation", "module", "parameters"), tuple(plural(bits, "bit") for bits in SHIPPED_BITS))
    for record in map(activations.get, activations.names()):
        arguments = {**record.options, **{name: f"{value:g}" for name, value in record.parameters.items()}}
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        errors = [load_table(record, bits).relative_rms for bits in SHIPPED_BITS]
        view.add_row(record.name, record.module, shown, *(f"{error:.4f}" if error else "exact" for error in errors))
    title = "Relative rms error of the derivative's codes, weight student (Student's t, ν = 3), level coding"
    terminal.show(title, "", view)


def table(
    name: Name,
    bits: Bits = DEFAULT_BITS,
    weight: Weight = None,
    coding: Coding = None,
    channels: Channels = None,
    balance: Balance = 1.0,
    domain: Domain = None,
    param: Parameters = None,
    samples: Samples = None,
    output: Annotated[Path | None, file_option("--output", "-o", help="Write the table to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    ladder: Annotated[bool, typer.Option(help="Show the tables for different standard deviations of the input.")] = False,
) -> None:
    """Show the optimal code table of an activation: thresholds, codes and levels. --output writes it to a file."""
    from fewbit import terminal

    options = TableOptions(weight, coding, channels or (), balance, domain, param or (), samples)
    if ladder:
        if output or as_json:
            raise typer.BadParameter("--ladder shows several tables; choose one with --weight to print or write it")
        _print_ladder(options.find_ladder(find_activation(name), bits))
        return
    found = options.find(find_activation(name), bits)
    if output:
        found.save(output)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    _print_table(found)
    if output:
        terminal.say_written(output)


def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing. Fail if a file would change.")] = False,
    output: Annotated[
        Path | None, folder_option("--output", "-o", help="Folder to write to; by default the folder of the shipped tables.")
    ] = None,
) -> None:
    """Design all shipped tables again, and write those that differ."""
    from fewbit import activations, terminal
    from fewbit.errors import TableError
    from fewbit.store import build_tables, tables_directory

    directory = output or tables_directory()
    changed = []
    with terminal.progress("designing", len(activations.SHIPPED)) as advance:
        for name, differs in build_tables(directory, check=check):
            changed += [name] * differs
            advance()
    if check and changed:
        raise TableError(
            f"{len(changed)} files in {directory} differ from a new design: {', '.join(changed)}; run `fewbit tables build`"
        )
    state = "are up to date" if not changed else f"written; changed: {', '.join(changed)}"
    print(f"{len(activations.SHIPPED)} files in {directory} {state}")


def _print_ladder(found: tuple[CodeTable, ...]) -> None:
    import numpy as np

    from fewbit import terminal
    from fewbit.constants import RUNGS
    from fewbit.record import label, plural

    first, *others = found
    view = terminal.table((), ("std", "intervals", "levels", *(f"rms of {channel}" for channel in first.channels)))
    for std, each in zip(RUNGS if others else ["any"], found, strict=True):
        errors = (f"{error:.4f}" for error in np.atleast_1d(each.relative_rms))
        view.add_row(f"{std}".removesuffix(".0"), str(each.codes.size), str(each.levels.shape[1]), *errors)
    title = f"{label(first.activation or 'custom', first.parameters)}: {plural(first.bits, 'bit')}"
    terminal.show(f"{title}, by standard deviation of the input; relative rms errors", "", view)


def _print_table(found: CodeTable) -> None:
    import numpy as np

    from fewbit import terminal
    from fewbit.record import label, plural

    alone = found.channels == ("derivative",)
    view = terminal.table((), ("x above", "up to", "code", *(("level",) if alone else found.channels)))
    ends = ["-inf", *(f"{threshold:.6f}" for threshold in found.thresholds), "inf"]
    for low, high, code in zip(ends[:-1], ends[1:], found.codes, strict=True):
        view.add_row(low, high, str(code), *(f"{level:.6f}" for level in found.levels[:, code]))
    holds = [] if alone else [" and ".join(found.channels)]
    if len(found.channels) > 1:
        holds.append(f"balance {found.balance:g}")
    title = ", ".join([plural(found.bits, "bit"), *holds, f"weight {found.weight}", f"{found.coding} coding"])
    terminal.show(f"{label(found.activation or 'custom', found.parameters)}: {title}", "", view, "")
    low, high = found.domain or (float("nan"),) * 2
    for channel, mse, rms in zip(found.channels, np.atleast_1d(found.mse), np.atleast_1d(found.relative_rms), strict=True):
        named = "" if len(found.channels) == 1 else f"{channel}: "
        terminal.show(f"{named}mse {mse:.6g}, relative rms {rms:.6g} on [{low:g}, {high:g}]")
