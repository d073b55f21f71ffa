"""allocate: the knapsack against brute force, predictions against measurements, budgets, and models left as they were."""

import copy
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewbit
from fewbit.errors import DesignError, InputError
from fewbit.measuring import saved_storages
from fewbit.models.calibration.knapsack import choose


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.SiLU())
    return nn.Sequential(*layers, nn.Linear(16, 4))


def batches(number=2, size=512):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for _ in range(number)]


def loss(model, batch):
    return model(batch).square().mean()


def gradient(model, batch):
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss(model, batch), list(model.parameters()))]).double()


def kept_bytes(model, batch):
    seen = {}
    with saved_storages(seen):
        y = model(batch)
    total = sum(seen.values())
    del y
    return total


def snapshot(model):
    return [(type(module), {name: id(value) for name, value in vars(module).items()}) for module in model.modules()]


class TestKnapsack:
    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def test_against_brute_force(self, data):
        sizes, costs = st.integers(0, 60), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 1e-4, 0.5, 1e3]))
        choices = st.dictionaries(st.integers(1, 8), st.tuples(sizes, costs), min_size=1, max_size=4)
        items = data.draw(st.lists(choices, min_size=1, max_size=5))
        budget = data.draw(st.integers(0, 200))
        fitting = [
            sum(item[choice][1] for item, choice in zip(items, picked, strict=True))
            for picked in itertools.product(*items)
            if sum(item[choice][0] for item, choice in zip(items, picked, strict=True)) <= budget
        ]
        if not fitting:
            with pytest.raises(DesignError, match="the budget must be at least"):
                choose(items, budget)
            return
        found = choose(items, budget)
        assert sum(item[choice][0] for item, choice in zip(items, found, strict=True)) <= budget
        cost = sum(item[choice][1] for item, choice in zip(items, found, strict=True))
        assert cost == pytest.approx(
            min(fitting), rel=1e-9, abs=1e-9 * max(cost for item in items for _, cost in item.values())
        )

    def test_sizes_of_real_layers(self):
        """Bytes of billions, and errors that fall by a factor of four for each bit."""
        generator = torch.Generator().manual_seed(0)
        weights = (10 ** (4 * torch.rand(40, generator=generator))).tolist()
        elements = (torch.randint(1, 9, (40,), generator=generator) * 2**27).tolist()
        items = [{b: (n * b // 8, w * 4.0**-b) for b in range(1, 9)} for n, w in zip(elements, weights, strict=True)]
        budget = sum(n * 3 // 8 for n in elements)
        found = choose(items, budget)
        used = sum(item[b][0] for item, b in zip(items, found, strict=True))
        assert used <= budget
        total = sum(item[b][1] for item, b in zip(items, found, strict=True))
        for i, j in itertools.permutations(range(40), 2):  # no exchange of bits between two layers is better
            for up, down in itertools.product(range(1, 8), repeat=2):
                changed = {i: found[i] + up, j: found[j] - down}
                if changed[i] > 8 or changed[j] < 1:
                    continue
                sizes, costs = zip(*(items[k][changed.get(k, found[k])] for k in (i, j)), strict=True)
                before = [items[k][found[k]] for k in (i, j)]
                if used + sum(sizes) - sum(size for size, _ in before) <= budget:
                    assert sum(costs) - sum(cost for _, cost in before) >= -1e-6 * total

    def test_nothing_is_spent_where_it_gains_nothing(self):
        assert choose([{1: (1, 0.0), 8: (8, 0.0)}, {1: (1, 1.0), 2: (2, 0.5), 3: (3, 0.5)}], 100) == [1, 2]
        assert choose([], 0) == []


class TestAllocate:
    def test_bits_bytes_and_tables(self, net):
        exact = copy.deepcopy(net)
        allocation = fewbit.allocate(net, batches(), loss, "8%", bits=range(1, 7))
        assert list(allocation.bits) == ["2", "4", "6"]
        assert allocation.bits["4"] == 1  # ReLU is exact
        assert [layer.elements for layer in allocation.layers] == [512 * 32, 512 * 64, 512 * 16]
        assert allocation.exact_bytes == 4 * 512 * (32 + 64 + 16)
        assert allocation.outcome.bytes <= allocation.budget == int(0.08 * allocation.exact_bytes)
        for layer, name in zip(allocation.layers, allocation.bits, strict=True):
            assert net.get_submodule(name).table.bits == layer.bits
            assert layer.bytes == layer.elements * layer.bits // 8
        assert allocation.outcome.measured <= allocation.uniform.measured
        assert torch.equal(net(batches()[0]), exact(batches()[0]))

    def test_predictions_hold(self, net):
        """One layer alone, and all together, against the exact model's gradient."""
        exact, (batch, *_) = copy.deepcopy(net), batches()
        true = gradient(exact, batch)
        allocation = fewbit.allocate(net, batches(), loss, "10%", bits=(2,))
        error = float((gradient(net, batch) - true).norm() / true.norm())
        assert allocation.outcome.measured == pytest.approx(error, rel=0.05)
        assert allocation.outcome.predicted == pytest.approx(error, rel=0.3)
        tables = {layer.name: layer.table for layer in allocation.calibration.layers}
        for layer in allocation.layers:
            alone = fewbit.convert(copy.deepcopy(exact), 1, filter_fn=lambda _, name, layer=layer: name == layer.name)
            alone.get_submodule(layer.name).bits, alone.get_submodule(layer.name).table = None, tables[layer.name]
            error = float((gradient(alone, batch) - true).norm() / true.norm())
            assert layer.error(2) == pytest.approx(error, rel=0.1, abs=1e-6)

    def test_coded_layers_take_part(self, net):
        batch = batches()[0]
        allocation = fewbit.allocate(net, batches(), loss, "12%", inputs=True, bits=(1, 2, 3, 4))
        assert set(allocation.bits) == {"0", "1", "2", "4", "6"}  # the other linear layers read codes of what is before them
        assert net[3].bits == 4  # as converted
        assert net[3].table is None
        kept = {bits: kept_bytes(_with_bits(net, bits), batch) for bits in (1, 4)}
        elements = sum(layer.elements for layer in allocation.layers)
        assert kept[4] - kept[1] == pytest.approx(elements * 3 / 8, rel=0.01)

    def test_without_a_loss(self, net):
        allocation = fewbit.allocate(net, batches(), budget="8%", bits=(1, 2, 4))
        assert allocation.outcome.measured <= allocation.uniform.measured

        class WithLoss(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = copy.deepcopy(net)

            def forward(self, x):
                y = self.inner(x)
                return {"logits": y, "loss": y.square().mean()}

        model = WithLoss()
        by_own = fewbit.allocate(fewbit.revert(model), batches(), budget="8%", bits=(1, 2, 4))
        given = fewbit.allocate(fewbit.revert(net), batches(), loss, "8%", bits=(1, 2, 4))
        assert list(by_own.bits.values()) == list(given.bits.values())

    def test_budgets(self, net):
        largest = 512 * (32 + 64 + 16)
        assert set(fewbit.allocate(net, batches(), loss, 10 * largest, bits=(2, 4)).bits.values()) <= {2, 4}
        least = 2 * largest // 8
        assert set(fewbit.allocate(net, batches(), loss, least, bits=(2, 4)).bits.values()) == {2}
        before = snapshot(net)
        for budget, message in (
            (least - 1, rf"at least {least} bytes \(6.25% of {4 * largest}\), the fewest bits in every layer; got {least - 1}"),
            ("1%", "the budget must be at least"),
            ("much", "budget must be a positive number of bytes or a text such as '30%', got 'much'"),
            ("-3%", "budget must be"),
            (0, "budget must be"),
            (True, "budget must be"),
            (0.3, "budget must be"),
        ):
            with pytest.raises(DesignError, match=message):
                fewbit.allocate(net, batches(), loss, budget, bits=(2, 4))
            assert snapshot(net) == before

    def test_wrong_arguments_leave_the_model_as_it_was(self, net):
        before = snapshot(net)
        for error, message, call in (
            (InputError, "allocate takes a torch.nn.Module", lambda: fewbit.allocate(3, batches())),
            (DesignError, "bits must be an integer", lambda: fewbit.allocate(net, batches(), bits=(0,))),
            (DesignError, "at least one number of bits", lambda: fewbit.allocate(net, batches(), bits=())),
            (InputError, "no batch", lambda: fewbit.allocate(net, iter(()))),
            (
                InputError,
                "finite and not zero",
                lambda: fewbit.allocate(net, batches(), lambda m, x: 0 * m(x).sum(), bits=(2,)),
            ),
            (InputError, "coded or can be", lambda: fewbit.allocate(nn.Linear(2, 2), batches())),
            (RuntimeError, "half way", lambda: fewbit.allocate(net, batches(), _failing(4), bits=(2,))),
        ):
            with pytest.raises(error, match=message):
                call()
            assert snapshot(net) == before

    def test_state_is_untouched(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.SiLU())
        fewbit.convert(model, 3)
        state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        allocation = fewbit.allocate(model, batches(), loss, "10%", bits=(2, 3))
        assert allocation.outcome.measured < 0.5  # dropout drops the same in all passes
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

        model = Twice()
        allocation = fewbit.allocate(model, batches(), loss, "10%", bits=(1, 3))
        assert list(allocation.bits) == ["act"]
        assert allocation.layers[0].elements == 2 * 512 * 8
        assert model.never.bits == 3

    def test_goes_to_a_file_and_back(self, net, tmp_path):
        other = copy.deepcopy(net)
        allocation = fewbit.allocate(net, batches(), loss, "12%", inputs=True, bits=(2, 4))
        allocation.calibration.save(tmp_path / "tables.json")
        fewbit.Calibration.load(tmp_path / "tables.json").install(other)
        for name, bits in allocation.bits.items():
            assert other.get_submodule(name).table == net.get_submodule(name).table
            assert other.get_submodule(name).table.bits == bits

    def test_report(self, net, tmp_path):
        allocation = fewbit.allocate(net, batches(), loss, "8%", bits=(1, 2, 3))
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


def _nothing(model, batch):
    return 0 * model(batch).sum()


def _failing(calls):
    """A loss that fails at that call."""
    counter = itertools.count(1)

    def fail(model, batch):
        if next(counter) == calls:
            raise RuntimeError("half way")
        return loss(model, batch)

    return fail
