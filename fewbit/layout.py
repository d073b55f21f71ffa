"""Lays out texts and tables in the columns of a terminal. Nothing is cut, and no line is longer than the terminal is wide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile, zip_longest
from typing import NamedTuple

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fewbit.text import cut, plain

WIDTH = 120  # columns of the longest lines of text, also in a wider terminal
_LONGEST = 400  # characters of a cell: files from outside may hold names of any length
_SENTENCE = 24  # columns that a table gives to sentences at least
_GAP, _INDENT = "  ", "  "  # between columns; before lines that stand below a name
_HANG = re.compile(r" +|\S+(?: \S+)*? {2,}")  # of a line: its indent, or a word with its explanation's gap
_UNIT = re.compile(r"(?<=\d) (?=(?:%|×|[KMGT]iB|B|µs|ms|bits?)(?!\w))")  # the space between a number and its unit
_WORD = re.compile(" *[^ ]+")
_GLUE = "\xa0"  # a space at which no line is broken; texts hold none, since `plain` escapes it


def lines(view: RenderableType, width: int) -> Iterator[RenderableType]:
    """The lines of a view, which holds texts and tables. A rich Text, such as Python to paste, stays as it is."""
    if isinstance(view, Group):
        for each in view.renderables:
            yield from lines(each, width)
    elif isinstance(view, str):
        yield from map(Text, broken(plain(view), min(width, WIDTH)))
    elif isinstance(view, Table):
        yield from _table_lines(view, width)
    else:
        yield view


def broken(text: str, width: int, hang: str | None = None) -> list[str]:
    """The lines of a text, broken between words, and never between a number and its unit.

    A broken line goes on below its own beginning, or below what follows its first gap of two spaces. With `hang`, it goes
    on after that.

    >>> broken("  kept of all: 12 MiB", 18), broken("µs  a median of times", 14), broken("encoder.layers.0.norm", 17)
    (['  kept of all:', '  12 MiB'], ['µs  a median', '    of times'], ['encoder.layers.0.', 'norm'])
    """
    return [part for line in text.split("\n") for part in _broken_line(line.rstrip(" "), width, hang)]


def _broken_line(line: str, width: int, hang: str | None) -> Iterator[str]:
    if cell_len(line) <= width:
        yield line.replace(_GLUE, " ")
        return
    before = cell_len(found.group()) if (found := _HANG.match(line)) else 0
    indent = hang if hang is not None else " " * before if before <= width // 2 else ""
    shown = ""
    for word in _WORD.findall(_UNIT.sub(_GLUE, line)):
        if shown.strip() and cell_len(shown + word) > width:
            yield shown.replace(_GLUE, " ")
            shown = indent + word.lstrip(" ")
        else:
            shown += word
        while cell_len(shown) > width:  # a long name, which goes on after one of its dots
            head = chop_cells(shown, width)[0]
            end = head.rfind(".") + 1 or head.rfind("_") + 1
            end = end if end > len(indent) else len(head)
            yield shown[:end].replace(_GLUE, " ")
            shown = indent + shown[end:]
    yield shown.replace(_GLUE, " ")


class _Column(NamedTuple):
    """A column of a table: its heading, its cells and their width. Cells that are sentences may be broken."""

    cells: list[str]
    wide: int
    is_right: bool
    is_sentence: bool

    @classmethod
    def of(cls, column: Column) -> _Column:
        cells = [cut(plain(str(each)), _LONGEST) for each in (column.header, *column.cells)]
        wide = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        return cls(cells, wide, column.justify == "right", not column.no_wrap)

    @property
    def least(self) -> int:
        """The least width."""
        return min(self.wide, _SENTENCE) if self.is_sentence else self.wide

    def padded(self, line: str, wide: int) -> str:
        return " " * (wide - cell_len(line)) + line if self.is_right else set_cell_size(line, wide)

    def named(self, row: int) -> str:
        """The heading and the cell, for a paragraph. Empty if the cell is."""
        glue = " " if self.is_sentence else _GLUE
        return glue.join([*self.cells[0].split(), self.cells[row]]) if self.cells[row] else ""


class _Way(NamedTuple):
    """A way to lay out a table: columns above the others, columns beside each other, and columns below."""

    above: list[_Column]
    beside: list[_Column]
    below: list[_Column]

    @property
    def indent(self) -> str:
        return _INDENT if self.above else ""

    def room(self, width: int) -> int:
        """The width that the columns beside each other leave. Negative if they do not fit."""
        return width - len(self.indent) - sum(each.least + len(_GAP) for each in self.beside) + len(_GAP)

    def widths(self, width: int) -> list[int]:
        """The widths of the columns beside each other. Sentences get what is left."""
        room, found = self.room(width), list[int]()
        for each in self.beside:
            found.append(min(each.wide, each.least + room))
            room -= found[-1] - each.least
        return found

    def lines(self, row: int, width: int) -> Iterator[str]:
        """The lines of a row. Row 0 has the headings."""
        if row or self.beside:
            name = _GAP.join(each.cells[row].strip("\n") for each in self.above if each.cells[row])
            yield from broken(name, width, hang=2 * _INDENT) if name else []
        widths = self.widths(width)
        cells = [broken(each.cells[row], wide) for each, wide in zip(self.beside, widths, strict=True)]
        if row == 0:  # they stand upon the rule
            cells = [[""] * (max(map(len, cells)) - len(each)) + each for each in cells]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = (each.padded(part, wide) for each, part, wide in zip(self.beside, parts, widths, strict=True))
            yield (self.indent + _GAP.join(padded)).rstrip()
        if row and (rest := ", ".join(filter(None, (each.named(row) for each in self.below)))):
            yield from broken(_INDENT + rest, width, hang=2 * _INDENT)

    def rule(self, width: int) -> str:
        return "─" * (len(self.indent) + sum(self.widths(width)) + len(_GAP) * (len(self.beside) - 1))


def _table_lines(table: Table, width: int) -> Iterator[Text]:
    """The lines of a table that fits.

    Sentences are broken first. If that is not enough, names get lines of their own above the other columns, and then sentences
    get lines below. If nothing is enough, each row is a paragraph.
    """
    ways = _ways([_Column.of(each) for each in table.columns])
    way = next(each for each in ways if not each.beside or each.room(width) >= 0)
    for row in range(1 + len(table.rows)):
        yield from (Text(line, "" if row else "bold") for line in way.lines(row, width))
        if way.beside and (row == 0 or table.rows[row - 1].end_section):
            yield Text(way.rule(width))


def _ways(columns: list[_Column]) -> Iterator[_Way]:
    """Ways to lay out these columns, the widest first."""
    figures = [each for each in columns if not each.is_sentence]
    sentences = [each for each in columns if each.is_sentence]
    yield _Way([], columns, [])
    for i in range(1, len([*takewhile(lambda each: not (each.is_right or each.is_sentence), columns)]) + 1):
        if figures[i:]:
            yield _Way(figures[:i], figures[i:] + sentences, [])
            yield _Way(figures[:i], figures[i:], sentences)
    yield _Way(columns[:1], [], columns[1:])
