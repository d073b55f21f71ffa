"""The count of operators and bytes, compared with counts by hand."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

import fewbit
from fewbit.bench import models
from fewbit.bench.step import Step
from fewbit.traffic import Use, traffic

ONES = torch.ones(4, 4)


def x():
    return torch.randn(4, 6)


def test_views_and_allocations_count_as_nothing():
    given = x()

    def look():
        given.view(6, 4).t().unsqueeze(0).expand(5, 4, 6).detach()
        given.as_strided((2, 2), (1, 3)).select(0, 1).unbind()
        given.chunk(2, dim=1), given.reshape(24)
        given.detach().t_().squeeze_()
        torch.ops.aten._unsafe_view(given, (24,))  # no view by its schema
        torch.empty(3), torch.empty_like(given), given.new_empty(7), torch.empty_strided((2,), (1,))
        torch.promote_types(torch.float32, torch.int64), given.size(), given.is_contiguous()

    found = traffic(look)
    assert not found.others
    assert not found.products


@pytest.mark.parametrize(
    ("function", "name", "elements"),
    [
        (lambda x: x.exp(), "aten.exp", 48),
        (lambda x: x * x, "aten.mul", 48),  # one tensor, read once
        (lambda x: x * x.clone().view(4, 6), "aten.mul", 72),
        (lambda x: x + x[0], "aten.add", 54),
        (lambda x: x.mul_(2.0), "aten.mul_", 48),  # read and written
        (lambda x: torch.add(x, x[:1], out=torch.empty(4, 6)), "aten.add", 54),
        (lambda x: x[:1].expand(4, 6).exp(), "aten.exp", 48),  # read once for each element
        (lambda x: torch.cat([x, x[:2]]), "aten.cat", 72),
        (lambda x: torch.zeros(10), "aten.zeros", 10),
        (lambda x: x.sum(), "aten.sum", 25),
        (lambda x: x.sum().item(), "aten._local_scalar_dense", 1),
        (lambda x: x.t().contiguous(), "aten.clone", 48),
        (lambda x: x.bfloat16(), "aten._to_copy", 36),
    ],
)
def test_bytes_by_hand(function, name, elements):
    assert traffic(lambda: function(x())).others[name] == Use(1, 4 * elements)


def test_calls_of_one_operator_add_up():
    found = traffic(lambda: x().exp().exp().view(24).exp())
    assert found.others["aten.exp"] == Use(3, 3 * 4 * 48)
    assert found.total == Use(4, 3 * 4 * 48 + 4 * 24)  # with what draws the numbers


def attention(x):
    x = x.view(1, 1, *x.shape)
    return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "function",
    [
        nn.Linear(6, 3),
        nn.Linear(6, 3, bias=False),
        lambda x: torch.bmm(x[None], x.t()[None]),
        lambda x: torch.baddbmm(ONES, x[None], x.t()[None]),
        lambda x: torch.einsum("ij,kj->ik", x, x),
        nn.Conv1d(4, 2, 3),
        nn.ConvTranspose1d(4, 2, 3),
        attention,
    ],
    ids=lambda function: getattr(function, "__name__", type(function).__name__),
)
def test_products_stand_apart(function):
    given = x().requires_grad_()
    grad = torch.ones_like(function(given))
    found = traffic(lambda: torch.autograd.grad(function(given), given, grad, materialize_grads=True))
    assert sum(use.calls for use in found.products.values()) >= 2  # forward's and backward's
    assert not set(found.others) - {"aten.sum", "aten.add", "aten.zeros_like"}  # of biases and gradients


def test_attention_written_out_is_a_softmax_between_products():
    found = traffic(lambda: torch.softmax(x() @ x().t(), -1) @ x())
    assert found.others["aten._softmax"] == Use(1, 4 * 32)
    assert found.products["aten.mm"].calls == 2


def again(module, given):
    """The total of another forward and backward pass. It begins with ones and adds to the existing gradients."""

    def step():
        y = module(given())
        y.backward(torch.ones_like(y))

    step()
    return traffic(step).total


# calls, and bytes in units of the input, of exact blocks in bfloat16; these figures are older than this count
@pytest.mark.parametrize(
    ("name", "sizes", "calls", "units"),
    [("gpt", {"blocks": 1}, 30, 77), ("conv", {"size": 32}, 38, 58)],
)
def test_known_figures(name, sizes, calls, units):
    subject = models.BUILT_IN[name](**sizes)
    given = subject.batch.detach().bfloat16().requires_grad_()
    found = again(subject.model.bfloat16(), lambda: given)
    assert (found.calls, round(found.bytes / given.nbytes)) == (calls, units)


def test_known_figures_of_a_layer_of_llama():
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    layer, rotary = modeling_llama.LlamaDecoderLayer(config, 0).bfloat16(), modeling_llama.LlamaRotaryEmbedding(config)
    given = torch.randn(8, 256, 512, dtype=torch.bfloat16, requires_grad=True)

    def run(given):
        return layer(given, position_embeddings=rotary(given, torch.arange(256)[None]), attention_mask=None)

    found = again(run, lambda: given)
    assert (found.calls, round(found.bytes / given.nbytes)) == (107, 258)


def test_a_block_of_a_gpt_by_hand():
    """Bytes in units of the input; gradients begin as None and backward at the output."""
    subject = models.gpt(blocks=1)
    step = Step(subject)
    step()
    found = traffic(step)
    calls = {name: use.calls for name, use in found.others.items()}
    assert calls == {
        "aten.native_layer_norm": 2,
        "aten.native_layer_norm_backward": 2,
        "aten.gelu": 1,
        "aten.gelu_backward": 1,
        "aten.add": 4,  # of the residuals, and of gradients that are added there
        "aten.sum": 4,  # gradients of biases
        "aten.stack": 1,  # gradients of queries, keys and values as one
        "aten.clone": 1,
    }
    units = 2 * 2 + 2 * 3 + 2 * 4 + 3 * 4 + 4 * 3 + (3 + 1 + 4 + 1) + 2 * 3 + 2 * 3
    assert found.total.bytes / subject.batch.nbytes == pytest.approx(units, rel=1e-3)  # without vectors
    assert set(found.products) == {
        "aten.addmm",
        "aten.mm",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }


@pytest.mark.parametrize("name", models.BUILT_IN)
def test_steps_differ_in_nothing(name):
    subject = models.BUILT_IN[name](1, 64, 2, 16)
    for model in (subject.model, fewbit.convert(subject.model, bits=4)):
        step = Step(subject._replace(model=model))
        step()
        assert traffic(step) == traffic(step)


def test_every_operator_of_fewbit_is_counted():
    """The built-in models and a gated unit use all of fewbit's operators. None of them counts as a product or a view."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewbit::")}
    seen = set()
    for make in models.BUILT_IN.values():
        subject = make(1, 64, 2, 16)
        step = Step(subject._replace(model=fewbit.convert(subject.model, bits=4)))
        step()
        seen |= set(traffic(step).others)
    gate, up, weight = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    unit = fewbit.functional.swiglu
    seen |= set(traffic(lambda: fewbit.functional.linear(unit(gate, up, bits=4), weight, bits=4).sum().backward()).others)
    assert {name.split(".")[0].replace("::", ".") for name in registered} <= seen
    assert "fewbit.encode" in seen
