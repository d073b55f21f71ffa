"""The `fewbit` command: thin, typed commands over the library. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.constants import CODINGS, DEFAULT_BITS, DEFAULT_WEIGHT, SHIPPED_BITS
from fewbit.errors import ActivationError, DesignError, FewbitError, InputError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from fewbit.design import CodeTable
    from fewbit.record import Activation

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tables_app = typer.Typer(help="The shipped tables.", no_args_is_help=True)
app.add_typer(tables_app, name="tables")

# the base of all usage errors, which typer exports under no name of its own in some versions
_CommandError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

Bits = Annotated[int, typer.Option(help="Bits of one code, 1 to 8.")]
Weight = Annotated[str, typer.Option(help="student, normal, uniform, or with arguments: 'normal(mean=0, std=2)'.")]
Coding = Annotated[str, typer.Option(help="level (intervals share levels) or interval (one level each).")]
Domain = Annotated[tuple[float, float] | None, typer.Option(help="Low and high end of x.", metavar="LOW HIGH")]
Parameters = Annotated[list[str] | None, typer.Option("--param", help="A parameter, such as alpha=0.5; may be repeated.")]
Samples = Annotated[Path | None, typer.Option(help="A .npy file of pre-activations to use as weight.")]
Name = Annotated[str, typer.Argument(help="An activation of `fewbit list`, or package.module:function on tensors.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 for a failure, 2 for wrong usage. Errors take one line on stderr."""
    arguments = _spread_bits(sys.argv[1:] if argv is None else argv)
    try:
        return app(args=arguments or ["--help"], prog_name="fewbit", standalone_mode=False) or 0
    except _CommandError as error:
        return _complain(error.format_message(), error.exit_code)
    except (ActivationError, DesignError) as error:  # a wrong name or a value out of range on the command line
        return _complain(str(error), 2)
    except FewbitError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:  # the reader of our output has gone: `fewbit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _complain(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)


def _complain(message: str, status: int) -> int:
    if message:  # there is none where typer has printed the help of a group without a command
        print("fewbit: " + " ".join(message.split()), file=sys.stderr)
    return status


def _spread_bits(arguments: list[str]) -> list[str]:
    """`plot gelu --bits 1 2 3` -> `plot gelu --bits 1 --bits 2 --bits 3`: several values of an option, unknown to typer."""
    if arguments[:1] not in (["plot"], ["demo"], ["bench"]):
        return arguments
    spread: list[str] = []
    after_bits = False
    for argument in arguments:
        number = argument.lstrip("-").isdigit()
        if after_bits and number and spread[-1] != "--bits":
            spread.append("--bits")
        after_bits = argument == "--bits" or (after_bits and number)
        spread.append(argument)
    return spread


def _show_version(wanted: bool) -> None:
    if wanted:
        from fewbit import __version__

        print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Optimal few-bit codes for the backward pass of activations."""


@app.command("list")
def list_activations() -> None:
    """All activations, with the error of their shipped tables."""
    from fewbit import activations, terminal
    from fewbit.record import plural
    from fewbit.store import load_table

    view = terminal.table(("activation", "module", "parameters"), tuple(plural(bits, "bit") for bits in SHIPPED_BITS))
    for record in map(activations.get, activations.names()):
        arguments = {**record.options, **{name: f"{value:g}" for name, value in record.parameters.items()}}
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        errors = [load_table(record, bits).relative_rms for bits in SHIPPED_BITS]
        view.add_row(record.name, record.module, shown, *(f"{error:.4f}" if error else "exact" for error in errors))
    terminal.console().print("Relative rms error of the derivative's codes, weight student, level coding\n", view, sep="\n")


@app.command()
def table(
    name: Name,
    bits: Bits = DEFAULT_BITS,
    weight: Weight = DEFAULT_WEIGHT,
    coding: Coding = CODINGS[0],
    domain: Domain = None,
    param: Parameters = None,
    samples: Samples = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show the optimal code table of an activation, and write it where --output says."""
    found = _find_table(_find_activation(name), bits, weight, coding, domain, param, samples)
    if output:
        found.save(output)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    _print_table(found)
    if output:
        print(f"wrote {output}")


@tables_app.command("build")
def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file would change.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; the shipped tables' own if left out.")] = None,
) -> None:
    """Design all shipped tables anew."""
    from rich.progress import track

    from fewbit import activations, terminal
    from fewbit.errors import TableError
    from fewbit.store import build_tables, tables_directory

    directory = output or tables_directory()
    steps = build_tables(directory, check=check)
    progress = track(steps, "designing", total=len(activations.SHIPPED), console=terminal.console(stderr=True))
    changed = [name for name, differs in progress if differs]
    if check and changed:
        raise TableError(
            f"{len(changed)} files in {directory} differ from a new design: {', '.join(changed)}; run `fewbit tables build`"
        )
    state = "are as a new design makes them" if not changed else f"written; changed: {', '.join(changed)}"
    print(f"{len(activations.SHIPPED)} files in {directory} {state}")


@app.command()
def plot(
    name: Annotated[str | None, typer.Argument(help="An activation, or package.module:function.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="One or more: --bits 1 2 3 4.")] = None,
    weight: Weight = DEFAULT_WEIGHT,
    coding: Coding = CODINGS[0],
    domain: Domain = None,
    param: Parameters = None,
    samples: Samples = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="All activations, at one number of bits.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Error against bits, all activations, both codings.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Picture to write: .png, .svg, .pdf.")] = None,
) -> None:
    """Draw f' with the steps of its tables and the error, or an overview of all activations."""
    if (name is not None) + gallery + errors != 1:
        raise typer.BadParameter("give an activation's name, or --gallery, or --errors")
    shaped = weight != DEFAULT_WEIGHT or coding != CODINGS[0] or domain or param or samples
    if (gallery or errors) and (shaped or (errors and bits) or len(bits or []) > 1):
        raise typer.BadParameter("--gallery takes one --bits, --errors none, and neither of them other options of the table")
    from fewbit import plots

    if errors:
        figure, stem = plots.plot_errors(), "errors"
    elif gallery:
        figure, stem = plots.plot_gallery((bits or [DEFAULT_BITS])[0]), "gallery"
    else:
        record = _find_activation(str(name))
        found = [_find_table(record, b, weight, coding, domain, param, samples) for b in bits or SHIPPED_BITS]
        bound = record.with_parameters(**found[0].parameters)
        figure, stem = plots.plot_tables(bound, found), record.name
    _show_or_save(figure, output, f"fewbit-{stem}.png")


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 150,
    bits: Annotated[list[int] | None, typer.Option(help="Runs besides the exact one: --bits 3 1.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, …")] = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture of the loss curves.")] = Path("fewbit-demo.png"),
) -> None:
    """Train a small GPT on the Python standard library with exact and with coded GELU, side by side."""
    from fewbit import terminal

    _check_picture(output)
    console = terminal.console()
    console.print(f"Training a small GPT on the Python standard library for {steps} steps")  # before torch takes its time
    from fewbit.demo import run

    run(steps=steps, bits=bits or [3, 1], device=device, output=output, console=console)


@app.command()
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
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Picture of the ratios against size.")] = None,
) -> None:
    """Time exact and coded activations, forward and backward, side by side, and count the bytes they keep."""
    if plot_path:
        _check_picture(plot_path, "--plot")
    if json_path:
        _check_folder(json_path)
    from rich.progress import track

    from fewbit import terminal
    from fewbit.bench import run, settings_of
    from fewbit.bench_report import WIDTH, show, write

    records = [_find_activation(name) for name in names or ("gelu", "silu")]
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


def _find_activation(name: str) -> Activation:
    """The record of a registered name or of `package.module:function`, imported with the working folder on the path."""
    from fewbit import activations
    from fewbit.record import from_callable

    if ":" not in name:
        return activations.get(name)
    import importlib

    home, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(home), attribute)
    except Exception as error:  # whatever the module does on import
        raise ActivationError(f"cannot import {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ActivationError(f"{name} is no function on tensors, but a {type(function).__name__}")
    return from_callable(function)  # type: ignore[arg-type]


def _find_table(
    record: Activation,
    bits: int,
    weight: Any,
    coding: str,
    domain: tuple[float, float] | None,
    param: list[str] | None,
    samples: Path | None,
) -> CodeTable:
    """The table that the options of `table` and `plot` ask for."""
    from fewbit.store import load_table

    if samples is not None:
        weight = _read_samples(samples)
    record = record.with_parameters(**_parse_parameters(param or []))
    return load_table(record, bits, weight=weight, coding=coding, domain=domain)


def _read_samples(path: Path) -> np.ndarray:
    import zipfile

    import numpy as np

    try:
        with path.open("rb") as file:
            samples = np.load(file)
        if not isinstance(samples, np.ndarray):
            raise ValueError("it holds several arrays")
        return samples
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise typer.BadParameter(f"--samples {path} is no .npy file of numbers, as numpy.save writes it") from error


def _parse_parameters(texts: list[str]) -> dict[str, float]:
    values = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise typer.BadParameter(f"--param takes NAME=NUMBER, such as alpha=0.5; got {text!r}") from error
    return values


def _print_table(found: CodeTable) -> None:
    from fewbit import terminal
    from fewbit.record import label, plural

    title = label(found.activation or "custom", found.parameters)
    view = terminal.table((), ("x above", "up to", "code", "level"))
    ends = ["-inf", *(f"{threshold:.6f}" for threshold in found.thresholds), "inf"]
    for low, high, code in zip(ends[:-1], ends[1:], found.codes, strict=True):
        view.add_row(low, high, str(code), f"{found.levels[0, code]:.6f}")
    low, high = found.domain or (float("nan"),) * 2
    terminal.console().print(
        f"{title}: {plural(found.bits, 'bit')}, weight {found.weight}, {found.coding} coding\n",
        view,
        f"\nmse {found.mse:.6g}, relative rms {found.relative_rms:.6g} on [{low:g}, {high:g}]",
        sep="\n",
    )


def _show_or_save(figure: Figure, output: Path | None, default: str) -> None:
    """Write the figure to `output`; without one, show it in a window, or where there is no display write it to `default`."""
    if output is None and _has_display():
        import matplotlib.pyplot as plt

        width, height = figure.get_size_inches()
        manager = plt.figure(figsize=(width, height)).canvas.manager
        if manager is not None:
            manager.canvas.figure = figure
            figure.set_canvas(manager.canvas)
            plt.show()
            return
    path = output or Path(default)
    _check_picture(path)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def _check_picture(path: Path, option: str = "--output") -> None:
    """Raise before any work is done if no picture can be written to `path`."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{option} {path} must end in one of {', '.join(sorted(known))}")
    _check_folder(path)


def _check_folder(path: Path) -> None:
    """Raise before any work is done if `path` has no folder to be written in."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))


def _has_display() -> bool:
    """Whether matplotlib opens windows here: it looks for a display, and without one falls back to drawing into memory."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from matplotlib.backends.registry import BackendFilter, backend_registry

    try:
        plt.switch_backend(mpl.get_backend())
    except (ImportError, ValueError):  # MPLBACKEND names one that is not there
        return False
    return mpl.get_backend().lower() in backend_registry.list_builtin(BackendFilter.INTERACTIVE)
