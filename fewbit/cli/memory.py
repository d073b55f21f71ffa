"""`fewbit memory`: what a model keeps for backward, and what converting it would leave."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.options import check_folder, check_picture, file_option, named, working_folder_on_path
from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.errors import FewbitError, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def memory(
    model: Annotated[
        str,
        typer.Argument(
            help="package.module:factory or ./file.py:factory, called without arguments, or a module itself; or "
            "hf:path/to/config.json, of Hugging Face."
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", help="Shape of an input, 8,3,224,224, or with its dtype and name, labels=8,128:int64; once for each."
        ),
    ],
    class_name: Annotated[
        str | None, typer.Option("--class", help="Of transformers, for hf:; the first in the file if left out.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of the training step whose peak is shown: adamw, say.")] = None,
    budget: Annotated[str | None, typer.Option(help="Show the largest batches that fit: '24 GiB', say.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="Plan a conversion: 4, for every kind, or by kind, activation=3,linear=4.")
    ] = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="Inputs of floating point need a gradient.")] = False,
    fake: Annotated[bool, typer.Option("--fake", help="On fake tensors, for models too large for this machine.")] = False,
    json_path: Annotated[Path | None, file_option("--json", help="Write the figures to this file.")] = None,
    csv_path: Annotated[Path | None, file_option("--csv", help="Write a row for each saved tensor to this file.")] = None,
    plot_path: Annotated[Path | None, file_option("--plot", help="Picture of the bytes by module.")] = None,
    html_path: Annotated[Path | None, file_option("--html", help="Write all of it as one page to this file.")] = None,
) -> None:
    """Show what a model keeps for backward, by module and operation, the peak of a step, and what fewbit.convert would save.

    Integer inputs are zeros. With --bits, the page, the picture and the JSON hold the plan, too; with --budget, the JSON holds
    the largest batches.
    """
    if plot_path:
        check_picture(plot_path, "--plot")
    for path in (json_path, csv_path, html_path):
        if path:
            check_folder(path)
    from fewbit import terminal
    from fewbit.models.conversion.setting import Setting, parse_bits
    from fewbit.models.memory.peak import optimizer_of
    from fewbit.models.memory.report import memory as measure
    from fewbit.models.report import Report

    wanted = None if bits is None else parse_bits(bits)
    if wanted is not None:
        Setting.of(wanted)  # which raises before the model is looked at
    limit = None if budget is None else terminal.parse_bytes(budget)
    optimizer_of(optimizer)
    batch = _batch(inputs, gradient, fake)
    found = _find_model(model, class_name, fake)
    try:
        report = measure(found, batch, fake=fake, optimizer=optimizer)
        plan = None if wanted is None else report.plan(wanted)
        results = {"peak": _peak_of(report), "plan": plan, "peak_after": plan and _peak_of(plan)}
        if limit is not None:
            results["largest_batch"] = report.largest_batch(limit, DEFAULT_MODEL_BITS if wanted is None else wanted)
    except FewbitError:
        raise
    except (Exception, SystemExit) as error:  # whatever the model does with such inputs
        raise InputError(f"the model raised {type(error).__name__} for these inputs: {error}") from error
    results = {name: each for name, each in results.items() if each is not None}
    console = terminal.console(at_least=report.width)
    console.print(report.view(), "")
    for name, each in results.items():
        if isinstance(each, Report):
            console.print(each.view(), "")
        else:
            text = f"after plan.convert(), {each}" if name == "peak_after" else str(each)
            console.print(text, "", sep="\n", soft_wrap=True)
    _write(report, results, json_path, csv_path, plot_path, html_path)


def _peak_of(report: Any) -> Any:
    """The peak of a step, or the words why there is none: the model cannot run on fake tensors, or nothing needs a gradient."""
    try:
        return report.peak
    except Exception as error:  # whatever the model does
        return f"no peak of a training step: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _write(
    report: Any,
    results: dict[str, Any],
    json_path: Path | None,
    csv_path: Path | None,
    plot_path: Path | None,
    html_path: Path | None,
) -> None:
    import json

    from fewbit import files, terminal

    plan = results.get("plan")
    if json_path:
        figures = {name: each.to_dict() for name, each in results.items() if not isinstance(each, str)}
        files.write(json_path, json.dumps({**report.to_dict(), **figures}, indent=1) + "\n")
    if csv_path:
        report.to_csv(csv_path)
    if plot_path:
        (plan or report).plot(plot_path)
    if html_path:
        report.to_html(html_path, plan)
    for path in filter(None, (json_path, csv_path, plot_path, html_path)):
        terminal.say_written(path)


def _find_model(name: str, class_name: str | None, fake: bool) -> nn.Module:
    """What `package.module:attribute` makes or is, imported with the working folder on the path; or what a configuration of
    Hugging Face describes, if it is to be fake on the meta device."""
    import torch
    from torch import nn

    if ":" not in name:
        raise typer.BadParameter(
            f"the model is given as package.module:factory, ./file.py:factory or hf:config.json, got {name!r}"
        )
    try:
        with working_folder_on_path():  # from which a factory may import, too
            found = named(name) if not name.startswith("hf:") else partial(_configured, Path(name[3:]), class_name, fake)
            if not isinstance(found, nn.Module):
                found = found()
    except (Exception, SystemExit) as error:  # whatever the module does on import, and the factory on a call
        raise InputError(f"cannot make a model of {name}: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise InputError(f"{name} made a {type(found).__name__}, not a torch.nn.Module")
    if isinstance(found, torch.jit.ScriptModule):
        raise InputError(f"{name} made a scripted module, whose parts run out of sight; give the module that it was made of")
    return found


def _configured(path: Path, class_name: str | None, fake: bool) -> nn.Module:
    """The model of transformers that a config.json describes, with random weights."""
    import json
    from importlib import import_module

    import torch

    try:
        transformers = import_module("transformers")  # not among fewbit's requirements
    except ImportError as error:
        raise InputError(f"hf: needs the package transformers ({error}); pip install transformers") from error
    settings = json.loads(path.read_text(encoding="utf-8"))
    wanted = class_name or next(iter(settings.get("architectures") or ()), None)
    if wanted is None:
        raise InputError("the file names no architectures; give one of transformers by --class")
    kind = getattr(transformers, wanted)
    with torch.device("meta" if fake else "cpu"):
        return kind(kind.config_class.from_dict(settings)).train()


def _batch(texts: list[str], gradient: bool, fake: bool) -> Any:
    """The inputs, by name if they are given with names."""
    found = [text.rpartition("=")[::2] for text in texts]
    tensors = [_input(text, gradient, fake) for _, text in found]
    names = [name for name, _ in found if name]
    if not names:
        return tuple(tensors)
    if len({*names}) != len(found):
        raise typer.BadParameter("--input: either all inputs have names, each its own, or none has")
    return dict(zip(names, tensors, strict=True))


def _input(text: str, gradient: bool, fake: bool) -> torch.Tensor:
    """A tensor of the shape and dtype: random numbers, zeros for integers, nothing at all if it is to be a fake one.

    >>> _input("2,3:int64", False, False).tolist()
    [[0, 0, 0], [0, 0, 0]]
    """
    import torch

    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")] if sizes else []
    except ValueError:
        shape = [-1]
    if not isinstance(dtype, torch.dtype) or any(size < 0 for size in shape):
        raise typer.BadParameter(f"--input takes a shape such as 8,3,224,224 or 8,128:int64, got {text!r}")
    try:
        if fake:
            found = torch.empty(shape, dtype=dtype, device="meta")
        else:
            found = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # too large, or no dtype for such numbers
        raise typer.BadParameter(f"--input {text}: there is no such tensor here ({error}); --fake needs no memory") from error
    return found.requires_grad_(gradient and dtype.is_floating_point)
