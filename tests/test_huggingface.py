"""convert on Hugging Face's models, made from small configurations: the forward bits, the keys, the gradients, and what comes
back."""

import copy
import pickle
import time

import pytest
import torch
from layer_oracles import relative
from torch._dynamo.utils import counters

import fewbit
from fewbit import activations
from fewbit.autograd import handle
from fewbit.measuring import saved_storages
from fewbit.models.conversion import mlp, written
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LLAMA = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 32}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
IMAGES = {"image_size": 32, "num_channels": 3, "num_labels": 5}
MODELS = {
    "BERT": ("BertForMaskedLM", {**TEXT, "hidden_act": "gelu_new"}),
    "RoBERTa": ("RobertaForMaskedLM", TEXT),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "Gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 16}),
    "Phi-3": ("Phi3ForCausalLM", {**LLAMA, "pad_token_id": 0}),
    "T5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "ViT": ("ViTForImageClassification", {**TEXT, **IMAGES, "patch_size": 8, "hidden_act": "quick_gelu"}),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
    ),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {**IMAGES, "depth_multiplier": 0.25, "finegrained_output": False}),
}
GATED = {"Llama": 2, "Qwen2": 2, "Gemma": 2, "Phi-3": 2, "T5": 4}
NORMS = {"Llama": 5, "Qwen2": 5, "Gemma": 5, "Phi-3": 5, "T5": 12}
CONV1D = {"GPT-2": 8}


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


def build(transformers, name):
    """The model without dropout, so that two of its forward passes can be compared."""
    kind, options = MODELS[name]
    cls = getattr(transformers, kind)
    config = cls.config_class(**options)
    for key in vars(config):
        if "dropout" in key or "pdrop" in key:
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    return cls(config).train()


def batch(name):
    generator = torch.Generator().manual_seed(1)
    if name in ("ViT", "ResNet", "MobileNetV2"):
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4)}
    tokens = torch.randint(1, 61, (4, 16), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def bytes_kept(model, inputs):
    seen = {}
    left_out = {each.untyped_storage().data_ptr() for each in (*inputs.values(), *model.parameters(), *model.buffers())}
    with saved_storages(seen, leave_out=left_out):
        output = model(**inputs)
    total = sum(seen.values())
    del output
    return total


def whole_error(ours, true):
    return relative(*(torch.cat([each[name].flatten() for name in true]) for each in (ours, true)))


SLOW = ("MobileNetV2", "RoBERTa", "Qwen2")  # as the others, but for their names or sizes


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_models(transformers, name):
    exact, inputs = build(transformers, name), batch(name)
    model = copy.deepcopy(exact)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert fewbit.convert(model, bits=4, inputs=4) is model
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(ours, type(theirs)) for ours, theirs in zip(model.modules(), exact.modules(), strict=True))
    for cls, numbers in ((mlp.GatedMLP, GATED), (written.WrittenRMSNorm, NORMS), (written.Conv1D, CONV1D)):
        assert sum(isinstance(each, cls) for each in model.modules()) == numbers.get(name, 0)
    for way in ("eval", "train"):
        ours, theirs = (getattr(each, way)()(**inputs) for each in (model, exact))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.loss, theirs.loss)
    true = gradients(copy.deepcopy(exact), inputs)
    near = gradients(model, inputs)
    assert near.keys() == true.keys()
    assert 0 < whole_error(near, true) < 0.25
    assert bytes_kept(model, inputs) < (0.3 if name in NORMS or name in CONV1D else 0.45) * bytes_kept(exact, inputs)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    fewbit.revert(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in exact.modules()]
    assert [vars(each).keys() for each in model.modules()] == [vars(each).keys() for each in exact.modules()]
    assert all(torch.equal(ours, true[name]) for name, ours in gradients(model, inputs).items())


NAMES = {
    "gelu": "gelu",
    "gelu_10": "clipped_gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "hardswish": "hardswish",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def leaf_gradient(module, x, grad, **keywords):
    leaf = x.clone().requires_grad_()
    y = module(leaf, **keywords)
    y.backward(grad.to(y.dtype))
    return y.detach(), leaf.grad


class TestActivations:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_forward_is_its_own_and_the_gradient_the_tables(self, transformers, name, dtype):
        exact = transformers.activations.ACT2FN[name]
        coded = fewbit.convert(copy.deepcopy(exact), bits=3)
        assert isinstance(coded, CodedActivation)
        assert isinstance(coded, type(exact))
        assert (coded.bits, coded.table, coded.shared, coded.record().name) == (3, None, False, NAMES[name])
        assert "bits=3" in repr(coded)
        x, grad = (2 * torch.randn(500)).to(dtype), torch.randn(500).to(dtype)
        y, ours = leaf_gradient(coded, x, grad)
        expected, true = leaf_gradient(exact, x, grad)
        assert torch.equal(y, expected)
        table = fewbit.load_table(coded.record(), 3)
        factors = torch.from_numpy(table(x.double().numpy()))
        torch.testing.assert_close(ours.double(), factors * grad.double(), rtol=0.01, atol=1e-6)
        assert relative(ours, true) < 0.25
        with torch.no_grad():
            assert torch.equal(coded(x), expected)
        copied = pickle.loads(pickle.dumps(coded))
        assert torch.equal(leaf_gradient(copied, x, grad)[1], ours)
        assert type(fewbit.revert(coded)) is type(exact)
        assert vars(coded).keys() == vars(exact).keys()

    def test_what_has_parameters_or_nothing_to_code_stays(self, transformers):
        for name in ("linear", "xielu", "prelu"):
            module = transformers.activations.ACT2FN[name]
            before = type(module)
            assert type(fewbit.convert(module, bits=3, inputs=3)) is before

    def test_a_table_of_ones_own(self, transformers):
        module = fewbit.convert(transformers.activations.ACT2FN["gelu_10"], bits=3)
        module.table, module.bits = fewbit.design(module.record(), bits=2, weight="normal(std=0.5)"), None
        x = torch.randn(100)
        ours = leaf_gradient(module, x, torch.ones(100))[1]
        torch.testing.assert_close(ours.double(), torch.from_numpy(module.table(x.double().numpy())), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["gelu_new", "gelu_python", "gelu_10"])
    def test_compiled(self, transformers, name):
        module = fewbit.convert(transformers.activations.ACT2FN[name], bits=3)
        x, grad = torch.randn(60), torch.randn(60)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(leaf_gradient(compiled, x, grad), leaf_gradient(module, x, grad), strict=True):
            assert torch.equal(ours, eager)
        torch.compiler.reset()

    def test_bounds_of_the_clipped_gelu(self):
        record = activations.get("clipped_gelu", min=-0.1, max=0.5)
        jumps = record.derivative_shape.jumps
        assert len(jumps) == 3
        for jump in jumps:
            assert abs(record.df(jump + 1e-7) - record.df(jump - 1e-7)) > 0.05


def llama_mlp(transformers, act="silu"):
    config = transformers.LlamaConfig(**LLAMA, hidden_act=act)
    torch.manual_seed(0)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


class TestGatedMLPs:
    def test_what_is_kept(self, transformers):
        exact = llama_mlp(transformers)
        x = torch.randn(512, 32, requires_grad=True)
        hidden = 4 * 512 * 48

        def kept(model):
            return kept_by(model, x) / hidden

        assert kept(exact) == pytest.approx(4, abs=0.01)
        assert kept(fewbit.convert(copy.deepcopy(exact), bits=4)) == pytest.approx(3 + 1 / 8, abs=0.02)
        gated = fewbit.convert(copy.deepcopy(exact), bits=4, inputs=4)
        input_codes = 2 * (1 / 8) * 32 / 48  # of x, which gate and up code each
        assert kept(gated) == pytest.approx(2 / 8 + input_codes, abs=0.12)  # and scales: two a row, eight a channel

    @pytest.mark.parametrize("act", ["silu", "gelu_new", "relu2", "gelu_python"])
    def test_bits_and_gradients(self, transformers, act):
        exact = llama_mlp(transformers, act)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8, inputs=8)
        assert coded.record().name == {"relu2": "relu_squared", "gelu_new": "gelu_tanh", "gelu_python": "gelu"}.get(act, act)
        assert "(act_fn): codes of the gated unit" in repr(coded)
        x, grad = torch.randn(64, 32), torch.randn(64, 32)
        for cast in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
                (y, ours), (expected, true) = (leaf_gradient(each, x, grad) for each in (coded, exact))
            assert torch.equal(y, expected)
            assert relative(ours, true) < 0.1
        fewbit.revert(coded.act_fn)
        assert torch.equal(leaf_gradient(coded, x, grad)[0], leaf_gradient(exact, x, grad)[0])
        assert "gated unit" not in repr(coded)

    def test_left_out_by_the_filter(self, transformers):
        model = fewbit.convert(llama_mlp(transformers), bits=4, inputs=4, filter_fn=lambda _, name: name != "act_fn")
        assert not isinstance(model, mlp.GatedMLP)
        model = fewbit.convert(llama_mlp(transformers), bits=4, inputs=4, filter_fn=lambda _, name: name != "")
        assert not isinstance(model, mlp.GatedMLP)
        assert isinstance(model.act_fn, CodedActivation)

    def test_compiled(self, transformers):
        model = fewbit.convert(llama_mlp(transformers, "gelu_new"), bits=4, inputs=4)
        x, grad = torch.randn(8, 32), torch.randn(8, 32)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(leaf_gradient(compiled, x, grad), leaf_gradient(model, x, grad), strict=True):
            torch.testing.assert_close(ours, eager)
        torch.compiler.reset()

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
            coded = mlp.coded_class(cls)
            assert coded is not None, path
            assert coded._names["act"] == act


WRITTEN = {  # class, its module, and how far its weight is from what multiplies
    "LlamaRMSNorm": ("llama.modeling_llama", 0),
    "Phi3RMSNorm": ("phi3.modeling_phi3", 0),
    "GptOssRMSNorm": ("gpt_oss.modeling_gpt_oss", 0),
    "Llama4TextRMSNorm": ("llama4.modeling_llama4", 0),
    "GemmaRMSNorm": ("gemma.modeling_gemma", 1),
    "T5LayerNorm": ("t5.modeling_t5", 0),
}


def written_layer(name, size=32):
    home = pytest.importorskip(f"transformers.models.{WRITTEN[name][0]}")
    module = getattr(home, name)(size)
    torch.nn.init.uniform_(module.weight, -0.5, 1.5)
    return module


def conv1d(transformers):
    torch.manual_seed(0)
    return transformers.pytorch_utils.Conv1D(48, 32)


def all_gradients(module, x, grad):
    module.zero_grad()
    y, grad_x = leaf_gradient(module, x, grad)
    return y, grad_x, *(each.grad.clone() for each in module.parameters())


def kept_by(model, x):
    """Bytes that a forward pass keeps, the parameters and x apart."""
    seen = {}
    left_out = {each.untyped_storage().data_ptr() for each in (x, *model.parameters())}
    with saved_storages(seen, leave_out=left_out):
        y = model(x)
    total = sum(seen.values())
    del y
    return total


class Readers(torch.nn.Module):
    """Two linear layers that read what a norm of 64 made."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.one, self.other = norm, torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        y = self.norm(x)
        return self.one(y) + self.other(y)


class TestRMSNorms:
    @pytest.mark.parametrize("name", WRITTEN)
    @pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_forward_is_its_own_and_the_gradient_near(self, name, weight, dtype):
        exact = written_layer(name).to(weight)
        coded = fewbit.convert(copy.deepcopy(exact), inputs=8)
        assert isinstance(coded, written.WrittenRMSNorm)
        assert isinstance(coded, type(exact))
        assert "bits=8" in repr(coded)
        assert "eps=1e-0" in repr(coded) or name == "T5LayerNorm"  # which shows nothing
        x, grad = (2 * torch.randn(9, 7, 32)).to(dtype), torch.randn(9, 7, 32)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ours, true = (all_gradients(each, x, grad) for each in (coded, exact))
            assert torch.equal(ours[0], true[0])
            assert [each.dtype for each in ours] == [each.dtype for each in true]
            assert all(relative(*each) < 0.02 for each in zip(ours[1:], true[1:], strict=True))
        with torch.no_grad():
            assert torch.equal(coded(x), true[0])
        with fewbit.exact():
            assert all(map(torch.equal, all_gradients(coded, x, grad), true))
        assert type(fewbit.revert(coded)) is type(exact)
        assert vars(coded).keys() == vars(exact).keys()

    @pytest.mark.parametrize("name", WRITTEN)
    def test_the_same_as_torchs_at_few_bits(self, name):
        """Against the layer of torch's, at 2 bits: equal functions with equal codes have nearly equal gradients."""
        coded = fewbit.convert(written_layer(name), inputs=2)
        eps = getattr(coded, "variance_epsilon", None) or coded.eps
        torchs = fewbit.nn.RMSNorm(32, eps, bits=2)
        torchs.weight.data = coded.weight.data + WRITTEN[name][1]
        x, grad = torch.randn(50, 32), torch.randn(50, 32)
        for ours, theirs in zip(*(all_gradients(each, x, grad) for each in (coded, torchs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_the_gradient_of_the_input_is_that_of_the_codes(self):
        """In closed form, from the normalized input that readers of the output find."""
        coded = fewbit.convert(written_layer("GemmaRMSNorm"), inputs=3)
        x, grad = torch.randn(50, 32, dtype=torch.float64).float(), torch.randn(50, 32)
        leaf = x.clone().requires_grad_()
        y = coded(leaf)
        recipe = handle.find(y)
        gain = 1 + coded.weight.detach().double()
        x_hat = recipe.rebuild(recipe.kept, torch.float64) / gain
        y.backward(grad)
        inner = grad.double() * gain
        scale = (x.double().square().mean(-1, keepdim=True) + coded.eps).rsqrt()
        expected = scale * (inner - x_hat * (inner * x_hat).mean(-1, keepdim=True))
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(coded.weight.grad.double(), (grad.double() * x_hat).sum(0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"])
    def test_one_code_for_the_norm_and_its_readers(self, name):
        model = Readers(written_layer(name, 64))
        x = torch.randn(1024, 64, requires_grad=True)
        before = kept_by(model, x)
        fewbit.convert(model, inputs=4)
        codes = 1024 * 64 // 2
        assert before >= 4 * 1024 * 64 * 2  # normalized, and what the two read
        assert codes < kept_by(model, x) < 1.25 * codes  # a scale a row, and five numbers a channel, besides

    @pytest.mark.parametrize("name", ["LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"])
    def test_compiled(self, name):
        module = fewbit.convert(torch.nn.Sequential(written_layer(name), torch.nn.Linear(32, 8)), inputs=4)
        x, grad = torch.randn(60, 32), torch.randn(60, 8)
        torch.compiler.reset()
        before = counters["stats"]["unique_graphs"]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for scaled in (x, 3 * x):
            for ours, eager in zip(*(all_gradients(each, scaled, grad) for each in (compiled, module)), strict=True):
                torch.testing.assert_close(ours, eager)
        assert counters["stats"]["unique_graphs"] == before + 1
        with fewbit.exact():
            exact = all_gradients(fewbit.revert(copy.deepcopy(module)), x, grad)
            for ours, theirs in zip(all_gradients(compiled, x, grad), exact, strict=True):
                torch.testing.assert_close(ours, theirs)
        torch.compiler.reset()

    @pytest.mark.parametrize(("name", "value"), [("weight", torch.rand(7, 32)), ("variance_epsilon", torch.tensor(0.1))])
    def test_parts_of_another_kind_stay_exact(self, name, value):
        exact = written_layer("LlamaRMSNorm")
        setattr(exact, name, torch.nn.Parameter(value))
        coded = fewbit.convert(copy.deepcopy(exact), inputs=2)
        x, grad = torch.randn(9, 7, 32), torch.randn(9, 7, 32)
        assert all(map(torch.equal, all_gradients(coded, x, grad), all_gradients(exact, x, grad)))

    def test_subclasses(self):
        gemma = type(written_layer("GemmaRMSNorm"))
        same = type("Same", (gemma,), {})
        others = {"_norm": lambda self, x: x}, {"forward": lambda self, x: x}, {"_gain": 1}
        assert isinstance(fewbit.convert(same(8), inputs=4), written.WrittenRMSNorm)
        for each in others:
            assert not isinstance(fewbit.convert(type("Other", (gemma,), each)(8), inputs=4), CodedLayer)


class TestConv1D:
    def test_forward_is_its_own_and_the_gradient_a_linear_layers(self, transformers):
        exact = conv1d(transformers)
        coded = fewbit.convert(copy.deepcopy(exact), inputs=3)
        linear = fewbit.nn.Linear(32, 48, bits=3)
        linear.weight.data, linear.bias.data = exact.weight.data.t(), exact.bias.data
        for x in (torch.randn(5, 7, 32), torch.randn(32), torch.randn(9, 32, dtype=torch.bfloat16)):
            for each in (exact, coded, linear):
                each.to(x.dtype)
            grad = torch.randn(*x.shape[:-1], 48)
            true, ours, theirs = (all_gradients(each, x, grad) for each in (exact, coded, linear))
            assert torch.equal(ours[0], true[0])
            assert torch.equal(ours[1], true[1])
            assert torch.equal(ours[3], true[3])
            torch.testing.assert_close(ours[2], theirs[2].t())
            assert 0 < relative(ours[2], true[2]) < 0.3
        with torch.autocast("cpu", torch.bfloat16):
            x, grad = torch.randn(5, 32), torch.randn(5, 48)
            ours, true = (all_gradients(each.float(), x, grad) for each in (coded, exact))
        assert torch.equal(ours[0], true[0])
        assert [each.dtype for each in ours] == [each.dtype for each in true]
        assert type(fewbit.revert(coded)) is type(exact)

    def test_what_is_kept(self, transformers):
        x, codes = torch.randn(1024, 32), 1024 * 32 // 2
        coded = fewbit.convert(conv1d(transformers), inputs=4)
        assert codes < kept_by(coded, x) < 1.4 * codes  # a scale a row, and two a channel, besides

    def test_compiled(self, transformers):
        module = fewbit.convert(conv1d(transformers), inputs=4)
        x, grad = torch.randn(60, 32), torch.randn(60, 48)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(all_gradients(compiled, x, grad), all_gradients(module, x, grad), strict=True):
            torch.testing.assert_close(ours, eager)
        torch.compiler.reset()


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
        kinds = {each.__name__: mlp.coded_class(each) for each in self.Base.__subclasses__()}
        assert [name for name, found in kinds.items() if found] == ["Gated"]
        model = self.Gated()
        exact = copy.deepcopy(model)
        fewbit.convert(model, bits=8, inputs=8)
        x, grad = torch.randn(9, 8), torch.randn(9, 8)
        (y, ours), (expected, true) = (leaf_gradient(each, x, grad) for each in (model, exact))
        assert torch.equal(y, expected)
        assert relative(ours, true) < 0.05


def test_a_billion_parameters_in_seconds(transformers):
    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(each.numel() for each in model.parameters()) > 1e9
    start = time.perf_counter()
    fewbit.convert(model, bits=4, inputs=4)
    assert time.perf_counter() - start < 5
    assert sum(isinstance(each, mlp.GatedMLP) for each in model.modules()) == 22
    print(f"{time.perf_counter() - start:.3f} s")


def test_hooks_that_change_an_activation_change_the_gated_mlp(transformers):
    exact = llama_mlp(transformers)
    coded, x = fewbit.convert(copy.deepcopy(exact), bits=4, inputs=4), torch.randn(3, exact.gate_proj.in_features)
    for each in (exact, coded):
        each.act_fn.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(coded(x), exact(x))
