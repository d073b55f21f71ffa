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
