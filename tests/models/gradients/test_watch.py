"""fewbit.watch: warns once of drift, and never without drift; leaves model, random numbers and compiled code alone."""

import copy
import io
import itertools
import math
import pickle
import sys
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from support import compiled
from torch import nn

import fewbit
from fewbit import activations
from fewbit.errors import DesignError, DriftWarning, InputError
from fewbit.models.gradients import watch as module


def inputs(scale=1.0, mean=0.0, shape=(64, 32)):
    return (mean + scale * torch.randn(shape)).requires_grad_()


@pytest.fixture
def tanh():
    """With a single table, from which inputs can drift away."""
    return fewbit.Tanh(table=fewbit.load_table("tanh", 3))


def joint(name):
    return fewbit.load_table(name, 4, channels=("derivative", "value"))


def caught_in(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught if issubclass(each.category, DriftWarning)]


class TestWarns:
    def test_once_until_it_recovers(self, tanh):
        with fewbit.watch(tanh, every=1):
            assert caught_in(lambda: tanh(inputs())) == []
            assert len(caught_in(lambda: tanh(inputs(10)))) == 1
            assert caught_in(lambda: [tanh(inputs(10)) for _ in range(5)]) == []
            assert caught_in(lambda: tanh(inputs())) == []
            assert len(caught_in(lambda: tanh(inputs(10)))) == 1

    def test_says_what_was_seen_and_what_to_do(self, tanh):
        model = nn.Sequential(nn.Linear(32, 32), tanh)
        with torch.no_grad():
            model[0].weight.mul_(100)
        with fewbit.watch(model, every=1):
            (message,) = caught_in(lambda: model(inputs()))
        assert message.startswith("1 (Tanh) drifted away from its table: in forward pass 1 the error of its derivative is ")
        for text in ("times the design's 0.0544", "mean ", "standard deviation ", "fewbit.calibrate"):
            assert text in message

    def test_is_a_warning_that_can_be_an_error(self, tanh):
        with fewbit.watch(tanh), pytest.raises(DriftWarning):  # the tests turn warnings into errors
            tanh(inputs(10))

    def test_values_of_shared_codes(self):
        act = fewbit.GELU(table=joint("gelu"))
        with fewbit.watch(act, every=1) as watching:
            (message,) = caught_in(lambda: act(inputs(10)))
        assert "the error of its value is" in message
        assert watching.report().rows()[0]["channel"] == "value"

    @pytest.mark.parametrize(
        ("unit", "call"),
        [
            (fewbit.GLU(table=joint("sigmoid")), lambda unit, gate, up: unit(torch.cat([up, gate], -1))),
            (fewbit.SwiGLU(table=joint("silu")), lambda unit, gate, up: unit(gate, up)),
            (fewbit.GEGLU(table=joint("gelu")), lambda unit, gate, up: unit(up=up, gate=gate)),
        ],
        ids=["GLU", "SwiGLU", "GEGLU"],
    )
    def test_gates(self, unit, call):
        with fewbit.watch(unit, every=1):
            assert caught_in(lambda: call(unit, inputs(), inputs(30))) == []
            assert len(caught_in(lambda: call(unit, inputs(100), inputs()))) == 1

    def test_exact_table_of_another_range(self):
        """Without an error where it was designed; a smallest error replaces it."""
        table = fewbit.CodeTable([0.0], [0, 1], [[0.0, 1.0]], 1, activation="relu6", errors=[0.0], powers=[1.0],
                                 parameters={})  # fmt: skip
        act = fewbit.ReLU6(table=table)
        with fewbit.watch(act, every=1):
            assert caught_in(lambda: act(inputs())) == []
            assert len(caught_in(lambda: act(inputs(10)))) == 1

    def test_table_that_knows_no_error_is_held_to_its_first_check(self):
        shipped = fewbit.load_table("tanh", 3)
        act = fewbit.Tanh(table=fewbit.CodeTable(shipped.thresholds, shipped.codes, shipped.levels, 3))
        with fewbit.watch(act, every=1):
            assert caught_in(lambda: act(inputs(4))) == []
            assert caught_in(lambda: act(inputs(4))) == []
            assert len(caught_in(lambda: act(inputs(60)))) == 1

    def test_a_table_installed_meanwhile_counts(self, tanh):
        with fewbit.watch(tanh, every=1) as watching:
            assert len(caught_in(lambda: tanh(inputs(10)))) == 1
            tanh.bits, tanh.table = None, fewbit.load_table("tanh", 3, weight="normal(std=10)", domain=(-40, 40))
            assert caught_in(lambda: tanh(inputs(10))) == []
        assert not watching.report().totals()["drifted"]


class TestStaysSilent:
    @pytest.mark.parametrize("bits", [3, 4])
    def test_where_the_input_takes_a_table_for_its_scale(self, bits):
        for act, scale in itertools.product((fewbit.Tanh(bits=bits), fewbit.GELU(bits=bits)), (0.03, 0.25, 1.0, 6.0, 40.0)):
            x = inputs(scale)
            with fewbit.watch(act, every=1) as watching:
                act(x)  # the tests turn warnings into errors
            assert watching.report().rows()[0]["error"] < 0.1

    def test_on_inputs_of_the_tables_own_weight(self):
        """No alarm in 200 checks of each of 8 tables; the docstring of _beyond_chance refers to this."""
        rng, alarms, ratios = np.random.default_rng(0), 0, []
        for name, bits, joint in itertools.product(("gelu", "silu"), (3, 4), (False, True)):
            channels = ("derivative", "value") if joint else ("derivative",)
            table = fewbit.load_table(name, bits, channels=channels)
            layer = module.Layer("", nn.Identity(), deque())
            for _ in range(200):
                x = rng.normal(size=1024) if joint else rng.standard_t(3, size=1024)
                check = module._check(layer, x, activations.get(name), table, 2.0)
                alarms += check.drifted
                ratios.append(check.ratio)
        assert alarms == 0
        assert np.mean(ratios) == pytest.approx(1, abs=0.1)

    def test_on_an_ordinary_net_in_training(self):
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        fewbit.convert(model, bits={"activation": 3})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with fewbit.watch(model, every=2) as watching:
            for _ in range(30):
                x = torch.randn(32, 16)
                (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(watching.layers[0].checks) > 5

    def test_on_exact_tables_dead_units_and_odd_numbers(self):
        model = nn.ModuleList([fewbit.ReLU(bits=1), fewbit.LeakyReLU(bits=1)])
        with fewbit.watch(model, every=1) as watching:
            for act, x in itertools.product(
                model, (inputs(1e4), inputs(0.1, -500), inputs() * math.nan, inputs(shape=()), inputs(shape=(0, 3)))
            ):
                act(x)
        assert not any(layer.drifted for layer in watching.layers)

    def test_but_not_on_inputs_where_the_derivative_is_zero_and_the_code_is_not(self):
        act = fewbit.GELU(bits=8)
        with fewbit.watch(act, every=1) as watching:
            assert len(caught_in(lambda: act(inputs(0.1, -500)))) == 1
        assert math.isfinite(watching.layers[0].checks[-1].ratio)

    def test_where_no_codes_are_made(self, tanh):
        with fewbit.watch(tanh, every=1) as watching:
            tanh(inputs(10).detach())
            with torch.no_grad():
                tanh(inputs(10))
            with fewbit.exact():
                tanh(inputs(10))
            torch.func.grad(lambda x: tanh(x).sum())(inputs(10).detach())
            tanh.eval()(inputs(10))
            fewbit.revert(tanh)
        assert watching.layers[0].calls == 0

    def test_where_a_relu_reads_the_codes_of_its_norm(self):
        model = fewbit.convert(nn.Sequential(nn.BatchNorm1d(32), nn.ReLU()), bits=4)
        with torch.no_grad():
            model[0].weight.fill_(100.0)
        with fewbit.watch(model, every=1) as watching:
            model(inputs())
        assert watching.layers[0].calls == 1
        assert not watching.layers[0].checks


def test_the_limit_is_where_it_says():
    """In a large sample, an error 5 % above the limit always gives an alarm, one 5 % below never does."""
    rng = np.random.default_rng(0)
    true = np.ones(100_000)
    for ratio, expected in ((0.95, False), (1.05, True)):
        error = 0.2 * ratio * rng.normal(size=true.size)
        assert module._beyond_chance(error, true, 0.2) is expected


def test_figures_are_those_of_the_sample(tanh):
    table, x = fewbit.load_table("tanh", 3), inputs(shape=(1000,))
    with fewbit.watch(tanh, every=1, samples=1000) as watching:
        tanh(x)
    (row,) = watching.report().rows()
    x = x.detach().double().numpy()
    true = 1 - np.tanh(x) ** 2
    assert row["error"] == pytest.approx(np.sqrt(np.mean((table(x) - true) ** 2) / np.mean(true**2)))
    assert row["design"] == table.relative_rms
    assert row["mean"] == pytest.approx(x.mean())
    assert row["std"] == pytest.approx(x.std())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_of_any_layout(tanh, dtype):
    x = torch.arange(24.0).to(dtype).reshape(2, 3, 4).transpose(0, 2)[:, 1:]
    watching = fewbit.watch(tanh, samples=5)
    for _ in range(20):
        sample = watching._sample(x)
        assert sample.shape == (5,)
        assert set(sample) <= set(x.double().flatten().tolist())
    watching.samples = 100
    assert sorted(watching._sample(x)) == sorted(x.double().flatten().tolist())


@pytest.mark.parametrize("every", [1, 7])
def test_checks_come_so_often_on_average(tanh, every):
    with fewbit.watch(tanh, every=every, samples=8, history=1000) as watching:
        x = inputs(shape=(4,))
        for _ in range(200 * every):
            tanh(x)
    (layer,) = watching.layers
    assert layer.calls == 200 * every
    assert 150 <= len(layer.checks) <= 250
    assert layer.checks[0].call == 1
    if every > 1:
        assert len({check.call % every for check in layer.checks}) == every  # all calls of a shared module get their turn


def test_history_is_bounded(tanh):
    with fewbit.watch(tanh, every=1, history=3) as watching:
        for _ in range(10):
            tanh(inputs())
    assert [check.call for check in watching.layers[0].checks] == [8, 9, 10]


class TestLeavesAlone:
    def test_gradients_and_random_numbers(self, tanh):
        results = []
        for watched in (False, True):
            torch.manual_seed(0)
            x = inputs()
            with fewbit.watch(tanh, every=1) if watched else warnings.catch_warnings():
                y = tanh(x)
            y.square().sum().backward()
            results.append((y, x.grad, torch.rand(3), np.random.get_state()[1]))  # noqa: NPY002
        assert all(np.array_equal(a, b) for a, b in zip(*([each.detach() if isinstance(each, torch.Tensor) else each
                   for each in result] for result in results), strict=True))  # fmt: skip

    def test_state_dict_copies_and_pickles(self, tanh):
        model = nn.Sequential(nn.Linear(32, 32), tanh)
        with fewbit.watch(model, every=1) as watching:
            assert list(model.state_dict()) == ["0.weight", "0.bias"]
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)
            for other in others:
                with torch.no_grad():
                    other[0].weight.mul_(100)
                other(inputs())
            assert watching.layers[0].calls == 0
            model(inputs())
            assert watching.layers[0].calls == 1
        assert not tanh._forward_pre_hooks
        model(inputs(100))
        assert watching.layers[0].calls == 1

    def test_removed_however_it_ends(self, tanh):
        with pytest.raises(KeyError), fewbit.watch(tanh):
            raise KeyError
        assert not tanh._forward_pre_hooks
        watching = fewbit.watch(tanh)
        watching.remove()
        watching.remove()
        assert not tanh._forward_pre_hooks

    def test_two_at_once(self, tanh):
        with fewbit.watch(tanh, every=1) as first, fewbit.watch(tanh, every=1) as second:
            tanh(inputs())
        assert first.layers[0].calls == second.layers[0].calls == 1

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled_code(self, tanh):
        """It is not checked and causes no graph break, compiled before the watch began or after."""
        call = compiled(tanh)
        with fewbit.watch(tanh, every=1) as watching:
            call(inputs(10)).sum().backward()
            assert "nothing checked yet: only training in eager code" in str(watching.report())
            tanh(inputs())
            assert watching.layers[0].calls == 1
        with fewbit.watch(call, every=1) as watching:
            call(inputs(10)).sum().backward()
            assert watching.layers[0].calls == 0

    def test_costs_little_between_checks(self, tanh):
        """Some twenty calls of Python's functions and of those in C, and none that computes anything."""
        x = inputs(shape=(64, 512))

        def calls():
            seen = []
            sys.setprofile(lambda frame, event, argument: seen.append(argument) if "call" in event else None)
            try:
                tanh(x)
            finally:
                sys.setprofile(None)
            return len(seen)

        tanh(x)
        plain = calls()
        with fewbit.watch(tanh, every=10**6) as watching:
            tanh(x)
            assert len(watching.layers[0].checks) == 1  # the first pass
            assert calls() < plain + 25
            assert len(watching.layers[0].checks) == 1


class TestReport:
    @pytest.fixture
    def report(self, tanh):
        model = nn.Sequential(nn.Linear(32, 32), tanh, nn.Linear(32, 32), fewbit.GELU(bits=3))
        with fewbit.watch(model, every=1) as watching, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for scale in (1, 1, 300, 300):
                model(inputs(scale))
        return watching.report()

    def test_prints_exports_and_draws(self, report, tmp_path):
        lines = str(report).splitlines()
        assert lines[0] == "1 of 2 layers drifted away from their tables: 1"
        assert max(map(len, lines)) <= report.width
        assert report.totals()["drifted"] == ["1"]
        first, second = report.rows()
        assert first["warnings"] == 1
        assert second["warnings"] == 0
        assert first["ratio"] > 2 > second["ratio"]
        assert first["largest_ratio"] >= first["ratio"]
        assert "Infinity" not in report.to_json()
        report.plot(tmp_path / "drift.png")

    def test_stays_what_it_was(self, tanh):
        with fewbit.watch(tanh, every=1) as watching:
            tanh(inputs())
            report = watching.report()
            before = report.to_dict()
            tanh(inputs())
        assert report.to_dict() == before

    def test_before_anything_was_seen(self, tanh):
        report = fewbit.watch(tanh).report()
        assert report.rows()[0]["error"] is None
        assert str(report)
        report.figure()

    def test_of_many_layers(self):
        model = nn.ModuleList(fewbit.Tanh() for _ in range(40))
        with fewbit.watch(model, every=1) as watching:
            for act in model:
                act(inputs())
        assert "10 more layers" in str(watching.report())
        watching.report().figure()


class TestRefuses:
    def test_a_model_without_codes(self):
        with pytest.raises(InputError, match="the model has none"):
            fewbit.watch(nn.Linear(2, 2))
        with pytest.raises(InputError, match=r"watch takes a torch\.nn\.Module first, got int"):
            fewbit.watch(3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"every": 0}, "every must be"), ({"samples": 1.5}, "samples must be"), ({"history": -1}, "history must be"),
         ({"factor": 1.0}, "factor must be more than 1")],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_numbers(self, tanh, options, message):
        with pytest.raises(DesignError, match=message):
            fewbit.watch(tanh, **options)
        assert not tanh._forward_pre_hooks


def test_prints_its_verdict():
    with fewbit.watch(nn.Sequential(fewbit.Tanh(bits=3))) as watching:
        assert repr(watching).startswith("Watch of 1 layer: nothing checked yet")
