"""What torch's own operations save within an interception: which of it is coded, and how large errors of gradients are."""

import copy

import pytest
import torch
from layer_oracles import relative
from support import bytes_kept
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fewbit

BITS = {"rest": 8, "product": 8}


class Squared(nn.Module):
    def forward(self, x):
        return x * x


def gradients(function, *tensors):
    """The output, and the gradients of tensors that need one, for a random gradient of the output."""
    y = function(*tensors)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, torch.autograd.grad(y, [each for each in tensors if each.requires_grad], grad)


def near(function, *tensors, bits=BITS, bound=0.02):
    """Assert that under patch the output is the same and gradients are near. Returns the bytes kept, coded over exact."""
    exact, true = gradients(function, *tensors)
    with fewbit.patch(bits=bits):
        y, found = gradients(function, *tensors)
        coded = bytes_kept(lambda: function(*tensors), leave_out=tensors)
    assert torch.equal(y, exact)
    for ours, theirs in zip(found, true, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) < bound
    return coded / bytes_kept(lambda: function(*tensors), leave_out=tensors)


def normal(*shape, dtype=torch.float32, needs=True):
    return torch.randn(shape, dtype=dtype, requires_grad=needs)


class TestProducts:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_of_two_tensors(self, dtype):
        a, b = normal(64, 128, dtype=dtype), normal(64, 128, dtype=dtype)
        assert near(lambda a, b: (a * 2) * (b + 1), a, b) < 1.35 / dtype.itemsize

    def test_have_recipes(self):
        """Readers of a product keep no code of their own, and neither do readers of products of products and of casts."""
        gate, up, weight = normal(64, 256), normal(64, 256), normal(32, 256)

        def unit(gate, up, weight):
            return functional.linear(functional.silu(gate * 1) * (up * 1), weight)

        def kept(function):
            with fewbit.patch(bits=4):
                return bytes_kept(lambda: function(gate, up, weight), leave_out=(gate, up, weight))

        assert kept(unit) < 1.05 * kept(lambda gate, up, weight: functional.silu(gate * 1) * (up * 1))
        assert near(unit, gate, up, weight, bits=8, bound=0.03) < 0.6

    def test_by_a_gate_of_another_shape(self):
        x, gate, weight = normal(4, 16, 8, 8), normal(4, 16, 1, 1), normal(8, 16, 1, 1)
        assert near(lambda x, gate, weight: functional.conv2d(x * 1 * gate.sigmoid(), weight), x, gate, weight, bits=8) < 0.7

    def test_what_is_multiplied_in_place(self):
        a, b = normal(64, 128), normal(64, 128)
        assert near(lambda a, b: (a * 1).mul_(b * 1), a, b) < 1

    def test_a_norm_written_out(self):
        x, weight, reads = normal(64, 128), normal(128), normal(32, 128)

        def norm(x, weight, reads):
            x = x * 1
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return functional.linear(weight * (x * scale), reads)

        assert near(norm, x, weight, reads, bits=8) < 0.2
        assert near(norm, x, weight, reads, bits=4, bound=0.15) < 0.2


class TestWhatIsCoded:
    def test_matrix_products_and_probabilities(self):
        q, k, v = normal(2, 4, 64, 32), normal(2, 4, 64, 32), normal(2, 4, 64, 32)
        masked = torch.ones(64, 64).tril().bool()

        def attention(q, k, v):
            scores = (q * 1) @ (k * 1).transpose(-1, -2) / 32**0.5
            return scores.masked_fill(~masked, -torch.inf).softmax(-1) @ (v * 1)

        assert near(attention, q, k, v) < 0.32

    @pytest.mark.parametrize("classes", [64, 4096])
    @pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
    def test_log_probabilities(self, classes, scale):
        logits, labels = normal(256, classes), torch.arange(256) % 64
        loss = lambda logits: functional.cross_entropy(scale * logits, labels)  # noqa: E731
        # a row keeps codes, its two largest numbers, a label and the loss
        assert near(loss, logits, bound=0.02) < 0.25 + 0.5 * 8 / classes

    @pytest.mark.parametrize("margin", [0.0, 5.0, 12.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_log_probabilities_of_what_is_learnt(self, margin, dtype):
        """If each label is almost certain, the gradient consists of all other probabilities."""
        labels = torch.arange(256) % 64
        logits = normal(256, 64, dtype=dtype, needs=False)
        logits[torch.arange(256), labels] += margin
        loss = lambda logits: functional.cross_entropy(1 * logits, labels)  # noqa: E731
        assert near(loss, logits.requires_grad_(), bound=0.01) < 1

    def test_probabilities_that_are_zero_or_not_finite(self):
        masked = torch.zeros(64, 128).masked_fill(torch.arange(128) > torch.arange(64).unsqueeze(1), -torch.inf)
        assert near(lambda x: (x * 1 + masked).softmax(-1), normal(64, 128)) < 0.3
        assert (
            near(lambda x: (x * 1 + 0 * masked[:, :1]).log_softmax(-1), 100 * normal(64, 128, needs=False).requires_grad_()) < 1
        )
        x = normal(64, 128, needs=False)
        x[3, 5] = torch.nan
        for function in (torch.softmax, torch.log_softmax):
            _, [true] = gradients(lambda x, function=function: function(x * 1, -1), x.requires_grad_())
            with fewbit.patch(bits=BITS):
                _, [found] = gradients(lambda x, function=function: function(x * 1, -1), x)
            assert torch.equal(found.isnan(), true.isnan())

    def test_probabilities_of_few_classes_stay_exact(self):
        assert near(lambda x: (x * 1).softmax(-1), normal(2048, 2), bound=1e-6) == 1

    def test_what_is_divided_by_what_varies_by_row(self):
        """As in linear attention: codes of the numerator itself would spoil small rows."""
        x, y = normal(4, 2, 256, 32), normal(4, 2, 256, 1)
        scales = (10 ** torch.linspace(-4, 0, 256)).unsqueeze(-1)
        assert near(lambda x, y: (x * scales) / (scales * (y.sigmoid() + 0.1)), x, y, bound=0.02) < 1

    def test_readers_of_a_quotient_share_its_codes(self):
        x, y, weight = normal(64, 256), normal(64, 256), normal(32, 256)
        kept = []
        for function in (lambda x, y: (x * 1) / (y.abs() + 1), lambda x, y: functional.linear((x * 1) / (y.abs() + 1), weight)):
            with fewbit.patch(bits=4):
                kept.append(bytes_kept(lambda function=function: function(x, y), leave_out=(x, y, weight)))
        assert kept[0] == kept[1]

    def test_what_a_squared_error_reads(self):
        """The difference from the target is coded: codes of the values themselves would spoil a small difference."""
        target = torch.randn(64, 128)
        x = (target + 1e-3 * torch.randn(64, 128)).requires_grad_()
        assert near(lambda x: functional.mse_loss(x * 1, target), x) < 0.7

    @pytest.mark.parametrize("dim", [0, 1, -1, -2])
    def test_probabilities_along_any_dimension(self, dim):
        assert near(lambda x: (x * 1).softmax(dim), normal(64, 65)) < 0.3
        assert near(lambda x: (x * 1).log_softmax(dim), normal(64, 65)) < 0.3

    def test_masks_as_bits(self):
        x = normal(64, 129)
        kept = near(lambda x: torch.where((x > 0.3).logical_not(), x * 1, x.new_zeros(())), x)
        assert kept == pytest.approx(1 / 8, abs=0.01)

    @pytest.mark.parametrize(("most", "size"), [(200, 1), (30_000, 2), (3_000_000, 4)])
    def test_indices_in_fewer_bytes(self, most, size):
        x = normal(most + 1)
        assert near(lambda x: (x * 1)[torch.arange(4096) * most // 4096], x, bound=1e-6) == pytest.approx(size / 8, abs=0.01)

    def test_what_is_saved_twice_once(self):
        x, y, z = (normal(64, 128) for _ in range(3))
        with fewbit.patch(bits=BITS):
            once = bytes_kept(lambda: (x * 1) * z.detach(), leave_out=(z,))
            shared = x * 1
            twice = bytes_kept(lambda: (shared * y, shared * z), leave_out=(y, z))
        assert twice < once + 1.1 * (64 * 128 + 64 * 4 + 128 * 8)


class TestWhatStaysExact:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x: 1 / (x * 1),
            lambda x: (x.abs() + 0.1).log(),
            lambda x: (x.abs() + 0.1).sqrt(),
            lambda x: (x.abs() + 0.1).rsqrt(),
            lambda x: (x.abs() + 0.1) ** -1.5,
            lambda x: (x.abs() + 0.1) ** 0.5,
            lambda x: (x * 1).norm(dim=-1),
            lambda x: (x * 1).logsumexp(-1),
            lambda x: (x * 1).cumprod(-1),
            lambda x: (30 * x).sin(),
            lambda x: torch.maximum(x * 1, x.flip(0)),
        ],
    )
    def test_where_backward_divides_or_compares(self, function):
        x = normal(64, 64)
        exact, true = gradients(function, x)
        with fewbit.patch(bits=BITS):
            y, found = gradients(function, x)
        assert torch.equal(y, exact)
        assert torch.equal(found[0], true[0])

    def test_leaves_views_of_them_and_what_the_model_was_called_with(self):
        class Scales(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(64, 128))

            def forward(self, x, y):
                return x * self.weight, y.view(-1, 128) * self.weight, self.weight.t() @ x

        model = fewbit.convert(Scales(), bits=4)
        x, y = normal(64, 128), normal(8192, needs=False)
        assert bytes_kept(lambda: model(x, y), leave_out=(x, y, model.weight)) == 0

    def test_not_what_it_was_called_with_that_others_have_computed(self):
        """As in a model whose own modules are torch's."""
        model = fewbit.convert(nn.Sequential(nn.Linear(128, 128), Squared()), bits=4)
        x, codes = normal(64, 128, needs=False), 64 * 128 // 2
        assert codes < bytes_kept(lambda: model(x), leave_out=(x, *model.parameters())) < 1.4 * codes

    def test_small_tensors(self):
        x, y = normal(4, 8), normal(4, 8)
        _, true = gradients(lambda x, y: (x * 1) * (y * 1), x, y)
        with fewbit.patch(bits=BITS):
            _, found = gradients(lambda x, y: (x * 1) * (y * 1), x, y)
        assert all(map(torch.equal, found, true))

    def test_without_the_kinds(self):
        x, y = normal(64, 128), normal(64, 128)
        with fewbit.patch(bits={"linear": 4}):
            _, found = gradients(lambda x, y: (x * 1) * (y * 1) @ y.t(), x, y)
        assert all(map(torch.equal, found, gradients(lambda x, y: (x * 1) * (y * 1) @ y.t(), x, y)[1]))

    def test_functions_in_python(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                return 2 * ctx.saved_tensors[0] * grad

        x = normal(64, 128)
        with fewbit.patch(bits=BITS):
            _, found = gradients(lambda x: Square.apply(x * 1), x)
        assert torch.equal(found[0], gradients(lambda x: Square.apply(x * 1), x)[1][0])

    def test_what_is_not_finite(self):
        x, y = normal(64, 128), normal(64, 128)
        with torch.no_grad():
            x[3, 4], y[5, 6] = torch.nan, torch.inf
        exact = gradients(lambda x, y: (x * 1) * (y * 1), x, y)[1]
        with fewbit.patch(bits=BITS):
            found = gradients(lambda x, y: (x * 1) * (y * 1), x, y)[1]
        assert all(torch.equal(ours.isfinite(), theirs.isfinite()) for ours, theirs in zip(found, exact, strict=True))


class Attends(nn.Module):
    """All parts written out as operations."""

    def __init__(self):
        super().__init__()
        self.weight, self.down = nn.Parameter(torch.randn(3, 64, 64) / 8), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (x @ each for each in self.weight)
        hidden = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        return self.down(functional.gelu(hidden) * torch.sigmoid(v))


class TestWithOthers:
    """Hooks, checkpoints, changes in place, second derivatives."""

    def results(self, run):
        torch.manual_seed(0)
        exact = Attends()
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        found = []
        for model in (exact, coded):
            y = run(model, x * 1)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
        return found

    def check(self, run):
        (y, *true), (ours, *found) = self.results(run)
        assert torch.equal(y, ours)
        errors = [relative(*pair) for pair in zip(found, true, strict=True)]
        assert 0 < max(errors) < 0.03
        return found

    def test_alone(self):
        self.check(lambda model, x: model(x))

    def test_offloaded(self):
        def run(model, x):
            with torch.autograd.graph.save_on_cpu():
                return model(x)

        alone = self.results(lambda model, x: model(x))[1][1:]
        assert all(map(torch.equal, self.check(run), alone))

    def test_in_a_checkpointed_region(self):
        alone = self.results(lambda model, x: model(x))[1][1:]
        found = self.check(lambda model, x: checkpoint(model, x, use_reentrant=False))
        assert all(map(torch.equal, found, alone))

    def test_around_a_checkpointed_region(self):
        """Calls in a region that began inside the model are torch's own, since no interception exists when it runs again."""

        class Around(Attends):
            def forward(self, x):
                return checkpoint(super().forward, x, use_reentrant=False)

        exact, x = Around(), normal(4, 64, 64)
        coded = fewbit.convert(copy.deepcopy(exact), bits=8)
        y, (true, *_) = gradients(lambda x: exact(x * 1), x)
        ours, (found, *_) = gradients(lambda x: coded(x * 1), x)
        assert torch.equal(y, ours)
        assert relative(found, true) < 0.03

    def test_a_change_in_place_is_torchs_error(self):
        x, y = normal(64, 128), normal(8, 8)
        with fewbit.patch(bits=BITS):
            kept = y * 1
            z = kept * (y + 1)  # small, so kept as it is
            kept.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        with fewbit.patch(bits=BITS):
            large = x * 1
            z = large * (x + 1)  # codes hold the former numbers
            large.add_(1)
        z.sum().backward()
        assert relative(x.grad, 2 * x.detach() + 1) < 0.02

    def test_second_derivatives_are_near(self):
        x = normal(64, 64)

        def second(patched):
            with fewbit.patch(bits=BITS if patched else {"recurrent": 8}):
                y = (x * 1).pow(3) * (x * 2)
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        assert relative(second(True), second(False)) < 0.05

    def test_no_cycles_are_left(self):
        import gc
        import weakref

        model, x = fewbit.convert(Attends(), bits=4), normal(4, 64, 64)
        gc.collect()
        gc.disable()
        try:
            y = model(x)
            dies = weakref.ref(y)
            del y
            assert dies() is None
        finally:
            gc.enable()

    def test_transforms_pass_by(self):
        model, x = fewbit.convert(Attends(), bits=4), torch.randn(4, 64, 64)
        exact = fewbit.revert(copy.deepcopy(model))
        found = torch.func.grad(lambda x: model(x).square().sum())(x)
        assert relative(found, torch.func.grad(lambda x: exact(x).square().sum())(x)) < 0.1
