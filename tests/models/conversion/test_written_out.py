"""Gated MLPs, RMS norms and linear layers that are written out as products, as in Hugging Face's models."""

import copy

import pytest
import torch
from layer_oracles import relative
from support import all_gradients, bytes_kept, compiled
from torch._dynamo.utils import counters

import fewbit

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "error::fewbit.ConversionWarning"
)

NORMS = {
    "LlamaRMSNorm": "llama.modeling_llama",
    "GptOssRMSNorm": "gpt_oss.modeling_gpt_oss",
    "Llama4TextRMSNorm": "llama4.modeling_llama4",
    "GemmaRMSNorm": "gemma.modeling_gemma",
    "T5LayerNorm": "t5.modeling_t5",
}


def own_norm(name, size=32):
    module = getattr(pytest.importorskip(f"transformers.models.{NORMS[name]}"), name)(size)
    torch.nn.init.uniform_(module.weight, -0.5, 1.5)
    return module


def llama_mlp(transformers, act="silu", width=32, hidden=48):
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=hidden, hidden_act=act)
    torch.manual_seed(0)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


def conv1d(transformers):
    torch.manual_seed(0)
    return transformers.pytorch_utils.Conv1D(48, 64)


class Behind(torch.nn.Module):
    """A norm of what a linear layer made, and two linear layers that read it."""

    def __init__(self, norm, width=64):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(width, width), norm
        self.one, self.other = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x):
        y = self.norm(self.first(x))
        return self.one(y) + self.other(y)


class Scaled(torch.nn.Module):
    """Products with vectors, with numbers, with itself, and with matrices."""

    def __init__(self, width=64):
        super().__init__()
        self.gain, self.weight = torch.nn.Parameter(torch.rand(width)), torch.nn.Parameter(torch.randn(width, width) / 8)
        self.bias = torch.nn.Parameter(torch.randn(width))
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x)
        y = y * self.gain + 2 * y.square() + y**2
        z = y @ self.weight
        return z * y + torch.addmm(self.bias, z.flatten(0, -2), self.weight).view(z.shape)


class TestNorms:
    @pytest.mark.parametrize("name", NORMS)
    @pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_forward_is_their_own_and_the_gradient_near(self, name, weight, dtype):
        exact = own_norm(name).to(weight)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        assert isinstance(coded, type(exact))
        x, grad = (2 * torch.randn(90, 7, 32)).to(dtype), torch.randn(90, 7, 32)
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", NORMS)
    def test_one_code_for_the_norm_and_its_readers(self, name, dtype):
        model = fewbit.convert(Behind(own_norm(name, 64)).to(dtype), bits=4)
        x = torch.randn(1024, 64, dtype=dtype)
        codes, by_row, by_channel = 1024 * 64 // 2, 2 * 4 * 1024, 16 * 4 * 64
        assert codes < bytes_kept(model, x, leave_out=(x, *model.parameters())) < codes + by_row + by_channel

    @pytest.mark.parametrize("name", NORMS)
    def test_errs_no_more_than_torchs(self, name):
        """The gradient before a norm, compared with torch's layer on codes of the normalized numbers."""
        errors = []
        for norm in (own_norm(name, 64), torch.nn.RMSNorm(64)):
            exact = Behind(norm)
            exact.load_state_dict(Behind(norm).state_dict() | {"norm.weight": torch.linspace(-0.5, 1.5, 64)})
            coded = fewbit.convert(copy.deepcopy(exact), bits=3)
            x, grad = torch.randn(1024, 64), torch.randn(1024, 64)
            found, true = (all_gradients(each, x, grad)[1:] for each in (coded, exact))
            errors.append(relative(torch.cat([each.flatten() for each in found]), torch.cat([each.flatten() for each in true])))
        assert 0 < errors[0] < 1.1 * errors[1]


class TestLinear:
    def test_gradients_are_those_of_a_linear_layer(self, transformers):
        exact = torch.nn.Sequential(torch.nn.Linear(64, 64), conv1d(transformers))
        coded = fewbit.convert(copy.deepcopy(exact), bits=3)
        linear = torch.nn.Sequential(copy.deepcopy(exact[0]), torch.nn.Linear(64, 48))
        linear[1].weight.data, linear[1].bias.data = exact[1].weight.data.t(), exact[1].bias.data
        fewbit.convert(linear, bits=3)
        x, grad = torch.randn(5, 70, 64), torch.randn(5, 70, 48)
        true, ours, theirs = (all_gradients(each, x, grad) for each in (exact, coded, linear))
        assert torch.equal(ours[0], true[0])
        assert torch.equal(ours[1], true[1])  # of x: nothing of it is lost
        assert relative(ours[4], true[4]) == pytest.approx(relative(theirs[4].t(), true[4]), rel=0.2)

    @pytest.mark.parametrize("multiply", [torch.matmul, torch.mm, lambda x, weight: (weight.t() @ x.t()).t()])
    def test_what_is_kept_of_a_product_with_a_weight(self, multiply):
        """As for a linear layer, in all ways to write the product."""
        weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(1024, 64, requires_grad=True)
        weight = torch.nn.Parameter(weight)
        with fewbit.patch(bits=4):
            kept = bytes_kept(lambda: multiply(x * 1, weight), leave_out=(x, weight))
        codes = 1024 * 64 // 2
        assert codes < kept < 1.3 * codes  # and a scale for each row, and two numbers for each channel


class TestGatedMLPs:
    def test_what_is_kept(self, transformers):
        exact, x = llama_mlp(transformers, width=256, hidden=384), torch.randn(512, 256)
        hidden = 4 * 512 * 384

        def kept(bits):
            model = fewbit.convert(copy.deepcopy(exact), bits) if bits else exact
            return bytes_kept(model, x, leave_out=(x, *model.parameters())) / hidden

        assert kept(None) == pytest.approx(4, abs=0.01)
        assert kept({"activation": 4}) == pytest.approx(3 + 1 / 8, abs=0.02)
        assert kept(4) == pytest.approx(2 / 8, abs=0.02)

    @pytest.mark.parametrize("act", ["silu", "gelu_new", "relu2", "gelu_python"])
    def test_bits_and_gradients(self, transformers, act):
        exact = llama_mlp(transformers, act)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        x, grad = torch.randn(64, 32), torch.randn(64, 32)
        for cast in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
                (y, ours, *_), (expected, true, *_) = (all_gradients(each, x, grad) for each in (coded, exact))
            assert torch.equal(y, expected)
            assert relative(ours, true) < 0.1

    def test_hooks_on_parts(self, transformers):
        exact = llama_mlp(transformers)
        coded, x = fewbit.convert(copy.deepcopy(exact), bits=8), torch.randn(64, 32)
        seen = []
        for each in (exact, coded):
            each.act_fn.register_forward_hook(lambda module, args, output: output + 1)
            each.act_fn.register_full_backward_hook(lambda module, given, grad: seen.append(grad[0]))
        ours, true = (all_gradients(each, x, torch.ones(64, 32)) for each in (coded, exact))
        assert torch.equal(ours[0], true[0])
        assert relative(ours[1], true[1]) < 0.05
        assert relative(*seen) < 0.05

    @pytest.mark.parametrize("part", ["", "act_fn", "up_proj"])
    def test_a_part_left_out_by_the_filter_stays_exact(self, transformers, part):
        model = fewbit.convert(llama_mlp(transformers), bits=4, filter_fn=lambda _, name: name != part)
        assert type(model.get_submodule(part)).__module__ != "fewbit.nn"
        x, grad = torch.randn(64, 32), torch.randn(64, 32)
        ours, true = (all_gradients(each, x, grad) for each in (model, llama_mlp(transformers)))
        assert torch.equal(ours[0], true[0])
        assert 0 < relative(ours[1], true[1]) < 0.3


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    """The same codes in compiled code, in which hooks do not see what operations save."""

    def check(self, model, shape):
        x = torch.randn(shape)
        grad = torch.randn_like(model(x).detach())
        fewbit.convert(model, bits=4)
        before = counters["stats"]["unique_graphs"]
        call = compiled(model)
        for scaled in (x, 3 * x):
            for ours, eager in zip(*(all_gradients(each, scaled, grad) for each in (call, model)), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == before + 1
        call = compiled(model, "aot_eager_decomp_partition")
        return [bytes_kept(each, x, leave_out=(x, *model.parameters())) for each in (call, model)]

    @pytest.mark.parametrize("name", NORMS)
    def test_norms(self, name):
        coded, eager = self.check(Behind(own_norm(name, 64)), (1024, 64))
        assert coded < 1.1 * eager

    def test_linear(self, transformers):
        coded, eager = self.check(torch.nn.Sequential(torch.nn.Linear(64, 64), conv1d(transformers)), (512, 64))
        assert coded < 1.1 * eager

    def test_gated_mlps(self, transformers):
        coded, eager = self.check(llama_mlp(transformers, "gelu_new", 64, 192), (512, 64))
        assert coded < 1.1 * eager

    def test_products(self):
        coded, eager = self.check(Scaled(), (8, 64, 64))
        assert coded < 1.3 * eager

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_outputs_are_torchs_under_autocast_and_of_mixed_dtypes(self, dtype):
        class Mixed(Scaled):
            def __init__(self):
                super().__init__()
                self.number, self.vector = torch.nn.Parameter(torch.tensor(0.3)), torch.nn.Parameter(torch.rand(64))

            def forward(self, x):
                y = super().forward(x) * self.number
                return y.to(torch.bfloat16) * self.number + (y.to(torch.bfloat16) * self.vector) * self.vector.half()

        exact = Mixed()
        coded = compiled(fewbit.convert(copy.deepcopy(exact), bits=8))
        x, grad = torch.randn(8, 64, 64), torch.randn(8, 64, 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours, true = (all_gradients(each, x, grad) for each in (coded, exact))
        assert torch.equal(ours[0], true[0])
        assert [each.dtype for each in ours] == [each.dtype for each in true]
        assert all(relative(*each) < 0.05 for each in zip(ours[1:], true[1:], strict=True))

    def test_a_norm_of_two_dtypes(self):
        """As T5's in bfloat16: its scale is float32, and so is a product of both."""
        model = Behind(own_norm("T5LayerNorm", 64)).bfloat16()
        x = torch.randn(1024, 64, dtype=torch.bfloat16)
        exact = model(x)
        fewbit.convert(model, bits=4)
        call = compiled(model, "aot_eager_decomp_partition")
        assert torch.equal(call(x), exact)
        coded, eager = (bytes_kept(each, x, leave_out=(x, *model.parameters())) for each in (call, model))
        assert coded < 1.2 * eager

    @pytest.mark.slow
    def test_casts_and_powers_of_all_kinds(self):
        class Casts(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.power = torch.nn.Linear(64, 64), torch.nn.Parameter(torch.tensor(2.0))

            def forward(self, x):
                y = self.linear(x).sigmoid()
                low = y.to(torch.bfloat16).float() + y.type_as(x.half()).to(y) + y.to("cpu").double().type_as(x)
                return (
                    low * y**self.power + y**2 * y.pow(3) + y.to(device="cpu", dtype=torch.float64).to(torch.float32, copy=True)
                )

        model, x = Casts(), torch.randn(256, 64)
        true = all_gradients(model, x)
        ours = all_gradients(compiled(fewbit.convert(model, bits=8)), x)
        assert torch.equal(ours[0], true[0])
        assert all(relative(*each) < 0.05 for each in zip(ours[1:], true[1:], strict=True))

    def test_no_product_is_coded_that_is_not_named(self):
        model, x = Scaled(), torch.randn(8, 64, 64)
        true = all_gradients(model, x)
        fewbit.convert(model, bits={"norm": 4})
        for ours, theirs in zip(all_gradients(compiled(model), x), true, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_with_a_coding(self):
        model = fewbit.convert(Scaled(), bits=8, coding="uniform")
        x = torch.randn(8, 64, 64)
        for ours, eager in zip(*(all_gradients(each, x) for each in (compiled(model), model)), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)


class Shared(torch.nn.Module):
    """Two gated MLPs with one activation module, which is registered before or after them."""

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
        self.gate, self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bits", [{"product": 6}, {"activation": 3, "product": 6}, 4], ids=str)
def test_the_order_of_modules_does_not_matter(bits):
    kept = [bytes_kept(fewbit.convert(Shared(first), bits), torch.randn(64, 32)) for first in (True, False)]
    assert kept[0] == kept[1] < bytes_kept(Shared(True), torch.randn(64, 32))
