"""convert and revert: modules stay what they are, but for what they keep. And layers under autocast, torch.func and export."""

import copy
import pickle

import pytest
import torch
from layer_oracles import CASES, relative
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional

import fewbit
from fewbit.errors import DesignError, InputError, TableError
from fewbit.measuring import saved_storages


class Own(nn.Linear):
    """A subclass, which has a mind of its own."""

    def forward(self, input):
        return super().forward(input)


class Block(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(nn.ConvTranspose2d(8, 8, 2), nn.GroupNorm(2, 8), nn.SiLU())
        self.norm, self.scale = nn.LayerNorm(8), nn.RMSNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GLU(), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, 8))
        self.own, self.frozen = Own(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.leaky = nn.LeakyReLU(0.25)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.mix(self.stem(x)).mean((2, 3))
        x = x + self.mlp(self.norm(x))
        return self.head(self.leaky(self.frozen(self.own(self.scale(x)))))


@pytest.fixture
def model():
    return Block()


def batch():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def bytes_kept(model, x):
    seen = {}
    with saved_storages(seen, leave_out={each.untyped_storage().data_ptr() for each in (x, *model.parameters())}):
        y = model(x)
    total = sum(seen.values())
    del y
    return total


def types(model):
    return [type(module) for module in model.modules()]


def test_outputs_gradients_and_bytes(model):
    exact = copy.deepcopy(model)
    fewbit.convert(model, bits=8, inputs=8)
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
    assert bytes_kept(fewbit.convert(fewbit.revert(model), bits=4, inputs=4), big) < bytes_kept(exact, big) / 5


def test_everything_stays_in_place(model):
    model.head.weight = model.own.weight = nn.Parameter(torch.randn(8, 8))
    model.again = model.leaky
    model.norm.note = "mine"
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append("forward"))
    model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    modules, parameters = list(model.modules()), list(model.parameters())
    names, keys, before, text = [name for name, _ in model.named_modules()], list(model.state_dict()), types(model), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    assert fewbit.convert(model, bits=3, inputs=5) is model
    assert [id(each) for each in model.modules()] == [id(each) for each in modules]
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert model.head.weight is model.own.weight
    assert model.again is model.leaky
    assert all(issubclass(now, then) for now, then in zip(types(model), before, strict=True))
    assert type(model.own) is Own
    assert type(model.mlp[4]) is nn.Dropout
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


def test_activations_alone(model):
    fewbit.convert(model, bits=3)
    assert type(model.head) is nn.Linear
    assert type(model.norm) is nn.LayerNorm
    assert type(model.mlp[1]) is nn.GLU
    assert type(model.mlp[3]) is fewbit.GELU
    assert (model.mlp[3].bits, model.mlp[3].shared) == (3, False)


def test_the_filter(model):
    seen = []

    def choose(module, name):
        seen.append(name)
        return name.startswith("mlp")

    fewbit.convert(model, inputs=4, filter_fn=choose)
    converted = {name for name, module in model.named_modules() if "_before_fewbit" in vars(module)}
    assert converted == {"mlp.0", "mlp.1", "mlp.2", "mlp.3", "mlp.5"}
    assert "own" not in seen
    assert "stem.0" in seen


def test_again_with_other_bits(model):
    fewbit.convert(model, bits=3)
    fewbit.convert(model, bits=3, inputs=4)
    assert (model.head.bits, model.leaky.bits, model.leaky.shared) == (4, 4, True)
    fewbit.convert(fewbit.revert(model), bits=7, inputs=6)
    assert (model.head.bits, model.leaky.bits) == (6, 7)
    fewbit.revert(fewbit.revert(model))
    assert type(model.head) is nn.Linear


def test_a_root_that_is_a_layer_itself():
    for module, text in ((nn.Linear(3, 2), "Linear(in_features=3, out_features=2, bias=True, bits=4)"), (nn.GELU(), "GELU")):
        original = type(module)
        assert repr(fewbit.convert(module, inputs=4)).startswith(text)
        assert type(fewbit.revert(module)) is original


def test_modules_of_fewbits_own_stay():
    model = nn.Sequential(fewbit.Linear(3, 4, bits=2), fewbit.GELU(bits=1), nn.Linear(4, 4))
    fewbit.revert(fewbit.convert(model, bits=5, inputs=5))
    assert [type(each) for each in model] == [fewbit.Linear, fewbit.GELU, nn.Linear]
    assert (model[0].bits, model[1].bits) == (2, 1)


def test_attributes_of_the_same_names_come_back():
    module = nn.Linear(3, 3)
    module.bits, module.table = 32, "mine"
    fewbit.convert(module, inputs=4)
    assert (module.bits, module.table) == (4, None)
    fewbit.revert(module)
    assert (module.bits, module.table) == (32, "mine")
    relu = fewbit.convert(nn.ReLU(inplace=True), bits=4)
    relu.inplace = False
    assert fewbit.revert(relu).inplace is False


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(model, copied):
    x = batch()
    fewbit.convert(model, bits=4, inputs=4, coding="uniform")
    expected = gradients(model, x)
    other = copied(model)
    assert types(other) == types(model)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(other, x).items())
    fewbit.revert(other)
    assert type(other.head) is nn.Linear
    assert type(model.head) is fewbit.Linear


def test_the_uniform_coding(model):
    fewbit.convert(model, bits=4, inputs=8, coding="uniform")
    tables = {module.table for module in model.modules() if hasattr(module, "table")}
    assert {(table.coding, table.bits) for table in tables} == {("uniform", 8)}
    assert model.mlp[1].table.activation == "sigmoid"
    assert "uniform" in repr(model.head)
    gradients(model, batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 9}, DesignError, "bits must be an integer from 1 to 8, got 9"),
        ({"inputs": 0}, DesignError, "got 0"),
        ({"inputs": True}, DesignError, "got True"),
        ({"inputs": 4, "coding": "best"}, (DesignError, TableError), "best"),
        ({"inputs": 4, "filter_fn": lambda module, name: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_wrong_arguments_change_nothing(model, arguments, error, message):
    before = types(model)
    with pytest.raises(error, match=message):
        fewbit.convert(model, **arguments)
    assert types(model) == before
    assert not any("_before_fewbit" in vars(module) for module in model.modules())


def test_no_model():
    with pytest.raises(InputError, match=r"convert takes a torch\.nn\.Module, got list"):
        fewbit.convert([nn.Linear(2, 2)])


class Plain(nn.Linear):
    """A subclass that adds to what it is, and changes nothing of what it does."""

    def __init__(self, *args, note="mine", **keywords):
        super().__init__(*args, **keywords)
        self.note = note

    @property
    def shape(self):
        return tuple(self.weight.shape)

    def extra_repr(self):
        return f"{super().extra_repr()}, note={self.note}"


class Mixed:
    def twice(self, x):
        return self(self(x))


class Both(Mixed, nn.GELU):
    pass


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class OwnBits(nn.Linear):
    @property
    def bits(self):
        return 32


def leaf_gradients(module, x):
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    y = module(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(each.grad.clone() for each in module.parameters())]


class TestSubclasses:
    def test_all_stays_but_what_is_kept(self):
        exact = Plain(8, 6, note="other")
        coded, x = fewbit.convert(copy.deepcopy(exact), inputs=8), torch.randn(30, 8)
        assert isinstance(coded, Plain)
        assert isinstance(coded, fewbit.Linear)
        assert (coded.note, coded.shape, type(coded).__name__) == ("other", (6, 8), "Plain")
        assert repr(coded) == "Plain(in_features=8, out_features=6, bias=True, note=other, bits=8)"
        ours, true = leaf_gradients(coded, x), leaf_gradients(exact, x)
        assert torch.equal(ours[0], true[0])
        assert 0 < relative(ours[2], true[2]) < 0.02
        assert 0 < bytes_kept(coded, torch.randn(999, 8)) < 0.5 * 999 * 8 * 4
        fewbit.revert(coded)
        assert type(coded) is Plain
        assert vars(coded).keys() == vars(exact).keys()

    def test_one_class_for_all_of_a_class(self):
        one, two = (fewbit.convert(Plain(3, 3), inputs=4) for _ in range(2))
        assert type(one) is type(two)

    @pytest.mark.parametrize("protocol", [1, 2, 5])
    def test_copies(self, protocol):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4, inputs=4)
        x = torch.randn(5, 8)
        expected = leaf_gradients(model, x)
        for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model, protocol))):
            assert types(other) == types(model)
            assert all(map(torch.equal, leaf_gradients(other, x), expected))
        other = copy.deepcopy(model)
        assert types(fewbit.revert(other)) == [nn.Sequential, Plain, Both]
        assert isinstance(model[0], fewbit.Linear)

    def test_a_file_of_the_whole_module(self, tmp_path):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4, inputs=4)
        torch.save(model, tmp_path / "model.pt")
        assert types(torch.load(tmp_path / "model.pt", weights_only=False)) == types(model)

    def test_methods_and_mixins(self):
        exact, x = Both(), torch.randn(9)
        coded = fewbit.convert(copy.deepcopy(exact), bits=4)
        assert isinstance(coded, Mixed)
        assert torch.equal(coded.twice(x), exact.twice(x))

    @pytest.mark.parametrize("make", [lambda: Own(3, 3), lambda: OwnConvolution(3, 3, 1), lambda: OwnBits(3, 3)])
    def test_those_that_replace_what_fewbit_does_stay(self, make):
        module = make()
        before = type(module)
        assert type(fewbit.convert(module, bits=3, inputs=3)) is before

    def test_what_others_put_in_the_place_of_forward_stays(self):
        module = nn.Linear(3, 3)
        module.forward = lambda x: x
        assert type(fewbit.convert(module, inputs=3)) is nn.Linear

    def test_lazy_modules_once_they_are_made(self):
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
        assert type(fewbit.convert(model, inputs=4)[0]) is nn.LazyLinear
        model(torch.randn(2, 3))
        assert type(fewbit.convert(model, inputs=4)[0]) is fewbit.Linear

    def test_attention_and_recurrent_modules_stay(self):
        model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(4, 4), nn.GRU(4, 4)])
        before = types(model)
        assert types(fewbit.convert(model, bits=4, inputs=4)) == before

    def test_names_that_users_gave(self):
        module = nn.LeakyReLU(0.3)
        module.name, module.record = "first", [1]
        fewbit.convert(module, bits=2)
        x = torch.randn(9)
        assert torch.equal(module(x), functional.leaky_relu(x, 0.3))
        assert (module.name, module.record) == ("first", [1])

    def test_compiled(self):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4, inputs=4)
        x = torch.randn(5, 8)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(leaf_gradients(compiled, x), leaf_gradients(model, x), strict=True):
            torch.testing.assert_close(ours, eager)
        torch.compiler.reset()


class TestParametrizations:
    @pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
    def test_outputs_and_gradients(self, name):
        exact = getattr(nn.utils.parametrizations, name)(nn.Linear(8, 8)).eval()  # spectral_norm iterates in training
        coded = fewbit.convert(copy.deepcopy(exact), inputs=8)
        assert isinstance(coded, fewbit.Linear)
        assert nn.utils.parametrize.is_parametrized(coded, "weight")
        assert list(coded.state_dict()) == list(exact.state_dict())
        x = torch.randn(40, 8)
        for ours, true in zip(leaf_gradients(coded, x), leaf_gradients(exact, x), strict=True):
            assert relative(ours, true) < 0.1  # of orthogonal, whose map enlarges them
        other = copy.deepcopy(coded)
        assert torch.equal(other(x), coded(x))
        fewbit.revert(coded)
        assert not isinstance(coded, fewbit.Linear)
        for ours, true in zip(leaf_gradients(coded, x), leaf_gradients(exact, x), strict=True):
            assert torch.equal(ours, true)

    def test_removed_after_conversion(self):
        module = fewbit.convert(nn.utils.parametrizations.weight_norm(Plain(8, 8)), inputs=4)
        nn.utils.parametrize.remove_parametrizations(module, "weight")
        assert isinstance(module, fewbit.Linear)
        assert type(fewbit.revert(module)) is Plain

    def test_made_after_conversion(self):
        module = nn.utils.parametrizations.weight_norm(fewbit.convert(nn.Linear(8, 8), inputs=4))
        exact = fewbit.revert(copy.deepcopy(module))
        assert not isinstance(exact, fewbit.Linear)
        assert nn.utils.parametrize.is_parametrized(exact, "weight")
        x = torch.randn(3, 8)
        assert torch.equal(exact(x), module(x))
        assert fewbit.convert(module, inputs=6).bits == 6
        nn.utils.parametrize.remove_parametrizations(exact, "weight")
        assert type(exact) is nn.Linear

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_hooks_of_the_older_kind(self):
        exact, coded = (nn.utils.weight_norm(nn.Linear(8, 8)) for _ in range(2))
        coded.load_state_dict(exact.state_dict())
        fewbit.convert(coded, inputs=8)
        x = torch.randn(40, 8)
        for ours, true in zip(leaf_gradients(coded, x), leaf_gradients(exact, x), strict=True):
            assert relative(ours, true) < 0.03


class TestTransformerLayers:
    """What torch's own layers have for an activation: a function, mostly."""

    def model(self, activation="relu"):
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    @pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh, nn.SiLU()], ids=["relu", "gelu", "tanh", "SiLU()"])
    @pytest.mark.parametrize("inputs", [None, 6])
    def test_outputs_and_gradients(self, activation, inputs):
        exact = self.model(activation)
        coded, x = copy.deepcopy(exact), torch.randn(4, 10, 16)
        keys = list(coded.state_dict())
        fewbit.convert(coded, bits=6, inputs=inputs)
        assert list(coded.state_dict()) == keys
        assert coded.layers[0].activation.bits == 6
        assert coded.layers[1].activation.record().name in (activation, "tanh", "silu")
        assert "bits=6" in repr(coded.layers[0].activation)
        ours, true = leaf_gradients(coded, x), leaf_gradients(exact, x)
        assert torch.equal(ours[0], true[0])
        assert relative(*(torch.cat([each.flatten() for each in found[1:]]) for found in (ours, true))) < 0.1
        again = fewbit.convert(pickle.loads(pickle.dumps(coded)), bits=3)
        assert again.layers[0].activation.bits == 3
        for each in (coded, again):
            fewbit.revert(each)
            assert types(each) == types(exact)
            assert [vars(layer).keys() for layer in each.layers] == [vars(layer).keys() for layer in exact.layers]
            assert [layer.activation for layer in each.layers if callable(activation)] == [
                layer.activation for layer in each.layers if callable(activation)
            ]
        assert all(map(torch.equal, leaf_gradients(coded, x), true))

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_the_fast_path(self, activation):
        exact = self.model(activation).eval()
        coded, x = fewbit.convert(copy.deepcopy(exact), bits=4, inputs=4), torch.randn(4, 10, 16)
        assert coded.layers[0].activation_relu_or_gelu == exact.layers[0].activation_relu_or_gelu
        with torch.inference_mode(), torch.profiler.profile() as record:
            assert torch.equal(coded(x), exact(x))
        counts = {event.key: event.count for event in record.key_averages()}
        assert counts["aten::_transformer_encoder_layer_fwd"] == 4

    def test_a_function_of_ones_own_stays(self):
        def mine(x):
            return x.relu() + 1

        model = nn.TransformerDecoderLayer(16, 2, 32, activation=mine)
        assert fewbit.convert(model, bits=4).activation is mine
        assert "activation" not in dict(model.named_modules())

    def test_the_filter_sees_it(self):
        model = fewbit.convert(nn.TransformerDecoderLayer(16, 2, 32), bits=4, filter_fn=lambda _, name: name != "activation")
        assert model.activation is functional.relu
        assert fewbit.convert(model, bits=4, filter_fn=lambda _, name: name == "activation").activation.bits == 4
        assert fewbit.revert(model).activation is functional.relu


NORMS = [
    (nn.BatchNorm1d, (6, 5), {}),
    (nn.BatchNorm1d, (6, 5, 7), {"momentum": None}),
    (nn.BatchNorm1d, (6, 5), {"affine": False, "momentum": 0.5}),
    (nn.BatchNorm2d, (3, 5, 4, 4), {"track_running_stats": False}),
    (nn.BatchNorm3d, (2, 5, 3, 3, 3), {"eps": 0.1}),
]


@pytest.mark.parametrize(("torchs", "shape", "keywords"), NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_running_statistics(torchs, shape, keywords, dtype):
    exact = torchs(5, **keywords).to(dtype)
    coded = fewbit.convert(copy.deepcopy(exact), inputs=8)
    for step in range(5):
        if step == 3:
            exact.eval(), coded.eval()
        x, results = 3 * torch.randn(shape).to(dtype) + 1, []
        grad = torch.randn(shape).to(dtype)
        for module in (coded, exact):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(grad)
            results.append((y, leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert relative(results[0][1], results[1][1]) < 0.1
        for name, state in exact.state_dict().items():
            assert torch.equal(coded.state_dict()[name], state), name


CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 8)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", stride=2), (2, 3, 8, 9)),
    (nn.Conv2d(3, 4, (3, 5), padding="same", padding_mode="replicate"), (2, 3, 8, 9)),
    (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, bias=False), (4, 8, 9)),
    (nn.Conv3d(2, 3, 2, padding="valid"), (2, 2, 3, 4, 5)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    (nn.ConvTranspose2d(3, 4, 3, stride=(2, 3), padding=1, output_padding=1), (2, 3, 5, 6)),
    (nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("exact", "shape"), CONVOLUTIONS)
def test_convolutions(exact, shape):
    coded = fewbit.convert(copy.deepcopy(exact), inputs=8)
    x, grads = torch.randn(shape), []
    for module in (coded, exact):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        grads.append((y, leaf.grad, module.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert relative(grads[0][2], grads[1][2]) < 0.03


def test_transposed_convolutions_take_an_output_size():
    exact = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    coded, x = fewbit.convert(copy.deepcopy(exact), inputs=4), torch.randn(1, 3, 6, 6, requires_grad=True)
    for size in ((11, 12), (12, 11)):
        assert torch.equal(coded(x, output_size=size), exact(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        coded(x, output_size=(20, 20))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's own
class TestAutocast:
    def test_outputs_and_gradients(self, model):
        exact, x = copy.deepcopy(model), batch()
        fewbit.convert(model, bits=8, inputs=8)
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

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
    def test_each_layer(self, name, own):
        case = CASES[name]
        x, parameters = case.make(own)
        parameters = {name: each.float().requires_grad_() for name, each in parameters.items()}
        if own == torch.float64:
            parameters = {name: each.detach().double().requires_grad_() for name, each in parameters.items()}
        with torch.autocast("cpu", torch.bfloat16):
            exact = case.exact(x.requires_grad_(), parameters)
            y = case.coded(x, parameters)
        assert y.dtype == exact.dtype
        assert torch.equal(y, exact)
        y.sum().backward()
        assert x.grad.dtype == own


class TestTransforms:
    """Under torch.func, forward-mode differentiation and export the layers are torch's own operations, and exact."""

    def layers(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GLU(), nn.RMSNorm(8), nn.Linear(8, 2))
        return fewbit.convert(copy.deepcopy(model), inputs=2), model

    def test_gradients(self):
        coded, exact = self.layers()
        parameters = {name: each.detach() for name, each in exact.named_parameters()}
        x = torch.randn(5, 6)

        def loss(module):
            return lambda parameters, x: functional_call(module, parameters, (x,)).square().sum()

        for take in (
            lambda f: grad(f)(parameters, x),
            lambda f: vmap(grad(f), in_dims=(None, 0))(parameters, x),
            lambda f: vjp(f, parameters, x)[1](torch.ones(()))[0],
        ):
            ours, true = take(loss(coded)), take(loss(exact))
            for name in true:
                torch.testing.assert_close(ours[name], true[name])

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_forward_mode(self):
        coded, exact = self.layers()
        x, tangent = torch.randn(5, 6), torch.randn(5, 6)
        for ours, true in zip(jvp(coded, (x,), (tangent,)), jvp(exact, (x,), (tangent,)), strict=True):
            torch.testing.assert_close(ours, true)

    def test_no_grad_and_frozen_keep_nothing(self):
        coded, _ = self.layers()
        x = torch.randn(5, 6)
        with torch.no_grad():
            assert bytes_kept(coded, x) == 0
        assert bytes_kept(coded.requires_grad_(False), x) == 0

    @pytest.mark.slow
    def test_export(self):
        coded, exact = self.layers()
        x = torch.randn(5, 6)
        program = torch.export.export(coded, (x,))
        assert "fewbit" not in str(program.graph)
        assert torch.equal(program.module()(x), exact(x))

    def test_on_the_meta_device(self):
        coded, _ = self.layers()
        y = coded.to("meta")(torch.randn(5, 6, device="meta"))
        y.sum().backward()
        assert coded[0].weight.grad.shape == (8, 6)


def test_dropout_of_functional_use():
    """A module may be called twice, with different inputs, in one step."""
    module = fewbit.convert(nn.Linear(4, 4, bias=False), inputs=8)
    a, b = torch.randn(9, 4), 100 * torch.randn(3, 4)
    (module(a).sum() + module(b).sum()).backward()
    assert relative(module.weight.grad, (a.sum(0) + b.sum(0)).expand(4, 4)) < 0.03
    assert functional.linear(a, module.weight).equal(module(a))
