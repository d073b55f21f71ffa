"""`fewbit demo`: a small network in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import check_picture, file_option


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
