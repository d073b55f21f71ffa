"""`fewbit bench`: activations and whole models, exact and coded, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.models import making
from fewbit.cli.options import (
    check_folder,
    check_picture,
    file_option,
    find_activation,
    named,
)
from fewbit.constants import DEFAULT_BITS, DEFAULT_LAYER_BITS
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.bench.models import Subject

_MODEL = "gpt, llama, conv, or package.module:factory, which returns (model, batch) or (model, batch, loss_fn)."
_BITS = "Bits of the coded runs: --bits 3 1. By default 3, or 4 with --model. A model also takes activation=3,linear=4."


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Activations, as in `fewbit table`. By default gelu and silu.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"Time training steps of a model instead of activations: {_MODEL}")] = None,
    bits: Annotated[list[str] | None, typer.Option(help=_BITS)] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="dtype to time. May be repeated. By default float32 and bfloat16.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Elements of the input. May be repeated. By default 2^10, 2^16 and 2^22.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of gpt, llama or conv. By default 4, 4 and 2.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Device to time on. May be repeated. By default cpu.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads on the CPU. By default as many as torch uses.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds. Each round times every run once. By default 30, or 10 with --model.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Also time encode and decode alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also time the exact activation under torch.compile.")] = False,
    operators: Annotated[
        bool, typer.Option("--operators", help="With --model, also show the bytes that each operator moves.")
    ] = False,
    json_path: Annotated[Path | None, file_option("--json", help="Write all figures to this file, as JSON.")] = None,
    plot_path: Annotated[
        Path | None, file_option("--plot", help="Write a picture of the ratios of times, by size, to this file.")
    ] = None,
) -> None:
    """Time exact and coded activations side by side, forward and backward, and count the bytes that they keep.

    With --model it times training steps of a model instead: exact, with every block checkpointed, and coded. It also counts
    operators and bytes.
    """
    _check_used_with_model(
        model is not None,
        {"names of activations": names, "--size": size, "--parts": parts, "--compile": compiled, "--plot": plot_path},
        {"--blocks": blocks, "--operators": operators},
    )
    if plot_path:
        check_picture(plot_path, "--plot")
    if json_path:
        check_folder(json_path)
    from fewbit import terminal

    dtypes, devices = dtype or ["float32", "bfloat16"], device or ["cpu"]
    if model is not None:
        from fewbit.bench import compare, compare_report

        wanted = bits or [str(DEFAULT_LAYER_BITS)]
        words = (model, _factory(model, blocks), wanted, dtypes, devices, threads, repeats or 10)
        compared = compare.run(_checked(compare.Settings.of, *words), _tracker())
        compare_report.show(compared, terminal.console(), operators)
        if json_path:
            compare_report.write(compared, json_path)
        return
    from fewbit.bench import measure, report

    records = [find_activation(name) for name in names or ("gelu", "silu")]
    numbers, sizes = [_number(text) for text in bits or [str(DEFAULT_BITS)]], size or ["2^10", "2^16", "2^22"]
    options = {"threads": threads, "repeats": repeats or 30, "parts": parts, "compiled": compiled}
    measured = measure.run(_checked(measure.settings_of, records, numbers, dtypes, sizes, devices, **options), _tracker())
    report.show(measured, terminal.console())
    report.write(measured, json_path, plot_path)


def _checked(settings_of: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """The settings that these words mean. An unknown dtype, size or device is wrong usage."""
    try:
        return settings_of(*words, **options)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def _check_used_with_model(with_model: bool, of_activations: dict[str, Any], of_models: dict[str, Any]) -> None:
    if with_model and (given := [name for name, value in of_activations.items() if value]):
        raise typer.BadParameter(f"--model takes no {given[0]}: that is for activations")
    if not with_model and (given := [name for name, value in of_models.items() if value]):
        raise typer.BadParameter(f"{given[0]} is only for --model, as in --model gpt")


def _number(bits: str) -> int:
    try:
        return int(bits)
    except ValueError:
        raise typer.BadParameter(f"--bits of an activation is a number from 1 to 8, got {bits!r}") from None


def _tracker() -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Show the progress on stderr, if that is a terminal."""
    from rich.progress import track

    from fewbit import terminal

    progress = terminal.console(stderr=True)
    unseen = not progress.is_terminal
    return partial(track, description="measuring", console=progress, transient=True, disable=unseen)


def _factory(name: str, blocks: int | None) -> Callable[[], Subject]:
    """A function that makes the model of that name and its batch. It is imported with the working folder on the path."""
    from fewbit.bench.models import BUILT_IN, Subject

    if name in BUILT_IN:
        return partial(BUILT_IN[name], **({} if blocks is None else {"blocks": blocks}))
    if ":" not in name:
        raise typer.BadParameter(f"--model {name} is none of {', '.join(BUILT_IN)}; others are given as package.module:factory")
    if blocks is not None:
        raise typer.BadParameter(f"--blocks is for {', '.join(BUILT_IN)}; leave it out for {name}")
    with making(name):
        found = named(name)

    def make() -> Subject:
        with making(name):
            made = found()
        return Subject.of(made)

    return make
