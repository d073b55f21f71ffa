"""Layers with a forward of their own, RMS norms and Conv1D, as Hugging Face's models have them."""

import copy

import pytest
import torch
from layer_oracles import relative
from support import all_gradients, bytes_kept, compiled
from torch._dynamo.utils import counters

import fewbit
from fewbit.autograd import sharing
from fewbit.models.conversion import own_forwards
from fewbit.nn.layers import CodedLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "error::fewbit.ConversionWarning"
)

OWN = {  # class, its module, and how far its weight is from what multiplies
    "LlamaRMSNorm": ("llama.modeling_llama", 0),
    "Phi3RMSNorm": ("phi3.modeling_phi3", 0),
    "GptOssRMSNorm": ("gpt_oss.modeling_gpt_oss", 0),
    "Llama4TextRMSNorm": ("llama4.modeling_llama4", 0),
    "GemmaRMSNorm": ("gemma.modeling_gemma", 1),
    "T5LayerNorm": ("t5.modeling_t5", 0),
}


def own_norm(name, size=32):
    home = pytest.importorskip(f"transformers.models.{OWN[name][0]}")
    module = getattr(home, name)(size)
    torch.nn.init.uniform_(module.weight, -0.5, 1.5)
    return module


def conv1d(transformers):
    torch.manual_seed(0)
    return transformers.pytorch_utils.Conv1D(48, 32)


class Readers(torch.nn.Module):
    """Two linear layers that read what a norm of 64 made."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.one, self.other = norm, torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        y = self.norm(x)
        return self.one(y) + self.other(y)


class TestRMSNorms:
    @pytest.mark.parametrize("name", OWN)
    @pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_forward_is_its_own_and_the_gradient_near(self, name, weight, dtype):
        exact = own_norm(name).to(weight)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        assert isinstance(coded, own_forwards.OwnRMSNorm)
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

    @pytest.mark.parametrize("name", OWN)
    def test_the_same_as_torchs_at_few_bits(self, name):
        """Against the layer of torch's, at 2 bits: equal functions with equal codes have nearly equal gradients."""
        coded = fewbit.convert(own_norm(name), bits=2)
        eps = getattr(coded, "variance_epsilon", None) or coded.eps
        torchs = fewbit.nn.RMSNorm(32, eps, bits=2)
        torchs.weight.data = coded.weight.data + OWN[name][1]
        x, grad = torch.randn(50, 32), torch.randn(50, 32)
        for ours, theirs in zip(*(all_gradients(each, x, grad) for each in (coded, torchs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_the_gradient_of_the_input_is_that_of_the_codes(self):
        """In closed form, from the normalized input that readers of the output find."""
        coded = fewbit.convert(own_norm("GemmaRMSNorm"), bits=3)
        x, grad = torch.randn(50, 32, dtype=torch.float64).float(), torch.randn(50, 32)
        leaf = x.clone().requires_grad_()
        y = coded(leaf)
        recipe = sharing.find(y)
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
        model = Readers(own_norm(name, 64))
        x = torch.randn(1024, 64, requires_grad=True)
        before = bytes_kept(model, x)
        fewbit.convert(model, bits=4)
        codes = 1024 * 64 // 2
        assert before >= 4 * 1024 * 64 * 2  # normalized, and what the two read
        assert codes < bytes_kept(model, x) < 1.25 * codes  # a scale a row, and five numbers a channel, besides

    @pytest.mark.parametrize("name", ["LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self, name):
        module = fewbit.convert(torch.nn.Sequential(own_norm(name), torch.nn.Linear(32, 8)), bits=4)
        x, grad = torch.randn(60, 32), torch.randn(60, 8)
        before = counters["stats"]["unique_graphs"]
        call = compiled(module)
        for scaled in (x, 3 * x):
            for ours, eager in zip(*(all_gradients(each, scaled, grad) for each in (call, module)), strict=True):
                torch.testing.assert_close(ours, eager)
        assert counters["stats"]["unique_graphs"] == before + 1
        with fewbit.exact():
            exact = all_gradients(fewbit.revert(copy.deepcopy(module)), x, grad)
            for ours, theirs in zip(all_gradients(call, x, grad), exact, strict=True):
                torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(("name", "value"), [("weight", torch.rand(7, 32)), ("variance_epsilon", torch.tensor(0.1))])
    def test_parts_of_another_kind_stay_exact(self, name, value):
        exact = own_norm("LlamaRMSNorm")
        setattr(exact, name, torch.nn.Parameter(value))
        coded = fewbit.convert(copy.deepcopy(exact), bits=2)
        x, grad = torch.randn(9, 7, 32), torch.randn(9, 7, 32)
        assert all(map(torch.equal, all_gradients(coded, x, grad), all_gradients(exact, x, grad)))

    def test_subclasses(self):
        gemma = type(own_norm("GemmaRMSNorm"))
        same = type("Same", (gemma,), {})
        others = {"_norm": lambda self, x: x}, {"forward": lambda self, x: x}, {"_gain": 1}
        assert isinstance(fewbit.convert(same(8), bits=4), own_forwards.OwnRMSNorm)
        for each in others:
            assert not isinstance(fewbit.convert(type("Other", (gemma,), each)(8), bits=4), CodedLayer)


class TestConv1D:
    def test_forward_is_its_own_and_the_gradient_a_linear_layers(self, transformers):
        exact = conv1d(transformers)
        coded = fewbit.convert(copy.deepcopy(exact), bits=3)
        linear = fewbit.nn.Linear(32, 48, bits=3)
        linear.weight.data, linear.bias.data = exact.weight.data.t(), exact.bias.data
        for x in (torch.randn(5, 7, 32), torch.randn(32), torch.randn(99, 32, dtype=torch.bfloat16)):
            for each in (exact, coded, linear):
                each.to(x.dtype)
            grad = torch.randn(*x.shape[:-1], 48)
            true, ours, theirs = (all_gradients(each, x, grad) for each in (exact, coded, linear))
            assert torch.equal(ours[0], true[0])
            assert torch.equal(ours[1], true[1])
            assert torch.equal(ours[3], true[3])
            torch.testing.assert_close(ours[2], theirs[2].t())
            assert relative(ours[2], true[2]) < 0.3
            assert relative(ours[2], true[2]) > 0 or x.dim() == 1  # one row is kept as it is
        with torch.autocast("cpu", torch.bfloat16):
            x, grad = torch.randn(5, 32), torch.randn(5, 48)
            ours, true = (all_gradients(each.float(), x, grad) for each in (coded, exact))
        assert torch.equal(ours[0], true[0])
        assert [each.dtype for each in ours] == [each.dtype for each in true]
        assert type(fewbit.revert(coded)) is type(exact)

    def test_what_is_kept(self, transformers):
        x, codes = torch.randn(1024, 32, requires_grad=True), 1024 * 32 // 2
        coded = fewbit.convert(conv1d(transformers), bits=4)
        assert codes < bytes_kept(coded, x) < 1.4 * codes  # a scale a row, and two a channel, besides

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self, transformers):
        module = fewbit.convert(conv1d(transformers), bits=4)
        x, grad = torch.randn(60, 32), torch.randn(60, 48)
        for ours, eager in zip(all_gradients(compiled(module), x, grad), all_gradients(module, x, grad), strict=True):
            torch.testing.assert_close(ours, eager)
