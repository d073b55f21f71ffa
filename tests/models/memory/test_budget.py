"""Plans for a number of bytes: they fit, also when run; they are not slower than they must be; they say what they do."""

import copy
from itertools import pairwise

import pytest
import torch
from support import gradients, types
from torch import nn

import fewbit
from fewbit.bench.models import gpt, llama
from fewbit.bench.step import Step
from fewbit.errors import DesignError, InputError
from fewbit.models.blocks import blocks
from fewbit.models.conversion.engine import conversion_of
from fewbit.models.memory import search
from fewbit.models.memory.budget import OUTSIDE, Cost, thinned
from fewbit.models.memory.rates import COMMON, Rates, rates_of
from fewbit.models.memory.ways import BOTH, CODE, KEEP, RECOMPUTE, WAYS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return gpt(4, 64, 4, 64)


@pytest.fixture(scope="module")
def report(subject):
    return fewbit.memory(subject.model, subject.batch, fake=True, loss_fn=subject.loss_fn, optimizer="sgd")


@pytest.fixture(scope="module")
def plans(report):
    """Share of the exact peak -> a plan with it as its budget, for a device with constant speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "rates_of", lambda *_: Rates(1e11, 1e10, 1e6, "a device"))
        return {share: report.plan(4, budget=int(share * report.peak.bytes)) for share in (1.0, 0.7, 0.5, 0.01)}


def test_where_exact_fits_it_stays(plans):
    plan = plans[1.0]
    assert {*plan.choice.blocks.values()} == {KEEP}
    assert not plan.choice.rest
    assert plan.fits
    assert plan.time == pytest.approx(1)
    assert plan.peak.bytes == plan.exact.bytes


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_it_fits_and_is_no_slower_than_blocks_alike(plans, share):
    plan = plans[share]
    assert plan.fits
    assert plan.peak.bytes <= plan.budget < plan.exact.bytes
    assert plan.time <= min(cost.time for cost in plan.uniform.values() if cost.peak <= plan.budget) + 1e-9


def test_less_room_takes_more_time(plans):
    assert plans[1.0].time <= plans[0.7].time <= plans[0.5].time


def test_where_nothing_fits_the_least_is_told(plans):
    plan = plans[0.01]
    assert not plan.fits
    assert "nothing fits" in plan.verdict
    assert plan.peak.bytes == min(plan.peak.bytes, *(cost.peak for cost in plan.uniform.values()))


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_it_holds_when_run(subject, plans, share):
    """The peak beyond the model, from the allocator, and that of exact training."""
    plan, model = plans[share], copy.deepcopy(subject.model)
    exact = Step(subject._replace(model=model))
    exact()
    before = exact.peak_bytes(CPU)
    plan.choice.convert(model, plan.setting, None)
    step = Step(subject._replace(model=model))
    step()
    saved = plan.exact.bytes - plan.peak.bytes
    assert before - step.peak_bytes(CPU) == pytest.approx(saved, rel=0.1)


def test_convert_and_the_lines_do_the_same(subject, report, plans):
    for plan in plans.values():
        model = copy.deepcopy(subject.model)
        exec(plan.lines, {"fewbit": fewbit, "model": model})  # only the text that is printed
        before = types(subject.model)
        try:
            assert plan.convert() is subject.model
            one, other = conversion_of(subject.model), conversion_of(model)
            assert {name: _plain(each) for name, each in one.items()} == {name: _plain(each) for name, each in other.items()}
        finally:
            fewbit.revert(subject.model)
        assert types(subject.model) == before


def _plain(attributes):
    """The comparable part of what a conversion set."""
    return {name: getattr(value, "setting", value) for name, value in attributes.items()}


def test_gradients_are_those_of_codes_and_recomputation_changes_none(subject):
    model = copy.deepcopy(subject.model)
    names = [name for name, module in model.named_modules() if module in blocks(model)[0]]
    wanted = gradients(model, subject.batch)
    fewbit.convert(model, filter_fn=lambda module, name: False, recompute=names)
    found = gradients(model, subject.batch)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    wanted = gradients(fewbit.convert(model, 4), subject.batch)
    found = gradients(fewbit.convert(model, 4, recompute=names[1:]), subject.batch)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())


def test_a_filter_is_heeded(subject, report):
    def filter_fn(module, name):
        return not isinstance(module, nn.LayerNorm)

    plan = report.plan(4, filter_fn, budget=int(0.6 * report.peak.bytes))
    model, pasted = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    plan.choice.convert(model, plan.setting, plan.filter_fn)
    assert not any(hasattr(module, "bits") for module in model.modules() if isinstance(module, nn.LayerNorm))
    exec(plan.lines, {"fewbit": fewbit, "model": pasted, "filter_fn": filter_fn})
    assert types(pasted) == types(model)


def test_gradients_that_are_there_stay():
    subject = gpt(2, 64, 2, 16)
    batch = subject.batch.detach().requires_grad_()
    for each in (batch, *subject.model.parameters()):
        each.grad = torch.ones_like(each)
    fewbit.memory(subject.model, batch, loss_fn=subject.loss_fn).plan(4, budget=1)
    assert all(each.grad.eq(1).all() for each in (batch, *subject.model.parameters()))


@pytest.mark.slow
def test_another_budget_runs_no_more_steps(report, monkeypatch):
    first = report.plan(3, budget=report.peak.bytes)
    monkeypatch.setattr(search, "Recorder", None)
    assert report.plan(3, budget=report.peak.bytes).time == first.time


def test_times_are_measured_where_the_model_may_run():
    subject = llama(2, 128, 2, 32)
    before = {name: each.clone() for name, each in subject.model.state_dict().items()}
    report = fewbit.memory(subject.model, subject.batch, loss_fn=subject.loss_fn)
    plan = report.plan(4, budget=int(0.6 * report.peak.bytes))
    assert "measured" in plan.how
    assert [*plan.uniform] == [*WAYS]
    assert all(torch.equal(each, before[name]) for name, each in subject.model.state_dict().items())
    assert all(each.grad is None for each in subject.model.parameters())


def test_models_without_blocks():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 1))
    report = fewbit.memory(model, torch.randn(512, 64), fake=True)
    plan = report.plan(4, budget=int(0.8 * report.peak.bytes))
    assert [*plan.uniform] == [KEEP, CODE]
    assert plan.choice.rest
    assert plan.fits


def test_blocks_that_cannot_run_twice_are_not_recomputed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.runs = nn.Sequential(nn.Linear(16, 16)), 0

        def forward(self, x):
            self.runs += 1
            return self.layer(x[: 8 if self.runs % 2 else 4])

    model = nn.Sequential(*(Counting() for _ in range(3)))
    report = fewbit.memory(model, torch.randn(8, 16), fake=True)
    plan = report.plan(4, budget=1 << 20)
    assert RECOMPUTE not in plan.uniform
    assert BOTH not in plan.uniform


def test_the_inner_level_serves_where_that_is_better():
    stages = nn.Sequential(*(nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4))) for _ in range(2)))
    report = fewbit.memory(stages, torch.randn(256, 32), fake=True)
    plan = report.plan(4, budget=int(0.8 * report.peak.bytes))
    assert plan.fits
    assert len(plan.choice.blocks) in (2, 8)


def test_reports(plans, tmp_path):
    plan = plans[0.7]
    rows = plan.rows()
    assert [row["module"] for row in rows] == [*plan.choice.blocks, OUTSIDE]
    assert all(row["bits"] is None or "code" in row["choice"] for row in rows)
    text = str(plan)
    assert plan.verdict.split(":")[0] in text
    assert plan.lines in text
    assert plan.to_dict()["fits"]
    plan.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_the_frontier_is_one(plans):
    costs = plans[0.7].frontier
    assert [*costs] == sorted(costs)
    assert all(one.time > other.time for one, other in pairwise(costs))
    assert thinned(costs, 3)[0] == costs[0]
    assert thinned([Cost(1, 2.0)], 3) == [Cost(1, 2.0)]


class TestErrors:
    def test_budgets(self, report):
        with pytest.raises(InputError, match="bytes"):
            report.plan(budget="much")

    def test_bits(self, report):
        with pytest.raises(DesignError, match="bits"):
            report.plan(9, budget="1 GiB")

    def test_converted_since(self, subject):
        model = copy.deepcopy(subject.model)
        report = fewbit.memory(model, subject.batch, fake=True, loss_fn=subject.loss_fn)
        fewbit.convert(model)
        with pytest.raises(InputError, match="since this report"):
            report.plan(budget="1 GiB")


def test_rates():
    found = rates_of(CPU, torch.float32)
    assert 1e8 < found.products < 1e15
    assert 1e7 < found.bytes < 1e14
    assert rates_of(torch.device("meta"), torch.float32) is COMMON
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    operator = torch.ops.aten.mm.default
    assert COMMON.seconds(operator, (a, b), {}, a @ b) == pytest.approx(1e-5, rel=1e-3)
    assert COMMON.seconds(torch.ops.aten.view.default, (a, [128]), {}, a.view(128)) == 0
