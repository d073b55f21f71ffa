"""The command that draws: `fewbit plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.options import (
    Balance,
    Channels,
    Coding,
    Domain,
    Parameters,
    Samples,
    TableOptions,
    Weight,
    check_picture,
    file_option,
    find_activation,
)
from fewbit.constants import DEFAULT_BITS, SHIPPED_BITS
from fewbit.text import file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    name: Annotated[str | None, typer.Argument(help="An activation, or package.module:function.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="One or more numbers of bits: --bits 1 2 3 4.")] = None,
    weight: Weight = None,
    coding: Coding = None,
    channels: Channels = None,
    balance: Balance = 1.0,
    domain: Domain = None,
    param: Parameters = None,
    samples: Samples = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="Draw all activations with one number of bits.")] = False,
    errors: Annotated[
        bool, typer.Option("--errors", help="Draw the error against the bits, for all activations and both optimal codings.")
    ] = False,
    output: Annotated[
        Path | None, file_option("--output", "-o", help="Write the picture to this file: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Draw an activation's derivative f' (or f, or both), the steps of its tables, and the error of each table.

    --gallery and --errors draw an overview of all activations instead.
    """
    if (name is not None) + gallery + errors != 1:
        raise typer.BadParameter("give an activation's name, or --gallery, or --errors")
    options = TableOptions(weight, coding, channels or (), balance, domain, param or (), samples)
    if (gallery or errors) and (options != TableOptions() or (errors and bits) or len(bits or []) > 1):
        raise typer.BadParameter("--gallery takes one --bits and --errors takes none; neither takes other options of a table")
    from fewbit import plots

    if errors:
        figure, stem = plots.plot_errors(), "errors"
    elif gallery:
        figure, stem = plots.plot_gallery((bits or [DEFAULT_BITS])[0]), "gallery"
    else:
        record = find_activation(str(name))
        found = [options.find(record, b) for b in bits or SHIPPED_BITS]
        bound = record.with_parameters(**found[0].parameters)
        figure, stem = plots.plot_tables(bound, found), record.name
    _show_or_save(figure, output, f"fewbit-{file_name(stem)}.png")


def _show_or_save(figure: Figure, output: Path | None, default: str) -> None:
    """Write the figure to `output`. Without one, show it in a window, or write it to `default` if there is no display."""
    if output is None and _has_display():
        import matplotlib.pyplot as plt

        width, height = figure.get_size_inches()
        manager = plt.figure(figsize=(width, height)).canvas.manager
        if manager is not None:
            manager.canvas.figure = figure
            figure.set_canvas(manager.canvas)
            plt.show()
            return
    from fewbit import terminal
    from fewbit.plots import save

    path = output or Path(default)
    check_picture(path)
    save(figure, path)
    terminal.say_written(path)


def _has_display() -> bool:
    """Whether matplotlib can open windows here. Without a display it falls back to drawing into memory."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from matplotlib.backends.registry import BackendFilter, backend_registry

    try:
        plt.switch_backend(mpl.get_backend())
    except (ImportError, ValueError):  # MPLBACKEND names a backend that does not exist
        return False
    return mpl.get_backend().lower() in backend_registry.list_builtin(BackendFilter.INTERACTIVE)
