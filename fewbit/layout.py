"""How texts and tables are laid out in so many columns of a terminal: nothing is cut, and no line is longer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile, zip_longest
from typing import NamedTuple

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fewbit.text import plain

WIDTH = 120  # columns that a text has at most, in a wider terminal, too
_SENTENCE = 24  # columns that a table leaves to sentences
_GAP, _INDENT = "  ", "  "  # between columns, and before what stands below a name
_HANG = re.compile(r" +|\S+(?: \S+)*? {2,}")  # of a line: its indent, or a word that is explained and the gap behind it
_UNIT = re.compile(r"(?<=\d) (?=(?:%|×|[KMGT]iB|B|µs|ms|bits?)(?!\w))")  # what stands before one
_WORD = re.compile(" *[^ ]+")
_GLUE = "\xa0"  # a space at which no line is broken; none comes from outside, since `plain` escapes it


def lines(view: RenderableType, width: int) -> Iterator[RenderableType]:
    """The lines of a view that is made of texts and tables. A rich Text, such as Python to paste, stays as it is."""
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
    """Its lines, broken between words, but not between a number and its unit. What is broken goes on below where its line
    began, or below what follows the line's first gap; or after `hang`.

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
    """A column of a table: its heading and its cells, and how wide they are. Sentences may be broken."""

    cells: list[str]
    wide: int
    is_right: bool
    is_sentence: bool

    @classmethod
    def of(cls, column: Column) -> _Column:
        cells = [plain(str(each)) for each in (column.header, *column.cells)]
        wide = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        return cls(cells, wide, column.justify == "right", not column.no_wrap)

    @property
    def least(self) -> int:
        """What it takes at least."""
        return min(self.wide, _SENTENCE) if self.is_sentence else self.wide

    def padded(self, line: str, wide: int) -> str:
        return " " * (wide - cell_len(line)) + line if self.is_right else set_cell_size(line, wide)

    def named(self, row: int) -> str:
        """The cell behind its heading, as in a paragraph; nothing where it is empty."""
        glue = " " if self.is_sentence else _GLUE
        return glue.join([*self.cells[0].split(), self.cells[row]]) if self.cells[row] else ""


class _Way(NamedTuple):
    """A way to lay out a table: the columns that stand above the others, those beside each other, and those below."""

    above: list[_Column]
    beside: list[_Column]
    below: list[_Column]

    @property
    def indent(self) -> str:
        return _INDENT if self.above else ""

    def room(self, width: int) -> int:
        """What the columns beside each other leave; less than nothing where they take more than there is."""
        return width - len(self.indent) - sum(each.least + len(_GAP) for each in self.beside) + len(_GAP)

    def widths(self, width: int) -> list[int]:
        """Of the columns beside each other; sentences get what is left."""
        room, found = self.room(width), list[int]()
        for each in self.beside:
            found.append(min(each.wide, each.least + room))
            room -= found[-1] - each.least
        return found

    def lines(self, row: int, width: int) -> Iterator[str]:
        """The lines of a row, whose number is 0 for the headings."""
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
    """A table whose sentences are broken where it is to be narrow. Where that is not enough, names get lines of their own,
    above what the other columns hold, and sentences get lines below. Where nothing is enough, each row is a paragraph."""
    ways = _ways([_Column.of(each) for each in table.columns])
    way = next(each for each in ways if not each.beside or each.room(width) >= 0)
    for row in range(1 + len(table.rows)):
        yield from (Text(line, "" if row else "bold") for line in way.lines(row, width))
        if way.beside and (row == 0 or table.rows[row - 1].end_section):
            yield Text(way.rule(width))


def _ways(columns: list[_Column]) -> Iterator[_Way]:
    """The widest first."""
    figures = [each for each in columns if not each.is_sentence]
    sentences = [each for each in columns if each.is_sentence]
    yield _Way([], columns, [])
    for i in range(1, len([*takewhile(lambda each: not (each.is_right or each.is_sentence), columns)]) + 1):
        if figures[i:]:
            yield _Way(figures[:i], figures[i:] + sentences, [])
            yield _Way(figures[:i], figures[i:], sentences)
    yield _Way(columns[:1], [], columns[1:])
