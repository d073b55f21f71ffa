"""calibrate: histograms against numpy's, tables against the shipped ones, files, and models that stay as they were."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewbit
from fewbit import activations
from fewbit.design.evaluate import errors_under
from fewbit.errors import DesignError, InputError, TableError, TableFileError
from fewbit.models.calibration.histogram import BINS, EDGES, StreamingHistogram, bins_of


class Net(nn.Module):
    """One SiLU at two places, a batch norm and dropout, and a GELU that never runs."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.silu = self.again = nn.SiLU()
        self.relu, self.tanh, self.unused = nn.ReLU(inplace=True), nn.Tanh(), nn.GELU()
        self.drop, self.last = nn.Dropout(0.25), nn.Linear(16, 2)

    def forward(self, x, scale=1.0):
        x = self.silu(self.norm(self.first(x)) * scale)
        return self.last(self.drop(self.tanh(3 * self.relu(self.again(self.second(x))))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batches(number=3, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 8, generator=generator) for _ in range(number)]


def loss(model, batch):
    return model(batch).square().mean()


def snapshot(model):
    state = {name: each.clone() for name, each in model.state_dict().items()}
    return state, [(type(module), set(vars(module)), module.training) for module in model.modules()]


def assert_same(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]


class TestHistogram:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_streamed_counts_are_those_of_numpy(self, dtype):
        generator = torch.Generator().manual_seed(0)
        parts = [(torch.randn(n, 3, generator=generator) * 10.0**k).to(dtype) for n, k in ((5, -3), (100, 0), (33, 5))]
        histogram = StreamingHistogram()
        for part in parts:
            histogram.add(part)
        together = torch.cat(parts).double().numpy().ravel()
        moved = np.abs(histogram.counts - np.histogram(together, EDGES)[0]).sum()
        assert moved <= (0 if dtype == torch.float64 else 4)  # arcsinh in float32 may fall on the other side of an edge
        assert histogram.elements == together.size
        assert histogram.mean == pytest.approx(together.mean(), rel=1e-6)
        assert histogram.std == pytest.approx(together.std(), rel=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
    def test_order_and_parts_do_not_matter(self, parts):
        one, other = StreamingHistogram(), StreamingHistogram()
        for part in parts:
            one.add(torch.tensor(part, dtype=torch.float64))
        other.add(torch.tensor([x for part in parts for x in part][::-1], dtype=torch.float64))
        np.testing.assert_array_equal(one.counts, other.counts)
        assert one.mean == pytest.approx(other.mean, rel=1e-9, abs=1e-6)
        assert one.std == pytest.approx(other.std, rel=1e-6, abs=1e-3)

    def test_what_is_not_finite_counts_apart(self):
        histogram = StreamingHistogram()
        histogram.add(torch.tensor([0.5, torch.nan, -torch.inf, torch.inf]))
        histogram.add(torch.tensor([torch.nan]))
        histogram.add(torch.empty(0))
        assert (histogram.elements, histogram.not_finite, histogram.counts.sum()) == (1, 4, 1)
        assert histogram.mean == 0.5

    def test_numbers_of_any_size_have_a_bin(self):
        for dtype in (torch.float16, torch.float32, torch.float64):
            info = torch.finfo(dtype)
            bins = bins_of(torch.tensor([info.min, -1.0, 0.0, info.tiny, 1.0, info.max, torch.nan], dtype=dtype)).tolist()
            assert bins == sorted(bins)
            assert bins[0] >= 0
            assert bins[-2] <= BINS - 1 < bins[-1]

    def test_gradients_are_counted_where_their_elements_lie(self):
        x, gradient = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 4)
        x[0, 0] = torch.nan
        histogram = StreamingHistogram()
        histogram.add_gradient(bins_of(x), gradient)
        expected = np.histogram(x.numpy(), EDGES, weights=gradient.double().numpy() ** 2)[0]
        np.testing.assert_allclose(histogram.squares, expected)

    def test_many_bins_are_merged(self):
        histogram = StreamingHistogram()
        histogram.add(torch.cat([torch.randn(1000), torch.tensor([-1e8, 3e7])]).double())
        weight = histogram.seen()
        assert weight.counts.size <= 4096
        assert weight.counts.sum() == 1002
        assert weight.domain[0] <= -1e8 < 3e7 <= weight.domain[1]

    @pytest.mark.parametrize("x", [[0.0], [5.0, 5.0], [1e-7, -1e-7], [1e8], [-3e9, 3e9]])
    def test_few_and_odd_samples_give_a_table(self, x):
        histogram = StreamingHistogram()
        histogram.add(torch.tensor(x))
        for channels in (("derivative",), ("derivative", "value")):
            table = fewbit.design("gelu", 3, weight=histogram.smoothed(), channels=channels)
            assert np.isfinite(table.levels).all()


class TestSmoothing:
    """Of 100 samples alone the outer levels would be those of single samples."""

    def error(self, weight, x):
        table = fewbit.design("gelu", 4, weight=weight)
        return np.sqrt(np.mean((table(x) - activations.get("gelu").df(x)) ** 2))

    def test_helps_where_samples_are_few_or_their_scale_changes(self):
        rng, histogram = np.random.default_rng(0), StreamingHistogram()
        histogram.add(torch.from_numpy(rng.standard_normal(100)))
        for scale in (1, 3):
            x = scale * rng.standard_normal(100_000)
            assert self.error(histogram.smoothed(), x) < self.error(histogram.seen(), x)

    def test_costs_little_where_samples_are_many(self):
        x, histogram = np.random.default_rng(0).standard_normal(200_000), StreamingHistogram()
        histogram.add(torch.from_numpy(x))
        assert self.error(histogram.smoothed(), x) < 1.02 * self.error(histogram.seen(), x)


class TestCalibrate:
    def test_shifted_layers_get_tables_of_their_own(self, net):
        net.first.weight.data.mul_(0.0)
        net.norm.bias.data.fill_(-2.0)
        net.norm.weight.data.fill_(0.1)
        calibration = fewbit.calibrate(net, batches(), bits=2)
        layers = {layer.name: layer for layer in calibration.layers}
        assert list(layers) == ["silu", "relu", "tanh", "unused"]
        assert layers["silu"].after[0] < layers["silu"].before[0]
        assert layers["silu"].elements == 2 * 3 * 64 * 16  # at both places
        assert layers["relu"].after == (0.0,)
        assert net.again is net.silu
        assert net.silu.table is layers["silu"].table

    @pytest.mark.parametrize("inputs", [None, 3])
    def test_error_is_that_of_direct_evaluation_and_never_above_the_shipped(self, net, inputs):
        seen = []
        net.silu.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().numpy().copy()))
        calibration = fewbit.calibrate(net, batches(), bits=3, inputs=inputs)
        x, layer, silu = np.concatenate([each.ravel() for each in seen]), calibration.layers[0], activations.get("silu")
        exact = [silu.df(x), silu.f(x)][: 1 + bool(inputs)]
        shipped = fewbit.load_table("silu", 3, channels=("derivative", "value") if inputs else "derivative")
        for table, errors in ((shipped, layer.before), (layer.table, layer.after)):
            for coded, true, error in zip(np.atleast_2d(table(x)), exact, errors, strict=True):
                assert np.sqrt(np.mean((coded - true) ** 2) / np.mean(true**2)) == pytest.approx(error, rel=0.05)
        histogram = StreamingHistogram()
        histogram.add(torch.from_numpy(x))
        of = [errors_under(histogram.seen(), table, silu)[0].sum() for table in (layer.table, shipped)]
        assert of[0] <= of[1]

    def test_bits_are_the_modules_own_unless_given(self, net):
        fewbit.convert(net, bits=2)
        net.tanh.bits = 4
        assert [layer.table.bits for layer in fewbit.calibrate(net, batches()).layers] == [2, 2, 4, 2]
        assert [layer.table.bits for layer in fewbit.calibrate(net, batches(), 1).layers] == [1, 1, 1, 1]
        assert all(type(module) is not nn.GELU for module in net.modules())

    def test_layers_that_never_ran_keep_their_table(self, net):
        calibration = fewbit.calibrate(net, batches(), bits=2)
        assert calibration.layers[-1].elements == 0
        assert calibration.layers[-1].table == fewbit.load_table("gelu", 2)
        assert "layers of which no elements were seen keep" in str(calibration)

    @pytest.mark.parametrize("loss_fn", [None, loss])
    @pytest.mark.parametrize("training", [True, False])
    def test_state_is_untouched(self, net, loss_fn, training):
        fewbit.convert(net, bits=2).train(training)
        net.first.weight.grad = torch.ones_like(net.first.weight)
        before, numbers = snapshot(net), torch.get_rng_state()
        fewbit.calibrate(net, batches(), loss_fn=loss_fn)
        assert_same(before, snapshot(net))
        assert torch.equal(torch.get_rng_state(), numbers)
        assert torch.equal(net.first.weight.grad, torch.ones_like(net.first.weight))
        assert net.second.weight.grad is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    @pytest.mark.parametrize("loss_fn", [None, loss])
    def test_an_exception_half_way_leaves_the_model_as_it_was(self, net, loss_fn):
        before, bad = snapshot(net), [*batches(1), torch.randn(4, 9)]
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fewbit.calibrate(net, bad, bits=3, loss_fn=loss_fn)
        assert_same(before, snapshot(net))
        assert type(net.silu) is nn.SiLU
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    def test_batches_may_be_tensors_arguments_or_names(self, net):
        net.eval()
        data, found = batches(1)[0], []
        for batch in (data, (data, 1.0), [data], {"x": data, "scale": 1.0}):
            found.append(fewbit.calibrate(copy.deepcopy(net), iter([batch]), 2).layers[0].table)
        assert all(table == found[0] for table in found)

    def test_gradients_weigh(self, net):
        """Where the gradient lives on positive x alone, that is where the table is good."""

        def of_positive(model, batch):
            x = batch[:, :1]
            return (model(x).clamp(min=0) * (x > 0)).sum()

        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
        model[0].weight.data.fill_(1.0)
        calibration = fewbit.calibrate(model, batches(size=512), 2, loss_fn=of_positive)
        assert calibration.by_gradient
        x = np.linspace(0.05, 2, 100)
        exact = activations.get("tanh").df(x)
        plain = fewbit.calibrate(copy.deepcopy(model), [batch[:, :1] for batch in batches(size=512)], 2).layers[0].table
        assert np.abs(calibration.layers[0].table(x) - exact).mean() < np.abs(plain(x) - exact).mean() + 1e-3

    def test_gates(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.glu, self.swiglu = fewbit.nn.GLU(bits=3), fewbit.nn.SwiGLU(bits=3)
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                return self.swiglu(gate=self.glu(self.linear(x)), up=x[..., 2:])

        torch.manual_seed(0)
        model, x = Gated(), 0.2 * torch.randn(512, 4)
        seen = []
        model.glu.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        calibration = fewbit.calibrate(model, [x])
        glu, swiglu = calibration.layers
        assert (glu.activation, swiglu.activation) == ("sigmoid", "silu")
        assert glu.mean == pytest.approx(seen[0][..., 2:].mean().item(), rel=1e-5)
        for layer in (glu, swiglu):
            assert layer.table.channels == ("derivative", "value")
            assert sum(layer.after) < sum(layer.before)
        model(x).sum().backward()

    def test_not_finite_pre_activations_are_left_out_and_told(self):
        model = nn.Sequential(nn.GELU())
        x = torch.randn(1000)
        x[:10] = torch.nan
        calibration = fewbit.calibrate(model, [x], 3)
        assert (calibration.layers[0].elements, calibration.layers[0].not_finite) == (990, 10)
        assert "10 elements were NaN or infinite" in str(calibration)
        model = nn.Sequential(nn.GELU())
        calibration = fewbit.calibrate(model, [torch.full((8,), torch.nan)], 3)
        assert model[0].table == fewbit.load_table("gelu", 3)

    def test_wrong_arguments(self, net):
        for error, message, call in (
            (InputError, r"calibrate takes a torch.nn.Module, got str", lambda: fewbit.calibrate("net", batches())),
            (DesignError, "bits must be an integer from 1 to 8, got 9", lambda: fewbit.calibrate(net, batches(), 9)),
            (InputError, "batches gave no batch", lambda: fewbit.calibrate(net, [], 3)),
            (InputError, "found no activation", lambda: fewbit.calibrate(nn.Linear(2, 2), batches())),
        ):
            before = snapshot(net)
            with pytest.raises(error, match=message):
                call()
            assert_same(before, snapshot(net))
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
            fewbit.calibrate(net, batches(), 3, loss_fn=loss)


class TestFile:
    @pytest.fixture
    def calibration(self, net):
        return fewbit.calibrate(net, batches(), bits=2)

    def test_round_trip(self, net, calibration, tmp_path):
        calibration.save(tmp_path / "tables.json")
        loaded = fewbit.Calibration.load(tmp_path / "tables.json")
        assert loaded.to_dict() == calibration.to_dict()
        assert loaded.layers == calibration.layers
        other = Net()
        other.load_state_dict(net.state_dict())
        assert loaded.install(other) is other
        assert [other.silu.table, other.tanh.table] == [net.silu.table, net.tanh.table]
        x = batches(1)[0].requires_grad_()
        net.eval(), other.eval()
        gradients = [torch.autograd.grad(model(x).sum(), model.first.weight)[0] for model in (net, other)]
        assert torch.equal(*gradients)

    def test_joint_tables_are_installed_on_a_model_not_yet_converted(self, tmp_path):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        fewbit.calibrate(model, batches(), 3, inputs=3).save(tmp_path / "tables.json")
        other = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        fewbit.Calibration.load(tmp_path / "tables.json").install(other)
        assert other[1].shared
        assert other[1].table == model[1].table
        assert type(other[0]) is nn.Linear

    def test_tables_travel_with_copies_and_not_in_the_state(self, net, calibration):
        assert set(net.state_dict()) == set(Net().state_dict())
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert other.silu.table == net.silu.table
        assert type(fewbit.revert(net).silu) is nn.SiLU

    def test_installing_checks_before_it_changes(self, calibration):
        class Other(Net):
            def __init__(self):
                super().__init__()
                self.tanh = nn.Sigmoid()

        joint, shorter, elsewhere = fewbit.convert(Net(), 2, inputs=2), Net(), Other()
        del shorter.tanh
        linear = Net()
        linear.tanh = nn.Linear(16, 16)
        for model, error, message in (
            (shorter, InputError, r"no module 'tanh' \(1 of 4 names missing\)"),
            (elsewhere, TableError, "module 'tanh' is sigmoid, the calibration's table is for tanh"),
            (linear, InputError, "module 'tanh' is none that can be coded"),
            (joint, TableError, "module 'silu' needs a table with the channels"),
        ):
            before = snapshot(model)
            with pytest.raises(error, match=message):
                calibration.install(model)
            assert_same(before, snapshot(model))

    def test_parameters_are_compared(self):
        calibration = fewbit.calibrate(nn.Sequential(nn.ELU(0.5)), [torch.randn(100)], 2)
        calibration.install(nn.Sequential(nn.ELU(0.5)))
        with pytest.raises(TableError, match=r"is elu alpha=1, the calibration's table is for elu alpha=0.5"):
            calibration.install(nn.Sequential(nn.ELU(1.0)))

    def test_damaged_files(self, calibration, tmp_path):
        path = tmp_path / "tables.json"
        with pytest.raises(TableFileError, match="cannot read"):
            fewbit.Calibration.load(path)
        calibration.save(path)
        whole = path.read_text()
        content = json.loads(whole)
        layer = content["layers"][0]
        for text, message in (
            (whole[: len(whole) // 2], "not valid JSON, perhaps cut short"),
            ("{}", "is no fewbit calibration file"),
            (json.dumps({**content, "version": 99}), "has version 99"),
            (json.dumps({**content, "layers": [{**layer, "mean": "much"}]}), "broken layer: mean of a layer cannot be 'much'"),
            (json.dumps({**content, "layers": [{**layer, "after": [1, 2]}]}), "a number for each of"),
            (json.dumps({**content, "layers": [{**layer, "table": {}}]}), "broken layer: a table has the entries"),
            (json.dumps({**content, "layers": [{"name": "x"}]}), "broken layer: a layer has the entries"),
        ):
            path.write_text(text)
            with pytest.raises(TableFileError, match=message):
                fewbit.Calibration.load(path)


def test_report(net, tmp_path):
    calibration = fewbit.calibrate(net, batches(), bits=2)
    row = calibration.rows()[0]
    assert (row["layer"], row["bits"]) == ("silu", 2)
    assert row["derivative_after"] == calibration.layers[0].after[0]
    assert row["value_after"] is None
    assert json.loads(calibration.to_json()) == calibration.to_dict()
    assert calibration.to_csv().count("\n") == 5
    calibration.plot(tmp_path / "a.png")
    assert all(len(line) <= calibration.width for line in str(calibration).splitlines())


@pytest.mark.slow
def test_compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batches(1)[0]

    def gradient(run):
        return torch.autograd.grad(run(x).square().sum(), model[0].weight)[0]

    gradient(compiled)  # compiled before, too
    calibration = fewbit.calibrate(compiled, batches(), bits=2)
    assert [layer.name for layer in calibration.layers] == ["1", "3"]
    assert [layer.elements for layer in calibration.layers] == [3 * 64 * 16] * 2
    torch.testing.assert_close(gradient(compiled), gradient(model))
    fewbit.calibrate(compiled, batches(), bits=1)
    torch.testing.assert_close(gradient(compiled), gradient(model))


def test_batches_that_the_model_does_not_take():
    model = fewbit.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    with pytest.raises(InputError, match="a tuple or list as forward's arguments, a mapping as named ones; give batches"):
        fewbit.calibrate(model, [(torch.randn(2, 4), torch.randn(2))])


class Checkpointed(nn.Sequential):
    """Runs forward again in backward."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_part_counts_once():
    model = Checkpointed(nn.Linear(4, 8), fewbit.GELU(bits=2), nn.Linear(8, 1))
    batches = [torch.randn(16, 4) for _ in range(3)]
    found = fewbit.calibrate(model, batches, loss_fn=lambda model, batch: model(batch).sum())
    assert found.layers[0].elements == 3 * 16 * 8


def test_installs_on_transformer_layers_that_hold_functions():
    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True), 1)

    calibration = fewbit.calibrate(encoder(), [torch.randn(4, 5, 8)], bits=2)
    model = calibration.install(encoder())
    assert model.layers[0].activation.table == calibration.layers[0].table
