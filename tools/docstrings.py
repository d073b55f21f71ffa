"""The docstrings of fewbit as Markdown, for the site: an extension of mkdocstrings, named in mkdocs.yml.

A docstring lists arguments as a name, two spaces or more, and words, with further lines indented. Doctests are examples.
"""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]: `sh tools/docs` installs it

_ENTRY = re.compile(r"(\w[\w, ]*?)  +(\S.*)")


def as_markdown(docstring: str) -> str:
    """Lists for arguments, blocks of code for doctests."""
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
    """Text outside of backticks: no emphasis, no tags."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_\[])", r"\\\1", part.replace("<", "&lt;")) for part in parts)


class Docstrings(griffe.Extension):
    """Turns each docstring into Markdown when it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
