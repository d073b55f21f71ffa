"""Options that several commands share, with their checks and look-ups."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.errors import ActivationError
from fewbit.files import is_special
from fewbit.text import shown

if TYPE_CHECKING:
    import numpy as np

    from fewbit.design.table import CodeTable
    from fewbit.record import Activation


def _folder(path: Path | None) -> Path | None:
    """The path of an option. Its ~ is replaced here, since the shell does not do so after `--option=`."""
    if path is not None and "\0" in str(path):
        raise typer.BadParameter(f"a path cannot have a null character, got {shown(str(path))}")
    return path and Path(os.path.expanduser(path))


def _file(path: Path | None) -> Path | None:
    if path is not None and path.name in ("", ".."):
        raise typer.BadParameter(f"give the name of a file, got {shown(str(path))}")
    return _folder(path)


def file_option(*names: str, **settings: Any) -> Any:
    """An option that takes the path of a file."""
    return typer.Option(*names, callback=_file, **settings)


def folder_option(*names: str, **settings: Any) -> Any:
    """An option that takes the path of a folder."""
    return typer.Option(*names, callback=_folder, **settings)


def choice_option(*names: str, known: Sequence[str], **settings: Any) -> Any:
    """An option that takes one of the known words."""

    def check(given: str | None) -> str | None:
        if given is not None and given not in known:
            raise typer.BadParameter(f"it must be one of {', '.join(known)}; got {shown(given)}")
        return given

    return typer.Option(*names, callback=check, metavar="|".join(known), **settings)


Bits = Annotated[int, typer.Option(help="Bits of one code, 1 to 8.")]
Weight = Annotated[
    str | None,
    typer.Option(
        help="How often each x occurs: student (the default for the derivative alone), normal (the default if values are "
        "coded too), uniform, or one with arguments, such as 'normal(mean=0, std=2)'."
    ),
]
Coding = Annotated[
    str | None,
    typer.Option(
        help="level: intervals share levels, the default for one channel. interval: each interval has its own level, the "
        "default for several channels. uniform: equal bins, not optimised."
    ),
]
Domain = Annotated[tuple[float, float] | None, typer.Option(help="Only x between these two ends count.", metavar="LOW HIGH")]
Parameters = Annotated[
    list[str] | None, typer.Option("--param", help="A parameter of the activation, such as alpha=0.5. May be repeated.")
]
Samples = Annotated[Path | None, file_option(help="A .npy file of recorded pre-activations, to use as the weight.")]
Channels = Annotated[
    list[str] | None,
    typer.Option(help="What backward reads: derivative (the default), value, or both: --channels derivative value."),
]
Balance = Annotated[float, typer.Option(help="Weight of the value's squared error, relative to the derivative's.")]
Name = Annotated[
    str, typer.Argument(help="An activation of `fewbit list`, or identity, or package.module:function on tensors.")
]


@dataclass(frozen=True)
class TableOptions:
    """The options with which `table` and `plot` choose a table of an activation: as they were given, or their defaults."""

    weight: str | None = None
    coding: str | None = None
    channels: Sequence[str] = ()
    balance: float = 1.0
    domain: tuple[float, float] | None = None
    parameters: Sequence[str] = ()
    samples: Path | None = None

    def find(self, record: Activation, bits: int) -> CodeTable:
        """The table of the activation with these options: shipped, from the cache or designed."""
        from fewbit.store import load_table

        return load_table(
            record.with_parameters(**_parse_parameters(self.parameters)),
            bits,
            weight=self.weight if self.samples is None else _read_samples(self.samples),
            coding=self.coding,
            channels=tuple(self.channels) or ("derivative",),
            balance=self.balance,
            domain=self.domain,
        )

    def find_ladder(self, record: Activation, bits: int) -> tuple[CodeTable, ...]:
        """The ladder of the activation. Bits, channels and parameters name a ladder; its tables differ in all else."""
        from fewbit.store import load_ladder

        if self != TableOptions(channels=self.channels, parameters=self.parameters):
            raise typer.BadParameter("--ladder takes only --bits, --channels and --param: each table has its own weight")
        record = record.with_parameters(**_parse_parameters(self.parameters))
        return load_ladder(record, bits, channels=tuple(self.channels) or ("derivative",))


def find_activation(name: str) -> Activation:
    """The record of a registered name or of `package.module:function`, imported with the working folder on the path."""
    from fewbit import activations
    from fewbit.record import from_callable

    if ":" not in name:
        return activations.get(name)
    try:
        function = named(name)
    except (Exception, SystemExit) as error:  # the module may raise anything on import
        raise ActivationError(f"cannot import {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ActivationError(f"{name} is not a function on tensors, but a {type(function).__name__}")
    return from_callable(function)  # type: ignore[arg-type]


def named(name: str) -> Any:
    """The object `package.module:attribute` or `./file.py:attribute`, imported with the working folder on the path."""
    home, _, attributes = name.rpartition(":")
    with working_folder_on_path():
        found = _run_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
        for part in attributes.split("."):
            found = getattr(found, part)
    return found


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module. It is entered in sys.modules under the name of the file, since its classes may need that."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "likewise"
    found = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, found)
    spec.loader.exec_module(found)
    return found


@contextmanager
def working_folder_on_path() -> Iterator[None]:
    """In this context imports also look in the working folder. Other changes of the path stay after it."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = [each for each in sys.path if each is not folder]


def check_picture(path: Path, option: str = "--output") -> None:
    """Raise before any work is done if no picture can be written to `path`."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if not is_special(path) and path.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{option} {path} must end in one of {', '.join(sorted(known))}")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise before any work is done if the folder of `path` does not exist, if `path` is a folder, or may not be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _read_samples(path: Path) -> np.ndarray:
    import numpy as np

    try:
        if is_special(path):
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            samples = np.load(file)
        if not isinstance(samples, np.ndarray):
            raise ValueError("it holds several arrays")
        return samples
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise typer.BadParameter(f"--samples {path} is not a .npy file of numbers, as numpy.save writes it") from error


def _parse_parameters(texts: Sequence[str]) -> dict[str, float]:
    values = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise typer.BadParameter(f"--param takes NAME=NUMBER, such as alpha=0.5; got {text!r}") from error
    return values
