"""One name for repeated layers: `layers.0.up`, `layers.1.up`, … -> `layers.0-11.up`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pattern(name: str) -> str:
    """The name with the numbers of layers replaced by *.

    >>> pattern("encoder.layer.11.up"), pattern("conv1")
    ('encoder.layer.*.up', 'conv1')
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def label(names: Iterable[str]) -> str:
    """One name for several of the same pattern. Equal numbers stay, others become ranges, or * if they are many and not in a
    row.

    >>> label(["layers.0.up", "layers.1.up", "layers.2.up"]), label(["a.0.3", "a.2.3"]), label(["head"]), label([""])
    ('layers.0-2.up', 'a.0,2.3', 'head', '(model)')
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_range(list(dict.fromkeys(column))) for column in columns) or "(model)"


def _range(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(map(int, parts))
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers)) if len(numbers) <= 4 else "*"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of the names, for a sentence.

    >>> some(["a", "b"]), some(["", "a", "b", "c"])
    ('a, b', 'the model itself, a, b, …')
    """
    return ", ".join(name or "the model itself" for name in names[:most]) + ", …" * (len(names) > most)


def shortened(name: str, most: int = 30) -> str:
    """The name, cut to `most` characters: parts after the first are left out as needed.

    >>> shortened("encoder.layer.0-11.output.dense", 26), shortened("fully_connected", 10)
    ('encoder.….output.dense', 'fully_con…')
    """
    if len(name) <= most:
        return name
    first, *rest = name.split(".")
    while len(rest) > 1 and len(f"{first}.….{'.'.join(rest)}") > most:
        rest.pop(0)
    return cut(f"{first}.….{'.'.join(rest)}" if rest else name, most)


def cut(text: str, most: int) -> str:
    """
    >>> cut("ScaledDotProduct", 10), cut("Mul", 10)
    ('ScaledDot…', 'Mul')
    """
    return text if len(text) <= most else text[: most - 1] + "…"
