"""`fewbit demo`: a small network in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import check_picture, file_option


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 150,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits of the runs with coded GELUs: --bits 3 1. By default 3 1.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to train on: cpu, cuda, mps, …")] = "cpu",
    output: Annotated[Path, file_option("--output", "-o", help="Write the picture of the loss curves to this file.")] = Path(
        "fewbit-demo.png"
    ),
) -> None:
    """Train a small GPT on the Python standard library's source: exact, with coded GELUs, and with everything coded."""
    from fewbit import terminal

    check_picture(output)
    console = terminal.console()
    console.print(f"Training a small GPT on the Python standard library for {steps} steps")  # before torch takes its time
    from fewbit.demo import run

    run(steps=steps, bits=bits or [3, 1], device=device, output=output, console=console)
