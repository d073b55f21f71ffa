"""The verdict of fidelity on its figures, in a line, a table and a picture."""

import math

import pytest
import torch
from support import coded_mlp, squares
from torch import nn

import fewbit
from fewbit.autograd import exact as exact_mode
from fewbit.models.gradients import fidelity as module


class TestVerdict:
    def test_safe(self, batches):
        report = fewbit.fidelity(coded_mlp(bits=8), batches, squares)
        assert report.level == "safe"
        assert report.verdict.endswith(": safe") or "safe, but look at" in report.verdict
        assert report.verdict.startswith(f"coded gradient errs by {report.whole.error:.2g}, ")

    @pytest.mark.parametrize(("share", "level"), [(0.0999, "safe"), (0.11, "doubtful"), (0.49, "doubtful"), (0.51, "unsafe")])
    def test_levels(self, share, level):
        part = module.Part("all", 1, 1.0, error=share, worst=share, cosine=1.0, noise=1.0, share=share, systematic=0.0)
        assert module.Fidelity(part, [part], 4, True).level == level

    @pytest.mark.parametrize(("share", "says"), [(0.01, False), (0.05, False), (0.07, True), (0.2, False)])
    def test_says_what_is_safe_but_not_free(self, share, says):
        part = module.Part("all", 1, 1.0, error=share, worst=share, cosine=1.0, noise=1.0, share=share, systematic=0.0)
        assert ("a few tenths of a percent" in module.Fidelity(part, [part], 4, True).verdict) == says

    @pytest.mark.parametrize(("systematic", "level"), [(0.09, "safe"), (0.3, "doubtful"), (0.6, "unsafe"), (None, "safe")])
    def test_noise_hides_no_systematic_error(self, systematic, level):
        part = module.Part("all", 1, 1.0, error=0.2, worst=0.2, cosine=1.0, noise=4.0, share=0.05, systematic=systematic)
        report = module.Fidelity(part, [part], 4, True)
        assert report.level == level
        assert ("of the mean gradient does not average out" in report.verdict) == (level != "safe")

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
        report = fewbit.fidelity(coded_mlp(), batches[:1], squares)
        assert (report.level, report.whole.noise, report.whole.share) == ("unknown", None, None)
        assert report.whole.error > 0
        assert "one batch shows no SGD noise" in report.verdict
        report.figure()
        assert "–" in str(report)

    def test_equal_batches(self, batches):
        report = fewbit.fidelity(coded_mlp(), batches[:1] * 3, squares)
        assert report.level == "unknown"
        assert "all batches are equal" in report.verdict

    def test_nothing_coded(self, batches):
        model = fewbit.revert(coded_mlp())
        report = fewbit.fidelity(model, batches, squares)
        assert "nothing in the model is coded" in report.verdict
        assert report.level == "unknown"

    def test_exact_codes(self, batches):
        model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), bits={"activation": 1})
        report = fewbit.fidelity(model, batches, squares)
        assert (report.level, report.whole.error) == ("safe", 0)
        assert "bit for bit" in report.verdict
        report.figure()

    def test_no_gradient_at_all(self, batches):
        report = fewbit.fidelity(coded_mlp(), batches, lambda model, x: 0 * squares(model, x))
        assert report.level == "unknown"
        assert "zero in all batches" in report.verdict

    def test_exact_gradient_not_finite(self, batches):
        bad = [*batches[:2], torch.full((16, 8), math.inf), *batches[2:]]
        model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), bits={"activation": 2})
        report = fewbit.fidelity(model, bad, squares)
        assert report.not_finite_exact == 1
        assert "1 of 6 batches left out" in report.verdict
        assert report.whole.error == pytest.approx(fewbit.fidelity(model, batches, squares).whole.error)
        assert "not finite in any batch" in fewbit.fidelity(model, [bad[2]] * 2, squares).verdict

    def test_coded_gradient_alone_not_finite(self, batches):
        model = coded_mlp()

        def loss(model, batch):
            output = model(batch)
            if not exact_mode.active:
                output.register_hook(lambda grad: grad * math.nan)
            return output.square().mean()

        report = fewbit.fidelity(model, batches, loss)
        assert report.level == "unsafe"
        assert "not finite in 5 of 5 batches" in report.verdict
        assert str(report)

    def test_a_coded_gradient_that_is_not_finite_leaves_no_systematic_error(self):
        """The other batches are judged without it, but the sum of the errors contains it."""
        data, model = [1 + torch.randn(16, 8) for _ in range(5)], coded_mlp()

        def loss(model, batch):
            output = model(batch)
            if batch is data[2] and not exact_mode.active:
                output.register_hook(lambda grad: grad * math.inf)
            return output.square().mean()

        report = fewbit.fidelity(model, data, loss)
        assert (report.not_finite_coded, report.level) == (1, "unsafe")
        for part in (report.whole, *report.parts):
            assert part.systematic is None
            assert math.isfinite(part.error)
        assert fewbit.fidelity(model, data, squares).whole.systematic is not None
        assert "–" in str(report)
        report.figure()

    def test_loss_that_changes(self, batches):
        calls = []

        def loss(model, batch):
            calls.append(batch)
            return len(calls) * squares(model, batch)

        report = fewbit.fidelity(coded_mlp(), batches, loss)
        assert report.level == "unknown"
        assert "loss_fn must do the same" in report.verdict


def test_exports_and_draws(batches, tmp_path):
    report = fewbit.fidelity(coded_mlp(), (batch for batch in batches), squares)
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
