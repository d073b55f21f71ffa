"""The report on memory as one HTML page. The page loads nothing and is readable without its script.

`page.html` is its template. `page.js` sorts a table when its heading is clicked. Everything that comes from the model, such as
names, is escaped, and the browser may run no other script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.models.grouping import label
from fewbit.models.memory import advice
from fewbit.models.memory.budget import BudgetPlan
from fewbit.models.memory.operations import KIND_WORDS, kind_of, plain_operation
from fewbit.models.memory.peak import Peak
from fewbit.models.memory.storages import NOTE, ROLES, bars_of, repeated
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from fewbit.models.memory.largest import LargestBatch
    from fewbit.models.memory.plan import Plan
    from fewbit.models.memory.report import MemoryReport

EXACT, CONVERTED = "exact", "converted"
Row = tuple[dict[str, Any], ...]  # cells: text, the number to sort by or None, and what a pointer is told


def page(report: MemoryReport, plan: Plan | BudgetPlan | None = None, largest: LargestBatch | None = None) -> str:
    """The page of a report. The plan and the largest batch are added if they are given."""
    import jinja2  # imported here, since only pages need it

    here = Path(__file__)
    script = here.with_name("page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    found = report.totals()
    budget, conversion = (plan, None) if isinstance(plan, BudgetPlan) else (None, plan)
    runs = {EXACT: report.storages} | ({CONVERTED: conversion.after} if conversion else {})
    modules = bars_of(runs)
    return environment.from_string(here.with_name("page.html").read_text(encoding="utf-8")).render(
        script=script,
        allowed="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=f"{found['model']}: memory of training",
        verdict=report.verdict if plan is None else plan.verdict,
        words=f"In {found['mode']} mode{', on fake tensors' if report.fake else ''}, with {report.forward.words}.",
        lines=_lines(report, plan),
        kinds=_kinds(modules),
        bars=_bars(modules, runs),
        peaks=_peaks(report, plan),
        totals=[(role, bytes_label(found[role])) for role in ROLES if found[role] or role == ROLES[0]],
        notes=[each for each in (NOTE, report.note, plan.how if plan else "") if each],
        largest=largest and _largest(largest),
        runs=[*runs],
        blocks=_blocks(modules, runs),
        advice=conversion and _advice(conversion),
        budget=budget and _budget(budget),
        tensors=_tensors(report),
    )


def _cell(text: str, number: float | None = None, tip: str = "") -> dict[str, Any]:
    return {"text": text, "number": number, "tip": tip}


def _size(number: int) -> dict[str, Any]:
    return _cell(bytes_label(number), number, f"{number:,} bytes")


def _table(name: str, caption: str, columns: Sequence[str], rows: Iterable[Row]) -> dict[str, Any]:
    """A table. Columns whose first cell has a number are aligned right."""
    found = list(rows)
    right = [cell["number"] is not None for cell in found[0]] if found else [False] * len(columns)
    return {"name": name, "caption": caption, "columns": list(zip(columns, right, strict=True)), "rows": found}


def _lines(report: MemoryReport, plan: Plan | BudgetPlan | None) -> str:
    """Python to paste."""
    if isinstance(plan, BudgetPlan):
        return plan.lines
    if plan is None:
        return "report = fewbit.memory(model, batch)\nprint(report.plan())  # what the converted model would keep"
    given = str(plan.setting) + (", filter_fn=filter_fn" if plan.filter_fn else "")
    if plan.outcome.chosen == plan.candidates:
        return f"fewbit.convert(model, {given})"
    return f"fewbit.memory(model, batch).plan({given}).convert()  # converts only what pays"


def _bar(stack: Mapping[str, int], longest: int) -> list[dict[str, Any]]:
    """The parts of a bar, by kind of operation. Widths are in percent of the longest bar."""
    sums: Counter[str] = Counter()
    for operation, number in stack.items():
        sums[kind_of(operation)] += number
    return [
        {"kind": kind, "width": f"{100 * sums[kind] / longest:.3f}", "tip": f"{words}: {bytes_label(sums[kind])}"}
        for kind, words in KIND_WORDS.items()
        if sums[kind]
    ]


def _sum(stacks: Iterable[Mapping[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for stack in stacks:
        found.update(stack)
    return found


def _bars(modules: Mapping[str, Mapping[str, Mapping[str, int]]], runs: Iterable[str]) -> list[dict[str, Any]]:
    """One bar for each run, of all modules together."""
    sums = {run: _sum(bars.get(run, {}) for bars in modules.values()) for run in runs}
    longest = max(map(Counter.total, sums.values()), default=0) or 1
    return [{"run": run, "bytes": bytes_label(each.total()), "parts": _bar(each, longest)} for run, each in sums.items()]


def _kinds(modules: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[tuple[str, str]]:
    """The kinds of operations that bars show, and their words."""
    used = {kind_of(operation) for bars in modules.values() for stack in bars.values() for operation in stack}
    return [(kind, words) for kind, words in KIND_WORDS.items() if kind in used]


def _peaks(report: MemoryReport, plan: Plan | BudgetPlan | None) -> list[dict[str, Any]]:
    """The peaks of a step before and after the conversion, or the reason why a peak is not known."""
    if isinstance(plan, BudgetPlan):
        found: dict[str, Any] = {EXACT: plan.exact, "as planned": plan.peak}
    else:
        given = {EXACT: report} | ({"after plan.convert()": plan} if plan else {})
        found = {name: _peak_of(each) for name, each in given.items()}
    sizes = [each.bytes for each in found.values() if isinstance(each, Peak)]
    rows = []
    for name, each in found.items():
        if isinstance(each, Peak):
            parts = ", ".join(f"{bytes_label(size)} {role}" for role, size in each.parts.items() if size)
            row = {"bytes": bytes_label(each.bytes), "width": f"{100 * each.bytes / max(sizes):.3f}"}
            rows.append({"name": name, **row, "words": f"in the {each.moment}: {parts}", "advice": each.advice})
        else:
            rows.append({"name": name, "bytes": "", "width": "0", "words": each, "advice": ""})
    return rows


def _peak_of(report: MemoryReport | Plan) -> Peak | str:
    try:
        return report.peak
    except Exception as error:  # the model may do anything that fake tensors cannot
        return f"not known: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _blocks(modules: Mapping[str, Mapping[str, Mapping[str, int]]], runs: Iterable[str]) -> list[dict[str, Any]]:
    """The modules, grouped by the block that they are in, the largest first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(modules, key=lambda name: -max(sum(stack.values()) for stack in modules[name].values())):
        groups.setdefault(re.sub(r"(^|\.)[\d*][^.]*$", r"\1*", _block_of(name)), []).append(name)
    bars = {key: {run: _sum(modules[name].get(run, {}) for name in names) for run in runs} for key, names in groups.items()}
    sizes = {key: max(each.total() for each in found.values()) for key, found in bars.items()}
    longest = max(sizes.values(), default=0) or 1
    found = []
    for key, names in sorted(groups.items(), key=lambda item: -sizes[item[0]]):
        several, block = len(names) > 1, _block_of(names[0])
        found.append(
            {
                "name": block if several else names[0],
                "bytes": " → ".join(bytes_label(each.total()) for each in bars[key].values()),
                "bars": [_bar(each, longest) for each in bars[key].values()],
                "table": _modules(block, {name: modules[name] for name in names}, [*runs]) if several else None,
            }
        )
    return found


def _block_of(name: str) -> str:
    """The outermost block that a module is in. If it is in none, the part of the model that it is in.

    >>> _block_of("transformer.h.0-11.mlp.act"), _block_of("encoder.norm"), _block_of("head")
    ('transformer.h.0-11', 'encoder', 'head')
    """
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part[0].isdigit() or part == "*"), 0)
    return ".".join(parts[: numbered + 1])


def _modules(block: str, modules: Mapping[str, Mapping[str, Mapping[str, int]]], runs: Sequence[str]) -> dict[str, Any]:
    sizes = {name: [sum(bars.get(run, {}).values()) for run in runs] for name, bars in modules.items()}
    rows = (
        (_cell(name), *map(_size, sizes[name]), _cell(_operations(modules[name])))
        for name in sorted(modules, key=lambda name: -max(sizes[name]))
    )
    return _table("module", f"Modules in {block}", ("module", *runs, "kept by"), rows)


def _operations(bars: Mapping[str, Mapping[str, int]]) -> str:
    """The operations in words, those that keep most first."""
    sums = _sum(bars.values())
    return ", ".join(dict.fromkeys(plain_operation(name) for name, number in sums.most_common() if number))


def _advice(plan: Plan) -> dict[str, Any]:
    def rows() -> Iterable[Row]:
        for group in advice.grouped(plan.advice):
            first, count = group[0], len(group)
            name = label(each.module for each in group) + (f" ({count})" if count > 1 else "")
            saves = _cell(advice.saves_label(group), sum(each.saves or 0 for each in group))
            yield _cell(name, tip=first.type), saves, _cell(first.advice), _cell(advice.reason_label(group))

    caption = "saves: what its conversion saves when the other modules that pay are converted too; negative if it adds bytes"
    return _table("module", caption, ("module", "saves", "advice", "because"), rows())


def _budget(plan: BudgetPlan) -> list[dict[str, Any]]:
    """Tables of the choice for each block, and of the costs of other choices."""
    blocks = ((_cell(row["module"]), _cell(row["choice"]), _bits(row["bits"])) for row in plan.rows())
    uniform = [(_cell(str(way)), _size(cost.peak), _cell(f"{cost.time:.2f}", cost.time)) for way, cost in plan.uniform.items()]
    mixed = [(_size(cost.peak), _cell(f"{cost.time:.2f}", cost.time)) for cost in plan.frontier]
    time = "forward and backward, × exact"
    return [
        _table("block", "The choice for each block", ("block", "choice", "bits"), blocks),
        _table("way", "All blocks alike", ("all blocks", "peak", time), uniform),
        _table("mixture", "Blocks mixed, as predicted: each lower peak takes a longer time", ("peak", time), mixed),
    ]


def _bits(bits: int | None) -> dict[str, Any]:
    return _cell("" if bits is None else str(bits), bits or 0)


def _largest(found: LargestBatch) -> dict[str, Any]:
    rows = (
        (
            _cell(way),
            _cell(f"{each.samples:,}" if each.samples else "none", each.samples),
            _size(each.bytes),
            _cell(each.moment),
        )
        for way, each in found.ways.items()
    )
    return _table("training", found.title, ("training", found.grows, "its peak", "when"), rows)


def _tensors(report: MemoryReport) -> dict[str, Any]:
    rows = (
        (
            _cell(each.module),
            _cell(plain_operation(each.operation), tip=each.operation),
            _cell(each.tensor),
            _cell(str(each.count), each.count),
            _size(each.bytes),
            _cell(each.shared),
        )
        for each in repeated(report.storages)
    )
    columns = ("module", "operation", "tensor", "times", "bytes", "shared with")
    return _table("tensor", "Repeated layers share a row", columns, rows)
