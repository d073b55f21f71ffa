"""An extension of mkdocstrings, named in mkdocs.yml, that turns the docstrings of fewbit into Markdown for the site.

An argument is a line with a name, two spaces or more, and words; its further lines are indented. Doctests become examples.
"""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]: `sh tools/docs` installs it

_ENTRY = re.compile(r"(\w[\w, ]*?)  +(\S.*)")


def as_markdown(docstring: str) -> str:
    """The docstring with arguments as lists and doctests as blocks of code."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", docstring)))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if lines[0].startswith(">>>"):
        return f"```pycon\n{text}\n```"
    if all(line.startswith("    ") for line in lines):
        return text
    if not _ENTRY.fullmatch(lines[0]):
        return _escaped(text)
    entries: list[str] = []
    for line in lines:
        if entry := _ENTRY.fullmatch(line):
            entries.append(f"- **{entry[1]}**: {_escaped(entry[2])}")
        else:
            entries[-1] += f" {_escaped(line.strip())}"
    return "\n".join(entries)


def _escaped(text: str) -> str:
    """The text with characters escaped that would make emphasis or tags, except within backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_\[])", r"\\\1", part.replace("<", "&lt;")) for part in parts)


class Docstrings(griffe.Extension):
    """Turns each docstring into Markdown when it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
