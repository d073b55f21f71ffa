"""Modules that are not exactly torch's: subclasses, parametrized ones, and torch's transformer layers, which hold functions."""

import copy
import inspect
import pickle

import pytest
import torch
from layer_oracles import relative
from support import all_gradients, bytes_kept, compiled, types
from torch import nn
from torch.nn import functional

import fewbit
from fewbit.models.conversion.interception import Intercepted
from fewbit.nn.layers import CodedLayer


class Plain(nn.Linear):
    """A subclass that adds things and changes nothing of torch's behaviour."""

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


class OwnForward(nn.Linear):
    """A subclass that overrides what fewbit replaces."""

    def forward(self, input):
        return super().forward(input)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class OwnBits(nn.Linear):
    @property
    def bits(self):
        return 32


class TestSubclasses:
    def test_all_stays_but_what_is_kept(self):
        exact = Plain(8, 6, note="other")
        coded, x = fewbit.convert(copy.deepcopy(exact), bits=8), torch.randn(99, 8)
        assert isinstance(coded, Plain)
        assert isinstance(coded, fewbit.Linear)
        assert (coded.note, coded.shape, type(coded).__name__) == ("other", (6, 8), "Plain")
        assert repr(coded) == "Plain(in_features=8, out_features=6, bias=True, note=other, bits=8)"
        ours, true = all_gradients(coded, x), all_gradients(exact, x)
        assert torch.equal(ours[0], true[0])
        assert 0 < relative(ours[2], true[2]) < 0.02
        assert 0 < bytes_kept(coded, torch.randn(999, 8, requires_grad=True)) < 0.5 * 999 * 8 * 4
        fewbit.revert(coded)
        assert type(coded) is Plain
        assert vars(coded).keys() == vars(exact).keys()

    def test_one_class_for_all_of_a_class(self):
        one, two = (fewbit.convert(Plain(3, 3), bits=4) for _ in range(2))
        assert type(one) is type(two)

    @pytest.mark.parametrize("protocol", [1, 2, 5])
    def test_copies(self, protocol):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4)
        x = torch.randn(5, 8)
        expected = all_gradients(model, x)
        for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model, protocol))):
            assert types(other) == types(model)
            assert all(map(torch.equal, all_gradients(other, x), expected))
        other = copy.deepcopy(model)
        assert types(fewbit.revert(other)) == [nn.Sequential, Plain, Both]
        assert isinstance(model[0], fewbit.Linear)

    def test_a_file_of_the_whole_module(self, tmp_path):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4)
        torch.save(model, tmp_path / "model.pt")
        assert types(torch.load(tmp_path / "model.pt", weights_only=False)) == types(model)

    def test_methods_and_mixins(self):
        exact, x = Both(), torch.randn(9)
        coded = fewbit.convert(copy.deepcopy(exact), bits=4)
        assert isinstance(coded, Mixed)
        assert torch.equal(coded.twice(x), exact.twice(x))

    @pytest.mark.parametrize("make", [lambda: OwnForward(32, 3), lambda: OwnConvolution(32, 3, 1), lambda: OwnBits(32, 3)])
    def test_those_that_replace_what_fewbit_does_run_their_own_forward(self, make):
        """And the functions that it calls are coded."""
        exact, x = make(), torch.randn(99, 32, 4, 32).requires_grad_()
        coded = fewbit.convert(copy.deepcopy(exact), bits=3)
        assert not isinstance(coded, CodedLayer)
        assert isinstance(coded, Intercepted)
        y = coded(x * 1)
        assert torch.equal(y, exact(x * 1))
        assert bytes_kept(lambda: coded(x * 1), leave_out=[*coded.parameters()]) < 0.2 * x.nbytes
        grad = torch.randn_like(y)
        true, near = (torch.autograd.grad(each(x * 1), each.weight, grad)[0] for each in (exact, coded))
        assert 0 < relative(near, true) < 0.3

    def test_what_others_put_in_the_place_of_forward_stays(self):
        module = nn.Linear(3, 3)
        module.forward = lambda x: x
        with pytest.warns(fewbit.ConversionWarning):
            assert type(fewbit.convert(module, bits=3)) is nn.Linear

    def test_lazy_modules_once_they_are_made(self):
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
        assert type(fewbit.convert(model, bits=4)[0]) is nn.LazyLinear
        model(torch.randn(2, 3))
        assert type(fewbit.convert(model, bits=4)[0]) is fewbit.Linear

    def test_names_that_users_gave(self):
        module = nn.LeakyReLU(0.3)
        module.name, module.record = "first", [1]
        fewbit.convert(module, bits=2)
        x = torch.randn(9)
        assert torch.equal(module(x), functional.leaky_relu(x, 0.3))
        assert (module.name, module.record) == ("first", [1])

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.slow
    def test_compiled(self):
        model = fewbit.convert(nn.Sequential(Plain(8, 8), Both()), bits=4)
        x = torch.randn(5, 8)
        for ours, eager in zip(all_gradients(compiled(model), x), all_gradients(model, x), strict=True):
            torch.testing.assert_close(ours, eager)


class TestParametrizations:
    @pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
    def test_outputs_and_gradients(self, name):
        exact = getattr(nn.utils.parametrizations, name)(nn.Linear(8, 8)).eval()  # spectral_norm iterates in training
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        assert isinstance(coded, fewbit.Linear)
        assert nn.utils.parametrize.is_parametrized(coded, "weight")
        assert list(coded.state_dict()) == list(exact.state_dict())
        x = torch.randn(40, 8)
        for ours, true in zip(all_gradients(coded, x), all_gradients(exact, x), strict=True):
            assert relative(ours, true) < 0.1  # of orthogonal, whose map enlarges errors
        other = copy.deepcopy(coded)
        assert torch.equal(other(x), coded(x))
        fewbit.revert(coded)
        assert not isinstance(coded, fewbit.Linear)
        for ours, true in zip(all_gradients(coded, x), all_gradients(exact, x), strict=True):
            assert torch.equal(ours, true)

    def test_the_class_is_the_very_one_afterwards(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.GELU())
        before = types(model)
        fewbit.convert(model, bits=4)
        fewbit.convert(model, bits=3)
        assert all(one is other for one, other in zip(types(fewbit.revert(model)), before, strict=True))

    def test_changed_while_converted(self):
        module = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        fewbit.convert(module, bits=4)
        nn.utils.parametrize.register_parametrization(module, "bias", nn.Tanh())
        x = torch.randn(3, 8)
        expected = module(x)
        assert torch.equal(fewbit.revert(module)(x), expected)
        assert not isinstance(module, fewbit.Linear)
        assert "bits" not in str(inspect.signature(type(module)))

    def test_removed_after_conversion(self):
        module = fewbit.convert(nn.utils.parametrizations.weight_norm(Plain(8, 8)), bits=4)
        nn.utils.parametrize.remove_parametrizations(module, "weight")
        assert isinstance(module, fewbit.Linear)
        assert type(fewbit.revert(module)) is Plain

    def test_made_after_conversion(self):
        module = nn.utils.parametrizations.weight_norm(fewbit.convert(nn.Linear(8, 8), bits=4))
        exact = fewbit.revert(copy.deepcopy(module))
        assert not isinstance(exact, fewbit.Linear)
        assert nn.utils.parametrize.is_parametrized(exact, "weight")
        x = torch.randn(3, 8)
        assert torch.equal(exact(x), module(x))
        assert fewbit.convert(module, bits=6).bits == 6
        nn.utils.parametrize.remove_parametrizations(exact, "weight")
        assert type(exact) is nn.Linear

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_hooks_of_the_older_kind(self):
        exact, coded = (nn.utils.weight_norm(nn.Linear(8, 8)) for _ in range(2))
        coded.load_state_dict(exact.state_dict())
        fewbit.convert(coded, bits=8)
        x = torch.randn(40, 8)
        for ours, true in zip(all_gradients(coded, x), all_gradients(exact, x), strict=True):
            assert relative(ours, true) < 0.03


class TestTransformerLayers:
    """torch's own layers. Their activation is a function, mostly, and their forward calls it."""

    def model(self, activation="relu"):
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    @pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh, nn.SiLU()], ids=["relu", "gelu", "tanh", "SiLU()"])
    @pytest.mark.parametrize("bits", [{"activation": 6}, 6], ids=str)
    def test_outputs_and_gradients(self, activation, bits):
        exact = self.model(activation)
        coded, x = copy.deepcopy(exact), torch.randn(4, 10, 16)
        keys = list(coded.state_dict())
        fewbit.convert(coded, bits=bits)
        assert list(coded.state_dict()) == keys
        kept = [bytes_kept(lambda each=each: each(x), leave_out=(x, *each.parameters())) for each in (coded, exact)]
        assert kept[0] < kept[1] or (activation in ("relu", torch.tanh) and bits != 6)  # linear layers keep its output anyway
        ours, true = all_gradients(coded, x), all_gradients(exact, x)
        assert torch.equal(ours[0], true[0])
        assert relative(*(torch.cat([each.flatten() for each in found[1:]]) for found in (ours, true))) < 0.1
        again = fewbit.convert(pickle.loads(pickle.dumps(coded)), bits=3)
        for each in (coded, again):
            fewbit.revert(each)
            assert types(each) == types(exact)
            assert [vars(layer).keys() for layer in each.layers] == [vars(layer).keys() for layer in exact.layers]
        assert all(map(torch.equal, all_gradients(coded, x), true))

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_the_fast_path(self, activation):
        exact = self.model(activation).eval()
        coded, x = fewbit.convert(copy.deepcopy(exact), bits=4), torch.randn(4, 10, 16)
        assert coded.layers[0].activation_relu_or_gelu == exact.layers[0].activation_relu_or_gelu
        with torch.inference_mode(), torch.profiler.profile() as record:
            assert torch.equal(coded(x), exact(x))
        counts = {event.key: event.count for event in record.key_averages()}
        assert counts["aten::_transformer_encoder_layer_fwd"] == 4
        assert torch.equal(coded.requires_grad_(False)(x), exact.requires_grad_(False)(x))

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_copies_compute_the_same(self, activation):
        exact = nn.TransformerDecoderLayer(16, 2, 32, activation=activation, dropout=0.0)
        coded, x = fewbit.convert(copy.deepcopy(exact), bits=4), torch.randn(4, 10, 16)
        for each in (coded, copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
            assert torch.equal(each(x, x), copy.deepcopy(exact)(x, x))

    @pytest.mark.slow
    def test_compiled(self):
        exact, x = self.model("gelu"), torch.randn(4, 10, 16)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        ours, true = all_gradients(compiled(coded), x), all_gradients(exact, x)
        assert relative(ours[0], true[0]) < 1e-6
        assert relative(*(torch.cat([each.flatten() for each in found[1:]]) for found in (ours, true))) < 0.03
