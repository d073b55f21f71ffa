"""tools/studies: shared functions in cases with known answers, and each study at a tiny size."""

import doctest
import io
import json
from datetime import date

import pytest
import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import demo, terminal
from fewbit.bench import models
from fewbit.bench.step import Step
from fewbit.models.blocks import blocks
from tools.studies import (
    baselines,
    calibration,
    common,
    fidelity,
    final_loss,
    frontier,
    gpt,
    huggingface,
    lora,
    pictures,
    planner,
    recurrent,
    resnet,
    swiglu,
    working_sizes,
)


@pytest.fixture
def screen():
    """A console to print to. str() of its file is what was printed."""
    return Console(file=io.StringIO(), width=120)


def printed(console):
    return console.file.getvalue()


class TestKeptBytes:
    def test_each_storage_once_without_parameters_and_batch(self):
        model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(4, 8)
        assert common.kept_bytes(model, x) == 2 * 4 * 4 * 16  # GELU's input, and its output, which the last layer keeps
        assert common.kept_bytes(model, {"input": x}) == 2 * 4 * 4 * 16

    def test_code_tables_do_not_count(self):
        model, x = fewbit.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU()), bits={"activation": 4}), torch.randn(512, 8)
        for call in (model, torch.compile(model, backend="aot_eager")):  # its graph keeps the levels
            assert common.kept_bytes(call, x) == 512 * 16 // 2 + 1  # with the number of the rung

    def test_is_what_fewbit_counts(self):
        model, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 8, 16)
        for _ in range(2):
            assert common.kept_bytes(model, x) == fewbit.memory(model, x).activation_bytes
            fewbit.convert(model, bits=4)


def test_gradient_errors_and_noise():
    exact = [{"all": torch.tensor([3.0, 4.0])}, {"all": torch.tensor([3.0, 6.0])}]
    other = [{"all": torch.tensor([3.0, 3.0])}, {"all": torch.tensor([3.0, 6.0])}]
    assert common.gradient_errors(exact, other)["all"] == pytest.approx(0.1)
    assert common.gradient_noise(exact)["all"] == pytest.approx(2**0.5 / ((5 + 45**0.5) / 2))


def test_gradients_are_grouped_in_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.randn(3, 2)
    groups = common.gradients(model, lambda: model(x).sum(), lambda name: name.split(".")[0])
    model(x).sum().backward()
    for group, module in (("0", model[0]), ("1", model[1]), (common.ALL, model)):
        torch.testing.assert_close(groups[group].float(), torch.cat([each.grad.flatten() for each in module.parameters()]))


class TestMinMax:
    def test_error_is_at_most_half_a_step(self):
        x = torch.randn(5, 128)
        steps = (x.unflatten(-1, (2, 64)).amax(-1) - x.unflatten(-1, (2, 64)).amin(-1)) / 15
        error = (baselines.min_max(x, bits=4, group=64) - x).abs().unflatten(-1, (2, 64)).amax(-1)
        assert (error <= steps / 2 * 1.0001).all()

    def test_constant_groups_are_exact(self):
        assert (baselines.min_max(torch.full((2, 64), 3.0), bits=4, group=64) == 3).all()

    def test_forward_is_exact_and_the_gradient_is_near(self):
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        coded = baselines.min_max_coded(model)
        x = torch.randn(8, 64)
        assert torch.equal(coded(x), model(x))
        exact, near = (common.gradients(each, lambda each=each: each(x).square().sum(), str) for each in (model, coded))
        (error,) = {common.gradient_errors([exact], [near])[common.ALL]}
        assert 0.01 < error < 0.2


class TestQuantizedBatchNorm:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_values_and_signs(self, bits):
        norm = baselines.QuantizedBatchNorm2d(3, bits)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
            norm.bias.copy_(torch.tensor([0.3, 0.0, -0.7]))
        plain = nn.BatchNorm2d(3)
        plain.load_state_dict(norm.state_dict())
        x = torch.randn(16, 3, 8, 8)
        y, exact = norm(x), plain(x)
        near = ((exact - norm.bias[:, None, None]) / norm.weight[:, None, None]).abs() < 2.5
        step = 6 / 2**bits * norm.weight.abs()[:, None, None]
        assert ((y - exact).abs() / step)[near].max() < 0.51
        assert torch.equal(y > 0, exact > 0)
        assert all(y[:, i].unique().numel() <= 2**bits for i in range(3))

    def test_gradient_passes_straight_through(self):
        norm, plain = baselines.QuantizedBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        x, g = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        gradients = [
            torch.autograd.grad(each(leaf), leaf, g) for each in (norm, plain) for leaf in [x.clone().requires_grad_()]
        ]
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("module", [baselines, final_loss, gpt], ids=lambda module: module.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 == failed


def test_groups_of_the_gpt():
    assert {gpt.group_of(name) for name, _ in demo.GPT(None).named_parameters()} == {*gpt.GROUPS} - {common.ALL}


def test_results_are_written_under_a_stamp(tmp_path, capsys):
    common.write("some", {"a": 1}, tmp_path / "results")
    found = json.loads((tmp_path / "results" / "some.json").read_text())
    assert found == {
        "version": fewbit.__version__,
        "torch": torch.__version__,
        "date": found["date"],
        "threads": torch.get_num_threads(),
        "results": {"a": 1},
    }
    assert abs((date.today() - date.fromisoformat(found["date"])).days) <= 1  # midnight may have passed in between
    assert "some.json" in capsys.readouterr().out


def test_picture_of_calibration():
    ways = {way: {1: 0.2 * factor, 2: 0.1 * factor} for way, factor in (("shipped", 1.0), ("calibrated", 0.9))}
    errors = {"uniform": {"held_out": 0.1}, "allocated": {"held_out": 0.08}}
    results = {"tables": {"GELU": ways, "GELU and linear": ways}, "allocation": {"GELU": {2: errors, 3: errors}}}
    figure, drawn = pictures.plot_calibration_study(results), io.BytesIO()
    figure.savefig(drawn)
    assert drawn.getvalue().startswith(b"\x89PNG")
    line = next(line for line in figure.axes[0].lines if line.get_label() == "GELU, calibrated")
    assert line.get_ydata() == pytest.approx([0.9, 0.9])


@pytest.mark.slow
class TestTinyStudies:
    def test_calibration(self, screen, monkeypatch):
        monkeypatch.setattr(calibration, "BITS", (2,))
        torch.manual_seed(0)
        model, data = demo.GPT(None), calibration.batches(11, 1)
        results = calibration.tables(screen, model, calibration.Judge(model, data), data)
        assert set(results["GELU"]) == {"shipped", "calibrated", "by gradient"}
        assert results["GELU and linear"]["calibrated"][2] < results["GELU and linear"]["shipped"][2]
        assert "by gradient" in printed(screen)

    def test_gpt_memory(self, screen):
        results = gpt.memory(screen, widths=(128,), batch=2)["128"]
        assert results["bfloat16, exact"]["total"] + 1 == pytest.approx(16, abs=0.15)
        assert results["bfloat16, 4 bits"]["total"] <= 6
        assert "attention" in printed(screen)

    def test_gpt_errors(self, screen):
        torch.manual_seed(0)
        results = gpt.errors(screen, demo.GPT(None), batches=2)
        errors = {label: each[common.ALL] for label, each in results["errors"].items()}
        assert errors["joint codes, 5 bits"] < errors["joint codes, 4 bits"] < errors["joint codes, 3 bits"] < 0.5
        pictures.plot_errors_beside_noise(results["noise"], results["errors"], gpt.GROUPS).savefig(io.BytesIO())

    def test_systematic_part(self, screen):
        torch.manual_seed(0)
        results = fidelity.systematic(screen, demo.GPT(None), batches=4, bits=(1, 4))
        assert results["4 bits"].keys() >= {"head", "blocks.*.norm1", common.ALL}
        assert results["4 bits"][common.ALL] < results["1 bits"][common.ALL] < 1
        assert "blocks.*.norm1" in printed(screen)

    def test_gpt_training(self, screen):
        results = gpt.training(screen, steps=2)
        assert results["exact"]["losses"][0] == results["4 bits"]["losses"][0]  # forward is exact

    def test_resnet(self, screen):
        results = resnet.accuracy(screen, seeds=1, epochs=1, widths=(8, 8), blocks=1)
        assert set(results) == {*resnet.CODED, *resnet.NAIVE}
        assert results["joint codes, 4 bits"]["kept_bytes"]["all"] < results["exact"]["kept_bytes"]["all"] / 6

    def test_swiglu(self, screen):
        results = swiglu.memory(screen, width=64, hidden=128)
        assert results["bfloat16, exact"]["bits"]["all but the input"] == 64
        assert results["bfloat16, 4 bits"]["bits"]["all but the input"] <= 9

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
    def test_huggingface(self, screen):
        found = huggingface.compare_all(screen, ["Llama"], steps=2)["Llama"]
        assert found["bits equal"]
        assert found["keys equal"]
        assert found["losses"]["exact"][0] == found["losses"]["coded"][0]
        assert found["kept_bytes"]["coded"] < found["kept_bytes"]["exact"] / 2
        assert "Llama" in printed(screen)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_planner_is_studied_beside_what_is_measured():
    found = planner.study(planner.NETWORKS["GELU MLP"], True, False, {"activation": 3})
    assert found["units"] == {"exact": 2, **dict.fromkeys(planner.COLUMNS[1:], 1.09375 + 2**-19)}  # and the number of the rung
    assert found["advice"]["1"][0] == "code"


@pytest.mark.usefixtures("fresh_compiler")
def test_the_planner_is_studied_where_codes_do_not_pay():
    units = planner.study(planner.NETWORKS["ReLU MLP"], True, False, {"activation": 3})["units"]
    assert units["exact"] == units["pays, predicted"] == units["pays, measured"] == 1
    assert units["measured"] == 1.09375 == pytest.approx(units["predicted"], rel=1e-4)


class TestWorkingSizes:
    @pytest.mark.parametrize("name", working_sizes.CASES)
    def test_models_of_hugging_face(self, name, monkeypatch):
        monkeypatch.setattr(working_sizes, "BATCH", 1)
        monkeypatch.setattr(working_sizes, "TOKENS", 8)
        subject = getattr(working_sizes, name)()
        levels = {"resnet18": [4, 8, 16], "convnext": [4, 18]}.get(name, [6])
        assert [len(level) for level in blocks(subject.model)] == levels
        assert min(each.size(-1) for each in subject.batch.values()) in (8, 128, 224)
        Step(subject)()
        assert all(each.grad is not None for each in subject.model.parameters())

    @pytest.mark.slow
    def test_table(self, screen, monkeypatch):
        monkeypatch.setattr(working_sizes, "TOKENS", 64)
        models = {name: working_sizes.MODELS[name] for name in ("GPT-2", "ResNet, digits")}
        found = working_sizes.compare_all(screen, models, repeats=1)
        for each in found.values():
            assert each["coded"]["kept"] < each["checkpoint"]["kept"] + 0.2
            assert each["coded"]["calls"] < 2
        assert "ResNet, digits" in printed(screen)

    def test_digits(self):
        subject = working_sizes.digits()
        assert [each.shape[0] for each in subject.batch] == [resnet.BATCH] * 2
        assert [len(level) for level in blocks(subject.model)] == [9]
        (loss,) = Step(subject).forward()
        assert 2 < loss < 3  # near log 10


class TestFinalLoss:
    def test_the_rate_rises_and_falls(self):
        rates = [final_loss.rate(step, 120) for step in range(120)]
        assert rates[:10] == sorted(rates[:10])
        assert rates[9:] == sorted(rates[9:], reverse=True)
        assert (max(rates), rates[-1]) == (1e-3, pytest.approx(2e-5, rel=0.02))

    def test_starts_differ_by_a_hundredth(self):
        first, second = (final_loss.start(number).head.weight.detach() for number in (0, 1))
        assert float((second - first).std() / first.std()) == pytest.approx(0.01, rel=0.02)

    @pytest.mark.slow
    def test_finished_runs_are_not_run_again(self, screen, tmp_path, monkeypatch):
        runs = final_loss.run_all(screen, ["exact", "2"], starts=1, orders=1, steps=2, directory=tmp_path)
        exact, coded = runs
        assert exact["means"][0] == coded["means"][0]  # forward is exact
        assert exact["loss"] == exact["means"][-1] != coded["loss"]
        monkeypatch.setattr(final_loss, "train", lambda model, steps, order: [1.0] * steps)
        runs = final_loss.run_all(screen, ["exact", "2"], starts=2, orders=1, steps=2, directory=tmp_path)
        assert runs == [exact, coded, *(each for each in runs if each["start"] == 1)]
        assert [each["loss"] for each in runs[2:]] == [1.0, 1.0]
        assert json.loads((tmp_path / "final_loss.json").read_text())["results"]["runs"] == runs

    def test_distance_is_that_of_means_by_order(self):
        losses = {("exact", 0): [1.0, 1.2], ("exact", 1): [2.0, 2.2], ("4", 0): [1.3], ("4", 1): [2.1, 2.3]}
        runs = [
            {"label": label, "order": order, "start": start, "steps": 9, "loss": loss, "held_out": loss}
            for (label, order), each in losses.items()
            for start, loss in enumerate(each)
        ]
        found, error = final_loss.distance(runs, "4") or (None, None)
        assert found == pytest.approx((1.3 - 1.1 + 2.2 - 2.1) / 2 / 1.6)
        assert error == pytest.approx((0.02 * (1 / 2 + 1 + 1 / 2 + 1 / 2)) ** 0.5 / 2 / 1.6)
        assert final_loss.distance(runs, "exact") is None
        assert "9.38%" in terminal.text(final_loss.table(runs, 9), 100)


class TestRecurrent:
    def test_batches_have_as_many_characters(self):
        for steps in (32, 256):
            characters, following = recurrent.sample(steps, torch.Generator().manual_seed(0))
            assert characters.shape == following.shape == (recurrent.CHARACTERS // steps, steps)
            assert torch.equal(characters[:, 1:], following[:, :-1])

    @pytest.mark.slow
    def test_errors_and_their_picture(self, screen):
        found = recurrent.errors(screen, ["GRU"], [16, 32], number=2)
        for by_steps in found["GRU"].values():
            errors = list(by_steps["errors"].values())
            assert errors == sorted(errors, reverse=True)
            assert 0 < errors[-1] < 0.02
        assert len(recurrent.plot(found).axes) == 1
        assert recurrent.plot(json.loads(json.dumps(found)))  # as it is read from the file

    def test_kept(self, screen):
        found = recurrent.kept(screen, steps=16)
        assert 0 < found["LSTM"]["shares"][4] < found["GRU"]["shares"][4] < 0.12
        assert "LSTM" in printed(screen)

    def test_times(self, screen):
        found = recurrent.times(screen, [(4, 2, 8)], rounds=2)
        assert set(found) == set(recurrent.KINDS)
        assert all(each["least"] <= each["ratio"] <= each["most"] for by_size in found.values() for each in by_size.values())


@pytest.mark.slow
# PEFT uses a name that transformers 5 deprecates
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora(screen, monkeypatch):
    monkeypatch.setattr(lora, "ADAPTERS", {"LoRA, dropout": lora.ADAPTERS["LoRA, dropout"]})
    monkeypatch.setattr(lora, "BATCHES", 2)
    found = lora.compare_all(screen, ["Llama"], [])["Llama"]["LoRA, dropout"]
    assert found["before"] == found["after"]
    assert found["after"]["codes"] == 1
    assert found["after"]["fidelity"][lora.MORE]["error"] < found["after"]["fidelity"][lora.BITS]["error"]
    assert "both" in printed(screen)


@pytest.mark.slow
def test_frontier(screen, monkeypatch):
    monkeypatch.setattr(frontier, "SHARES", (0.5, 0.25))
    monkeypatch.setattr(frontier, "ROUNDS", 1)
    found = frontier.compare(models.gpt(3, 64, 4, 64), screen, "a GPT")
    assert len(found) == 2
    for each in found:
        assert each["measured peak"] == pytest.approx(each["planned peak"], rel=0.15)
        assert each["planned peak"] <= each["budget"]
        assert each["measured time"] > 0
    assert "a GPT" in printed(screen)
