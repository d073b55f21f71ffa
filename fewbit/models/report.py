"""The base of all reports on whole models: they print as a table, export their figures and draw a picture."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit import files, terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


class Report(ABC):
    """Figures of a model, one row for each of its parts. It prints as a table."""

    width: int = 120  # columns of the printed table

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One row for each part, not rounded: name of the figure -> text, number or None. The CSV file has these rows."""

    @abstractmethod
    def totals(self) -> dict[str, Any]:
        """The figures of the whole, and how they were measured."""

    @abstractmethod
    def view(self) -> RenderableType:
        """What is printed: the rows that matter most, the totals, and what the columns mean."""

    @abstractmethod
    def figure(self) -> Figure:
        """The picture."""

    def to_dict(self) -> dict[str, Any]:
        """The totals, and the rows under "rows". All are plain texts, numbers, lists and None."""
        return {**self.totals(), "rows": self.rows()}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON. If `path` is given, it is also written to that file."""
        return _written(json.dumps(self.to_dict(), indent=1) + "\n", path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """`rows` as comma-separated values under a line of names. If `path` is given, they are also written to that file.

        A text that a spreadsheet would take for a formula gets an apostrophe before it.
        """
        rows, text = self.rows(), io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
        return _written(text.getvalue(), path)

    def plot(self, path: str | Path | None = None) -> Figure:
        """The picture, a matplotlib Figure. If `path` is given, it is also saved to that file."""
        figure = self.figure()
        if path is not None:
            from fewbit.plots.style import save

            save(figure, path)
        return figure

    def __str__(self) -> str:
        return terminal.text(self.view(), self.width)

    __repr__ = __str__


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        files.write(path, text)
    return text
