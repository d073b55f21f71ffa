"""Gated MLPs: which classes are recognized, what is kept, and that outputs are theirs, bit for bit."""

import copy

import pytest
import torch
from layer_oracles import relative
from support import all_gradients, bytes_kept, compiled

import fewbit
from fewbit.models.conversion import gated_mlp
from fewbit.nn.activations import CodedActivation

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "error::fewbit.ConversionWarning"
)


def llama_mlp(transformers, act="silu"):
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=act)
    torch.manual_seed(0)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


class TestGatedMLPs:
    def test_what_is_kept(self, transformers):
        exact = llama_mlp(transformers)
        x = torch.randn(512, 32, requires_grad=True)
        hidden = 4 * 512 * 48

        def kept(model):
            return bytes_kept(model, x) / hidden

        assert kept(exact) == pytest.approx(4, abs=0.01)
        assert kept(fewbit.convert(copy.deepcopy(exact), bits={"activation": 4})) == pytest.approx(3 + 1 / 8, abs=0.02)
        gated = fewbit.convert(copy.deepcopy(exact), bits=4)
        input_codes = 2 * (1 / 8) * 32 / 48  # of x, which gate and up code each
        assert kept(gated) == pytest.approx(2 / 8 + input_codes, abs=0.12)  # and scales: two a row, eight a channel

    @pytest.mark.parametrize("act", ["silu", "gelu_new", "relu2", "gelu_python"])
    def test_bits_and_gradients(self, transformers, act):
        exact = llama_mlp(transformers, act)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        assert coded.record().name == {"relu2": "relu_squared", "gelu_new": "gelu_tanh", "gelu_python": "gelu"}.get(act, act)
        assert "(act_fn): codes of the gated unit" in repr(coded)
        x, grad = torch.randn(64, 32), torch.randn(64, 32)
        for cast in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
                (y, ours, *_), (expected, true, *_) = (all_gradients(each, x, grad) for each in (coded, exact))
            assert torch.equal(y, expected)
            assert relative(ours, true) < 0.1
        fewbit.revert(coded.act_fn)
        assert torch.equal(all_gradients(coded, x, grad)[0], all_gradients(exact, x, grad)[0])
        assert "gated unit" not in repr(coded)

    def test_left_out_by_the_filter(self, transformers):
        model = fewbit.convert(llama_mlp(transformers), bits=4, filter_fn=lambda _, name: name != "act_fn")
        assert not isinstance(model, gated_mlp.GatedMLP)
        model = fewbit.convert(llama_mlp(transformers), bits=4, filter_fn=lambda _, name: name != "")
        assert not isinstance(model, gated_mlp.GatedMLP)
        assert isinstance(model.act_fn, CodedActivation)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self, transformers):
        model = fewbit.convert(llama_mlp(transformers, "gelu_new"), bits=4)
        x, grad = torch.randn(8, 32), torch.randn(8, 32)
        for ours, eager in zip(all_gradients(compiled(model), x, grad), all_gradients(model, x, grad), strict=True):
            torch.testing.assert_close(ours, eager)

    def test_all_that_are_written_so(self, transformers):
        found = {
            "llama4.modeling_llama4.Llama4TextMLP": "activation_fn",
            "recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaMlp": "act_fn",
            "t5gemma.modeling_t5gemma.T5GemmaMLP": "act_fn",
            "longt5.modeling_longt5.LongT5DenseGatedActDense": "act",
            "granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedMLP": "activation",
            "modernbert.modeling_modernbert.ModernBertMLP": "act",
            "moonshine.modeling_moonshine.MoonshineDecoderMLP": "activation_fn",
            "idefics2.modeling_idefics2.Idefics2MLP": "act_fn",
        }
        for path, act in found.items():
            home, _, name = path.rpartition(".")
            cls = getattr(pytest.importorskip(f"transformers.models.{home}"), name)
            coded = gated_mlp.gated_mlp_class(cls)
            assert coded is not None, path
            assert coded._names["act"] == act


class TestOwnForwards:
    """Classes that differ from a gated MLP in one thing each stay as they are."""

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = (torch.nn.Linear(8, 8) for _ in range(3))
            self.f = torch.nn.SiLU()

    class Gated(Base):
        def forward(self, tokens):
            """Down of gated."""
            return self.w2(self.f(self.w1(tokens)) * self.w3(tokens))

    class Sum(Base):
        def forward(self, x):
            return self.w2(self.f(self.w1(x)) + self.w3(x))

    class OneWeight(Base):
        def forward(self, x):
            return self.w2(self.f(self.w1(x)) * self.w1(x))

    class Other(Base):
        def forward(self, x):
            return self.w2(self.f(self.w1(x)) * self.w3(self.w3(x)))

    class Default(Base):
        def forward(self, x, y=None):
            return self.w2(self.f(self.w1(x)) * self.w3(x))

    def test_which(self):
        kinds = {each.__name__: gated_mlp.gated_mlp_class(each) for each in self.Base.__subclasses__()}
        assert [name for name, found in kinds.items() if found] == ["Gated"]
        model = self.Gated()
        exact = copy.deepcopy(model)
        fewbit.convert(model, bits=8)
        x, grad = torch.randn(9, 8), torch.randn(9, 8)
        (y, ours, *_), (expected, true, *_) = (all_gradients(each, x, grad) for each in (model, exact))
        assert torch.equal(y, expected)
        assert relative(ours, true) < 0.05


def test_hooks_that_change_an_activation_change_the_gated_mlp(transformers):
    exact = llama_mlp(transformers)
    coded, x = fewbit.convert(copy.deepcopy(exact), bits=4), torch.randn(3, exact.gate_proj.in_features)
    for each in (exact, coded):
        each.act_fn.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(coded(x), exact(x))


class Shared(torch.nn.Module):
    """Two gated MLPs with one activation, which is registered before or after them."""

    def __init__(self, first):
        super().__init__()
        act = torch.nn.SiLU()
        if first:
            self.act = act
        self.one, self.two = SharedMLP(act), SharedMLP(act)
        if not first:
            self.act = act

    def forward(self, x):
        return self.two(self.one(x))


class SharedMLP(torch.nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate, self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bits", [{"product": 6}, {"activation": 3, "product": 6}, 4], ids=str)
def test_the_order_of_modules_does_not_matter(bits):
    kept = [bytes_kept(fewbit.convert(Shared(first), bits), torch.randn(64, 8)) for first in (True, False)]
    assert kept[0] == kept[1] < bytes_kept(Shared(True), torch.randn(64, 8))


def test_an_activation_built_without_shared_codes_gates_nothing():
    model = SharedMLP(fewbit.SiLU(bits=6))
    assert not isinstance(fewbit.convert(model, {"linear": 4, "product": 4}), gated_mlp.GatedMLP)
