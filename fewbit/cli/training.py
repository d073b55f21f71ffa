"""Commands that run networks: `fewbit demo`, `fewbit bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import check_folder, check_picture, file_option, find_activation
from fewbit.constants import DEFAULT_BITS
from fewbit.errors import InputError


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 150,
    bits: Annotated[list[int] | None, typer.Option(help="Runs besides the exact one: --bits 3 1.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, …")] = "cpu",
    output: Annotated[Path, file_option("--output", "-o", help="Picture of the loss curves.")] = Path("fewbit-demo.png"),
) -> None:
    """Train a small GPT on the Python standard library with exact and with coded GELU, side by side."""
    from fewbit import terminal

    check_picture(output)
    console = terminal.console()
    console.print(f"Training a small GPT on the Python standard library for {steps} steps")  # before torch takes its time
    from fewbit.demo import run

    run(steps=steps, bits=bits or [3, 1], device=device, output=output, console=console)


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="As in `fewbit table`; gelu and silu if left out.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Coded runs: --bits 3 1; 3 if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated; float32 and bfloat16 if left out.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="May be repeated; 2^10, 2^16 and 2^22 elements if left out.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="May be repeated; cpu if left out.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; torch's own number if left out.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every run is timed once.")] = 30,
    parts: Annotated[bool, typer.Option("--parts", help="Also encode and decode alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also the exact activation under torch.compile.")] = False,
    json_path: Annotated[Path | None, file_option("--json", help="Write all figures to this file.")] = None,
    plot_path: Annotated[Path | None, file_option("--plot", help="Picture of the ratios against size.")] = None,
) -> None:
    """Time exact and coded activations, forward and backward, side by side, and count the bytes they keep."""
    if plot_path:
        check_picture(plot_path, "--plot")
    if json_path:
        check_folder(json_path)
    from rich.progress import track

    from fewbit import terminal
    from fewbit.bench.measure import run, settings_of
    from fewbit.bench.report import WIDTH, show, write

    records = [find_activation(name) for name in names or ("gelu", "silu")]
    lists = (bits or [DEFAULT_BITS], dtype or ["float32", "bfloat16"], size or ["2^10", "2^16", "2^22"], device or ["cpu"])
    try:
        settings = settings_of(records, *lists, threads=threads, repeats=repeats, parts=parts, compiled=compiled)
    except InputError as error:  # a dtype, size or device that there is not
        raise typer.BadParameter(str(error)) from error
    progress = terminal.console(stderr=True)
    unseen = not progress.is_terminal
    report = run(settings, partial(track, description="measuring", console=progress, transient=True, disable=unseen))
    show(report, terminal.console(at_least=WIDTH))
    write(report, json_path, plot_path)
