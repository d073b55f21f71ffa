"""calibrate: tables compared with the shipped ones, files, and models that stay as they were."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from support import compiled
from torch import nn

import fewbit
from fewbit import activations
from fewbit.design.evaluate import errors_under
from fewbit.errors import DesignError, InputError, TableError, TableFileError
from fewbit.models.calibration.histogram import StreamingHistogram


class Net(nn.Module):
    """One SiLU used in two places, a batch norm and dropout, and a GELU that never runs."""

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


class TestCalibrate:
    def test_shifted_layers_get_tables_of_their_own(self, net):
        net.first.weight.data.mul_(0.0)
        net.norm.bias.data.fill_(-2.0)
        net.norm.weight.data.fill_(0.1)
        calibration = fewbit.calibrate(net, batches(), bits={"activation": 2})
        layers = {layer.name: layer for layer in calibration.layers}
        assert list(layers) == ["silu", "relu", "tanh", "unused"]
        assert layers["silu"].after[0] < layers["silu"].before[0]
        assert layers["silu"].elements == 2 * 3 * 64 * 16  # in both places
        assert layers["relu"].after == (0.0,)
        assert net.again is net.silu
        assert net.silu.table is layers["silu"].table

    @pytest.mark.parametrize("bits", [{"activation": 3}, 3], ids=str)
    def test_error_is_that_of_direct_evaluation_and_never_above_the_shipped(self, net, bits):
        seen = []
        net.silu.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().numpy().copy()))
        calibration = fewbit.calibrate(net, batches(), bits=bits)
        x, layer, silu = np.concatenate([each.ravel() for each in seen]), calibration.layers[0], activations.get("silu")
        channels = ("derivative", "value")[: 2 if bits == 3 else 1]
        exact = [silu.df(x), silu.f(x)][: len(channels)]
        spread = (np.mean(x**4) / 3) ** 0.25
        shipped = fewbit.load_ladder("silu", 3, channels=channels)[sum(spread > 2 ** (k + 0.5) for k in range(-4, 4))]
        for table, errors in ((shipped, layer.before), (layer.table, layer.after)):
            for coded, true, error in zip(np.atleast_2d(table(x)), exact, errors, strict=True):
                assert np.sqrt(np.mean((coded - true) ** 2) / np.mean(true**2)) == pytest.approx(error, rel=0.05)
        histogram = StreamingHistogram()
        histogram.add(torch.from_numpy(x))
        of = [errors_under(histogram.seen(), table, silu)[0].sum() for table in (layer.table, shipped)]
        assert of[0] <= of[1]

    def test_bits_are_the_modules_own_unless_given(self, net):
        fewbit.convert(net, bits={"activation": 2})
        net.tanh.bits = 4
        assert [layer.table.bits for layer in fewbit.calibrate(net, batches()).layers] == [2, 2, 4, 2]
        assert [layer.table.bits for layer in fewbit.calibrate(net, batches(), bits=1).layers] == [1, 1, 1, 1]
        assert [layer.table.bits for layer in fewbit.calibrate(net, batches(), bits={"linear": 5}).layers] == [1, 1, 1, 1]
        assert all(type(module) is not nn.GELU for module in net.modules())

    def test_bits_by_kind(self):
        model = fewbit.convert(nn.Sequential(nn.GLU(), nn.Linear(4, 8), nn.GELU()), bits=4)
        calibration = fewbit.calibrate(model, batches(), bits={"product": 2})
        assert {layer.name: layer.table.bits for layer in calibration.layers} == {"0": 2, "2": 4}
        calibration = fewbit.calibrate(model, batches(), bits={"activation": 3, "linear": 1})
        assert {layer.name: layer.table.bits for layer in calibration.layers} == {"0": 2, "2": 3}

    def test_converts_with_the_bits_or_with_five_for_every_kind(self, net):
        other = copy.deepcopy(net)
        fewbit.calibrate(net, batches())
        assert (net.tanh.table.bits, net.tanh.shared, net.last.bits, net.norm.bits) == (5, True, 5, 5)
        fewbit.calibrate(other, batches(), bits={"activation": 3})
        assert (other.tanh.table.bits, other.tanh.shared) == (3, False)
        assert type(other.last) is nn.Linear

    def test_layers_that_never_ran_keep_their_table(self, net):
        calibration = fewbit.calibrate(net, batches(), bits={"activation": 2})
        assert calibration.layers[-1].elements == 0
        assert calibration.layers[-1].table == fewbit.load_table("gelu", 2)
        assert "layers that saw no elements keep" in str(calibration)

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
            found.append(fewbit.calibrate(copy.deepcopy(net), iter([batch]), bits=2).layers[0].table)
        assert all(table == found[0] for table in found)

    def test_gradients_weigh(self, net):
        """If the gradient is only at positive x, the table is good there."""

        def of_positive(model, batch):
            x = batch[:, :1]
            return (model(x).clamp(min=0) * (x > 0)).sum()

        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
        model[0].weight.data.fill_(1.0)
        calibration = fewbit.calibrate(model, batches(size=512), of_positive, {"activation": 2})
        assert calibration.by_gradient
        x = np.linspace(0.05, 2, 100)
        exact = activations.get("tanh").df(x)
        plain = fewbit.calibrate(copy.deepcopy(model), [batch[:, :1] for batch in batches(size=512)]).layers[0].table
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
        calibration = fewbit.calibrate(model, [x], bits=3)
        assert (calibration.layers[0].elements, calibration.layers[0].not_finite) == (990, 10)
        assert "10 elements were NaN or infinite" in str(calibration)
        model = nn.Sequential(nn.GELU())
        calibration = fewbit.calibrate(model, [torch.full((8,), torch.nan)], bits={"activation": 3})
        assert model[0].table == fewbit.load_table("gelu", 3)

    def test_wrong_arguments(self, net):
        for error, message, call in (
            (InputError, r"calibrate takes a torch.nn.Module first, got str", lambda: fewbit.calibrate("net", batches())),
            (DesignError, "bits must be an integer from 1 to 8, .*got 9", lambda: fewbit.calibrate(net, batches(), bits=9)),
            (DesignError, "unknown kind 'linaer'; did you mean", lambda: fewbit.calibrate(net, batches(), bits={"linaer": 4})),
            (InputError, "needs a batch, and `batches` gave none", lambda: fewbit.calibrate(net, [], bits=3)),
            (InputError, "found no activation", lambda: fewbit.calibrate(nn.Linear(2, 2), batches())),
            (InputError, "loss_fn must be a function of the model and a batch", lambda: fewbit.calibrate(net, batches(), 3)),
            (InputError, r"goes through an iterable of batches.*got function", lambda: fewbit.calibrate(net, loss, batches())),
            (InputError, r"goes through an iterable of batches.*got int", lambda: fewbit.calibrate(net, 3)),
            (TypeError, "inputs", lambda: fewbit.calibrate(net, batches(), inputs=4)),
        ):
            before = snapshot(net)
            with pytest.raises(error, match=message):
                call()
            assert_same(before, snapshot(net))
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
            fewbit.calibrate(net, batches(), loss, bits=3)


class TestFile:
    @pytest.fixture
    def calibration(self, net):
        return fewbit.calibrate(net, batches(), bits={"activation": 2})

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
        fewbit.calibrate(model, batches(), bits=3).save(tmp_path / "tables.json")
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

        joint, shorter, elsewhere = fewbit.convert(Net(), 2), Net(), Other()
        del shorter.tanh
        linear = Net()
        linear.tanh = nn.Linear(16, 16)
        for model, error, message in (
            (shorter, InputError, r"no module 'tanh' \(1 of 4 names missing\)"),
            (elsewhere, TableError, "module 'tanh' is sigmoid, the calibration's table is for tanh"),
            (linear, InputError, "module 'tanh' cannot be coded"),
            (joint, TableError, "module 'silu' needs a table with the channels"),
        ):
            before = snapshot(model)
            with pytest.raises(error, match=message):
                calibration.install(model)
            assert_same(before, snapshot(model))

    def test_parameters_are_compared(self):
        calibration = fewbit.calibrate(nn.Sequential(nn.ELU(0.5)), [torch.randn(100)], bits={"activation": 2})
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
            ("{}", "is not a fewbit calibration file"),
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
    calibration = fewbit.calibrate(net, batches(), bits={"activation": 2})
    row = calibration.rows()[0]
    assert (row["layer"], row["bits"]) == ("silu", 2)
    assert row["derivative_after"] == calibration.layers[0].after[0]
    assert row["value_after"] is None
    assert json.loads(calibration.to_json()) == calibration.to_dict()
    assert calibration.to_csv().count("\n") == 5
    calibration.plot(tmp_path / "a.png")
    assert all(len(line) <= calibration.width for line in str(calibration).splitlines())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))
    call = compiled(model)
    x = batches(1)[0]

    def gradient(run):
        return torch.autograd.grad(run(x).square().sum(), model[0].weight)[0]

    gradient(call)  # also if it was compiled before
    calibration = fewbit.calibrate(call, batches(), bits=2)
    assert [layer.name for layer in calibration.layers] == ["1", "3"]
    assert [layer.elements for layer in calibration.layers] == [3 * 64 * 16] * 2
    torch.testing.assert_close(gradient(call), gradient(model))
    fewbit.calibrate(call, batches(), bits=1)
    torch.testing.assert_close(gradient(call), gradient(model))


def test_batches_that_the_model_does_not_take():
    model = fewbit.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    fewbit.calibrate(model, [(torch.randn(2, 4), torch.randn(2))], lambda model, batch: model(batch[0]).sum())
    with pytest.raises(
        InputError, match="a tuple or list of forward's arguments, or a mapping of named ones; give such batches"
    ):
        fewbit.calibrate(model, [(torch.randn(2, 4), torch.randn(2))])


class Checkpointed(nn.Sequential):
    """Checkpointed: forward runs again in backward."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_part_counts_once():
    model = Checkpointed(nn.Linear(4, 8), fewbit.GELU(bits=2), nn.Linear(8, 1))
    batches = [torch.randn(16, 4) for _ in range(3)]
    found = fewbit.calibrate(model, batches, loss_fn=lambda model, batch: model(batch).sum())
    assert found.layers[0].elements == 3 * 16 * 8


def test_transformer_layers_whose_activation_is_a_module():
    def encoder(activation):
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True), 1)

    calibration = fewbit.calibrate(encoder(nn.GELU()), [torch.randn(4, 5, 8)], bits={"activation": 2})
    model = calibration.install(encoder(nn.GELU()))
    assert model.layers[0].activation.table == calibration.layers[0].table
    with pytest.raises(InputError, match="Activations called as functions cannot be calibrated"):
        fewbit.calibrate(encoder("gelu"), [torch.randn(4, 5, 8)], bits={"activation": 2})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch), "real tensor of one element, got shape"),
        (lambda model, batch: None, "got NoneType"),
        (lambda model, batch: 1.0, "got float"),
        (lambda model, batch: model(batch).sum().detach(), "depends on no parameter"),
    ],
)
@pytest.mark.parametrize("function", [fewbit.calibrate, fewbit.allocate])
def test_what_is_no_loss(function, loss, message):
    with pytest.raises(InputError, match=message):
        function(nn.Sequential(nn.Linear(8, 8), nn.GELU()), [torch.randn(4, 8)], loss)


def test_kinds_without_a_table_to_calibrate():
    model = fewbit.convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), bits={"norm": 4})
    with pytest.raises(InputError, match=r"no activation or gate .* check the kinds in bits"):
        fewbit.calibrate(model, [torch.randn(4, 8)])


@pytest.mark.parametrize("function", [fewbit.calibrate, fewbit.allocate, fewbit.fidelity])
def test_one_mapping_is_one_batch(function):
    with pytest.raises(InputError, match="goes through several batches, but a dict is one batch; pass a list"):
        function(nn.Sequential(nn.Linear(8, 8), nn.GELU()), {"input": torch.randn(4, 8)})
