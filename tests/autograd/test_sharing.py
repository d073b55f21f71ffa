"""One code for many readers: gradients are never wrong, whatever happens to a tensor between its maker and its readers.

In every case the weight's gradient must be that of the reader's own codes, which naive code makes too, or be as near to the
exact one as shared 8-bit codes allow. If a recipe no longer fits its tensor, the error is as large as the change: changes are
large.
"""

import copy
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
from fewbit.autograd import sharing

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
    """Assert that the gradient of a weight is sound: that of codes of `seen` (*, in), for a gradient (*, out) of the output."""
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
    """A weight with x's number of columns."""
    return torch.randn(16, x, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def without_graph(change):
    """Change y in place without autograd's notice. For the exact network, the like with autograd, which would object."""

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
    """Changes in place after the tensor was made."""

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
        """The codes are of the tensor at the time when it was read, as torch's own graph would insist."""
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


class TestLives:
    """Lifetimes of graphs, tensors and threads."""

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
            assert (sharing.find(y) is not None) == bool(seed % 2)
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
                y = gelu(layer_norm(x) / (seed % 5 + 1))
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
            assert sharing.find(each) is None
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
    def test_a_recipe_from_outside_of_a_checkpoint(self, reentrant):
        x, weight = torch.randn(N, N, requires_grad=True), torch.randn(4, N, requires_grad=True)
        y = gelu(x)
        checkpoint(linear, y, weight, use_reentrant=reentrant).sum().backward()
        assert relative(weight.grad, torch.ones(4, N) @ y.detach()) < 0.03


def test_the_naive_code_agrees_that_shared_codes_are_the_activations_own():
    x, weight = torch.randn(32, N, dtype=torch.float64, requires_grad=True), square(N)
    table = fewbit.load_table("gelu", 4, channels=("derivative", "value"))
    y = CODED.gelu(x, bits=4, shared=True)
    grad = torch.randn(32, 16, dtype=torch.float64)
    by_x, by_weight = torch.autograd.grad(CODED.linear(y, weight, bits=2), [x, weight], grad)
    torch.testing.assert_close(by_weight, grad.T @ naive.lookup(table, x, 1))
    torch.testing.assert_close(by_x, grad @ weight.detach() * naive.lookup(table, x, 0))
