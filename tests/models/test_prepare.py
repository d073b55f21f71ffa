"""Preparing a model in one call: what is coded, with how many bits, and what the report says."""

import pytest
import torch
from support import gradients, squares, types
from torch import nn
from torch.nn import functional as F

import fewbit
from fewbit.demo import Block
from fewbit.errors import DesignError, InputError


class Classifier(nn.Module):
    """Takes sequences and gives logits. Batches also hold targets."""

    def __init__(self, width=32, classes=5):
        super().__init__()
        self.body = nn.Sequential(*(Block(nn.GELU(), width, 2) for _ in range(2)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def loss(model, batch):
    x, targets = batch
    return F.cross_entropy(model(x), targets)


def batches(number=4, samples=32):
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randint(5, (samples,), generator=generator) for _ in range(number)]
    return [(torch.randn(samples, 16, 32, generator=generator) + 0.1 * each[:, None, None], each) for each in targets]


def model():
    torch.manual_seed(0)
    return Classifier()


def test_a_safe_model():
    found = model()
    done = fewbit.prepare(found, batches(), loss, "1 GiB", optimizer="adamw")
    assert done.fidelity.level == "safe"
    assert done.fits
    assert done.verdict.startswith("safe: keeps ")
    assert done.next_step.startswith("train")
    assert done.peaks[1].bytes < done.peaks[0].bytes
    assert isinstance(found.head, fewbit.Linear)
    text = str(done)
    assert "1.00 GiB is met" in text
    assert "next: train" in text
    assert fewbit.fidelity(found, batches(), loss).level == "safe"


def test_bits_rise_until_it_is_safe():
    """One bit is far from enough: each bit halves the error."""
    coarse = fewbit.convert(model(), bits=1)
    assert fewbit.fidelity(coarse, batches(), loss).level != "safe"
    found = model()
    done = fewbit.prepare(found, batches(), loss, bits=1)
    assert done.fidelity.level == "safe"
    assert done.kept[1] == fewbit.memory(found, batches()[0], loss_fn=loss).activation_bytes > done.plan.best_bytes
    assert min(dict(done.setting.by_kind).values()) > 1
    bits = {name: each.bits for name, each in found.named_modules() if isinstance(each, fewbit.Linear)}
    assert all(number >= done.setting.bits_of("linear") for number in bits.values())
    raised = {name for name, number in bits.items() if number > done.setting.bits_of("linear")}
    assert raised == {name for name in done.raised if name in bits}


def test_a_budget_that_is_too_small():
    done = fewbit.prepare(model(), batches(), loss, 1000)
    assert done.fits is False
    assert "exceeded" in str(done)
    assert "smaller batch" in done.next_step


def test_blocks_are_recomputed_where_codes_alone_do_not_fit():
    """Recomputed blocks count for the budget, and their gradients for the verdict."""
    found = model()
    report = fewbit.memory(found, batches()[0], loss_fn=loss)
    exact, coded = report.peak.bytes, report.plan().peak.bytes
    done = fewbit.prepare(found, batches(), loss, int(0.97 * coded))
    assert done.peaks[0].bytes == exact
    assert done.fits
    assert done.plan.choice.recomputed
    assert done.fidelity.level == "safe"
    assert "recompute" in str(done)


def test_a_model_that_looks_at_numbers():
    """It does not run on fake tensors: there is no peak, but everything else."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 5))

        def forward(self, x):
            return self.body(x) if x.sum() < 1e9 else x

    done = fewbit.prepare(Looks(), [torch.randn(64, 32) for _ in range(3)], squares, "1 GiB")
    assert done.peaks is done.fits is None
    assert "cannot be checked" in str(done)
    assert done.verdict.startswith("safe: keeps ")
    assert done.to_dict()["peaks"] is None


def test_a_former_conversion_is_undone():
    found = fewbit.convert(model(), bits=1)
    done = fewbit.prepare(found, batches(), loss)
    assert done.peaks[0].bytes > done.peaks[1].bytes
    assert done.peaks[0].bytes == fewbit.prepare(model(), batches(), loss).peaks[0].bytes


def test_what_is_exported():
    done = fewbit.prepare(model(), batches(), loss)
    found = done.to_dict()
    assert found["kept"][1] < found["kept"][0]
    assert found["verdict"] == done.verdict
    assert found["peaks"][1]["bytes"] < found["peaks"][0]["bytes"]
    assert [row["group"] for row in done.rows()] == [part.group for part in done.fidelity.parts]
    assert done.fits is None
    assert done.plot().axes


def test_a_model_in_which_nothing_pays():
    found = nn.Linear(4, 4)
    done = fewbit.prepare(found, [torch.randn(8, 4) for _ in range(2)], squares)
    assert type(found) is nn.Linear
    assert "coding pays nowhere in this model" in done.next_step


def test_the_same_as_what_is_saved(tmp_path):
    found, x = model(), batches(1)[0][0]
    fewbit.prepare(found, batches(), loss, bits=2)
    fewbit.save(found, tmp_path / "conversion.json")
    other = fewbit.load(model(), tmp_path / "conversion.json")
    one, two = gradients(found, x), gradients(other, x)
    assert all(torch.equal(each, two[name]) for name, each in one.items())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": batches(1)}, InputError, "two batches"),
        ({"batches": 3}, InputError, "iterable"),
        ({"budget": "much"}, InputError, "24 GiB"),
        ({"bits": 9}, DesignError, "1 to 8"),
        ({"loss_fn": None}, InputError, "batch"),
        ({"filter_fn": 3}, InputError, "filter_fn"),
        ({"optimizer": "adamm"}, InputError, "adamw"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, InputError, "one element"),
    ],
    ids=["one batch", "no batches", "budget", "bits", "no loss", "filter", "optimizer", "loss"],
)
def test_errors_leave_the_model_as_it_was(change, error, words):
    found = model()
    arguments = {"batches": batches(), "loss_fn": loss, **change}
    with pytest.raises(error, match=words):
        fewbit.prepare(found, arguments.pop("batches"), **arguments)
    assert types(found) == types(model())


def test_where_the_peak_does_not_fall_it_says_so():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 8))  # few rows: gradients of weights are the peak
    batches = [torch.randn(32, 1024) for _ in range(3)]
    done = fewbit.prepare(model, batches, lambda model, batch: model(batch).square().mean())
    assert done.kept[1] < done.kept[0]
    assert done.peaks[1].bytes == done.peaks[0].bytes
    assert "fewbit.revert(model)" in done.next_step
