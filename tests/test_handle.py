"""One code, many readers: never a wrong gradient, whatever happens to the tensor between the layer that made it and its readers.

In every case the weight's gradient is that of codes of the reader's own, which naive code makes too, or within the error of shared
8-bit codes of the exact one. A recipe that no longer fits its tensor would be off by the whole of it: the changes are large.
"""

import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import layer_oracles as naive
import pytest
import torch
from layer_oracles import relative
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.autograd import handle
from fewbit.errors import InputError
from fewbit.measuring import saved_storages

CODED = fewbit.functional
N = 64


def gelu(x):
    return CODED.gelu(x, bits=8, shared=True)


def layer_norm(x):
    return CODED.layer_norm(x, (N,), bits=8)


def batch_norm(x):
    return CODED.batch_norm(x, None, None, WEIGHT.to(x), BIAS.to(x), training=True, bits=8)


def swiglu(x):
    return CODED.swiglu(x, 1 - x, bits=8)


def linear(x, weight):
    return CODED.linear(x, weight, bits=8)


def check(found, grad, seen, bits=8):
    """That the gradient of a weight is sound: of codes of `seen` (*, in), for a gradient (*, out) of the output."""
    rows, seen = grad.detach().reshape(-1, grad.shape[-1]).double(), seen.detach()
    exact = rows.T @ seen.reshape(-1, seen.shape[-1]).double()
    own = naive.scaled_values(naive.value_table(bits), seen, -1)
    if relative(found, rows.T @ own.reshape(-1, own.shape[-1])) > 1e-2:
        assert relative(found, exact) < 0.03


WEIGHT, BIAS = torch.linspace(-2, 2, N), torch.linspace(1, -1, N)
MAKERS = {
    "gelu": (gelu, functional.gelu),
    "layer_norm": (layer_norm, lambda x: functional.layer_norm(x, (N,))),
    "batch_norm": (batch_norm, lambda x: functional.batch_norm(x, None, None, WEIGHT.to(x), BIAS.to(x), training=True)),
    "batch_norm, relu": (
        lambda x: CODED.relu(batch_norm(x), bits=8, shared=True),
        lambda x: functional.batch_norm(x, None, None, WEIGHT.to(x), BIAS.to(x), training=True).relu(),
    ),
    "batch_norm, relu in place": (
        lambda x: CODED.relu(batch_norm(x), bits=8, shared=True, inplace=True),
        lambda x: functional.batch_norm(x, None, None, WEIGHT.to(x), BIAS.to(x), training=True).relu(),
    ),
    "swiglu": (swiglu, lambda x: functional.silu(x) * (1 - x)),
}


def square(x):
    """A weight of x's number of columns."""
    return torch.randn(16, x, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def without_graph(change):
    """A change of y in place that autograd does not see, and its like for the exact network, where autograd would object."""

    def inplace(y):
        with torch.no_grad():
            change(y)
        return y

    return inplace


def double_view(y):
    y.view(-1)[::2].mul_(-5)


CHANGES = {
    "mul_": lambda y: y.mul_(-3),
    "add_": lambda y: y.add_(7.0),
    "in a slice": lambda y: y[:, : N // 2].mul_(-9) is not None and y,
    "through a view": lambda y: double_view(y) or y,
    "without gradients": without_graph(lambda y: y.mul_(-3)),
    "without gradients, a view": without_graph(double_view),
    "through detach": lambda y: y.detach().mul_(-3) is not None and y,
    "in inference mode": lambda y: torch.inference_mode()(lambda: y.mul_(-3))() is not None and y,
    "copy_": lambda y: y.copy_(y.detach().flip(0) * 2),
    "zero_": lambda y: y.zero_(),
    "relu_": lambda y: y.relu_(),
    "a transposition in place": without_graph(lambda y: y.t_()),
    "new data": lambda y: setattr(y, "data", -3 * y.detach()) or y,
    "set_": without_graph(lambda y: y.set_(-3 * y.detach())),
}


class TestChanges:
    """In place, after the tensor was made."""

    @pytest.mark.parametrize("maker", MAKERS)
    @pytest.mark.parametrize("change", CHANGES)
    def test_before_it_is_read(self, maker, change):
        x = torch.randn(N, N, dtype=torch.float64)
        leaf, weight = x.clone().requires_grad_(), square(N)
        y = CHANGES[change](MAKERS[maker][0](leaf * 1))
        seen = y.detach().clone()
        grad = torch.randn(N, 16, dtype=torch.float64)
        z = linear(y, weight)
        assert torch.equal(z, functional.linear(seen, weight))
        z.backward(grad)
        check(weight.grad, grad, seen)

    @pytest.mark.parametrize("maker", MAKERS)
    def test_seen_by_autograd_give_the_gradient_of_the_input_too(self, maker):
        found = []
        x = torch.randn(N, N, dtype=torch.float64)
        for make, read in ((MAKERS[maker][0], linear), (MAKERS[maker][1], functional.linear)):
            leaf, weight = x.clone().requires_grad_(), square(N)
            y = make(leaf * 1).clone() if make is MAKERS[maker][1] else make(leaf * 1)
            y.mul_(-3)[:, :5].add_(2)
            grad = torch.randn(N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
            read(y, weight).backward(grad)
            found.append(leaf.grad)
        assert relative(*found) < 0.05

    @pytest.mark.parametrize("maker", MAKERS)
    def test_after_it_was_read(self, maker):
        """The codes are of the tensor as it was read, as torch's own graph would insist."""
        x, weight = torch.randn(N, N, dtype=torch.float64, requires_grad=True), square(N)
        y = MAKERS[maker][0](x)
        seen, z = y.detach().clone(), linear(y, weight)
        with torch.no_grad():
            y.mul_(-3)
        other = square(N)
        changed = linear(y, other)
        grad = torch.randn(N, 16, dtype=torch.float64)
        (z * grad).sum().backward(retain_graph=True)
        check(weight.grad, grad, seen)
        (changed * grad).sum().backward()
        check(other.grad, grad, -3 * seen)

    def test_of_the_norms_own_weight_do_not_reach_its_readers(self):
        x = torch.randn(N, N, dtype=torch.float64, requires_grad=True)
        scale, weight = torch.full((N,), 2.0, dtype=torch.float64, requires_grad=True), square(N)
        y = CODED.rms_norm(x.detach(), (N,), scale, bits=8)
        seen, z = y.detach().clone(), linear(y, weight)
        with torch.no_grad():
            scale.mul_(10)
        (found,) = torch.autograd.grad(z.sum(), weight)
        assert relative(found, torch.ones(16, N, dtype=torch.float64) * seen.sum(0)) < 0.03


VIEWS = {
    "the same": lambda y: y,
    "view": lambda y: y.view(4, 16, N),
    "flatten": lambda y: y.view(4, 16, N).flatten(0, 1),
    "other columns": lambda y: y.view(2 * N, N // 2),
    "unsqueeze": lambda y: y.unsqueeze(0),
    "reshape": lambda y: y.reshape(-1, 4),
    "transposed": lambda y: y.t(),
    "transposed, contiguous": lambda y: y.t().contiguous(),
    "transposed, back": lambda y: y.t().t(),
    "permuted": lambda y: y.view(4, 16, N).permute(1, 0, 2),
    "permuted, reshaped": lambda y: y.view(4, 16, N).permute(1, 0, 2).reshape(N, N),
    "sliced rows": lambda y: y[8:24],
    "sliced columns": lambda y: y[:, 5:20],
    "every other row": lambda y: y[::2],
    "chunk": lambda y: y.chunk(4, dim=1)[2],
    "row": lambda y: y[3],
    "expand": lambda y: y[:1].expand(5, -1),
    "flipped": lambda y: y.flip(0),
    "clone": lambda y: y.clone(),
    "detached": lambda y: y.detach(),
    "as_strided": lambda y: y.as_strided((N, N), (1, N)),
    "unfold": lambda y: y.unfold(1, 4, 4).flatten(1),
    "real": lambda y: torch._neg_view(y),
    "cat": lambda y: torch.cat([y, y]),
    "to float": lambda y: y.float(),
    "times two": lambda y: 2 * y,
    "dropout": lambda y: functional.dropout(y, 0.5),
    "no dropout": lambda y: functional.dropout(y, 0.5, training=False),
    "identity": torch.nn.Identity(),
    "contiguous": lambda y: y.contiguous(),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_and_copies(maker, view):
    x = torch.randn(N, N, dtype=torch.float64, requires_grad=True)
    seen = VIEWS[view](MAKERS[maker][0](x))
    weight = square(seen.shape[-1]).to(seen.dtype).detach().requires_grad_()
    z = linear(seen, weight)
    grad = torch.randn(z.shape, dtype=z.dtype)
    z.backward(grad)
    check(weight.grad, grad, seen)


def kept(function, *leave_out):
    """Bytes of the distinct storages that autograd saves, but for those of the given tensors, which live on."""
    seen = {}
    with saved_storages(seen, leave_out={each.untyped_storage().data_ptr() for each in leave_out}):
        y = function()
    total = sum(seen.values())
    del y
    return total


class TestBytes:
    """What all readers together keep: x is no part of it."""

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

        assert kept(block, scale, bias, *weights) == self.CODES + 2 * 128 * 4 - 128 * 4 + 2 * N * 4

    def test_an_activation_between_two_products(self):
        x, weights = torch.randn(128, N), [torch.randn(N, N, requires_grad=True) for _ in range(2)]

        def block():
            hidden = CODED.gelu(CODED.linear(x, weights[0], bits=4), bits=4, shared=True)
            return CODED.linear(hidden, weights[1], bits=4)

        assert kept(block, *weights) == self.CODES + 4 * (128 + N) + self.CODES

    @pytest.mark.parametrize("inplace", [False, True])
    def test_batch_norm_relu_convolution(self, inplace):
        x = torch.randn(4, 16, 16, 16, requires_grad=True)
        weight, scale, bias = (torch.randn(shape, requires_grad=True) for shape in ((8, 16, 3, 3), (16,), (16,)))

        def block():
            y = CODED.batch_norm(x, None, None, scale, bias, training=True, bits=4)
            return CODED.conv2d(CODED.relu(y, bits=4, shared=True, inplace=inplace), weight, bits=4)

        assert 0 <= kept(block, weight, scale, bias) - x.numel() // 2 <= 4 * 16 * 4

    def test_a_gated_unit_and_its_reader(self):
        gate, up, weight = (torch.randn(128, N, requires_grad=True) for _ in range(3))

        def block():
            return CODED.linear(CODED.swiglu(gate, up, bits=4), weight, bits=4)

        assert kept(block, weight) == 2 * self.CODES + 4 * (128 + N)

    def test_a_second_reader_that_is_torchs_keeps_the_tensor(self):
        x, weight = torch.randn(128, N, requires_grad=True), torch.randn(N, N, requires_grad=True)

        def block():
            y = CODED.gelu(x, bits=4, shared=True)
            return CODED.linear(y, weight, bits=4), functional.linear(y, weight)

        assert kept(block, weight) == self.CODES + 128 * N * 4

    def test_codes_die_with_their_tensor(self):
        before = len(handle._entries)
        x = torch.randn(128, N, requires_grad=True)
        for _ in range(20):
            gelu(x)
            layer_norm(x)
        gc.collect()
        assert len(handle._entries) <= before
        y = gelu(x)
        z = y.sum()
        assert handle.find(y) is not None
        del y, z
        gc.collect()
        assert len(handle._entries) <= before


class TestKeptExactly:
    """What the operation that made it keeps anyway."""

    def attention(self, x):
        q = k = v = x.view(2, 8, 4, 16).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 64)

    EXACT = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "relu": torch.relu,
        "exp": torch.exp,
        "softmax": lambda x: torch.softmax(x, -1),
        "tanh, viewed": lambda x: torch.tanh(x).view(-1, 64).unsqueeze(0),
    }

    def check(self, function, x, weight, exactly):
        x = x.clone().requires_grad_()
        y = function(x)
        z = CODED.linear(y, weight, bits=2)
        grad = torch.randn_like(z)
        (found,) = torch.autograd.grad(z, weight, grad, retain_graph=True)
        rows = grad.reshape(-1, grad.shape[-1]).T @ y.detach().reshape(-1, 64)
        assert torch.allclose(found, rows, rtol=1e-5, atol=1e-5) == exactly
        alone = kept(lambda: function(x), x, weight)
        together = kept(lambda: CODED.linear(function(x), weight, bits=2), x, weight)
        assert (together == alone) == exactly

    @pytest.mark.parametrize("name", EXACT)
    def test_outputs_of_torch(self, name):
        self.check(self.EXACT[name], torch.randn(16, 64), torch.randn(5, 64, requires_grad=True), True)

    def test_attention(self):
        self.check(self.attention, torch.randn(2, 8, 64), torch.randn(5, 64, requires_grad=True), True)

    OTHERS = {
        "clone": lambda x: torch.tanh(x).clone(),
        "dropout": lambda x: functional.dropout(torch.relu(x), 0.5),
        "times two": lambda x: torch.tanh(x) * 2,
        "gelu": functional.gelu,
        "max, the values": lambda x: x.view(-1, 2, 64).max(1)[0],
        "slice": lambda x: torch.tanh(x)[1:],
        "plus": lambda x: x + 1,
    }

    @pytest.mark.parametrize("name", OTHERS)
    def test_others_are_coded(self, name):
        self.check(self.OTHERS[name], torch.randn(16, 64), torch.randn(5, 64, requires_grad=True), False)

    def test_a_leaf_is_coded(self):
        assert not handle.is_kept_exactly(torch.randn(3, requires_grad=True))
        assert not handle.is_kept_exactly(torch.tanh(torch.randn(3)))

    def test_a_change_in_place_is_coded(self):
        weight = torch.randn(5, 64, requires_grad=True)
        y = torch.tanh(torch.randn(16, 64, requires_grad=True)).clone().mul_(3)
        (found,) = torch.autograd.grad(CODED.linear(y, weight, bits=8).sum(), weight)
        assert relative(found, torch.ones(5, 16) @ y.detach()) < 0.05


class TestLives:
    """Of graphs, tensors, threads."""

    def test_reuse_across_steps(self):
        module = torch.nn.Sequential(fewbit.Linear(N, N, bits=8), fewbit.GELU(bits=8, shared=True), fewbit.Linear(N, 4, bits=8))
        exact = torch.nn.Sequential(torch.nn.Linear(N, N), torch.nn.GELU(), torch.nn.Linear(N, 4))
        exact.load_state_dict(module.state_dict())
        for step in range(4):
            x = torch.randn(32, N) * 2.0 ** (step - 2)
            for model in (module, exact):
                model.zero_grad()
                model(x).square().sum().backward()
            for own, true in zip(module.parameters(), exact.parameters(), strict=True):
                assert relative(own.grad, true.grad) < 0.1

    def test_two_graphs_at_once_do_not_mix(self):
        weight = torch.randn(4, N, requires_grad=True)
        inputs = [torch.randn(32, N, requires_grad=True) * 1 for _ in range(3)]
        outputs = [gelu(x) for x in inputs]
        results = [linear(y, weight) for y in outputs]
        for y, z in reversed(list(zip(outputs, results, strict=True))):
            (found,) = torch.autograd.grad(z.sum(), weight)
            assert relative(found, torch.ones(4, 32) @ y.detach()) < 0.03

    def test_deleted_tensors_leave_nothing_to_those_that_take_their_place(self):
        """Their ids and addresses are used again at once."""
        weight, ids = torch.randn(4, N, requires_grad=True), set()
        for seed in range(60):
            x = torch.randn(32, N, requires_grad=True)
            y = gelu(x) if seed % 2 else torch.full((32, N), float(seed + 1), requires_grad=True) * 1
            assert (handle.find(y) is not None) == bool(seed % 2)
            ids.add(id(y))
            (found,) = torch.autograd.grad(linear(y, weight).sum(), weight)
            check(found, torch.ones(32, 4), y)
            del y
        assert len(ids) < 60

    @pytest.mark.parametrize("maker", MAKERS)
    def test_backward_twice(self, maker):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)
        z = linear(MAKERS[maker][0](x * 1), weight).square().sum()
        first = torch.autograd.grad(z, [x, weight], retain_graph=True)
        second = torch.autograd.grad(z, [x, weight])
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(z, [x, weight])

    def test_exceptions_in_between(self):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)
        y = gelu(x)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                linear(y, torch.randn(4, N + 1, requires_grad=True))
            with pytest.raises(RuntimeError):
                linear(y[:, 1:], weight)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            CODED.layer_norm(y, (3,))
        (found,) = torch.autograd.grad(linear(y, weight).sum(), weight)
        assert relative(found, torch.ones(4, N) @ y.detach()) < 0.03

    def test_threads(self):
        def work(seed):
            generator = torch.Generator().manual_seed(seed)
            x = (seed + 1) * torch.randn(40, N, generator=generator).requires_grad_()
            weight = torch.randn(4, N, generator=generator).requires_grad_()
            for _ in range(5):
                y = gelu(layer_norm(x) * (seed % 5 + 1))
                if seed % 3 == 0:
                    y.mul_(seed + 2)
                (found,) = torch.autograd.grad(linear(y, weight).sum(), weight)
                check(found, torch.ones(40, 4), y)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(32)))

    def test_copies_of_outputs(self):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)
        y = gelu(x)
        file = io.BytesIO()
        torch.save(y, file)
        file.seek(0)
        copies = [copy.deepcopy(y.detach()), copy.copy(y.detach()), pickle.loads(pickle.dumps(y.detach())), torch.load(file)]
        for each in copies:
            assert torch.equal(each, y)
            assert handle.find(each) is None
            (found,) = torch.autograd.grad(linear(each.detach(), weight).sum(), weight)
            check(found, torch.ones(N, 4), y)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_checkpoint(self, reentrant, rounding):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)

        def inner(y):
            y = CODED.layer_norm(y, (N,), bits=3, rounding=rounding)
            return CODED.linear(y, weight, bits=3, rounding=rounding).square()

        found = []
        for call in (inner, lambda y: checkpoint(inner, y, use_reentrant=reentrant)):
            torch.manual_seed(5)
            z = call(gelu(x)).sum()
            found.append(torch.autograd.grad(z, [x, weight]) if not reentrant else self.by_backward(z, x, weight))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    def by_backward(self, z, *leaves):
        for leaf in leaves:
            leaf.grad = None
        z.backward()
        return [leaf.grad for leaf in leaves]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_handle_from_outside_of_a_checkpoint(self, reentrant):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)
        y = gelu(x)
        checkpoint(linear, y, weight, use_reentrant=reentrant).sum().backward()
        assert relative(weight.grad, torch.ones(4, N) @ y.detach()) < 0.03


class TestReluOfCodes:
    """The derivative of a ReLU that reads a normalization: that of the sign of its input."""

    def mask(self, x, weight, bias, bits, relu=CODED.relu, **keywords):
        y = CODED.batch_norm(x.clone().requires_grad_(), None, None, weight, bias, training=True, bits=bits)
        y.retain_grad()
        torch.autograd.backward(relu(y, bits=bits, shared=True, **keywords).sum(), inputs=[y])
        return y.detach(), y.grad

    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_is_exact(self, bits, dtype):
        """For channels that are negative at times: zero of y within 2.5σ, or anywhere above."""
        x = torch.randn(400, 96).to(dtype)
        weight = torch.cat([torch.linspace(-3, 3, 64), torch.tensor([0.0, 1e-3, -1e-3, 1e-20] * 8)])
        zero = torch.cat([torch.rand(64) * 4.5 - 2.25, torch.rand(32) * 2])
        bias = -zero * weight
        bias[64::4] = torch.linspace(-1, 1, 8)
        y, grad = self.mask(x, weight.to(dtype), bias.to(dtype), bits)
        wrong = grad.float() != (y > 0).float()
        assert wrong.sum() == 0, (wrong.sum(0), y[wrong])

    def test_of_channels_that_are_hardly_ever_positive(self):
        """Up to 5σ: exact; beyond, y is taken to be negative."""
        x, zero = torch.randn(2000, 40), torch.linspace(0, 8, 40)
        y, grad = self.mask(x, torch.ones(40), -zero, 4)
        assert torch.equal(grad, (y > 0).float())
        y, grad = self.mask(x, -torch.ones(40), -zero, 4)
        assert torch.equal(grad, (y > 0).float())

    @pytest.mark.parametrize(("bits", "share"), [(2, 0.08), (3, 0.015), (4, 0.002), (5, 0.0004), (8, 0.0001)])
    def test_of_channels_that_are_hardly_ever_negative(self, bits, share):
        """There the mask may be wrong where y is negative, but no oftener than y is: a share of the normal distribution."""
        x, zero = torch.randn(5000, 60), -torch.linspace(0, 6, 60)
        for sign in (1, -1):
            y, grad = self.mask(x * sign, sign * torch.ones(60), -zero, bits)
            wrong = grad != (y > 0).float()
            assert not (wrong & (y > 0)).any()
            assert wrong.float().mean(0).max() < share

    def test_of_the_dead_and_the_constant(self):
        """Channels without any spread, whose y is the bias: the sign of that, and 0 has the derivative 0."""
        x = torch.zeros(16, 12)
        for weight in (1.0, -1.0, 0.0, 0.3, -1e-10):
            bias = torch.linspace(-1, 1, 12)
            bias[:3] = 0
            y, grad = self.mask(x, torch.full((12,), weight), bias, 4)
            assert torch.equal(y, bias.expand_as(y))
            ordinary = torch.ones(12, dtype=torch.bool) if abs(weight) in (0, 1e-10) else (bias / weight).abs() < 2.2
            assert torch.equal(grad[:, ordinary], (y > 0).float()[:, ordinary])

    def test_leaky(self):
        def leaky(y, **keywords):
            return CODED.leaky_relu(y, 0.25, **keywords)

        y, grad = self.mask(torch.randn(300, 30), torch.linspace(-2, 2, 30), torch.randn(30) / 5, 5, leaky)
        exact = torch.where(y > 0, 1.0, 0.25)
        steep = (torch.linspace(-2, 2, 30).abs() > 0.5).expand_as(y)
        assert torch.equal(grad[steep], exact[steep])

    @pytest.mark.parametrize("weight", [1e-10, -1e-10, 1e-30])
    @pytest.mark.parametrize("bias", [-1.0, 1.0])
    def test_tiny_weights_do_not_blow_up_the_norms_own_gradient(self, weight, bias):
        """As weight decay leaves them; without a ReLU behind."""
        x, grad = torch.randn(64, 4), torch.randn(64, 4)
        found = []
        for function in (
            lambda *a: CODED.batch_norm(*a, training=True, bits=8),
            lambda *a: functional.batch_norm(*a, training=True),
        ):
            own = x.clone().requires_grad_(), torch.full((4,), weight, requires_grad=True), torch.full((4,), bias)
            function(own[0], None, None, *own[1:]).backward(grad)
            found.append((own[0].grad, own[1].grad))
        assert relative(found[0][1], found[1][1]) < 0.02
        assert (found[0][0] - found[1][0]).abs().max() <= 0.1 * found[1][0].abs().max()


class TestSecondDerivatives:
    TAKEN = {
        "grad, backward": lambda x, w, y: torch.autograd.grad(y, x, create_graph=True)[0].square().sum().backward(),
        "of the weight": lambda x, w, y: torch.autograd.grad(y, w, create_graph=True)[0].square().sum().backward(),
        "with the loss": lambda x, w, y: (y + torch.autograd.grad(y, x, create_graph=True)[0].sum()).backward(),
        "grad of grad": lambda x, w, y: torch.autograd.grad(torch.autograd.grad(y, x, create_graph=True)[0].sum(), [x, w], allow_unused=True),
        "for the weight": lambda x, w, y: torch.autograd.grad(torch.autograd.grad(y, x, create_graph=True)[0].sum(), w, allow_unused=True),
        "backward, backward": lambda x, w, y: (y.backward(create_graph=True), x.grad.square().sum().backward()),
    }  # fmt: skip

    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
    @pytest.mark.parametrize("taken", TAKEN)
    @pytest.mark.parametrize("layer", ["linear", "layer_norm", "batch_norm", "group_norm", "swiglu", "relu of a norm"])
    def test_are_refused(self, layer, taken):
        x, weight = torch.randn(8, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        y = {
            "linear": lambda: CODED.linear(x, weight.diag()),
            "layer_norm": lambda: CODED.layer_norm(x, (6,), weight),
            "batch_norm": lambda: CODED.batch_norm(x, None, None, weight, training=True),
            "group_norm": lambda: CODED.group_norm(x, 2, weight),
            "swiglu": lambda: CODED.swiglu(x, x * weight),
            "relu of a norm": lambda: CODED.relu(CODED.layer_norm(x, (6,), weight, weight), shared=True),
        }[layer]()
        with pytest.raises(InputError, match="can be taken once"):
            self.TAKEN[taken](x, weight, y.square().sum())


def test_the_naive_code_agrees_that_shared_codes_are_the_activations_own():
    x, weight = torch.randn(32, N, dtype=torch.float64, requires_grad=True), square(N)
    table = fewbit.load_table("gelu", 4, channels=("derivative", "value"))
    y = CODED.gelu(x, bits=4, shared=True)
    grad = torch.randn(32, 16, dtype=torch.float64)
    by_x, by_weight = torch.autograd.grad(CODED.linear(y, weight, bits=2), [x, weight], grad)
    torch.testing.assert_close(by_weight, grad.T @ naive.lookup(table, x, 1))
    torch.testing.assert_close(by_x, grad @ weight.detach() * naive.lookup(table, x, 0))
