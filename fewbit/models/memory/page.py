"""The report on memory as one HTML page, which needs no network and no script. Its template is `page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.models.grouping import label
from fewbit.models.memory import advice
from fewbit.models.memory.saved import Storage
from fewbit.models.memory.storages import NOTE, ROLES, bars_of, repeated
from fewbit.terminal import bytes_label

if TYPE_CHECKING:
    from fewbit.models.memory.plan import Plan


def page(found: dict[str, Any], storages: Sequence[Storage], plan: Plan | None = None) -> str:
    """The page of a report's totals and storages; all that comes from the model, such as its names, is escaped."""
    import jinja2  # here, since only pages need it

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        title=f"{found['model']} in {found['mode']} mode: kept for backward",
        totals=_totals(found, plan),
        note=NOTE,
        modules=_modules(storages, plan),
        plan=plan and {"arguments": str(plan.setting), "how": plan.how, "rows": _advice(plan)},
        tensors=[{**asdict(each), "bytes": bytes_label(each.bytes)} for each in repeated(storages)],
    )


def _totals(found: dict[str, Any], plan: Plan | None) -> list[tuple[str, str]]:
    roles = [(role, found[role]) for role in ROLES if found[role] or role == ROLES[0]]
    if plan is not None:
        best = [("activations, what pays alone", plan.best_bytes)] if plan.best_bytes != plan.after_bytes else []
        roles[1:1] = [("activations, converted", plan.after_bytes), *best]
    return [(role, bytes_label(number)) for role, number in roles]


def _modules(storages: Sequence[Storage], plan: Plan | None) -> list[dict[str, Any]]:
    """A row each, largest first; shares are in percent of the longest bar."""
    runs = {"now": storages} if plan is None else {"now": storages, "then": plan.after}
    sums = {name: {run: sum(bars[run].values()) for run in runs} for name, bars in bars_of(runs).items()}
    longest = max((max(each.values()) for each in sums.values()), default=1)
    return [
        {
            "module": name,
            **{run: bytes_label(number) for run, number in each.items()},
            **{f"{run}_share": f"{100 * number / longest:.2f}" for run, number in each.items()},
        }
        for name, each in sorted(sums.items(), key=lambda item: -max(item[1].values()))
    ]


def _advice(plan: Plan) -> list[dict[str, str]]:
    rows = []
    for group in advice.grouped(plan.advice):
        first, count = group[0], len(group)
        name = label(each.module for each in group) + (f" ({count})" if count > 1 else "")
        rows.append({**vars(first), "module": name, "saves": advice.saves_label(group)})
    return rows
