"""Several readers of one tensor: what they keep together, what is kept as it is, and second derivatives of codes."""

import gc

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept
from torch.nn import functional

import fewbit
from fewbit.autograd import sharing
from fewbit.errors import InputError

CODED = fewbit.functional
N = 64
RUNG = 1  # byte after the codes of an activation


class TestBytes:
    """What all readers keep together, without x."""

    CODES = 128 * N // 2  # 4 bits

    def test_three_readers_of_a_norm(self):
        x, scale, bias = (
            torch.randn(128, N, requires_grad=True),
            torch.ones(N, requires_grad=True),
            torch.zeros(N, requires_grad=True),
        )
        weights = [torch.randn(N, N, requires_grad=True) for _ in range(3)]

        def block():
            y = CODED.layer_norm(x, (N,), scale, bias, bits=4)
            return [CODED.linear(each, weight, bits=4) for each, weight in zip((y, y.view(2, 64, N), y), weights, strict=True)]

        assert bytes_kept(block, leave_out=(scale, bias, *weights)) == self.CODES + 4 * (128 + 5 * N)

    def test_three_readers_of_what_no_coded_layer_made(self):
        x, weights = torch.randn(128, N, requires_grad=True), [torch.randn(N, N, requires_grad=True) for _ in range(3)]

        def heads(x):
            return [CODED.linear(x, weight, bits=4) for weight in weights]

        own = self.CODES + 4 * (128 + 2 * N)
        assert bytes_kept(lambda: heads(x + 1), leave_out=(x, *weights)) == own
        assert bytes_kept(heads, x, leave_out=weights) == 3 * own  # a leaf would keep its codes as long as it lives
        changed = x + 1
        first = CODED.linear(changed, weights[0], bits=4)
        changed.mul_(2)
        assert sharing.find(changed) is None
        del first

    def test_an_activation_between_two_products(self):
        x, weights = torch.randn(128, N), [torch.randn(N, N, requires_grad=True) for _ in range(2)]

        def block():
            hidden = CODED.gelu(CODED.linear(x, weights[0], bits=4), bits=4, shared=True)
            return CODED.linear(hidden, weights[1], bits=4)

        kept = bytes_kept(block, leave_out=(x, *weights))
        assert kept == self.CODES + RUNG

    @pytest.mark.parametrize("inplace", [False, True])
    def test_batch_norm_relu_convolution(self, inplace):
        x = torch.randn(4, 16, 16, 16, requires_grad=True)
        weight, scale, bias = (torch.randn(shape, requires_grad=True) for shape in ((8, 16, 3, 3), (16,), (16,)))

        def block():
            y = CODED.batch_norm(x, None, None, scale, bias, training=True, bits=4)
            return CODED.conv2d(CODED.relu(y, bits=4, shared=True, inplace=inplace), weight, bits=4)

        assert 0 <= bytes_kept(block, leave_out=(weight, scale, bias)) - x.numel() // 2 <= 4 * 6 * 16

    def test_a_gated_unit_and_its_reader(self):
        gate, up, weight = (torch.randn(128, N, requires_grad=True) for _ in range(3))

        def block():
            return CODED.linear(CODED.swiglu(gate, up, bits=4), weight, bits=4)

        assert bytes_kept(block, leave_out=(weight,)) == 2 * self.CODES + RUNG + 4 * (128 + 2 * N)

    def test_a_second_reader_that_is_torchs_keeps_the_tensor(self):
        x, weight = torch.randn(128, N, requires_grad=True), torch.randn(N, N, requires_grad=True)

        def block():
            y = CODED.gelu(x, bits=4, shared=True)
            return CODED.linear(y, weight, bits=4), functional.linear(y, weight)

        assert bytes_kept(block, leave_out=(weight,)) == self.CODES + RUNG + 128 * N * 4

    def test_codes_die_with_their_tensor(self):
        before = len(sharing._recipes)
        x = torch.randn(128, N, requires_grad=True)
        for _ in range(20):
            CODED.gelu(x, shared=True)
            CODED.layer_norm(x, (N,))
        gc.collect()
        assert len(sharing._recipes) <= before
        y = CODED.gelu(x, shared=True)
        z = y.sum()
        assert sharing.find(y) is not None
        del y, z
        gc.collect()
        assert len(sharing._recipes) <= before


EXACT = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "exp": torch.exp,
    "softmax": lambda x: torch.softmax(x, -1),
    "tanh, viewed": lambda x: torch.tanh(x).view(-1, 64).unsqueeze(0),
}
OTHERS = {
    "clone": lambda x: torch.tanh(x).clone(),
    "dropout": lambda x: functional.dropout(torch.relu(x), 0.5),
    "times two": lambda x: torch.tanh(x) * 2,
    "gelu": functional.gelu,
    "max, the values": lambda x: x.view(-1, 2, 64).max(1)[0],
    "slice": lambda x: torch.tanh(x)[1:],
    "plus": lambda x: x + 1,
}


class TestKeptExactly:
    """The readers need only what the operation that made the tensor keeps anyway."""

    def attention(self, x):
        q = k = v = x.view(2, 8, 4, 16).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 64)

    def check(self, function, x, weight, exactly):
        x = x.clone().requires_grad_()
        y = function(x)
        z = CODED.linear(y, weight, bits=2)
        grad = torch.randn_like(z)
        (found,) = torch.autograd.grad(z, weight, grad, retain_graph=True)
        rows = grad.reshape(-1, grad.shape[-1]).T @ y.detach().reshape(-1, 64)
        assert torch.allclose(found, rows, rtol=1e-5, atol=1e-5) == exactly
        alone = bytes_kept(function, x, leave_out=(weight,))
        together = bytes_kept(lambda x: CODED.linear(function(x), weight, bits=2), x, leave_out=(weight,))
        assert (together == alone) == exactly

    @pytest.mark.parametrize("name", EXACT)
    def test_outputs_of_torch(self, name):
        self.check(EXACT[name], torch.randn(16, 64), torch.randn(5, 64, requires_grad=True), True)

    def test_attention(self):
        self.check(self.attention, torch.randn(2, 8, 64), torch.randn(5, 64, requires_grad=True), True)

    @pytest.mark.parametrize("name", OTHERS)
    def test_others_are_coded(self, name):
        self.check(OTHERS[name], torch.randn(16, 64), torch.randn(5, 64, requires_grad=True), False)

    def test_a_leaf_is_coded(self):
        assert not sharing.is_kept_exactly(torch.randn(3, requires_grad=True))
        assert not sharing.is_kept_exactly(torch.tanh(torch.randn(3)))

    def test_a_change_in_place_is_coded(self):
        weight = torch.randn(5, 64, requires_grad=True)
        y = torch.tanh(torch.randn(16, 64, requires_grad=True)).clone().mul_(3)
        (found,) = torch.autograd.grad(CODED.linear(y, weight, bits=8).sum(), weight)
        assert relative(found, torch.ones(5, 16) @ y.detach()) < 0.05


def first(y, x):
    return torch.autograd.grad(y, x, create_graph=True)[0]


TAKEN = {
    "grad, backward": lambda x, w, y: first(y, x).square().sum().backward(),
    "of the weight": lambda x, w, y: first(y, w).square().sum().backward(),
    "with the loss": lambda x, w, y: (y + first(y, x).sum()).backward(),
    "grad of grad": lambda x, w, y: torch.autograd.grad(first(y, x).sum(), [x, w], allow_unused=True),
    "for the weight": lambda x, w, y: torch.autograd.grad(first(y, x).sum(), w, allow_unused=True),
    "backward, backward": lambda x, w, y: (y.backward(create_graph=True), x.grad.square().sum().backward()),
}


class TestSecondDerivatives:
    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
    @pytest.mark.parametrize("taken", TAKEN)
    @pytest.mark.parametrize("layer", ["linear", "layer_norm", "batch_norm", "group_norm", "swiglu", "relu of a norm"])
    def test_are_refused(self, layer, taken):
        x, weight = torch.randn(128, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        y = {
            "linear": lambda: CODED.linear(x, weight.diag()),
            "layer_norm": lambda: CODED.layer_norm(x, (6,), weight),
            "batch_norm": lambda: CODED.batch_norm(x, None, None, weight, training=True),
            "group_norm": lambda: CODED.group_norm(x, 2, weight),
            "swiglu": lambda: CODED.swiglu(x, x * weight),
            "relu of a norm": lambda: CODED.relu(CODED.layer_norm(x, (6,), weight, weight), shared=True),
        }[layer]()
        with pytest.raises(InputError, match="can be taken once"):
            TAKEN[taken](x, weight, y.square().sum())


def test_a_reader_that_wants_more_bits_or_other_rounding_makes_its_own_codes():
    x, weight = torch.randn(256, N, requires_grad=True), torch.randn(N, N)

    def error(first, **keywords):
        y, weights = x * 1, [weight.clone().requires_grad_() for _ in range(3)]
        CODED.linear(y, weights[0], **first)
        CODED.linear(y, weights[1], **keywords).square().sum().backward()
        functional.linear(x, weights[2]).square().sum().backward()
        return relative(weights[1].grad, weights[2].grad)

    assert error({"bits": 1}, bits=8) < 0.02 < error({"bits": 1}, bits=1)
    assert error({"bits": 8}, bits=1) < 0.02  # as good as the existing code
    assert error({"bits": 2}, bits=2, rounding="stochastic") > 1.1 * error({"bits": 2}, bits=2)


def test_a_power_keeps_its_output_for_the_exponent_alone():
    x, weight = torch.rand(512, N, requires_grad=True), torch.randn(N, N, requires_grad=True)
    y = (x + 0.5) ** torch.tensor(2.0)
    assert bytes_kept(lambda: CODED.linear(y, weight, bits=2), leave_out=(weight,)) < y.nbytes / 8


def test_a_view_whose_data_was_replaced_is_another_tensor():
    y = CODED.gelu(torch.randn(4, N, requires_grad=True), bits=4, shared=True)
    view = y.view(2, 2, N)
    assert sharing.find(view) is not None
    view.data = torch.randn(2, 2, N)
    assert sharing.find(view) is None


class TestLowRank:
    """y = (x A^T) B^T with few numbers in the middle. A reader of y keeps these numbers."""

    A, B = 8, 128

    def weights(self):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((self.A, N), (self.B, self.A))]

    def scaled(self, x, weights, scale, bits=4):
        middle = CODED.linear(x, weights[0], bits=bits)
        return CODED.linear(CODED.linear(middle, weights[1], bits=bits), scale, bits=bits)

    def test_bytes(self):
        x, weights = torch.randn(128, N), self.weights()
        scale = torch.randn(16, self.B, requires_grad=True)
        middle = 128 * self.A // 2 + 4 * (128 + 2 * self.A)
        assert bytes_kept(lambda: self.scaled(x, weights, scale), leave_out=(x, *weights, scale)) == middle

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients(self, dtype):
        x, weights, scale = torch.randn(128, N), self.weights(), torch.randn(16, self.B, requires_grad=True)

        def gradients(function):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = function()
            return torch.autograd.grad(y.float().square().sum(), (*weights, scale))

        exact = gradients(lambda: functional.linear(functional.linear(functional.linear(x, weights[0]), weights[1]), scale))
        coded = gradients(lambda: self.scaled(x, weights, scale, bits=8))
        for found, expected in zip(coded, exact, strict=True):
            assert relative(found, expected) < 0.02

    def test_a_weight_that_changes_before_backward_is_an_error(self):
        x, weights, scale = torch.randn(128, N), self.weights(), torch.randn(16, self.B, requires_grad=True)
        y = self.scaled(x, weights, scale)
        with torch.no_grad():
            weights[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Frozen(torch.nn.Module):
    """Three trained layers, each after a dropout, on what frozen layers make of a batch."""

    def __init__(self, p):
        super().__init__()
        torch.manual_seed(0)
        self.before = torch.nn.Sequential(torch.nn.Linear(N, N), torch.nn.LayerNorm(N)).requires_grad_(False)
        self.dropouts = torch.nn.ModuleList(torch.nn.Dropout(p) for _ in range(3))
        self.readers = torch.nn.ModuleList(torch.nn.Linear(N, N) for _ in range(3))

    def forward(self, x):
        x = torch.sin(self.before(x))
        return sum(reader(dropout(x)) for dropout, reader in zip(self.dropouts, self.readers, strict=True))


class TestFrozenBefore:
    CODES = 128 * N // 2

    @pytest.mark.parametrize(("p", "masks"), [(0.0, 0), (0.3, 3 * 128 * N // 8)])
    def test_bytes(self, p, masks):
        x, model = torch.randn(128, N), Frozen(p)
        assert bytes_kept(model, x) == (3 if p else 1) * 128 * N * 4
        assert bytes_kept(fewbit.convert(model, bits=4), x) == self.CODES + 4 * (128 + 2 * N) + masks

    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_gradients(self, p):
        x, exact, model = torch.randn(128, N), Frozen(p), fewbit.convert(Frozen(p), bits=8)
        found = []
        for each in (exact, model):
            torch.manual_seed(1)
            y = each(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), [*each.readers.parameters()])))
        assert torch.equal(found[0][0], found[1][0])
        for one, other in zip(*found, strict=True):
            assert relative(other, one) < 0.02

    def test_a_batch_is_kept_as_it_is(self):
        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.reader = torch.nn.Linear(N, N)

            def forward(self, x):
                return self.reader(x.view(-1, N)[:128].detach())

        x = torch.randn(2, 64, N)
        assert bytes_kept(fewbit.convert(Plain(), bits=4), x) == 0


def test_dropouts_of_a_tensor_that_no_coded_layer_made_share_a_code():
    x, weights = torch.randn(128, N, requires_grad=True), [torch.randn(N, N, requires_grad=True) for _ in range(3)]

    def heads():
        y = x + 1
        return [CODED.linear(CODED.dropout(y, 0.3), weight, bits=4) for weight in weights]

    own = 128 * N // 2 + 4 * (128 + 2 * N)
    assert bytes_kept(heads, leave_out=(x, *weights)) == own + 3 * 128 * N // 8
