"""allocate: predictions compared with measurements, budgets, and models that stay as they were."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from support import bytes_kept, flat, gradients
from torch import nn

import fewbit
from fewbit.errors import DesignError, InputError
from fewbit.models.calibration.allocate import parse_budget


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.SiLU())
    return nn.Sequential(*layers, nn.Linear(16, 4))


@pytest.fixture
def coded(net):
    """The same model with only its activations coded."""
    return fewbit.convert(net, bits={"activation": 4})


def batches(number=2, size=512):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for _ in range(number)]


def loss(model, batch):
    return model(batch).square().mean()


def gradient(model, batch):
    return flat(gradients(model, batch, loss)).double()


def snapshot(model):
    return [(type(module), {name: id(value) for name, value in vars(module).items()}) for module in model.modules()]


class TestAllocate:
    def test_bits_bytes_and_tables(self, coded):
        exact = copy.deepcopy(coded)
        allocation = fewbit.allocate(coded, batches(), loss, "8%", choices=range(1, 7))
        assert list(allocation.bits) == ["2", "4", "6"]
        assert allocation.bits["4"] == 1  # ReLU is exact
        assert [layer.elements for layer in allocation.layers] == [512 * 32, 512 * 64, 512 * 16]
        assert allocation.exact_bytes == 4 * 512 * (32 + 64 + 16)
        assert allocation.outcome.bytes <= allocation.budget == int(0.08 * allocation.exact_bytes)
        for layer, name in zip(allocation.layers, allocation.bits, strict=True):
            assert coded.get_submodule(name).table.bits == layer.bits
            assert layer.bytes == layer.elements * layer.bits // 8
        assert allocation.outcome.measured <= allocation.uniform.measured
        assert torch.equal(coded(batches()[0]), exact(batches()[0]))

    def test_predictions_hold(self, coded):
        """One layer alone, and all together, compared with the exact model's gradient."""
        exact, (batch, *_) = fewbit.revert(copy.deepcopy(coded)), batches()
        true = gradient(exact, batch)
        allocation = fewbit.allocate(coded, batches(), loss, "10%", choices=(2,))
        error = float((gradient(coded, batch) - true).norm() / true.norm())
        assert allocation.outcome.measured == pytest.approx(error, rel=0.05)
        assert allocation.outcome.predicted == pytest.approx(error, rel=0.3)
        tables = {layer.name: layer.table for layer in allocation.calibration.layers}
        for layer in allocation.layers:
            alone = fewbit.convert(copy.deepcopy(exact), {"activation": 1}, lambda _, name, layer=layer: name == layer.name)
            alone.get_submodule(layer.name).bits, alone.get_submodule(layer.name).table = None, tables[layer.name]
            error = float((gradient(alone, batch) - true).norm() / true.norm())
            assert layer.error(2) == pytest.approx(error, rel=0.1, abs=1e-6)

    def test_coded_layers_take_part(self, net):
        batch = batches()[0]
        allocation = fewbit.allocate(net, batches(), loss, "12%", choices=(1, 2, 3, 4))
        # the first linear layer reads the batch, and the others read codes of what is before them
        assert set(allocation.bits) == {"1", "2", "4", "6"}
        assert net[3].bits == 5  # a model that is not converted gets every kind
        assert net[3].table is None
        kept = {bits: bytes_kept(_with_bits(net, bits), batch) for bits in (1, 4)}
        elements = sum(layer.elements for layer in allocation.layers)
        assert kept[4] - kept[1] == pytest.approx(elements * 3 / 8, rel=0.01)

    def test_without_a_loss(self, coded):
        net = fewbit.revert(copy.deepcopy(coded))
        allocation = fewbit.allocate(coded, batches(), budget="8%", choices=(1, 2, 4))
        assert allocation.outcome.measured <= allocation.uniform.measured

        class WithLoss(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = copy.deepcopy(net)

            def forward(self, x):
                y = self.inner(x)
                return {"logits": y, "loss": y.square().mean()}

        activations = {"activation": 4}
        by_own = fewbit.allocate(fewbit.convert(WithLoss(), activations), batches(), budget="8%", choices=(1, 2, 4))
        given = fewbit.allocate(fewbit.convert(net, activations), batches(), loss, "8%", choices=(1, 2, 4))
        assert list(by_own.bits.values()) == list(given.bits.values())
        model, (batch, *_) = fewbit.convert(WithLoss(), activations), batches()
        measured = fewbit.allocate(model, batches(), choices=(2,)).outcome.measured
        ours, true = (gradient(each, batch) for each in (model.inner, fewbit.revert(net)))
        assert measured == pytest.approx(float((ours - true).norm() / true.norm()), rel=0.05)  # of the model's own loss

    def test_batches_may_be_tensors_arguments_or_names(self, coded):
        data, found = batches(), []
        for form in (lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}):
            allocation = fewbit.allocate(copy.deepcopy(coded), map(form, data), budget="8%", choices=(1, 2))
            found.append((allocation.bits, allocation.outcome))
        assert found == [found[0]] * 4
        with pytest.raises(InputError, match="the model does not take this batch"):
            fewbit.allocate(coded, [(each, each) for each in data], choices=(1, 2))

    def test_budgets(self, coded):
        exact = 4 * 512 * (32 + 64 + 16)
        largest, least = exact // 4, exact // 16  # with 8 bits, with 2
        assert set(fewbit.allocate(coded, batches(), loss, 10 * largest, choices=(2, 4)).bits.values()) <= {2, 4}
        for budget in (least, f"{least} B", 0.0625, "6.25%", f"{least / 1024} KiB"):
            allocation = fewbit.allocate(coded, batches(), loss, budget, choices=(2, 4))
            assert (allocation.budget, set(allocation.bits.values())) == (least, {2})
        before = snapshot(coded)
        for budget, got in (
            (
                least - 1,
                rf"at least {least} bytes \(6.25% of {exact}\), which the fewest bits in every layer take; got {least - 1}",
            ),
            ("1%", rf"the budget must be at least {least} bytes .*; got {exact // 100}"),
            ("2 KiB", rf"the budget must be at least {least} bytes .*; got 2048"),
            (0.06, rf"the budget must be at least {least} bytes .*; got {int(0.06 * exact)}"),
        ):
            with pytest.raises(DesignError, match=got):
                fewbit.allocate(coded, batches(), loss, budget, choices=(2, 4))
            assert snapshot(coded) == before

    def test_the_budget_is_thirty_percent_unless_given(self, coded):
        allocation = fewbit.allocate(coded, batches(), loss, choices=(1, 2))
        assert allocation.budget == int(0.3 * allocation.exact_bytes)

    @pytest.mark.parametrize(
        ("budget", "expected"),
        [
            (0.3, 3_000_000_000),
            (1.0, 10_000_000_000),
            (np.float32(0.5), 5_000_000_000),
            ("30%", 3_000_000_000),
            (" 12.5 % ", 1_250_000_000),
            ("150%", 15_000_000_000),
            (1, 1),
            (2**40, 2**40),
            (np.int64(7), 7),
            ("4096", 4096),
            ("4096 B", 4096),
            ("2KiB", 2048),
            ("512 MiB", 512 * 2**20),
            ("512 mib", 512 * 2**20),
            ("1.5 GB", 1_500_000_000),
            ("0.5 TiB", 2**39),
            ("3 kB", 3000),
        ],
        ids=repr,
    )
    def test_forms_of_a_budget(self, budget, expected):
        assert parse_budget(budget)(10_000_000_000) == expected

    @pytest.mark.parametrize(
        "budget",
        [
            *("much", "", "%", "-3%", "0%", "512 MiBs", "512 bits", "1e3", "3 %%", "0.3 0.4"),
            *(0, -1, 0.0, -0.3, 1.5, math.inf, math.nan, True, None, [1], b"30%"),
        ],
        ids=repr,
    )
    def test_what_is_no_budget(self, coded, budget):
        before = snapshot(coded)
        with pytest.raises(DesignError) as raised:
            fewbit.allocate(coded, batches(), loss, budget)
        rule = "budget must be a share such as 0.3 or '30%', or bytes such as 1048576 or '512 MiB'; got "
        assert str(raised.value) == rule + repr(budget)
        assert snapshot(coded) == before

    def test_wrong_arguments_leave_the_model_as_it_was(self, net):
        before = snapshot(net)
        for error, message, call in (
            (InputError, "allocate takes a torch.nn.Module first, got int", lambda: fewbit.allocate(3, batches())),
            (DesignError, "bits must be an integer", lambda: fewbit.allocate(net, batches(), choices=(0,))),
            (DesignError, "at least one number of bits", lambda: fewbit.allocate(net, batches(), choices=())),
            (
                DesignError,
                r"choices must be the numbers .* such as \(2, 3, 4\), got 4",
                lambda: fewbit.allocate(net, batches(), choices=4),
            ),
            (DesignError, "bits must be an integer", lambda: fewbit.allocate(net, batches(), choices=(2, 9))),
            (InputError, "goes through an iterable of batches.*got function", lambda: fewbit.allocate(net, loss, batches())),
            (InputError, "loss_fn must be a function of the model", lambda: fewbit.allocate(net, batches(), "30%")),
            (TypeError, "inputs", lambda: fewbit.allocate(net, batches(), inputs=True)),
            (TypeError, "bits", lambda: fewbit.allocate(net, batches(), bits=(2, 3))),
            (InputError, "needs a batch, and `batches` gave none", lambda: fewbit.allocate(net, iter(()))),
            (
                InputError,
                "finite and not zero",
                lambda: fewbit.allocate(net, batches(), lambda m, x: 0 * m(x).sum(), choices=(2,)),
            ),
            (InputError, "that is coded, or that these bits could code", lambda: fewbit.allocate(nn.Flatten(), batches())),
            (RuntimeError, "half way", lambda: fewbit.allocate(net, batches(), _failing(4), choices=(2,))),
        ):
            with pytest.raises(error, match=message):
                call()
            assert snapshot(net) == before

    def test_state_is_untouched(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.SiLU())
        fewbit.convert(model, {"activation": 3})
        state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        allocation = fewbit.allocate(model, batches(), loss, "10%", choices=(2, 3))
        assert allocation.outcome.measured < 0.5  # dropout draws the same mask in all passes
        assert torch.equal(torch.get_rng_state(), numbers)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_shared_modules_and_those_that_do_not_run(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.act, self.never = nn.Linear(8, 8), nn.GELU(), nn.SiLU()
                self.again = self.act

            def forward(self, x):
                return self.again(self.linear(self.act(self.linear(x))))

        model = fewbit.convert(Twice(), {"activation": 4})
        allocation = fewbit.allocate(model, batches(), loss, "10%", choices=(1, 3))
        assert list(allocation.bits) == ["act"]
        assert allocation.layers[0].elements == 2 * 512 * 8
        assert model.never.bits == 4

    def test_goes_to_a_file_and_back(self, net, tmp_path):
        other = copy.deepcopy(net)
        allocation = fewbit.allocate(net, batches(), loss, "12%", choices=(2, 4))
        allocation.calibration.save(tmp_path / "tables.json")
        fewbit.Calibration.load(tmp_path / "tables.json").install(other)
        for name, bits in allocation.bits.items():
            assert other.get_submodule(name).table == net.get_submodule(name).table
            assert other.get_submodule(name).table.bits == bits

    def test_report(self, coded, tmp_path):
        allocation = fewbit.allocate(coded, batches(), loss, "8%", choices=(1, 2, 3))
        assert json.loads(allocation.to_json()) == allocation.to_dict()
        assert allocation.totals()["bytes"] == sum(row["bytes"] for row in allocation.rows())
        predicted = sum(row["predicted_error"] ** 2 for row in allocation.rows()) ** 0.5
        assert allocation.totals()["predicted_error"] == pytest.approx(predicted)
        text = str(allocation)
        assert "all, measured" in text
        assert all(len(line) <= allocation.width for line in text.splitlines())
        allocation.plot(tmp_path / "a.png")


def _with_bits(model, bits):
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "table"):
            module.table, module.bits = None, bits
    return model


def _failing(calls):
    """A loss that fails at this call."""
    counter = itertools.count(1)

    def fail(model, batch):
        if next(counter) == calls:
            raise RuntimeError("half way")
        return loss(model, batch)

    return fail
