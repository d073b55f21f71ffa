"""fewbit.fidelity: compared with gradients that are all stored first, and what it must leave as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from support import coded_mlp, squares
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.models.gradients import streams
from fewbit.models.gradients.fidelity import block_pattern


def stored(model, loss_fn, batches):
    """The oracle: every gradient of every batch, exact and coded, by name: (batches, parameters) float64. It runs on copies."""
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
    """The figures by their definitions, from exact and coded gradients (batches, numbers)."""
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
        model = coded_mlp()
        report = fewbit.fidelity(model, batches, squares, by="parameter")
        exact, coded = stored(model, squares, batches)
        assert [part.group for part in report.parts] == list(exact)
        for part in report.parts:
            assert_is_oracle(part, exact[part.group], coded[part.group])
            assert part.parameters == exact[part.group].shape[1]
        every = [torch.cat(list(each.values()), 1) for each in (exact, coded)]
        assert_is_oracle(report.whole, *every)
        assert sum(part.weight for part in report.parts) == pytest.approx(1)
        assert report.batches == 5

    def test_groups_add_up(self, batches):
        model = coded_mlp()
        exact, coded = stored(model, squares, batches)
        report = fewbit.fidelity(model, batches, squares, by=lambda name: "even" if int(name[0]) % 2 == 0 else "odd")
        for part in report.parts:
            names = [name for name in exact if (int(name[0]) % 2 == 0) == (part.group == "even")]
            assert_is_oracle(part, *(torch.cat([each[name] for name in names], 1) for each in (exact, coded)))

    def test_are_exact_for_large_parameters_too(self):
        model = fewbit.convert(nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 1)), bits={"activation": 1})
        data = [1 + torch.randn(64, 64) for _ in range(4)]
        part = fewbit.fidelity(model, data, squares, by="parameter").parts[0]
        exact, coded = stored(model, squares, data)
        assert part.systematic is not None
        assert_is_oracle(part, exact["0.weight"], coded["0.weight"])

    def test_the_definition_of_noise_has_no_bias(self):
        """Half the mean squared difference, averaged over many runs, is the variance."""
        rng = np.random.default_rng(0)
        samples = rng.normal(size=(4000, 5, 3)) * np.array([1.0, 2.0, 3.0])
        differences = np.square(np.diff(samples, axis=1)).sum(2).mean(1) / 2
        assert differences.mean() == pytest.approx(14, rel=0.02)

    @pytest.mark.parametrize("chunk", [7 * 1024, 1024])
    def test_parts_of_a_gradient_make_the_whole(self, monkeypatch, chunk):
        model = fewbit.convert(nn.Sequential(nn.Linear(100, 90), nn.GELU(), nn.Linear(90, 1)), bits={"activation": 1})
        data = [1 + torch.randn(64, 100) for _ in range(3)]
        whole = fewbit.fidelity(model, data, squares).to_dict()
        monkeypatch.setattr(streams, "_CHUNK", chunk)
        found = fewbit.fidelity(model, data, squares).to_dict()
        for name in ("error", "share", "cosine", "worst", "systematic"):
            assert found[name] == pytest.approx(whole[name], rel=1e-9)

    def test_loss_scale_does_not_matter(self, batches):
        model = coded_mlp()
        plain, scaled = (
            fewbit.fidelity(model, batches, lambda model, x, scale=scale: scale * squares(model, x)) for scale in (1, 1024)
        )
        assert plain.rows() == scaled.rows()

    def test_dropout_is_the_same_in_both_passes(self, batches):
        model = coded_mlp(bits=8, dropout=0.5)
        report = fewbit.fidelity(model, batches, squares)
        assert report.whole.error < 0.05
        assert report.losses_differ < 1e-6

    def test_every_batch_has_its_own_random_numbers(self):
        model, seen = coded_mlp(dropout=0.5), []
        batches = [torch.randn(16, 8)] * 3
        model.register_forward_hook(lambda *_: seen.append(torch.rand(()).item()))
        fewbit.fidelity(model, batches, squares)
        assert seen[::2] == seen[1::2]
        assert len(set(seen)) == 3


class Odd(nn.Module):
    """Parameters of all kinds: shared, frozen, unused, used only in some batches, with zero gradient, sparse, complex."""

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
    report = fewbit.fidelity(model, batches, squares, by="parameter")
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
    assert report.level != "unknown"
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
    model = coded_mlp(bits={"activation": 3}).to(torch.bfloat16)
    report = fewbit.fidelity(model, [batch.bfloat16() for batch in batches], squares)
    assert 0.001 < report.whole.error < 0.3

    def with_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model, batch)

    report = fewbit.fidelity(coded_mlp(bits={"activation": 3, "linear": 2, "norm": 2}), batches, with_autocast)
    assert 0.001 < report.whole.error < 0.5


def test_checkpointing_is_exact_where_it_runs_forward_again(batches):
    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits={"activation": 1})

    def loss(model, batch):
        return checkpoint(model, batch, use_reentrant=False).square().mean()

    assert fewbit.fidelity(model, batches, loss).rows() == fewbit.fidelity(model, batches, squares).rows()


def test_default_groups():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), fewbit.Tanh()]) for _ in range(3))})

    def loss(model, batch):
        for linear, act in model["blocks"]:
            batch = act(linear(batch))
        return batch.sum()

    report = fewbit.fidelity(model, torch.randn(2, 4, 2), loss)
    assert [part.group for part in report.parts] == ["blocks.*.0"]
    report = fewbit.fidelity(model, torch.randn(2, 4, 2), loss, by="module")
    assert [part.group for part in report.parts] == [f"blocks.{i}.0" for i in range(3)]
    assert block_pattern("h.0.mlp2.10.fc") == "h.*.mlp2.*.fc"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models_compile_once_more(batches):
    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits={"activation": 1})
    eager = fewbit.fidelity(model, batches[:2], squares)
    compiled = fewbit.fidelity(torch.compile(model, backend="aot_eager"), batches[:2], squares)
    assert compiled.whole.error == pytest.approx(eager.whole.error, rel=1e-3)
    assert [part.group for part in compiled.parts] == [part.group for part in eager.parts]
