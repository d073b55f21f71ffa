"""`fewbit memory` and `fewbit plan`: what a model keeps for backward, and what it would keep after a conversion."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewbit.cli.models import (
    AutocastDtype,
    BitsByKind,
    ClassName,
    DeviceName,
    Dtype,
    Fake,
    Gradient,
    Inputs,
    LossName,
    Model,
    ModelOptions,
    OptimizerName,
    Seed,
    check_loss_name,
    check_step,
    loss_of_name,
    parsed_bits,
    running,
)
from fewbit.cli.outputs import Csv, Html, Json, Outputs, Plot
from fewbit.constants import DEFAULT_MODEL_BITS


def memory(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    loss: LossName = None,
    optimizer: OptimizerName = None,
    budget: Annotated[
        str | None, typer.Option(help="Also show the largest batches that fit these bytes, such as '24 GiB'.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Also plan a conversion: 4 is for every kind of saved tensor, activation=3,linear=4 is by kind."),
    ] = None,
    gradient: Gradient = False,
    fake: Fake = False,
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
    html_path: Html = None,
) -> None:
    """Show what a model keeps for backward, by module and operation, and the peak of a training step.

    With --bits, the page, the picture and the JSON also hold the plan of a conversion. With --budget, the page and the JSON
    also hold the largest batches.
    """
    options = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed, fake, gradient)
    outputs = Outputs(json_path, csv_path, plot_path, html_path)
    outputs.check()
    options.check()
    wanted = None if bits is None else parsed_bits(bits)
    check_step(optimizer, budget)
    check_loss_name(loss)
    from fewbit import terminal
    from fewbit.models.memory.report import memory as measure

    loss_fn = None if loss is None else loss_of_name(loss)
    found = options.make()
    batch = options.batch(found)
    with options.autocast(), running():
        report = measure(found, batch, fake=fake, loss_fn=loss_fn, optimizer=optimizer)
        results = {"peak": _peak_of(report)}
        if wanted is not None:
            results["plan"] = report.plan(wanted)
            results["peak_after"] = _peak_of(results["plan"])
        if budget is not None:
            results["largest_batch"] = report.largest_batch(budget, DEFAULT_MODEL_BITS if wanted is None else wanted)
    terminal.show(report.view())
    for name, each in results.items():
        after = "after plan.convert(), " * (name == "peak_after")
        terminal.show("", each.view() if hasattr(each, "view") else f"{after}{each}")
    plan, figures = results.get("plan"), {name: each.to_dict() for name, each in results.items() if not isinstance(each, str)}
    outputs.write(report, figures, pictured=plan, page=lambda path: report.to_html(path, plan, results.get("largest_batch")))


def plan(
    model: Model,
    inputs: Inputs = None,
    class_name: ClassName = None,
    dtype: Dtype = None,
    autocast: AutocastDtype = None,
    device: DeviceName = "cpu",
    seed: Seed = 0,
    loss: LossName = None,
    bits: BitsByKind = str(DEFAULT_MODEL_BITS),
    budget: Annotated[
        str | None, typer.Option(help="Bytes that a training step may take at its peak, such as '8 GiB'.")
    ] = None,
    optimizer: OptimizerName = None,
    gradient: Gradient = False,
    fake: Fake = False,
    json_path: Json = None,
    csv_path: Csv = None,
    plot_path: Plot = None,
    html_path: Html = None,
) -> None:
    """Plan a conversion: what each module would keep, what is worth coding, and the peak of a training step after it.

    With --budget, choose for each block of the model: keep it, code it, recompute it in backward, or code and recompute it.
    The plan is the fastest one found that fits. The lines of Python that carry it out are printed too.
    """
    options = ModelOptions(model, inputs, class_name, dtype, autocast, device, seed, fake, gradient)
    outputs = Outputs(json_path, csv_path, plot_path, html_path)
    outputs.check()
    options.check()
    wanted = parsed_bits(bits)
    check_step(optimizer, budget)
    check_loss_name(loss)
    from fewbit import terminal
    from fewbit.models.memory.report import memory as measure

    loss_fn = None if loss is None else loss_of_name(loss)
    found = options.make()
    batch = options.batch(found)
    with options.autocast(), running():
        report = measure(found, batch, fake=fake, loss_fn=loss_fn, optimizer=optimizer)
        if budget is not None:
            planned, peaks = report.plan(wanted, budget=budget), {}
        else:
            planned = report.plan(wanted)
            peaks = {"peak": _peak_of(report), "peak_after": _peak_of(planned)}
    terminal.show(planned.view())
    for name, each in peaks.items():
        terminal.show("", f"{'exact' if name == 'peak' else 'after plan.convert()'}, {each}")
    figures = {name: each.to_dict() for name, each in peaks.items() if not isinstance(each, str)}
    outputs.write(planned, figures, page=lambda path: report.to_html(path, planned))


def _peak_of(report: Any) -> Any:
    """The peak of a step, or a text that says why there is none: the model cannot run on fake tensors, or nothing needs a
    gradient."""
    from fewbit import terminal

    try:
        with terminal.progress("following a training step"):
            return report.peak
    except Exception as error:  # the model may raise anything
        return f"no peak of a training step: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
