"""The `fewbit` command: thin, typed commands over the library. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from fewbit import interrupt
from fewbit.cli import bench, environment, gradients, memory, pictures, tables, training
from fewbit.constants import CHANNELS
from fewbit.errors import ActivationError, DesignError, FewbitError
from fewbit.text import cut, plain

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tables_app = typer.Typer(help="Build the tables that fewbit ships with.", no_args_is_help=True)
app.add_typer(tables_app, name="tables")


def _help(command: Callable[..., Any]) -> str:
    """The command's docstring with each paragraph on one line. The terminal wraps it."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


app.command("list")(tables.list_activations)
for _command in (
    *(tables.table, pictures.plot, training.demo, bench.bench),
    *(memory.memory, memory.plan, gradients.fidelity, gradients.calibrate, gradients.allocate, gradients.prepare),
    environment.env,
):
    app.command(help=_help(_command))(_command)
tables_app.command("build")(tables.build)

# the base of all usage errors; some versions of typer do not export it
_CommandError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# options with several values, which typer does not support: the commands that take them, and a test for such a value
_SPREAD = {
    "--bits": (("plot", "demo", "bench"), lambda text: text.lstrip("-").isdigit()),
    "--channels": (("table", "plot"), CHANNELS.__contains__),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for a failure, 2 for wrong usage. Errors take one line on stderr."""
    arguments = _spread(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        with _notices():
            return _run(arguments)


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Say on a terminal why the first command takes long."""
    log, handler = logging.getLogger("fewbit.compiling"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fewbit: %(message)s"))
    level = log.level
    if sys.stderr is not None and sys.stderr.isatty():
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _run(arguments: list[str]) -> int:
    try:
        status = app(args=arguments or ["--help"], prog_name="fewbit", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # now, while an error can still be reported
        return status if status != interrupt.STATUS else _complain("interrupted", status)  # typer itself prints nothing
    except _CommandError as error:
        return _complain(error.format_message(), error.exit_code)
    except (ActivationError, DesignError) as error:  # a wrong name or a value out of range on the command line
        return _complain(str(error), 2)
    except FewbitError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:  # the reader of our output has ended: `fewbit list | head`
        _drop_output()
        return 1
    except OSError as error:
        if error.filename is None:
            _drop_output()
        return _complain(f"{error.filename or 'cannot write the output'}: {error.strerror or error}", 1)
    except MemoryError:
        return _complain("there is not enough memory", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", interrupt.STATUS)


def _show_warning(message: Any, *_: Any) -> None:
    """Print a warning on one line, without its place in the code."""
    print("fewbit: warning: " + plain(cut(" ".join(str(message).split()), 2000)), file=sys.stderr)


def _drop_output() -> None:
    """Keep Python from trying again, when the process ends, to write what could not be written."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, status: int) -> int:
    if interrupt.came():  # the interrupted code may have turned the interrupt into another error
        message, status = "interrupted", interrupt.STATUS
    if message:  # there is none if typer has printed the help of a group without a command
        print("fewbit: " + plain(cut(" ".join(message.split()), 2000)), file=sys.stderr)
    return status


def _spread(arguments: list[str]) -> list[str]:
    """`plot gelu --bits 1 2 3` -> `plot gelu --bits 1 --bits 2 --bits 3`, and the same for each option with several values."""
    options = {
        option: is_value for option, (commands, is_value) in _SPREAD.items() if arguments[:1] and arguments[0] in commands
    }
    spread: list[str] = []
    option = None  # the option whose values are being read
    for argument in arguments:
        if option and options[option](argument):
            if spread[-1] != option:
                spread.append(option)
        else:
            option = argument if argument in options else None
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
    """Train PyTorch models with a few bits for each number that backward reads. Forward stays exact."""
