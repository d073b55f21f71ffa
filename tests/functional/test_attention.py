"""scaled_dot_product_attention: torch's outputs, and the gradients of torch's own operation at the decoded values."""

import math

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept, compiled
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.errors import DesignError, InputError

attention = fewbit.functional.scaled_dot_product_attention
SHAPES = {
    "plain": ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 16), {}),
    "causal": ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 16), {"is_causal": True}),
    "scaled": ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 16), {"scale": 0.5}),
    "grouped": ((2, 4, 33, 16), (2, 2, 33, 16), (2, 2, 33, 16), {"enable_gqa": True}),
    "cross": ((2, 4, 17, 16), (2, 4, 40, 16), (2, 4, 40, 24), {}),
    "three dimensions": ((4, 33, 16), (4, 33, 16), (4, 33, 16), {}),
    "five dimensions": ((2, 3, 2, 33, 16), (2, 3, 2, 33, 16), (2, 3, 2, 33, 16), {}),
    "two dimensions": ((64, 16), (64, 16), (64, 16), {}),
    "dropout": ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 16), {"dropout_p": 0.3}),
}


def operands(name, dtype=torch.float32, seed=0):
    *shapes, keywords = SHAPES[name]
    numbers = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made, keywords


def run(function, tensors, wanted=None, seed=3, **keywords):
    """The output, the gradients for a random gradient of the output, and the next random number."""
    torch.manual_seed(seed)
    y = function(*tensors, **keywords)
    after = torch.rand(1)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    wanted = wanted or tensors
    for each in wanted:
        each.grad = None
    y.backward(grad)
    return y, [each.grad for each in wanted], after


def reference(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Attention, written out in float64."""
    q, k, v = (each.double() for each in (q, k, v))
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_outputs_are_torchs_and_gradients_near(name, dtype):
    tensors, keywords = operands(name, dtype)
    exact, true, after = run(functional.scaled_dot_product_attention, tensors, **keywords)
    for bits, bound in ((2, 0.6), (4, 0.2), (8, 0.03)):
        y, found, then = run(attention, tensors, **keywords, bits=bits)
        assert torch.equal(y, exact)
        assert (y.stride(), y.dtype, y._is_view()) == (exact.stride(), exact.dtype, False)
        assert torch.equal(after, then)  # equally many random numbers were drawn
        for ours, theirs in zip(found, true, strict=True):
            assert ours.dtype == theirs.dtype
            assert 0 < relative(ours, theirs) < bound
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(attention(*tensors, **keywords), exact)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "dropout"])
def test_gradients_are_those_at_what_the_codes_stand_for(name):
    """Operands that are codes already: the gradient is that of written-out attention at the levels."""
    tensors, keywords = operands(name)
    levels = torch.tensor([-1.0, 1.0])
    signs = [levels[(each > 0).long()].requires_grad_() for each in tensors]  # one bit is enough for them, nearly
    grad = torch.randn(functional.scaled_dot_product_attention(*signs, **keywords).shape, dtype=torch.float64)
    true = torch.autograd.grad(reference(*signs, **keywords), signs, grad)
    found = torch.autograd.grad(attention(*signs, **keywords, bits=8), signs, grad.float())
    for ours, theirs in zip(found, true, strict=True):
        assert relative(ours, theirs) < 0.02


def test_masks_and_their_gradients():
    q, k, v = operands("plain")[0]
    padded = torch.arange(33) < torch.tensor([33, 20])[:, None]
    biases = torch.randn(4, 33, 33, requires_grad=True)
    for mask in (padded[:, None, None], biases, biases.detach()):
        wanted = [q, k, v, mask] if mask.requires_grad else [q, k, v]
        exact, true, _ = run(functional.scaled_dot_product_attention, [q, k, v, mask], wanted)
        y, found, _ = run(attention, [q, k, v, mask], wanted, bits=8)
        assert torch.equal(y, exact)
        assert all(relative(ours, theirs) < 0.02 for ours, theirs in zip(found, true, strict=True))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_gradients_alone(needed):
    tensors, _ = operands("plain")
    given = [each if i in needed else each.detach() for i, each in enumerate(tensors)]
    wanted = [given[i] for i in needed]
    _, true, _ = run(functional.scaled_dot_product_attention, given, wanted)
    _, found, _ = run(attention, given, wanted, bits=8)
    assert all(relative(ours, theirs) < 0.02 for ours, theirs in zip(found, true, strict=True))


class TestKept:
    def block(self, function, dtype=torch.float32, **keywords):
        """Attention as models call it: q, k and v are views of one product."""
        x = torch.randn(4, 64, 3 * 128, dtype=dtype, requires_grad=True)
        q, k, v = (each.unflatten(-1, (4, 32)).transpose(1, 2) for each in (x * 1).chunk(3, -1))
        return function(q, k, v, **keywords)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("keywords", [{}, {"is_causal": True}], ids=str)
    def test_codes_alone(self, dtype, keywords):
        kept = bytes_kept(lambda: self.block(attention, dtype, bits=4, **keywords))
        bits = 4 + 2 * (4 + fewbit.functional.layers.FINER)
        statistics = 3 * (4 * 64 + 2 * 128) * 4
        assert kept <= 4 * 64 * 128 * bits / 8 + statistics + 3 * 512

    def test_with_dropout_a_state_of_random_numbers_more(self):
        state = torch.get_rng_state().nbytes
        kept = [bytes_kept(lambda p=p: self.block(attention, dropout_p=p)) for p in (0.0, 0.5)]
        assert kept[1] <= kept[0] + state

    def test_what_is_expanded_once(self):
        q = torch.randn(2, 8, 64, 32, requires_grad=True)
        k, v = (torch.randn(2, 1, 64, 32, requires_grad=True) for _ in range(2))
        expanded = [(each * 1).expand(2, 8, 64, 32) for each in (k, v)]
        kept = bytes_kept(lambda: attention(q * 1, *expanded))
        assert kept < 0.25 * q.nbytes + 2 * 0.4 * k.nbytes
        _, true, _ = run(functional.scaled_dot_product_attention, [q, *expanded], [q, k, v])
        expanded = [(each * 1).expand(2, 8, 64, 32) for each in (k, v)]
        _, found, _ = run(attention, [q, *expanded], [q, k, v], bits=8)
        assert all(relative(ours, theirs) < 0.02 for ours, theirs in zip(found, true, strict=True))

    def test_one_code_where_query_key_and_value_are_one_tensor(self):
        x = torch.randn(4, 64, 32, requires_grad=True)

        def kept(make):
            y = x * 1
            return bytes_kept(lambda: make(y))

        assert kept(lambda y: attention(y, y, y)) < 1.1 * kept(lambda y: attention(y, x.detach(), x.detach()))

    def test_what_needs_no_gradient_stays_the_callers(self):
        q, k, v = (each.detach() for each in operands("plain")[0])
        q.requires_grad_()
        assert bytes_kept(lambda: attention(q, k, v), leave_out=(k, v)) < 0.3 * q.nbytes


def test_what_is_not_finite_is_torchs():
    for place in range(3):
        tensors, _ = operands("plain")
        with torch.no_grad():
            tensors[place][0, 0, 0, 0] = torch.nan
        exact, true, _ = run(functional.scaled_dot_product_attention, tensors)
        y, found, _ = run(attention, tensors)
        assert torch.equal(y.isnan(), exact.isnan())
        assert all(torch.equal(ours.isnan(), theirs.isnan()) for ours, theirs in zip(found, true, strict=True))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_of_nothing(empty):
    shapes = {
        "batch": [(0, 2, 5, 8)] * 3,
        "queries": [(1, 2, 0, 8), (1, 2, 5, 8), (1, 2, 5, 8)],
        "keys": [(1, 2, 5, 8)] + [(1, 2, 0, 8)] * 2,
    }
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes[empty]]
    exact, true, _ = run(functional.scaled_dot_product_attention, tensors)
    y, found, _ = run(attention, tensors)
    assert torch.equal(y, exact) or bool(exact.isnan().all())
    assert [each.shape for each in found] == [each.shape for each in true]


def test_autocast():
    tensors, _ = operands("plain")
    with torch.autocast("cpu", torch.bfloat16):
        exact, true, _ = run(functional.scaled_dot_product_attention, tensors)
        y, found, _ = run(attention, tensors, bits=8)
        kept = bytes_kept(lambda: attention(*tensors))
    assert y.dtype == exact.dtype == torch.bfloat16
    assert torch.equal(y, exact)
    assert all(relative(ours, theirs) < 0.03 for ours, theirs in zip(found, true, strict=True))
    assert kept < 0.3 * sum(each.nbytes for each in tensors)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_in_a_checkpointed_region(reentrant, p):
    tensors, _ = operands("plain")
    inside = lambda *given: attention(*(each * 1 for each in given), dropout_p=p, bits=8)  # noqa: E731
    y, found, after = run(inside, tensors)
    again, recomputed, then = run(lambda *given: checkpoint(inside, *given, use_reentrant=reentrant), tensors)
    assert torch.equal(y, again)
    assert torch.equal(after, then)
    assert all(torch.equal(*pair) for pair in zip(found, recomputed, strict=True))


def test_offloaded():
    tensors, _ = operands("plain")
    with torch.autograd.graph.save_on_cpu():
        y, found, _ = run(attention, tensors)
    again, expected, _ = run(attention, tensors)
    assert torch.equal(y, again)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["plain", "causal", "grouped", "cross"])
def test_compiled(name):
    tensors, keywords = operands(name)
    expected = run(lambda *given: attention(*(each * 1 for each in given), **keywords), tensors)
    found = run(compiled(lambda *given: attention(*(each * 1 for each in given), **keywords)), tensors)
    assert torch.allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found[1], expected[1], strict=True))


def test_compiled_with_dropout_is_torchs():
    tensors, _ = operands("plain")
    torch._dynamo.reset()
    y, found, _ = run(compiled(lambda *given: attention(*given, dropout_p=0.5)), tensors)
    exact, true, _ = run(compiled(lambda *given: functional.scaled_dot_product_attention(*given, dropout_p=0.5)), tensors)
    assert torch.equal(y, exact)
    assert all(torch.equal(*pair) for pair in zip(found, true, strict=True))


def test_transforms_and_second_derivatives():
    tensors, _ = operands("plain")
    plain = [each.detach() for each in tensors]
    loss = lambda q: attention(q, *plain[1:]).square().sum()  # noqa: E731
    exact = lambda q: functional.scaled_dot_product_attention(q, *plain[1:]).square().sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss)(plain[0]), torch.func.grad(exact)(plain[0]))
    y = attention(*tensors)
    (first,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(InputError, match="second"):
        first.sum().backward()


def test_batches_of_gradients():
    tensors, _ = operands("plain")
    y = attention(*tensors)
    grads = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(y, tensors, grads[i], retain_graph=True)
        assert all(torch.allclose(each[i], one, rtol=1e-4, atol=1e-5) for each, one in zip(found, alone, strict=True))


def test_backward_within_patch():
    tensors, _ = operands("dropout")
    with fewbit.patch(bits=8):
        _, found, _ = run(functional.scaled_dot_product_attention, tensors, dropout_p=0.3)
    _, expected, _ = run(attention, tensors, dropout_p=0.3, bits=8)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_rounding_and_tables():
    tensors, _ = operands("plain")
    table = fewbit.load_table("identity", 3, channels=("value",), coding="uniform")
    _, by_table, _ = run(attention, tensors, table=table)
    _, by_bits, _ = run(attention, tensors, bits=3)
    assert not torch.equal(by_table[0], by_bits[0])  # with one table, all three have its bits
    _, random, _ = run(attention, tensors, bits=4, rounding="stochastic")
    _, nearest, _ = run(attention, tensors, bits=4)
    assert not torch.equal(random[0], nearest[0])
    for keywords in ({"bits": 0}, {"bits": 9}, {"rounding": "up"}):
        with pytest.raises(DesignError):
            attention(*tensors, **keywords)
    with pytest.raises(InputError, match="scaled_dot_product_attention takes a float16"):
        attention(*(each.detach().long() for each in tensors))


class TestModules:
    """Attention in modules."""

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("way", ["self", "cross", "own widths"])
    def test_multihead_attention(self, need_weights, batch_first, way):
        widths = {"kdim": 24, "vdim": 16} if way == "own widths" else {}
        exact = nn.MultiheadAttention(32, 4, batch_first=batch_first, **widths)
        coded = fewbit.convert(nn.MultiheadAttention(32, 4, batch_first=batch_first, **widths), bits=8)
        coded.load_state_dict(exact.state_dict())
        x = torch.randn(10, 10, 32, requires_grad=True)
        others = {
            "self": (x, x),
            "cross": (torch.randn(10, 10, 32),) * 2,
            "own widths": (torch.randn(10, 10, 24), torch.randn(10, 10, 16)),
        }
        padding = torch.arange(10) > torch.arange(2, 12)[:, None]
        results = []
        for module in (exact, coded):
            y, weights = module(x, *others[way], key_padding_mask=padding, need_weights=need_weights)
            results.append((y, weights, torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
        (y, weights, true), (ours, our_weights, found) = results
        assert torch.equal(y, ours)
        assert torch.equal(weights, our_weights) if need_weights else our_weights is None
        assert all(relative(each, one) < 0.05 for each, one in zip(found, true, strict=True) if one.norm() > 1e-3)

    def test_encoder_layers_keep_little(self):
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, activation="gelu")
        x = torch.randn(8, 64, 64, requires_grad=True)
        before = bytes_kept(layer, x, leave_out=(x, *layer.parameters()))
        fewbit.convert(layer, bits=4)
        assert bytes_kept(layer, x, leave_out=(x, *layer.parameters())) < 0.17 * before
