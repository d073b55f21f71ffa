"""convert on Hugging Face's models, made from small configurations: outputs bit for bit, keys, gradients, and the model after
revert."""

import copy
import pickle
import warnings

import oracles
import pytest
import torch
from layer_oracles import relative
from support import all_gradients, bytes_kept, compiled, flat
from support import gradients as gradients_of
from torch.utils._python_dispatch import TorchDispatchMode

import fewbit
from fewbit import activations
from fewbit.nn.activations import CodedActivation
from fewbit.nn.layers import CodedLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "error::fewbit.ConversionWarning"
)

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
KEPT = {"Llama": 0.2, "Qwen2": 0.2, "Gemma": 0.2, "Phi-3": 0.2, "T5": 0.2, "GPT-2": 0.2}  # part of exact bytes, at most


def build(transformers, name):
    """The model without dropout, so that two forward passes can be compared."""
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
    return gradients_of(model, inputs, lambda model, inputs: model(**inputs).loss)


def kept(model, inputs):
    """Bytes that a forward pass keeps, without parameters, buffers and inputs."""
    return bytes_kept(lambda: model(**inputs), leave_out=(*inputs.values(), *model.parameters(), *model.buffers()))


def whole_error(ours, true):
    return relative(flat({name: ours[name] for name in true}), flat(true))


SLOW = ("MobileNetV2", "RoBERTa", "Qwen2")  # as the others, with other names or sizes


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_models(transformers, name):
    exact, inputs = build(transformers, name), batch(name)
    model = copy.deepcopy(exact)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert fewbit.convert(model, bits=4) is model
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(ours, type(theirs)) for ours, theirs in zip(model.modules(), exact.modules(), strict=True))
    for way in ("eval", "train"):
        ours, theirs = (getattr(each, way)()(**inputs) for each in (model, exact))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.loss, theirs.loss)
    true = gradients(copy.deepcopy(exact), inputs)
    near = gradients(model, inputs)
    assert near.keys() == true.keys()
    assert 0 < whole_error(near, true) < 0.25
    assert kept(model, inputs) < KEPT.get(name, 0.45) * kept(exact, inputs)

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


class TestActivations:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_forward_is_its_own_and_the_gradient_the_tables(self, transformers, name, dtype):
        exact = transformers.activations.ACT2FN[name]
        coded = fewbit.convert(copy.deepcopy(exact), bits={"activation": 3})
        assert isinstance(coded, CodedActivation)
        assert isinstance(coded, type(exact))
        assert (coded.bits, coded.table, coded.shared, coded.record().name) == (3, None, False, NAMES[name])
        assert "bits=3" in repr(coded)
        x, grad = (2 * torch.randn(500)).to(dtype), torch.randn(500).to(dtype)
        y, ours = all_gradients(coded, x, grad)
        expected, true = all_gradients(exact, x, grad)
        assert torch.equal(y, expected)
        ladder = fewbit.load_ladder(coded.record(), 3)
        table = ladder[oracles.rung_of(x) if len(ladder) > 1 else 0]
        factors = torch.from_numpy(table(x.double().numpy()))
        torch.testing.assert_close(ours.double(), factors * grad.double(), rtol=0.01, atol=1e-6)
        assert relative(ours, true) < 0.25
        with torch.no_grad():
            assert torch.equal(coded(x), expected)
        copied = pickle.loads(pickle.dumps(coded))
        assert torch.equal(all_gradients(copied, x, grad)[1], ours)
        assert type(fewbit.revert(coded)) is type(exact)
        assert vars(coded).keys() == vars(exact).keys()

    def test_what_has_parameters_or_nothing_to_code_stays(self, transformers):
        for name in ("linear", "xielu", "prelu"):
            module = transformers.activations.ACT2FN[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fewbit.ConversionWarning)  # of torch's own module
                assert not isinstance(fewbit.convert(module, bits=3), CodedActivation)

    def test_a_table_of_ones_own(self, transformers):
        module = fewbit.convert(transformers.activations.ACT2FN["gelu_10"], bits={"activation": 3})
        module.table, module.bits = fewbit.design(module.record(), bits=2, weight="normal(std=0.5)"), None
        x = torch.randn(100)
        ours = all_gradients(module, x, torch.ones(100))[1]
        torch.testing.assert_close(ours.double(), torch.from_numpy(module.table(x.double().numpy())), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["gelu_new", "gelu_python", "gelu_10"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self, transformers, name):
        module = fewbit.convert(transformers.activations.ACT2FN[name], bits=3)
        x, grad = torch.randn(60), torch.randn(60)
        for ours, eager in zip(all_gradients(compiled(module), x, grad), all_gradients(module, x, grad), strict=True):
            assert torch.equal(ours, eager)

    def test_bounds_of_the_clipped_gelu(self):
        record = activations.get("clipped_gelu", min=-0.1, max=0.5)
        jumps = record.derivative_shape.jumps
        assert len(jumps) == 3
        for jump in jumps:
            assert abs(record.df(jump + 1e-7) - record.df(jump - 1e-7)) > 0.05


class Counter(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_billion_parameters_are_not_touched(transformers):
    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(each.numel() for each in model.parameters()) > 1e9
    with Counter() as counter:
        model.model.rotary_emb.inv_freq + 1
        fewbit.convert(model, bits=4)
    assert counter.count == 1  # the addition
    assert sum(isinstance(each, CodedLayer) for each in model.modules()) == 22 * 7 + 1
