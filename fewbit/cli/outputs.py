"""The files that commands on whole models write. Their paths are checked before anything runs; the files are written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fewbit.cli.options import check_folder, check_picture, file_option

if TYPE_CHECKING:
    from fewbit.models.report import Report

Json = Annotated[Path | None, file_option("--json", help="Write the figures to this file, as JSON.")]
Csv = Annotated[Path | None, file_option("--csv", help="Write the rows of the table to this file, as CSV.")]
Plot = Annotated[Path | None, file_option("--plot", help="Write a picture to this file: .png, .svg or .pdf.")]
Html = Annotated[Path | None, file_option("--html", help="Write everything to this file, as one page of HTML.")]
Conversion = Annotated[
    Path | None,
    file_option("--output", "-o", help="Save the conversion to this file. fewbit.load(model, file) reads it."),
]


@dataclass(frozen=True)
class Outputs:
    """The files that are to be written."""

    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    html: Path | None = None
    output: Path | None = None

    def check(self) -> None:
        """Raise if one of them cannot be written, as far as that can be known before."""
        if self.plot:
            check_picture(self.plot, "--plot")
        for path in filter(None, (self.json, self.csv, self.html, self.output)):
            check_folder(path)

    def write(
        self,
        report: Report,
        figures: Mapping[str, Any] | None = None,
        pictured: Report | None = None,
        page: Callable[[Path], Any] | None = None,
        output: Callable[[Path], Any] | None = None,
    ) -> None:
        """Write the files, and print their names.

        figures       more figures for the JSON, besides the report's
        pictured      the report to draw, if it is another one
        page, output  functions that write the page and the output to a path
        """
        import json

        from fewbit import files, terminal

        if self.json:
            files.write(self.json, json.dumps({**report.to_dict(), **(figures or {})}, indent=1) + "\n")
        if self.csv:
            report.to_csv(self.csv)
        if self.plot:
            (pictured or report).plot(self.plot)
        if self.html and page:
            page(self.html)
        if self.output and output:
            output(self.output)
        for path in filter(None, astuple(self)):
            terminal.say_written(path)
