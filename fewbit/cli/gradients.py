"""Commands that convert a model and run it: `fewbit fidelity`, `fewbit calibrate`, `fewbit allocate`, `fewbit prepare`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.models import (
    AutocastDtype,
    Batches,
    BatchOptions,
    BatchSize,
    BitsByKind,
    BitsIfAny,
    ClassName,
    Data,
    DeviceName,
    Dtype,
    Inputs,
    LossName,
    Model,
    ModelOptions,
    OptimizerName,
    Seed,
    check_step,
    parsed_bits,
    running,
)
from fewbit.cli.options import choice_option, file_option
from fewbit.cli.outputs import Conversion, Csv, Json, Outputs, Plot
from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.errors import ConversionWarning, DesignError, InputError

if TYPE_CHECKING:
    from torch import nn

    from fewbit.models.arguments import LossFunction
    from fewbit.models.conversion.setting import Bits
    from fewbit.models.report import Report


def fidelity(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    data: Data = None,
    batch_size: BatchSize = None,
    batches: Batches = 8,
    loss: LossName = None,
    bits: BitsIfAny = None,
    by: Annotated[
        str,
        choice_option(
            "--by",
            known=("pattern", "module", "parameter"),
            help="Groups of parameters: by module, by parameter, or by pattern (modules whose names differ only in numbers).",
        ),
    ] = "pattern",
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
) -> None:
    """Say whether training from codes is safe. Compares the gradient from codes with the exact one and with the noise of SGD.

    Inputs are random unless --data gives real ones. The model has the weights that its factory gives it. The verdict is for
    these weights and these inputs. It may be different on real inputs, or after some training.

    Without --loss, the loss is the `loss` of the model's output. If there is none, it is the sum of all outputs times fixed
    random numbers.
    """
    chosen = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed)
    options = BatchOptions(chosen, batches, data, batch_size, loss)
    outputs = Outputs(json_path, csv_path, plot_path)
    wanted = None if bits is None else parsed_bits(bits)
    found, given, loss_fn = _start(options, outputs)
    from fewbit import terminal
    from fewbit.models.gradients.fidelity import fidelity as compare

    setting, own = _convert(found, wanted), _OwnLoss()
    with terminal.progress("comparing gradients", len(given)) as advance, running():
        report = compare(found, _each(given, advance), loss_fn or options.under_autocast(own), by=by)
    notes = [f"{type(found).__name__}, {setting}", *options.notes(found, len(given)), f"loss: {loss or own}"]
    _show(report, notes)
    outputs.write(report, {"notes": notes})


def calibrate(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    data: Data = None,
    batch_size: BatchSize = None,
    batches: Batches = 8,
    loss: LossName = None,
    bits: BitsIfAny = None,
    output: Annotated[
        Path | None,
        file_option(
            "--output", "-o", help="Save the tables to this file. fewbit.Calibration.load(file).install(model) reads it."
        ),
    ] = None,
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
) -> None:
    """Design tables for the inputs of a model's own activations and gates, and show how much better they fit.

    Use real inputs (--data) and trained weights. Tables from random inputs fit only random inputs. With --loss, tables of
    derivatives are designed for the squared gradient at each pre-activation.
    """
    chosen = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed)
    options = BatchOptions(chosen, batches, data, batch_size, loss)
    outputs = Outputs(json_path, csv_path, plot_path, output=output)
    wanted = None if bits is None else parsed_bits(bits)
    found, given, loss_fn = _start(options, outputs)
    from fewbit import terminal
    from fewbit.models.calibration.calibrate import calibrate as fit

    with terminal.progress("calibrating tables", len(given)) as advance, running(), options.around():
        report = fit(found, _each(given, advance), loss_fn, wanted)
    notes = [f"{type(found).__name__}, calibrated", *options.notes(found, len(given)), *([f"loss: {loss}"] if loss else [])]
    _show(report, notes)
    outputs.write(report, {"notes": notes}, output=report.save)


def allocate(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    data: Data = None,
    batch_size: BatchSize = None,
    batches: Batches = 8,
    loss: LossName = None,
    budget: Annotated[
        str,
        typer.Option(
            help="What the codes of a batch may take: a share of what the exact tensors take, such as 10%, or bytes, such as "
            "'512 MiB'."
        ),
    ] = "30%",
    choices: Annotated[str, typer.Option(help="Numbers of bits to choose from, separated by commas.")] = "1,2,3,4,5,6,7,8",
    output: Conversion = None,
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
) -> None:
    """Choose the bits of each layer, such that the gradient's error is least within a budget.

    The model is converted with every kind, unless it is converted already. This runs a forward and a backward pass for each
    layer. It also designs a table for each activation and each number of bits.

    Without --loss, the loss is the `loss` of the model's output. If there is none, it is the sum of all outputs times fixed
    random numbers.
    """
    chosen = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed)
    options = BatchOptions(chosen, batches, data, batch_size, loss)
    outputs = Outputs(json_path, csv_path, plot_path, output=output)
    from fewbit.models.calibration.allocate import parse_budget

    numbers = _numbers(choices)
    parse_budget(budget)
    found, given, loss_fn = _start(options, outputs)
    from fewbit import terminal
    from fewbit.models.calibration.allocate import allocate as choose
    from fewbit.models.conversion.stored import save

    with terminal.progress("running the model", len(given)) as advance, running(), options.around():
        report = choose(found, _each(given, advance), loss_fn, budget, choices=numbers)
    own = "the `loss` of the model's output, or else the sum of all outputs times fixed random numbers"
    notes = [f"{type(found).__name__}, allocated", *options.notes(found, len(given)), f"loss: {loss or own}"]
    _show(report, notes)
    outputs.write(report, {"notes": notes}, output=lambda path: save(found, path))


def prepare(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    data: Data = None,
    batch_size: BatchSize = None,
    batches: Annotated[
        int, typer.Option(min=2, help="Number of batches to compare gradients on, or as many as --data has.")
    ] = 8,
    loss: LossName = None,
    bits: BitsByKind = str(DEFAULT_MODEL_BITS),
    budget: Annotated[
        str | None, typer.Option(help="Bytes that a training step may take at its peak, such as '24 GiB'.")
    ] = None,
    optimizer: OptimizerName = None,
    output: Conversion = None,
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
) -> None:
    """Convert a model as far as that pays and is safe. Gives more bits if gradients err too much. Calibrates if that helps.

    Without --loss, the loss is the `loss` of the model's output. If there is none, it is the sum of all outputs times fixed
    random numbers.
    """
    chosen = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed)
    options = BatchOptions(chosen, batches, data, batch_size, loss)
    outputs = Outputs(json_path, csv_path, plot_path, output=output)
    wanted = parsed_bits(bits)
    check_step(optimizer, budget)
    found, given, loss_fn = _start(options, outputs)
    from fewbit.models.conversion.stored import save
    from fewbit.models.prepare import prepare as convert

    own = _OwnLoss()
    with running():
        report = convert(found, given, loss_fn or options.under_autocast(own), budget, bits=wanted, optimizer=optimizer)
    notes = [f"{type(found).__name__}, prepared", *options.notes(found, len(given)), f"loss: {loss or own}"]
    _show(report, notes)
    outputs.write(report, {"notes": notes}, output=lambda path: save(found, path))


def _start(options: BatchOptions, outputs: Outputs) -> tuple[nn.Module, list[Any], LossFunction | None]:
    """Check all that can be checked before; then return the model, the batches, and the loss function if one is named."""
    outputs.check()
    options.check()
    loss_fn = options.loss_function()
    model = options.model.make()
    return model, options.batches(model), loss_fn


def _convert(model: nn.Module, bits: Bits | None) -> str:
    """Convert the model, unless it is converted and no bits are given. Returns words for its state then."""
    from fewbit.models.conversion.convert import convert
    from fewbit.models.conversion.engine import is_converted
    from fewbit.models.conversion.setting import Setting
    from fewbit.models.modules import coded_modules

    if bits is None and (coded_modules(model) or any(map(is_converted, model.modules()))):
        return "as its factory converted it"
    wanted = DEFAULT_MODEL_BITS if bits is None else bits
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        try:
            convert(model, wanted)
        except ConversionWarning as warning:
            raise InputError(f"there is nothing to compare: {warning}") from warning
    return f"converted with {Setting.of(wanted)}"


class _OwnLoss:
    """The `loss` of a model's output, or else the sum of all outputs times fixed random numbers. `str` says which it was."""

    def __init__(self):
        self._is_returned = True

    def __call__(self, model: Any, batch: Any) -> Any:
        from fewbit.models.arguments import loss_in, surrogate_loss

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            self._is_returned = loss_in(output) is not None
            return output

        return surrogate_loss(watched, batch)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        if self._is_returned:
            return "the `loss` of the model's output"
        return "the sum of all outputs times fixed random numbers, since the output has no `loss`; name your own with --loss"


def _each(batches: list[Any], advance: Callable[[], None]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        advance()


def _numbers(choices: str) -> list[int]:
    from fewbit.design.table import check_bits

    try:
        return [check_bits(int(each), DesignError) for each in choices.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--choices takes numbers of bits, 1 to 8, such as 2,3,4; got {choices!r}") from error


def _show(report: Report, notes: list[str]) -> None:
    from fewbit import terminal

    terminal.show(*notes, "", report.view())
