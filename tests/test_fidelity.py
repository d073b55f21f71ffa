"""fewbit.fidelity: against all gradients stored and compared at once, and what it must leave as it was."""

import copy
import math
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.errors import InputError
from fewbit.models.safety import fidelity as module
from fewbit.models.safety import streamed
from fewbit.models.safety.fidelity import kind_of


def squares(model, batch):
    return model(batch).square().mean()


def net(*, bits=2, inputs=2, dropout=0.0):
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    )
    return fewbit.convert(model, bits=bits, inputs=inputs)


@pytest.fixture
def batches():
    return [torch.randn(16, 8) for _ in range(5)]


def stored(model, loss_fn, batches):
    """The oracle: every gradient of every batch, exact and coded, (batches, parameters) float64 by name. Of copies."""
    both = []
    for context in (fewbit.exact, lambda: torch.enable_grad()):
        rows = []
        for at, batch in enumerate(batches):
            one = copy.deepcopy(model)
            torch.manual_seed(100 + at)
            with context():
                loss_fn(one, batch).backward()
            rows.append(
                {name: (torch.zeros_like(p) if p.grad is None else p.grad).double() for name, p in one.named_parameters()}
            )
        both.append({name: torch.stack([row[name].flatten() for row in rows]) for name in rows[0]})
    return both


def oracle(exact, coded):
    """The figures by their definitions; exact and coded (batches, numbers)."""
    error = coded - exact
    power = exact.square().sum(1)
    variance = (exact[1:] - exact[:-1]).square().sum(1).mean() / 2
    b = len(exact)
    pairs = error @ error.T
    mean_error = (pairs.sum() - pairs.trace()) / (b * (b - 1))
    return {
        "error": (error.square().sum(1).mean() / power.mean()).sqrt(),
        "worst": (error.norm(dim=1) / exact.norm(dim=1)).max(),
        "cosine": (exact * coded).sum() / (exact.norm() * coded.norm()),
        "noise": (variance / power.mean()).sqrt(),
        "share": (error.square().sum(1).mean() / variance).sqrt(),
        "systematic": (mean_error.clamp_min(0) / (power.mean() - variance)).sqrt()
        if power.mean() * 0.99 >= variance
        else math.nan,
    }


def assert_is_oracle(part, exact, coded, but=()):
    for name, value in oracle(exact, coded).items():
        found = getattr(part, name)
        if name not in but and math.isfinite(value):
            assert found == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


class TestFigures:
    def test_are_those_of_all_gradients_stored(self, batches):
        model = net()
        report = fewbit.fidelity(model, squares, batches, by="parameter")
        exact, coded = stored(model, squares, batches)
        assert [part.group for part in report.parts] == list(exact)
        for part in report.parts:
            # a parameter of up to 1024 numbers has a sketch that is the error itself
            assert_is_oracle(part, exact[part.group], coded[part.group])
            assert part.parameters == exact[part.group].shape[1]
        every = [torch.cat(list(each.values()), 1) for each in (exact, coded)]
        assert_is_oracle(report.whole, *every)
        assert sum(part.weight for part in report.parts) == pytest.approx(1)
        assert report.batches == 5

    def test_groups_add_up(self, batches):
        model = net()
        exact, coded = stored(model, squares, batches)
        report = fewbit.fidelity(model, squares, batches, by=lambda name: "even" if int(name[0]) % 2 == 0 else "odd")
        for part in report.parts:
            names = [name for name in exact if (int(name[0]) % 2 == 0) == (part.group == "even")]
            assert_is_oracle(part, *(torch.cat([each[name] for name in names], 1) for each in (exact, coded)))

    def test_sketch_of_large_parameters_is_near(self):
        model = fewbit.convert(nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 1)), bits=1)
        data = [1 + torch.randn(64, 64) for _ in range(4)]
        part = fewbit.fidelity(model, squares, data, by="parameter").parts[0]
        exact, coded = stored(model, squares, data)
        assert_is_oracle(part, exact["0.weight"], coded["0.weight"], but=("systematic",))
        expected = float(oracle(exact["0.weight"], coded["0.weight"])["systematic"])
        assert part.systematic == pytest.approx(expected, rel=0.1)

    def test_the_definition_of_noise_has_no_bias(self):
        """Mean over many runs of half the mean squared difference: the variance."""
        rng = np.random.default_rng(0)
        samples = rng.normal(size=(4000, 5, 3)) * np.array([1.0, 2.0, 3.0])
        differences = np.square(np.diff(samples, axis=1)).sum(2).mean(1) / 2
        assert differences.mean() == pytest.approx(14, rel=0.02)

    @pytest.mark.parametrize("chunk", [7 * 1024, 1024])
    def test_parts_of_a_gradient_make_the_whole(self, monkeypatch, chunk):
        model = fewbit.convert(nn.Sequential(nn.Linear(100, 90), nn.GELU(), nn.Linear(90, 1)), bits=1)
        data = [1 + torch.randn(64, 100) for _ in range(3)]
        whole = fewbit.fidelity(model, squares, data).to_dict()
        monkeypatch.setattr(streamed, "_CHUNK", chunk)
        found = fewbit.fidelity(model, squares, data).to_dict()
        for name in ("error", "share", "cosine", "worst"):
            assert found[name] == pytest.approx(whole[name], rel=1e-9)
        assert found["systematic"] == pytest.approx(whole["systematic"], rel=1e-6)  # the same signs

    def test_loss_scale_does_not_matter(self, batches):
        model = net()
        plain, scaled = (
            fewbit.fidelity(model, lambda model, x, scale=scale: scale * squares(model, x), batches) for scale in (1, 1024)
        )
        assert plain.rows() == scaled.rows()

    def test_dropout_is_the_same_in_both_passes(self, batches):
        model = net(bits=8, inputs=8, dropout=0.5)
        report = fewbit.fidelity(model, squares, batches)
        assert report.whole.error < 0.05
        assert report.losses_differ < 1e-6

    def test_every_batch_has_its_own_random_numbers(self):
        model, seen = net(dropout=0.5), []
        batches = [torch.randn(16, 8)] * 3
        model.register_forward_hook(lambda *_: seen.append(torch.rand(()).item()))
        fewbit.fidelity(model, squares, batches)
        assert seen[::2] == seen[1::2]
        assert len(set(seen)) == 3


class Odd(nn.Module):
    """Parameters of all kinds: shared, frozen, unused, used in some batches alone, of zero gradient, sparse, complex."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8, sparse=True)
        self.up, self.act, self.down = nn.Linear(8, 8), fewbit.GELU(bits=1), nn.Linear(8, 8)
        self.down.weight = self.up.weight
        self.frozen, self.unused, self.sometimes = (nn.Linear(8, 8) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.zero, self.complex = nn.Parameter(torch.ones(8)), nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, tokens):
        x = self.frozen(self.embed(tokens))
        x = self.down(self.act(self.up(x)))
        if tokens[0] % 2:
            x = x + self.sometimes(x)
        return x + 0 * self.zero + (self.act(x) * self.complex).abs()


def test_parameters_of_all_kinds():
    model = Odd()
    batches = [torch.tensor([first, 3, 3, 7]) for first in (1, 2, 3, 5)]
    report = fewbit.fidelity(model, squares, batches, by="parameter")
    dense = copy.deepcopy(model)
    dense.embed.sparse = False
    exact, coded = (
        {name: torch.view_as_real(each).flatten(1) if each.is_complex() else each for name, each in both.items()}
        for both in _complex_stored(dense, batches)
    )
    parts = {part.group: part for part in report.parts}
    assert set(parts) == {name for name, each in model.named_parameters() if each.requires_grad}
    for name, part in parts.items():
        if exact[name].any():
            assert_is_oracle(part, exact[name], coded[name], but=("worst",))
    assert parts["zero"].error is None
    assert parts["unused.weight"].weight == 0
    assert report.without_gradient == ["unused.weight", "unused.bias"]
    assert "down.weight" not in parts  # it is up.weight
    assert str(report)
    assert report.level == "doubtful" or report.whole.share is not None
    with np.errstate(all="raise"):
        report.figure()


def _complex_stored(model, batches):
    both = []
    for context in (fewbit.exact, torch.enable_grad):
        rows = []
        for batch in batches:
            one = copy.deepcopy(model)
            with context():
                squares(one, batch).backward()
            rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.named_parameters()})
        wide = {n: torch.complex128 if rows[0][n].is_complex() else torch.float64 for n in rows[0]}
        both.append({n: torch.stack([row[n].to(wide[n]).flatten() for row in rows]) for n in rows[0]})
    return both


def test_bfloat16_and_autocast(batches):
    model = net(bits=3, inputs=None).to(torch.bfloat16)
    report = fewbit.fidelity(model, squares, [batch.bfloat16() for batch in batches])
    assert 0.001 < report.whole.error < 0.3

    def with_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model, batch)

    report = fewbit.fidelity(net(bits=3), with_autocast, batches)
    assert 0.001 < report.whole.error < 0.5


class TestLeavesAllAsItWas:
    @pytest.fixture
    def model(self, batches):
        model = net(dropout=0.5)
        squares(model, batches[0]).backward()
        model[4].eval()
        return model

    @pytest.fixture
    def before(self, model):
        """A function that checks that all is as it is now."""
        kept = copy.deepcopy(model)
        gradients = {name: (each.grad, each.grad.clone()) for name, each in model.named_parameters()}
        buffers = [(buffer, buffer._version) for buffer in model.buffers()]
        numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        hooks = [dict(each._post_accumulate_grad_hooks or {}) for each in model.parameters()]

        def check():
            for name, each in model.named_parameters():
                grad, content = gradients[name]
                assert each.grad is grad
                assert torch.equal(grad, content)
            assert all(map(torch.equal, model.state_dict().values(), kept.state_dict().values()))
            assert all(mine is buffer for mine, (buffer, _) in zip(model.buffers(), buffers, strict=True))
            assert [each.training for each in model.modules()] == [each.training for each in kept.modules()]
            assert torch.equal(torch.get_rng_state(), numbers[0])
            assert random.getstate() == numbers[1]
            assert np.array_equal(np.random.get_state()[1], numbers[2])  # noqa: NPY002
            assert hooks == [dict(each._post_accumulate_grad_hooks or {}) for each in model.parameters()]
            assert not fewbit.autograd.switch.is_exact()

        return check

    def test_after_a_report(self, model, before, batches):
        def loss(model, batch):
            model.train()
            model.extra = 1
            model.register_buffer("later", torch.ones(1))
            random.random(), np.random.rand()  # noqa: NPY002
            return squares(model, batch)

        assert fewbit.fidelity(model, loss, batches).whole.error > 0
        before()

    @pytest.mark.parametrize("failing", [1, 2, 3, 4])
    def test_after_an_exception_half_way(self, model, before, batches, failing):
        calls = []

        def loss(model, batch):
            calls.append(batch)
            if len(calls) == failing:
                raise KeyError
            return squares(model, batch)

        with pytest.raises(KeyError):
            fewbit.fidelity(model, loss, batches)
        before()

    def test_after_an_exception_in_backward(self, model, before, batches):
        def loss(model, batch):
            output = model(batch)
            output.register_hook(lambda _: (_ for _ in ()).throw(KeyError()))
            return output.square().mean()

        with pytest.raises(KeyError):
            fewbit.fidelity(model, loss, batches)
        before()

    def test_gradients_of_others_too(self, batches):
        scale, model = nn.Parameter(torch.ones(())), net()
        data = [batch.requires_grad_() for batch in batches]
        fewbit.fidelity(model, lambda model, x: scale * squares(model, x), data)
        assert scale.grad is None
        assert all(batch.grad is None for batch in data)

    def test_buffers_are_the_same_for_every_batch(self, model, batches):
        seen = []

        def loss(model, batch):
            seen.append(model[1].running_mean.clone())
            return squares(model, batch)

        fewbit.fidelity(model, loss, batches)
        assert all(torch.equal(each, seen[0]) for each in seen)

    def test_without_gradients_outside(self, model, before, batches):
        with torch.no_grad():
            assert fewbit.fidelity(model, squares, batches).whole.error > 0
        before()


def test_one_gradient_is_stored_not_all():
    """Of 6 equal weights: while backward runs there are never more gradients than parameters, and two for the one in hand."""
    layers = 6
    model = fewbit.convert(
        nn.Sequential(*(nn.Sequential(nn.Linear(50, 50, bias=False), nn.GELU()) for _ in range(layers))), bits=2
    )
    alive, peak = weakref.WeakSet(), [0]

    class Tracked:
        pass

    taken = streamed.Stream.take_exact, streamed.Stream.take_coded

    def tracking(take):
        def run(self, gradient):
            if gradient is not None:
                tag = Tracked()
                gradient.tag = tag  # lives as long as the tensor does
                alive.add(tag)
            assert self.parameter.grad is None
            take(self, gradient)
            del gradient
            peak[0] = max(peak[0], len(alive) + sum(each.grad is not None for each in model.parameters()))

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed.Stream, "take_exact", tracking(taken[0]))
        patch.setattr(streamed.Stream, "take_coded", tracking(taken[1]))
        fewbit.fidelity(model, squares, [torch.randn(4, 50) for _ in range(4)])
    assert layers <= peak[0] <= layers + 1


class TestVerdict:
    def test_safe(self, batches):
        report = fewbit.fidelity(net(bits=8, inputs=8), squares, batches)
        assert report.level == "safe"
        assert report.verdict.endswith(": safe") or "safe, but look at" in report.verdict
        assert report.verdict.startswith(f"coded gradient errs by {report.whole.error:.2g}, ")

    @pytest.mark.parametrize(("share", "level"), [(0.0999, "safe"), (0.11, "doubtful"), (0.49, "doubtful"), (0.51, "unsafe")])
    def test_levels(self, share, level):
        part = module.Part("all", 1, 1.0, error=share, worst=share, cosine=1.0, noise=1.0, share=share, systematic=0.0)
        assert module.Fidelity(part, [part], 4, True).level == level

    @pytest.mark.parametrize(("systematic", "level"), [(0.09, "safe"), (0.3, "doubtful"), (0.6, "unsafe"), (None, "safe")])
    def test_noise_hides_no_systematic_error(self, systematic, level):
        part = module.Part("all", 1, 1.0, error=0.2, worst=0.2, cosine=1.0, noise=4.0, share=0.05, systematic=systematic)
        report = module.Fidelity(part, [part], 4, True)
        assert report.level == level
        assert ("of the mean gradient for good" in report.verdict) == (level != "safe")

    def test_names_the_weakest_group(self):
        parts = [
            module.Part(name, 1, weight, error=share, worst=share, cosine=1.0, noise=1.0, share=share, systematic=0.0)
            for name, weight, share in (("all", 1.0, 0.05), ("good", 0.9, 0.01), ("bad", 0.1, 0.3), ("rounding", 1e-12, 9.0))
        ]
        report = module.Fidelity(parts[0], parts[1:], 4, True)
        assert (
            report.verdict == "coded gradient errs by 0.05, 5.0 % of the SGD noise 1: safe, but look at bad (30 % of its noise)"
        )

    def test_one_batch_tells_no_noise(self, batches):
        report = fewbit.fidelity(net(), squares, batches[:1])
        assert (report.level, report.whole.noise, report.whole.share) == ("unknown", None, None)
        assert report.whole.error > 0
        assert "one batch tells no SGD noise" in report.verdict
        report.figure()
        assert "–" in str(report)

    def test_equal_batches(self, batches):
        report = fewbit.fidelity(net(), squares, batches[:1] * 3)
        assert report.level == "unknown"
        assert "differ in nothing" in report.verdict

    def test_nothing_coded(self, batches):
        model = fewbit.revert(net())
        report = fewbit.fidelity(model, squares, batches)
        assert "nothing in the model is coded" in report.verdict
        assert report.level == "unknown"

    def test_exact_codes(self, batches):
        model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), bits=1)
        report = fewbit.fidelity(model, squares, batches)
        assert (report.level, report.whole.error) == ("safe", 0)
        assert "bit for bit" in report.verdict
        report.figure()

    def test_no_gradient_at_all(self, batches):
        report = fewbit.fidelity(net(), lambda model, x: 0 * squares(model, x), batches)
        assert report.level == "unknown"
        assert "zero in all batches" in report.verdict

    def test_exact_gradient_not_finite(self, batches):
        bad = [*batches[:2], torch.full((16, 8), math.inf), *batches[2:]]
        model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits=2)
        report = fewbit.fidelity(model, squares, bad)
        assert report.not_finite_exact == 1
        assert "1 of 6 batches left out" in report.verdict
        assert report.whole.error == pytest.approx(fewbit.fidelity(model, squares, batches).whole.error)
        assert "finite in no batch" in fewbit.fidelity(model, squares, [bad[2]] * 2).verdict

    def test_coded_gradient_alone_not_finite(self, batches):
        model = net()

        def loss(model, batch):
            output = model(batch)
            if not fewbit.autograd.switch.is_exact():
                output.register_hook(lambda grad: grad * math.nan)
            return output.square().mean()

        report = fewbit.fidelity(model, loss, batches)
        assert report.level == "unsafe"
        assert "not finite in 5 of 5 batches" in report.verdict
        assert str(report)

    def test_loss_that_changes(self, batches):
        calls = []

        def loss(model, batch):
            calls.append(batch)
            return len(calls) * squares(model, batch)

        report = fewbit.fidelity(net(), loss, batches)
        assert report.level == "unknown"
        assert "loss_fn must do the same" in report.verdict


class TestRefuses:
    def test_what_is_no_model(self):
        with pytest.raises(InputError, match=r"takes a torch\.nn\.Module, got int"):
            fewbit.fidelity(3, squares, [])

    def test_no_batches(self):
        with pytest.raises(InputError, match="gave none"):
            fewbit.fidelity(net(), squares, iter(()))

    def test_no_trainable_parameter(self, batches):
        with pytest.raises(InputError, match="no parameter"):
            fewbit.fidelity(net().requires_grad_(False), squares, batches)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda model, x: model(x), r"one element, got shape \(16, 4\)"),
            (lambda model, x: 1.0, "got float"),
            (lambda model, x: squares(model, x).detach(), "depends on no parameter"),
        ],
        ids=["vector", "number", "detached"],
    )
    def test_losses(self, batches, loss, message):
        with pytest.raises(InputError, match=message):
            fewbit.fidelity(net(), loss, batches)

    def test_backward_in_loss(self, batches):
        def loss(model, batch):
            found = squares(model, batch)
            found.backward(retain_graph=True)
            return found

        with pytest.raises(InputError, match="must not call backward"):
            fewbit.fidelity(net(), loss, batches)

    def test_optimizers_that_step_within_backward(self, batches):
        model = net()
        model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
        with pytest.raises(InputError, match=r"0\.weight has a hook"):
            fewbit.fidelity(model, squares, batches)

    def test_groups(self, batches):
        with pytest.raises(InputError, match="by must be one of 'kind'"):
            fewbit.fidelity(net(), squares, batches, by="layer")
        with pytest.raises(InputError, match="'all' is taken"):
            fewbit.fidelity(net(), squares, batches, by=lambda name: "all")


def test_checkpointing_is_exact_where_it_runs_forward_again(batches):
    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits=1)

    def loss(model, batch):
        return checkpoint(model, batch, use_reentrant=False).square().mean()

    assert fewbit.fidelity(model, loss, batches).rows() == fewbit.fidelity(model, squares, batches).rows()


def test_default_groups():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), fewbit.Tanh()]) for _ in range(3))})

    def loss(model, batch):
        for linear, act in model["blocks"]:
            batch = act(linear(batch))
        return batch.sum()

    report = fewbit.fidelity(model, loss, torch.randn(2, 4, 2))
    assert [part.group for part in report.parts] == ["blocks.*.0"]
    report = fewbit.fidelity(model, loss, torch.randn(2, 4, 2), by="module")
    assert [part.group for part in report.parts] == [f"blocks.{i}.0" for i in range(3)]
    assert kind_of("h.0.mlp2.10.fc") == "h.*.mlp2.*.fc"


def test_compiled_models_compile_once_more(batches):
    torch._dynamo.reset()
    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits=1)
    eager = fewbit.fidelity(model, squares, batches[:2])
    compiled = fewbit.fidelity(torch.compile(model, backend="aot_eager"), squares, batches[:2])
    assert compiled.whole.error == pytest.approx(eager.whole.error, rel=1e-3)
    assert [part.group for part in compiled.parts] == [part.group for part in eager.parts]
    torch._dynamo.reset()


def test_exports_and_draws(batches, tmp_path):
    report = fewbit.fidelity(net(), squares, (batch for batch in batches))
    text = str(report)
    assert text.startswith(report.verdict[:40])
    assert max(map(len, text.splitlines())) <= report.width
    assert report.to_dict()["verdict"] == report.verdict
    assert len(report.to_csv().splitlines()) == len(report.parts) + 1
    assert "NaN" not in report.to_json()
    report.plot(tmp_path / "fidelity.png")
    many = module.Fidelity(report.whole, report.parts * 12, 5, True)
    assert "more groups" in str(many)
    many.figure()


def test_within_exact_there_is_nothing_to_compare(batches):
    with fewbit.exact(), pytest.raises(InputError, match="there are none; call it outside"):
        fewbit.fidelity(net(), squares, batches)
