"""convert and revert: modules keep other things but stay what they are; kinds and bits; and what is reported."""

import copy
import logging
import pickle

import pytest
import torch
from layer_oracles import relative
from support import SwiGLU, bytes_kept, gradients, types
from torch import nn

import fewbit
from fewbit.constants import KINDS
from fewbit.errors import DesignError, InputError
from fewbit.models.conversion.interception import Intercepted

EXACT = {"mlp.4"}  # the modules that any conversion converts


def batch():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def converted(model):
    """The names of the modules that keep codes themselves after convert."""
    named = model.named_modules()
    return {name for name, module in named if "_before_fewbit" in vars(module) and not isinstance(module, Intercepted)}


def intercepted(model):
    """The names of the modules whose calls of torch's functions keep codes."""
    return {name for name, module in model.named_modules() if isinstance(module, Intercepted) and module.interception.setting}


def test_outputs_gradients_and_bytes(model):
    exact = copy.deepcopy(model)
    fewbit.convert(model, bits=8)
    x = batch()
    assert torch.equal(model(x), exact(x))
    ours, true = gradients(model, x), gradients(exact, x)
    assert ours.keys() == true.keys()
    assert all(relative(ours[name], true[name]) < 0.25 for name in true), {n: relative(ours[n], true[n]) for n in true}
    for name, state in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], state)
    for way in ("train", "eval"):
        getattr(model, way)()
        getattr(exact, way)()
        assert torch.equal(model(x), exact(x))
    big = torch.randn(64, 3, 16, 16)
    assert bytes_kept(fewbit.convert(fewbit.revert(model), bits=4), big) < bytes_kept(exact, big) / 5


def test_everything_stays_in_place(model):
    model.head.weight = model.own.weight = nn.Parameter(torch.randn(8, 8))
    model.again = model.leaky
    model.norm.note = "mine"
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append("forward"))
    model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    own = type(model.own)
    modules, parameters = list(model.modules()), list(model.parameters())
    names, keys, before, text = [name for name, _ in model.named_modules()], list(model.state_dict()), types(model), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    assert fewbit.convert(model, bits={"activation": 3, "linear": 5, "norm": 4, "product": 5}) is model
    assert [id(each) for each in model.modules()] == [id(each) for each in modules]
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert model.head.weight is model.own.weight
    assert model.again is model.leaky
    assert all(issubclass(now, then) for now, then in zip(types(model), before, strict=True))
    assert intercepted(model) == {"", "own"}
    assert issubclass(type(model.own), own)
    assert type(model.mlp[4]) is fewbit.Dropout
    assert repr(model.norm) == repr(nn.LayerNorm(8))[:-1] + ", bits=5)"
    assert repr(model.mlp[3]) == "GELU(approximate='none', bits=5, shared=True)"
    assert repr(model.stem[2]) == "ReLU(inplace=True, bits=5, shared=True)"
    start = [each.detach().clone() for each in parameters]
    gradients(model, batch())
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not torch.equal(parameters[0], start[0])

    assert fewbit.revert(model) is model
    assert types(model) == before
    assert repr(model) == text
    assert model.norm.note == "mine"
    assert not any({"bits", "table", "rounding", "shared", "_before_fewbit"} & vars(each).keys() for each in model.modules())
    assert vars(model.mlp[3]).keys() == vars(nn.GELU()).keys()


@pytest.mark.filterwarnings("ignore::fewbit.ConversionWarning")
def test_each_kind_alone(model):
    """A mapping converts only the modules of the kinds that it names, and those with exact codes. A single number is for every
    kind."""
    of_kind = {
        "activation": {"stem.2", "mix.2", "mlp.3", "leaky"},
        "linear": {"stem.0", "mix.0", "mlp.0", "mlp.2", "mlp.5", "frozen", "head"},
        "norm": {"stem.1", "mix.1", "norm", "scale"},
        "product": {"mlp.1"},
    }
    before = types(model)
    for kind in KINDS:
        fewbit.convert(model, bits={kind: 3})
        found = of_kind.get(kind, set())
        assert converted(model) == found | EXACT, kind
        assert intercepted(model) == {"", "own"}
        assert {model.get_submodule(name).bits for name in found} <= {3}
        assert not any(getattr(module, "shared", False) for module in model.modules())
    fewbit.convert(model)
    assert converted(model) == EXACT.union(*of_kind.values())
    assert {model.get_submodule(name).bits for name in converted(model) - EXACT} == {5}
    assert model.mlp[3].shared
    assert types(fewbit.revert(model)) == before


def test_the_filter(model):
    seen = []

    def choose(module, name):
        seen.append(name)
        return name.startswith("mlp")

    fewbit.convert(model, bits=4, filter_fn=choose)
    assert converted(model) == {"mlp.0", "mlp.1", "mlp.2", "mlp.3", "mlp.4", "mlp.5"}
    assert intercepted(model) == set()
    assert {"own", "stem.0"} <= {*seen}


class TestAgain:
    """After a second conversion only its own setting counts."""

    def test_other_bits_and_kinds(self, model):
        fewbit.convert(model, bits={"activation": 3})
        fewbit.convert(model, bits=4)
        assert (model.head.bits, model.leaky.bits, model.leaky.shared) == (4, 4, True)
        fewbit.convert(model, bits={"activation": 7, "linear": 6})
        assert (model.head.bits, model.leaky.bits) == (6, 7)
        assert type(model.norm) is nn.LayerNorm
        assert type(model.mlp[1]) is nn.GLU
        fewbit.convert(model, bits={"activation": 3})
        assert converted(model) == {"stem.2", "mix.2", "mlp.3", "leaky"} | EXACT
        assert (model.leaky.bits, model.leaky.shared) == (3, False)
        fewbit.revert(fewbit.revert(model))
        assert type(model.head) is nn.Linear

    def test_is_as_converted_once(self, model):
        once, x = copy.deepcopy(model), batch()
        for bits in (2, {"linear": 3}, {"norm": 5, "product": 2}):
            fewbit.convert(model, bits=bits, coding="uniform" if bits == 2 else None)
        fewbit.convert(once, bits=bits)
        assert types(model) == types(once)
        assert [vars(each).keys() for each in model.modules()] == [vars(each).keys() for each in once.modules()]
        ours, theirs = gradients(model, x), gradients(once, x)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_the_filter_of_the_last_one_counts(self, model):
        fewbit.convert(model, bits=4)
        fewbit.convert(model, bits=4, filter_fn=lambda _, name: name == "head")
        assert converted(model) == {"head"}

    def test_nothing_is_left_where_nothing_is_of_the_new_kinds(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        before = types(model)
        fewbit.convert(model, bits=4)
        with pytest.warns(fewbit.ConversionWarning):
            fewbit.convert(model, bits={"recurrent": 4})
        assert types(model) == before

    def test_transformer_layers(self):
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        exact, x = copy.deepcopy(model), torch.randn(5, 3, 16)
        dropouts = {"dropout", "dropout1", "dropout2"}
        fewbit.convert(model, bits=4)
        assert converted(model) == {"linear1", "linear2", "norm1", "norm2"} | dropouts
        assert intercepted(model) == {"", "self_attn"}
        fewbit.convert(model, bits={"activation": 3})
        assert converted(model) == dropouts
        assert model.activation is nn.functional.relu
        assert torch.equal(model(x), exact(x))
        fewbit.revert(model)
        assert vars(model).keys() == vars(exact).keys()
        assert all(torch.equal(each, gradients(exact, x)[name]) for name, each in gradients(model, x).items())

    def test_gated_mlps(self):
        """Their activation is treated like any other, and their product as a call in their forward."""
        model = nn.Sequential(SwiGLU(8, 16))
        exact, x = copy.deepcopy(model), torch.randn(30, 8)
        fewbit.convert(model, bits=4)
        assert converted(model) == {"0.gate", "0.up", "0.down", "0.act"}
        assert intercepted(model) == {"0"}
        fewbit.convert(model, bits={"activation": 3})
        assert converted(model) == {"0.act"}
        assert (model[0].act.shared, model[0].act.bits) == (False, 3)
        assert type(model[0]).__bases__[-1] is SwiGLU
        fewbit.convert(model, bits={"product": 2})
        assert converted(model) == set()
        assert intercepted(model) == {"0"}
        assert torch.equal(model(x), exact(x))
        fewbit.convert(model, bits={"linear": 4})
        assert converted(model) == {"0.gate", "0.up", "0.down"}
        fewbit.revert(model)
        assert types(model) == types(exact)
        assert [vars(each).keys() for each in model.modules()] == [vars(each).keys() for each in exact.modules()]


def test_a_root_that_is_a_layer_itself():
    for module, text in ((nn.Linear(3, 2), "Linear(in_features=3, out_features=2, bias=True, bits=4)"), (nn.GELU(), "GELU")):
        original = type(module)
        assert repr(fewbit.convert(module, bits=4)).startswith(text)
        assert type(fewbit.revert(module)) is original


def test_modules_of_fewbits_own_stay():
    model = nn.Sequential(fewbit.Linear(3, 4, bits=2), fewbit.GELU(bits=1), nn.Linear(4, 4))
    fewbit.revert(fewbit.convert(model, bits=5))
    assert [type(each) for each in model] == [fewbit.Linear, fewbit.GELU, nn.Linear]
    assert (model[0].bits, model[1].bits) == (2, 1)


def test_attributes_of_torchs_stay():
    relu = fewbit.convert(nn.ReLU(inplace=True), bits=4)
    relu.inplace = False
    assert fewbit.revert(relu).inplace is False


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(model, copied):
    x = batch()
    fewbit.convert(model, bits=4, coding="uniform")
    expected = gradients(model, x)
    other = copied(model)
    assert types(other) == types(model)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(other, x).items())
    fewbit.revert(other)
    assert type(other.head) is nn.Linear
    assert type(model.head) is fewbit.Linear


def test_the_uniform_coding(model):
    fewbit.convert(model, bits={"activation": 4, "linear": 8, "norm": 8, "product": 8}, coding="uniform")
    tables = {module.table for module in model.modules() if hasattr(module, "table")}
    assert {(table.coding, table.bits) for table in tables} == {("uniform", 8)}
    assert model.mlp[1].table.activation == "sigmoid"
    assert "uniform" in repr(model.head)
    gradients(model, batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 4, "coding": "best"}, DesignError, "coding must be one of .*, got 'best'"),
        ({"bits": 4, "filter_fn": lambda module, name: 1 / 0}, ZeroDivisionError, "division"),
        ({"inputs": 4}, TypeError, "inputs"),
        (
            {"bits": 4, "filter_fn": 4},
            InputError,
            r"filter_fn must be a function .* got 4\. Give numbers of bits by kind as bits",
        ),
    ],
)
def test_wrong_arguments_change_nothing(model, arguments, error, message):
    before = types(model)
    with pytest.raises(error, match=message):
        fewbit.convert(model, **arguments)
    assert types(model) == before
    assert not converted(model)


@pytest.mark.parametrize("function", [fewbit.convert, fewbit.revert])
def test_no_model(function):
    with pytest.raises(InputError, match=rf"{function.__name__} takes a torch\.nn\.Module first, got list"):
        function([nn.Linear(2, 2)])


class TestTold:
    """One line on the logger, or a warning that nothing was done."""

    @pytest.fixture
    def told(self, caplog):
        caplog.set_level(logging.INFO, logger="fewbit")
        return lambda: [(each.levelname, each.getMessage()) for each in caplog.records if each.name == "fewbit"]

    def test_one_line(self, model, told):
        fewbit.convert(model, bits={"activation": 3, "linear": 4, "product": 1})
        kinds = "7 linear at 4 bits, 4 activation at 4 bits, 1 product at 4 bits, 1 by exact codes"
        others = "2 whose calls of functions are coded"
        assert told() == [("INFO", f"convert: 15 of {len(list(model.modules()))} modules of the Block: {kinds}, {others}")]
        fewbit.revert(model)
        assert told()[1:] == [("INFO", "revert: 15 modules of the Block")]

    def test_bits_of_one(self, told):
        fewbit.convert(nn.Sequential(nn.GELU()), bits={"activation": 1})
        assert told() == [("INFO", "convert: 1 of 2 modules of the Sequential: 1 activation at 1 bit")]

    @pytest.mark.parametrize(
        ("activation", "keeps"),
        [
            (nn.ReLU(), "relu"),
            (nn.Tanh(), "tanh"),
            (nn.Sigmoid(), "sigmoid"),
            (nn.ELU(), None),
            (nn.GELU(), None),
            (nn.SiLU(), None),
        ],
        ids=str,
    )
    def test_activations_that_keep_their_output(self, activation, keeps, told):
        """Their codes are kept in addition to the output, which an exact linear layer keeps. If it is coded, they are not."""
        model = nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 64))
        x = torch.randn(64, 64)
        before = bytes_kept(model, x)
        fewbit.convert(model, bits={"activation": 3})
        remark = "and an exact linear layer after it keeps that output too"
        ((_, line),) = told()
        assert (remark in line) == (keeps is not None)
        assert (f"; exact training keeps only the output of {keeps}, {remark}" in line) == (keeps is not None)
        assert (bytes_kept(model, x) > before) == (keeps is not None)
        fewbit.convert(model, bits={"activation": 3, "linear": 3})
        assert remark not in told()[-1][1]
        assert bytes_kept(model, x) < before

    def test_several_are_named_once(self, told):
        fewbit.convert(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.GELU(), nn.ReLU()), bits={"activation": 3})
        assert "only the output of relu, tanh, and" in told()[0][1]

    def test_a_warning_that_nothing_was_converted(self, model, told):
        for call, setting in (
            (lambda: fewbit.convert(nn.Identity(), bits={"recurrent": 4}), r"bits=\{'recurrent': 4\}"),
            (lambda: fewbit.convert(model, filter_fn=lambda *_: False), "bits=5"),
            (lambda: fewbit.convert(nn.Identity(), 2, coding="uniform"), "bits=2, coding='uniform'"),
        ):
            message = rf"no module of the (Block|Identity) was converted with {setting}: no module is of these kinds"
            with pytest.warns(fewbit.ConversionWarning, match=message) as found:
                call()
            assert [each.filename for each in found] == [__file__]  # it points at the call
        assert told() == []
        assert issubclass(fewbit.ConversionWarning, UserWarning)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # from torch
def test_autocast(model):
    exact, x = copy.deepcopy(model), batch()
    fewbit.convert(model, bits=8)
    results = []
    for each in (model, exact):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        y.float().square().sum().backward()
        results.append((y, {name: p.grad for name, p in each.named_parameters() if p.grad is not None}))
    (y, ours), (true_y, true) = results
    assert y.dtype == true_y.dtype
    assert torch.equal(y, true_y)
    assert all(ours[name].dtype == true[name].dtype for name in true)
    assert all(relative(ours[name], true[name]) < 0.3 for name in true), {n: relative(ours[n], true[n]) for n in true}
