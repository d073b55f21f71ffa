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

_MODEL = "gpt, llama or conv, or package.module:factory that returns (model, batch) or (model, batch, loss_fn)."
_BITS = "Coded runs: --bits 3 1; 3 if left out. Of a model also activation=3,linear=4; 4 if left out."


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="As in `fewbit table`; gelu and silu if left out.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Training steps of a model instead of activations: {_MODEL}")] = None,
    bits: Annotated[list[str] | None, typer.Option(help=_BITS)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated; float32 and bfloat16 if left out.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="May be repeated; 2^10, 2^16 and 2^22 elements if left out.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of gpt, llama or conv; 4, 4 and 2 if left out.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="May be repeated; cpu if left out.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads on the CPU; torch's own number if left out.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds, in each of which every run is timed once; 30, of a model 10 if left out.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Also encode and decode alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also the exact activation under torch.compile.")] = False,
    operators: Annotated[bool, typer.Option("--operators", help="Of a model, also what each operator moves.")] = False,
    json_path: Annotated[Path | None, file_option("--json", help="Write all figures to this file.")] = None,
    plot_path: Annotated[Path | None, file_option("--plot", help="Picture of the ratios against size.")] = None,
) -> None:
    """Time exact and coded activations, forward and backward, side by side, and count the bytes they keep.

    With --model count and time training steps of a model, exact, with every block checkpointed, and coded.
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
    report.show(measured, terminal.console(at_least=report.WIDTH))
    report.write(measured, json_path, plot_path)


def _checked(settings_of: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """The settings that these words mean; a dtype, size or device that there is not is wrong usage."""
    try:
        return settings_of(*words, **options)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def _check_used_with_model(with_model: bool, of_activations: dict[str, Any], of_models: dict[str, Any]) -> None:
    if with_model and (given := [name for name, value in of_activations.items() if value]):
        raise typer.BadParameter(f"--model takes no {given[0]}: that is for activations")
    if not with_model and (given := [name for name, value in of_models.items() if value]):
        raise typer.BadParameter(f"{given[0]} is for --model: --model gpt, say")


def _number(bits: str) -> int:
    try:
        return int(bits)
    except ValueError:
        raise typer.BadParameter(f"--bits of an activation is a number from 1 to 8, got {bits!r}") from None


def _tracker() -> Callable[[Sequence[Any]], Iterable[Any]]:
    """What shows on stderr how far it is, if that is a terminal."""
    from rich.progress import track

    from fewbit import terminal

    progress = terminal.console(stderr=True)
    unseen = not progress.is_terminal
    return partial(track, description="measuring", console=progress, transient=True, disable=unseen)


def _factory(name: str, blocks: int | None) -> Callable[[], Subject]:
    """What makes the model of that name, and its batch; imported with the working folder on the path."""
    from fewbit.bench.models import BUILT_IN, Subject

    if name in BUILT_IN:
        return partial(BUILT_IN[name], **({} if blocks is None else {"blocks": blocks}))
    if ":" not in name:
        raise typer.BadParameter(f"--model {name} is none of {', '.join(BUILT_IN)}; others are given as package.module:factory")
    if blocks is not None:
        raise typer.BadParameter(f"--blocks is for {', '.join(BUILT_IN)}; {name} makes as many as it makes")
    with making(name):
        found = named(name)

    def make() -> Subject:
        with making(name):
            made = found()
        return Subject.of(made)

    return make
