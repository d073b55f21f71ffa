"""Plans compared with what is measured after conversion, and what `plan.convert()` leaves out."""

import copy
import itertools
import json
import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SwiGLU
from torch import nn

import fewbit
from fewbit import demo
from fewbit.errors import DesignError, InputError
from fewbit.models.conversion.engine import is_converted
from fewbit.models.conversion.interception import Intercepted
from fewbit.models.memory import trials
from fewbit.models.memory.saved import Saver, Storage

ROWS, WIDTH, HIDDEN = 64, 32, 64


def converted(model):
    """The names of the modules that a conversion has changed."""
    named = model.named_modules()
    return {name for name, module in named if is_converted(module) and not stays_exact(module)}


def stays_exact(module):
    """Whether it is a module that stays exact inside others."""
    return isinstance(module, Intercepted) and module.interception.setting is None


def mlp(activation, trainable=True):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)).requires_grad_(trainable)


def batch(gradient=False, rows=ROWS):
    return torch.randn(rows, WIDTH, requires_grad=gradient)


class WrittenOut(SwiGLU):
    """The same in words that `convert` does not take."""

    def forward(self, x):
        return self.down(self.act(self.gate(x)).mul(self.up(x)))


class Picks(nn.Module):
    """Modules that keep places along a dimension."""

    def forward(self, x):
        picked = x.max(-1).values + x.sort(-1).values[:, 0] + x.topk(2).values[:, 0] + x.min(-1).values
        return picked + x.gather(-1, x.argsort(-1))[:, 0] + x.cummax(-1).values[:, 0]


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    return transformers.BertModel(transformers.BertConfig(**sizes))


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()
    )


MODELS = {
    "relu": (lambda: mlp(nn.ReLU()), batch),
    "tanh, frozen": (lambda: mlp(nn.Tanh(), False), lambda: batch(True)),
    "gelu": (lambda: mlp(nn.GELU()), batch),
    "silu, frozen": (lambda: mlp(nn.SiLU(), False), lambda: batch(True)),
    "swiglu": (lambda: SwiGLU(WIDTH, HIDDEN), batch),
    "norm and dropout": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), mlp(nn.GELU()), nn.Dropout(0.1), nn.Linear(WIDTH, 8)),
        batch,
    ),
    "convolutions": (residual, lambda: torch.randn(2, 3, 12, 12)),
    "gpt": (lambda: demo.GPT(None), lambda: torch.randint(256, (2, 64))),
    "bert": (bert, lambda: {"input_ids": torch.randint(100, (2, 32)), "attention_mask": torch.ones(2, 32).tril(20).long()}),
}


PLANS = [  # the quick ones: each model with one setting of bits
    pytest.param(name, bits, marks=[pytest.mark.slow] * (name == "bert" or i % 3 != j))
    for i, name in enumerate(MODELS)
    for j, bits in enumerate([{"activation": 3}, 4, {"linear": 2, "norm": 5}])
]


@pytest.mark.parametrize(("name", "bits"), PLANS, ids=str)
@pytest.mark.filterwarnings("ignore::fewbit.ConversionWarning")  # of a plan for kinds that the model does not have
def test_predicted_is_what_is_measured(name, bits):
    make, batch_of = MODELS[name]
    model, given = make(), batch_of()
    before = fewbit.memory(model, given)
    plan = before.plan(bits)
    assert "on fake tensors" in plan.how
    assert plan.before_bytes == before.activation_bytes == fewbit.memory(model, given).activation_bytes
    fewbit.convert(model, bits)
    assert converted(model) == plan.candidates
    after = fewbit.memory(model, given)
    assert plan.after_bytes == pytest.approx(after.activation_bytes, rel=0.01)
    predicted = {module: kept for module, (_, kept) in plan.by_module().items() if kept}
    measured = {module: kept for module, kept in after.by_module().items() if kept}
    assert predicted == pytest.approx(measured, rel=0.01, abs=8)
    fewbit.revert(model)
    assert plan.convert() is model
    assert converted(model) == plan.outcome.chosen <= plan.candidates
    assert plan.best_bytes == pytest.approx(fewbit.memory(model, given).activation_bytes, rel=0.01)
    assert plan.best_bytes <= min(plan.before_bytes, plan.after_bytes)


def advice_of(plan):
    return {each.module: (each.advice, each.reason) for each in plan.advice}


def test_a_relu_before_an_exact_linear_is_left():
    plan = fewbit.memory(mlp(nn.ReLU()), batch()).plan(bits={"activation": 3})
    advice, reason = advice_of(plan)["1"]
    assert advice == "leave"
    saved = plan.outcome.saved["1"]
    assert saved == pytest.approx(-ROWS * HIDDEN // 8 * 3, abs=4)  # on fake tensors a table of one number counts
    assert reason.startswith("2 (matrix product) keeps that tensor anyway, and codes would add")
    assert plan.best_bytes == plan.before_bytes < plan.after_bytes


def test_what_pays_only_together():
    plan = fewbit.memory(mlp(nn.Tanh()), batch()).plan(bits=4)
    found = advice_of(plan)
    assert found["1"][0] == found["2"][0] == "code"
    assert "together with 2 (matrix product)" in found["1"][1]
    assert found["0"] == ("leave", "reads the model's input, which stays in memory anyway")
    assert plan.outcome.saved["2"] == ROWS * HIDDEN * 4  # if only it is exact, it keeps the tensor, and the tanh its code


def test_frozen_layers_and_products():
    found = advice_of(fewbit.memory(mlp(nn.GELU(), False), batch(True)).plan(bits={"activation": 3, "linear": 4}))
    assert found["1"][0] == "code"
    assert found["2"] == ("leave", "keeps nothing itself that coding could shrink")
    found = advice_of(fewbit.memory(WrittenOut(WIDTH, HIDDEN), batch()).plan(bits={"activation": 3}))
    assert found[""] == ("leave", "keeps as many bytes when coded")
    assert found["down"] == ("leave", "stays exact with these bits")


def test_few_rows_are_not_worth_coding():
    plan = fewbit.memory(mlp(nn.Tanh()), batch(rows=1)).plan(bits=4)
    assert not plan.outcome.chosen
    assert advice_of(plan)["1"] == ("leave", "2 (matrix product) keeps that tensor anyway, and codes would add 513 B")
    plan = fewbit.memory(mlp(nn.GELU()), batch(rows=1)).plan(bits={"activation": 4})
    assert not plan.outcome.chosen
    assert advice_of(plan)["1"][1].startswith("the tensor is so small that scales and padding would add ")


def test_the_filter_and_what_is_converted_already_are_kept():
    model = fewbit.convert(mlp(nn.GELU()), bits={"activation": 1})
    before = copy.deepcopy({name: vars(module) for name, module in model.named_modules()})
    plan = fewbit.memory(model, batch()).plan(4, filter_fn=lambda module, name: name == "2")
    assert set(plan.outcome.saved) == {"2"}
    assert type(model[1]) is fewbit.GELU
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {n: v.keys() for n, v in before.items()}
    assert fewbit.revert(model)[1].__class__ is nn.GELU


class TestConvert:
    """`plan.convert()` converts exactly what was chosen."""

    def test_leaves_out_what_would_keep_more_and_says_so(self, caplog):
        model, x = mlp(nn.ReLU()), batch()
        caplog.set_level(logging.INFO, logger="fewbit")
        plan = fewbit.memory(model, x).plan(bits={"activation": 3})
        assert caplog.text == ""
        assert plan.convert() is model
        assert type(model[1]) is nn.ReLU
        told = [each.getMessage() for each in caplog.records]
        saved = "codes would add 1.50 KiB"
        assert [
            line.startswith("1 stays exact: 2 (matrix product) keeps that tensor anyway") and saved in line for line in told
        ] == [True]
        fewbit.convert(model, bits={"activation": 3})
        assert type(model[1]) is fewbit.ReLU
        fewbit.revert(model)
        caplog.clear()
        fewbit.memory(model, x).plan(bits=4).convert()
        assert [type(each) for each in model] == [nn.Linear, fewbit.ReLU, fewbit.Linear]
        assert [each.getMessage().partition(":")[0] for each in caplog.records] == ["convert", "0 stays exact"]
        assert "2 of 4 modules of the Sequential: 1 activation at 4 bits, 1 linear at 4 bits" in caplog.text

    @pytest.mark.parametrize("given", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
    def test_batches_of_any_form(self, given):
        model = mlp(nn.ReLU())
        fewbit.memory(model, given(batch())).plan(bits={"activation": 3}).convert()
        assert converted(model) == set()
        fewbit.memory(model, given(batch())).plan(bits={"activation": 3, "linear": 3}).convert()
        assert converted(model) == {"1", "2"}

    def test_is_exactly_what_was_chosen(self):
        """Each module gets its own bits, whatever the filter is, and the codes that the plan counted."""
        model, x = nn.Sequential(mlp(nn.Tanh()), nn.LayerNorm(WIDTH), mlp(nn.GELU())), batch()
        plan = fewbit.memory(model, x).plan({"activation": 2, "linear": 3, "norm": 5}, lambda _, name: name != "2.1")
        plan.convert()
        assert converted(model) == plan.outcome.chosen
        assert plan.outcome.chosen < plan.candidates
        assert type(model[2][1]) is nn.GELU
        assert {model.get_submodule(name).bits for name in plan.outcome.chosen} == {3, 5}
        assert fewbit.memory(model, x).activation_bytes == pytest.approx(plan.best_bytes, rel=0.01)

    def test_uses_the_coding(self):
        model = mlp(nn.GELU())
        fewbit.memory(model, batch()).plan(4, coding="uniform").convert()
        assert model[1].table.coding == "uniform"

    def test_makes_others_torchs_own_again(self):
        """As for any conversion: only the plan's own setting counts."""
        model = fewbit.convert(mlp(nn.Tanh()), bits=2)
        fewbit.memory(model, batch()).plan(bits={"activation": 3, "linear": 3}).convert()
        assert converted(model) == {"1", "2"}
        assert model[1].bits == model[2].bits == 3
        fewbit.memory(model, batch()).plan(bits={"activation": 3}).convert()
        assert converted(model) == set()
        assert [type(each) for each in model] == [nn.Linear, nn.Tanh, nn.Linear]

    def test_warns_where_there_is_nothing_to_convert(self):
        plan = fewbit.memory(mlp(nn.GELU()), batch()).plan(bits={"norm": 3})
        with pytest.warns(fewbit.ConversionWarning, match=r"no module of the Sequential was converted with bits=\{'norm': 3\}"):
            plan.convert()

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: fewbit.convert(model),
            lambda model: model.append(nn.GELU()),
            lambda model: model.__setitem__(1, nn.SiLU()),
            lambda model: model.pop(2),
        ],
        ids=["converted", "added", "exchanged", "removed"],
    )
    def test_not_of_a_model_that_changed_since(self, change):
        model = mlp(nn.GELU())
        report = fewbit.memory(model, batch())
        plan = report.plan()
        change(model)
        before = [type(each) for each in model]
        for call in (plan.convert, report.plan):
            with pytest.raises(InputError, match="converted or changed since this report; make a new one"):
                call()
        assert [type(each) for each in model] == before

    def test_again_and_after_a_revert(self):
        """A plan may be carried out again while the model is as it was."""
        model = mlp(nn.GELU())
        plan = fewbit.memory(model, batch()).plan()
        plan.convert()
        with pytest.raises(InputError, match="changed since"):
            plan.convert()
        fewbit.revert(model)
        assert converted(plan.convert()) == plan.outcome.chosen


def test_wrong_arguments_change_nothing():
    model = mlp(nn.GELU())
    report = fewbit.memory(model, batch())
    for call in (lambda: report.plan(bits=9), lambda: report.plan({"linear": 9}), lambda: report.plan({"lin": 4})):
        with pytest.raises(DesignError, match="bits"):
            call()
    with pytest.raises(ZeroDivisionError):
        report.plan(filter_fn=lambda module, name: 1 / 0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fewbit.memory(model, torch.randn(3, 5))
    assert [type(each) for each in model] == [nn.Linear, nn.GELU, nn.Linear]


class LooksAtNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(nn.GELU())

    def forward(self, x):
        return self.body(x) if x.sum().item() < 1e9 else x


def test_a_model_that_looks_at_numbers_runs_itself():
    model, x = LooksAtNumbers(), batch()
    state = torch.get_rng_state()
    plan = fewbit.memory(model, x).plan(4)
    assert "converted model on real tensors, since fake tensors do not serve (DataDependent" in plan.how
    assert plan.after_bytes == fewbit.memory(fewbit.convert(model, 4), x).activation_bytes
    assert torch.equal(state, torch.get_rng_state())
    assert type(fewbit.memory(fewbit.revert(model), x).plan({"activation": 3}).convert().body[1]) is fewbit.GELU
    with pytest.raises(RuntimeError):
        fewbit.memory(model, x, fake=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_planned_as_a_whole():
    model = torch.compile(mlp(nn.GELU()), backend="aot_eager_decomp_partition")
    x = batch()
    plan = fewbit.memory(model, x).plan(bits={"activation": 3})
    assert "the model is compiled" in plan.how
    fewbit.convert(model, bits={"activation": 3})
    assert plan.after_bytes == pytest.approx(fewbit.memory(model, x).activation_bytes, rel=0.01)
    assert plan.best_bytes == plan.after_bytes < plan.before_bytes
    relu = torch.compile(mlp(nn.ReLU()), backend="aot_eager_decomp_partition")
    plan = fewbit.memory(relu, x).plan(bits={"activation": 3})
    assert plan.outcome.chosen == frozenset()
    assert advice_of(plan)["_orig_mod.1"] == ("leave", "the model as a whole would keep no less")
    assert converted(plan.convert()) == set()


def test_a_plan_on_fake_tensors_alone_agrees():
    model, x = mlp(nn.GELU()), batch()
    real, fake = fewbit.memory(model, x).plan(4), fewbit.memory(model, x, fake=True).plan(4)
    assert real.totals() == fake.totals()
    meta = copy.deepcopy(model).to("meta")
    assert fewbit.memory(meta, x.to("meta"), fake=True).plan(4).totals() == real.totals()


def test_exports(tmp_path):
    plan = fewbit.memory(demo.GPT(None), torch.randint(256, (2, 16))).plan(4)
    found = json.loads(plan.to_json())
    assert sum(row["after"] for row in found["rows"]) == found["after"] == plan.after_bytes
    assert sum(row["before"] for row in found["rows"]) == found["before"]
    plan.plot(tmp_path / "a.png")
    assert "blocks.0-3.act (4)" in str(plan)
    assert max(map(len, str(plan).splitlines())) <= plan.width
    assert "blocks.0.act" in plan.to_csv()


LAYERS = [
    lambda: nn.Linear(8, 8),
    lambda: nn.Linear(8, 8).requires_grad_(False),
    nn.GELU,
    nn.ReLU,
    nn.Tanh,
    lambda: nn.LayerNorm(8),
    lambda: nn.Dropout(0.3),
]


@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, len(LAYERS) - 1), min_size=2, max_size=4), st.sampled_from([2, 64, 400]))
@pytest.mark.slow
def test_no_set_of_conversions_keeps_less(which, rows):
    """Compared with all sets of conversions, measured on real tensors."""
    torch.manual_seed(random.Random(str(which)).randint(0, 100))
    model, x = nn.Sequential(*[LAYERS[i]() for i in which]), torch.randn(rows, 8, requires_grad=True)
    plan = fewbit.memory(model, x).plan(4)
    names, least = list(plan.outcome.saved), plan.before_bytes
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            if chosen:
                fewbit.convert(model, 4, lambda _, name, chosen=chosen: name in chosen)
            least = min(least, fewbit.memory(model, x).activation_bytes)
            fewbit.revert(model)
    assert plan.best_bytes <= least + 4 * len(names)


def storage(number, *savers):
    return Storage(
        "activations", number, "float32", (1,), tuple(Saver(name, "Op") for name in savers), tuple((n, 0) for n in savers)
    )


def test_the_search_takes_back_more_than_one_at_a_time():
    """Two modules that add bytes each, linked to a third one that only pays without them."""
    calls = []

    def run(names):
        calls.append(frozenset(names))
        kept = 100 - 60 * ("c" in names) + 30 * ("a" in names) + 20 * ("b" in names)
        return [storage(kept, "a", "b", "c")]

    names = ["a", "b", "c"]
    found = trials.choose(run, names, run([]), run(names))
    assert found.chosen == {"c"}
    assert found.saved == {"a": -30, "b": -20, "c": 60}
    assert len(calls) <= 12


def test_transformer_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True), 2)
    x = torch.randn(8, 16, 16)
    plan = fewbit.memory(model, x).plan(bits={"activation": 3})
    found = advice_of(plan)
    assert found["layers.0"][0] == found["layers.1"][0] == "code"
    assert sum(row["after"] for row in plan.rows()) == plan.after_bytes
    plan.convert()
    assert fewbit.memory(model, x).activation_bytes == plan.best_bytes


class Calls(nn.Module):
    """An activation that is called as a function."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return nn.functional.gelu(self.up(x)) * 2


def test_calls_of_functions_are_coded():
    model, x = Calls(), batch()
    plan = fewbit.memory(model, x).plan(bits={"activation": 3})
    assert advice_of(plan)[""][0] == "code"
    plan.convert()
    assert fewbit.memory(model, x).activation_bytes == plan.best_bytes < 0.6 * plan.before_bytes


@pytest.mark.parametrize("first", [4, {"activation": 2, "linear": 5}, {"activation": 3}], ids=str)
def test_a_converted_model_is_planned_as_an_exact_one(first):
    """The current conversion does not count: a new one starts from the exact model."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32)), torch.randn(64, 32)
    fresh = fewbit.memory(model, x).plan(3)
    again = fewbit.memory(fewbit.convert(model, first), x).plan(3)
    assert again.rows() == fresh.rows()
    assert again.totals() == fresh.totals()
    again.convert()
    assert {name for name, module in model.named_modules() if hasattr(module, "coded_kind")} == fresh.outcome.chosen


def test_places_along_a_dimension():
    """The bytes of an index follow from the number of places, so they are known without looking at the batch."""
    model, x = nn.Sequential(nn.Linear(WIDTH, 300), Picks()), batch(rows=2000)
    plan = fewbit.memory(model, x).plan(bits=4)
    fewbit.convert(model, bits=4)
    assert plan.after_bytes == fewbit.memory(model, x).activation_bytes < 0.6 * plan.before_bytes
