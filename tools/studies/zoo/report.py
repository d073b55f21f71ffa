"""The report on the zoo: a table of models, what is still kept exactly, and a summary."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from fewbit import terminal
from tools.studies.zoo.measure import BITS, MORE_BITS, Row

Rows = Mapping[str, Row]

_NAME_WIDTH, _LEFT_WIDTH, _LARGEST = 32, 51, 3

_ATTENTION = re.compile("^ScaledDotProduct|ForCpu$")  # of names of attention's operations


def table(rows: Rows) -> Table:
    """One row for each model. `kept` is the bytes that the coded model keeps, relative to the exact model."""
    left = "operations of torch's own that keep most\nof the rest, and how much of all that is kept"
    columns = (
        "exact,\nKiB",
        f"kept,\n{BITS} bits",
        "and\npatched",
        "plan\nerror",
        f"error,\n{BITS} bits",
        f"error,\n{MORE_BITS} bits",
    )
    view = terminal.table(("model",), columns)
    view.add_column("the\nsame", no_wrap=True)
    view.add_column(left, no_wrap=True)
    for name, row in rows.items():
        if "failure" in row:
            continue
        kept, errors = row["kept_bytes"], row["gradient_errors"]
        view.add_row(
            _cut(name, _NAME_WIDTH),
            f"{kept['exact'] / 1024:.0f}",
            *(f"{ratio(row, label):.3f}" for label in ("coded", "patched")),
            f"{plan_error(row):.1%}",
            *(f"{errors[str(bits)]:.4f}" for bits in (BITS, MORE_BITS)),
            "DIFFER" if row["differ"] else "same",
            _cut(largest(row), _LEFT_WIDTH),
        )
    return view


def largest(row: Row) -> str:
    """The operations that keep most of what the coded model keeps."""
    whole = row["kept_bytes"]["coded"] or 1
    shares = {operation: sum(parts.values()) / whole for operation, parts in row["left"].items()}
    most = [(name, share) for name, share in Counter(shares).most_common(_LARGEST) if share >= 0.005]
    return ", ".join(f"{_ATTENTION.sub('', name)} {share:.0%}" for name, share in most)


def ratio(row: Row, label: str = "coded") -> float:
    """Bytes kept, relative to the exact model."""
    kept = row["kept_bytes"]
    return kept[label] / kept["exact"] if kept["exact"] else 1.0


def plan_error(row: Row) -> float:
    """The relative error of the plan in predicting the measured bytes."""
    kept = row["kept_bytes"]
    return kept["predicted"] / kept["coded"] - 1 if kept["coded"] else 0.0


def summary(rows: Rows) -> dict[str, Any]:
    """The summary over all models that did not fail."""
    good = {name: row for name, row in rows.items() if "failure" not in row}
    found: dict[str, Any] = {
        "models": len(rows),
        "failures": len(rows) - len(good),
        "keep more than exact": [name for name, row in good.items() if ratio(row) > 1],
        "keep more when patched besides": [name for name, row in good.items() if ratio(row, "patched") > ratio(row)],
        "not the same": [name for name, row in good.items() if row["differ"]],
    }
    if good:
        kept = [ratio(row) for row in good.values()]
        found |= {
            "kept": {"median": statistics.median(kept), "90th percentile": float(np.quantile(kept, 0.9))},
            "kept, patched": {"median": statistics.median(ratio(row, "patched") for row in good.values())},
            "gradient error": {
                str(bits): statistics.median(row["gradient_errors"][str(bits)] for row in good.values())
                for bits in (BITS, MORE_BITS)
            },
            "plan error, worst": max(abs(plan_error(row)) for row in good.values()),
            "kept by family": {
                family: statistics.median(ratio(row) for row in good.values() if row["family"] == family)
                for family in dict.fromkeys(row["family"] for row in good.values())
            },
        }
    return found


def what_is_left(rows: Rows) -> dict[str, dict[str, Any]]:
    """Operation of torch -> its mean share of what coded models keep, the number of models in which it is found, and the
    classes of modules that run it, those with most bytes first. "codes" are what fewbit's own operations keep."""
    good = [row for row in rows.values() if "failure" not in row and row["kept_bytes"]["coded"]]
    shares: Counter[str] = Counter()
    models: Counter[str] = Counter()
    classes: dict[str, Counter[str]] = {}
    for row in good:
        whole = row["kept_bytes"]["coded"] * len(good)
        shares["codes"] += row["codes"] / whole
        for operation, parts in row["left"].items():
            models[operation] += 1
            for cls, part in parts.items():
                shares[operation] += part / whole
                classes.setdefault(operation, Counter())[cls] += part / whole  # type: ignore[assignment]
    return {
        name: {
            "share": share,
            "models": models[name] or len(good),
            "classes": dict(classes.get(name, Counter()).most_common(6)),
        }
        for name, share in shares.most_common()
    }


def left_table(left: Mapping[str, Mapping[str, Any]], most: int = 30) -> Table:
    """The operations with the largest shares."""
    view = terminal.table(("what keeps it",), ("share", "models"))
    view.add_column("in which classes of modules", no_wrap=True)
    for name, each in list(left.items())[:most]:
        classes = ", ".join(f"{cls} {part / each['share']:.0%}" for cls, part in list(each["classes"].items())[:4])
        view.add_row(_cut(name, _NAME_WIDTH + 4), f"{each['share']:.1%}", str(each["models"]), _cut(classes, 84))
    rest = list(left.values())[most:]
    if rest:
        view.add_row(f"{len(rest)} others", f"{sum(each['share'] for each in rest):.1%}", "", "")
    return view


def lines(found: Mapping[str, Any]) -> Iterable[str]:
    """The summary in words."""
    yield f"{found['models']} models, of which {found['failures']} failed"
    if "kept" in found:
        kept, errors = found["kept"], found["gradient error"]
        yield f"kept at {BITS} bits: median {kept['median']:.3f}, 90th percentile {kept['90th percentile']:.3f} of exact"
        yield f"kept when patched too: median {found['kept, patched']['median']:.3f}"
        yield ", ".join(f"{family} {each:.3f}" for family, each in found["kept by family"].items())
        yield f"gradient error: median {errors[str(BITS)]:.4f} at {BITS} bits, {errors[str(MORE_BITS)]:.4f} at {MORE_BITS}"
        yield f"plan: at worst {found['plan error, worst']:.2%} from what was measured"
    for label in ("keep more than exact", "keep more when patched besides", "not the same"):
        yield f"{label}: {len(found[label])}" + (f" ({', '.join(found[label])})" if found[label] else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
