"""fewbit inside the libraries that people train with: converted or patched models train, save and load there."""

import copy
import csv
import functools
import logging
import sys

import pytest
import torch
from support import bytes_kept, flat, gradients
from torch import nn

import fewbit

ALL = {"activation": 3, "linear": 4, "norm": 4, "product": 4}


def encoder(activation, dropout=0.0):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=dropout, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CALLABLES = {
    "function": lambda: fewbit.functional.gelu,
    "partial": lambda: functools.partial(fewbit.functional.gelu, bits=2),
    "module": lambda: fewbit.GELU(bits=2),
}


class TestTransformerEncoder:
    @pytest.mark.parametrize("activation", CALLABLES)
    def test_activation_argument(self, activation):
        exact, model, x = encoder("gelu"), encoder(CALLABLES[activation]()), torch.randn(8, 16, 32)
        assert list(model.state_dict()) == list(exact.state_dict())
        assert torch.equal(model(x), exact(x))
        true, ours = flat(gradients(exact, x)), flat(gradients(model, x))
        assert 0 < (ours - true).norm() < 0.2 * true.norm()
        hidden = 2 * 8 * 16 * 128 * 4  # bytes of both layers that the GELUs kept
        assert bytes_kept(exact, x) - bytes_kept(model, x) > 0.9 * hidden
        copy.deepcopy(model)
        with torch.no_grad():  # eval takes torch's fast path if it can, and gives what the exact model gives
            torch.testing.assert_close(model.eval()(x), exact.eval()(x), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("bits", [{"activation": 3}, ALL], ids=str)
    def test_patched(self, bits):
        model, x = encoder(nn.functional.gelu), torch.randn(8, 16, 32)
        y, true, exactly = model(x), flat(gradients(model, x)), bytes_kept(model, x)
        with fewbit.patch(bits=bits):
            assert torch.equal(model(x), y)
            coded = flat(gradients(model, x))
            assert 0 < (coded - true).norm() < 0.2 * true.norm()
            assert bytes_kept(model, x) < (0.5 if "linear" in bits else 0.8) * exactly
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(x), y, atol=1e-5, rtol=1e-5)


SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, use_cache=False))


def classifier():
    """Its activation calls torch.nn.functional.gelu in a class of transformers' own."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=128, hidden_act="gelu"))


def rows(number=64):
    """Counting upwards, modulo 32, from any number: learned in a few steps."""
    starts = torch.randint(0, 32, (number, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(16)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False}
    steps = {"max_steps": 6, "logging_steps": 1, "save_steps": 6, "per_device_train_batch_size": 16}
    rate = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(output_dir=str(folder), **{**plain, **steps, **rate, **options})
    return Trainer(model=model, args=arguments, train_dataset=rows())


def losses(run):
    return [each["loss"] for each in run.state.log_history if "loss" in each]


SLOW, WAYS = pytest.mark.slow, ("convert", "patch")
# transformers 5 has another name for gradient checkpointing; earlier versions only know this one
renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@renamed
class TestTrainer:
    @pytest.mark.parametrize("way", [*WAYS, *(pytest.param(f"{way} and checkpoint", marks=SLOW) for way in WAYS)])
    def test_trains_saves_and_loads(self, way, tmp_path):
        from transformers import AutoModelForCausalLM

        model = language_model()
        keys = list(model.state_dict())
        batch = torch.stack([each["input_ids"] for each in rows(16)])
        exactly = bytes_kept(model, batch)
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        run = trainer(model, tmp_path, **(options if "checkpoint" in way else {}))
        if "convert" in way:
            fewbit.convert(model, bits=ALL)
            assert bytes_kept(model, batch) < 0.85 * exactly
            run.train()
        else:
            with fewbit.patch(bits=ALL):
                assert bytes_kept(model, batch) < 0.85 * exactly
                run.train()
        first, *_, last = losses(run)
        assert last < 0.8 * first
        assert list(model.state_dict()) == keys
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
        assert type(loaded.model.layers[0].mlp.act_fn) is not type(fewbit.SiLU())
        with torch.no_grad():
            assert torch.equal(loaded.eval()(batch).logits, model.eval()(batch).logits)
        resumed = trainer(fewbit.convert(language_model(), bits=ALL), tmp_path)
        resumed.args.max_steps = 7
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert resumed.state.global_step == 7

    def test_calls_inside_models_are_patched(self):
        model, batch = classifier(), torch.randint(0, 32, (16, 16))
        labels = torch.arange(16) % 2
        model.eval()  # dropout off, for comparison
        exact = model(batch, labels=labels).loss
        exactly = bytes_kept(model, batch)
        with fewbit.patch(bits={"activation": 3}):
            loss = model(batch, labels=labels).loss
            assert torch.equal(loss, exact)
            assert bytes_kept(model, batch) < exactly - 0.85 * (2 * 16 * 16 * 128 * 4)
        loss.backward()
        assert all(each.grad is not None for each in model.parameters())


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 1))


def examples():
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def test_accelerate(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer has left one with another precision
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = fewbit.convert(regression(), bits=ALL)
    keys = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(examples(), batch_size=64)
    exact = accelerator.prepare(regression())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    x = examples().tensors[0]
    assert torch.equal(model(x), exact(x))
    assert bytes_kept(model, x) < 0.55 * bytes_kept(exact, x)
    found = []
    for _ in range(4):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            found.append(loss.item())
    assert found[-1] < 0.5 * found[0]
    accelerator.save_state(str(tmp_path))
    before = model(x)
    with torch.no_grad():
        next(model.parameters()).zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model(x), before)
    assert list(accelerator.unwrap_model(model).state_dict()) == keys


@renamed
class TestCallbackOfTrainers:
    def run(self, folder, callback, model=None, **options):
        found = trainer(model or language_model(), folder, **options)
        found.add_callback(callback)
        return found

    def test_converts_saves_and_resumes(self, tmp_path):
        """Seven steps at once; or six, a checkpoint, and one more in a new run whose callback has other settings."""
        whole = self.run(tmp_path / "whole", fewbit.callbacks.trainer_callback(bits=3), max_steps=7)
        whole.train()
        assert isinstance(whole.model.model.layers[0].mlp.up_proj, fewbit.Linear)
        first = self.run(tmp_path / "parts", fewbit.callbacks.trainer_callback(bits=3))
        first.train()
        folder = tmp_path / "parts" / "checkpoint-6"
        assert (folder / "fewbit.json").is_file()
        resumed = self.run(tmp_path / "parts", fewbit.callbacks.trainer_callback(bits=8), max_steps=7)
        resumed.train(resume_from_checkpoint=str(folder))
        assert resumed.model.model.layers[0].mlp.up_proj.bits == 3
        for name, each in whole.model.state_dict().items():
            assert torch.equal(each, resumed.model.state_dict()[name])

    def test_it_tells_what_came_of_it(self, tmp_path, caplog):
        found = self.run(tmp_path, fewbit.callbacks.trainer_callback(bits=4, check=3), max_steps=5)
        with caplog.at_level(logging.INFO, "fewbit"):
            found.train()
        (told,) = (each for each in found.state.log_history if "fewbit_kept_share" in each)
        assert told["step"] == 3
        assert 0 < told["fewbit_kept_share"] < 0.3
        assert 0 < told["fewbit_gradient_error"] < 0.3
        assert told["fewbit_verdict"] in ("safe", "doubtful")
        assert "that exact training keeps" in caplog.text
        assert not any(module._forward_pre_hooks for module in found.model.modules())

    def test_to_look_changes_nothing(self, tmp_path):
        """The run is the same, bit for bit, as that of a model converted by hand."""
        watched = self.run(tmp_path / "watched", fewbit.callbacks.trainer_callback(bits=4, check=2), max_steps=4)
        watched.train()
        plain = trainer(fewbit.convert(language_model(), bits=4), tmp_path / "plain", max_steps=4)
        plain.train()
        for name, each in plain.model.state_dict().items():
            assert torch.equal(each, watched.model.state_dict()[name])

    @pytest.mark.parametrize("check", [-1, 1, True, 2.5])
    def test_numbers_to_check(self, check):
        with pytest.raises(fewbit.errors.InputError, match="number of batches"):
            fewbit.callbacks.trainer_callback(check=check)

    def test_a_converted_model_stays(self, tmp_path):
        model = fewbit.convert(language_model(), bits=2)
        self.run(tmp_path, fewbit.callbacks.trainer_callback(bits=8), model, max_steps=1).train()
        assert model.model.layers[0].mlp.up_proj.bits == 2

    def test_errors_come_when_it_is_made(self, monkeypatch):
        with pytest.raises(fewbit.DesignError, match="1 to 8"):
            fewbit.callbacks.trainer_callback(bits=9)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(fewbit.InputError, match="install it"):
            fewbit.callbacks.trainer_callback()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # advice on speed
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # from lightning's own call of torch's pytree
@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")  # the resumed run saves elsewhere
def test_callback_of_lightning(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(bits, epochs, resume=None):
        torch.manual_seed(0)
        module = lightning_module("nowhere")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        saving = ModelCheckpoint(tmp_path / f"{bits} bits, {epochs} epochs", filename="last")
        callbacks = [fewbit.callbacks.lightning_callback(bits), saving]
        run = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
        run.fit(module, torch.utils.data.DataLoader(examples(), batch_size=64), ckpt_path=resume)
        return module

    whole, _ = fit(3, 3), fit(3, 2)
    checkpoint = tmp_path / "3 bits, 2 epochs" / "last.ckpt"
    assert torch.load(checkpoint)["fewbit"].startswith("{")
    resumed = fit(8, 3, checkpoint)
    assert {each.bits for each in resumed.modules() if isinstance(each, fewbit.Linear)} == {3}
    assert all(torch.equal(each, resumed.state_dict()[name]) for name, each in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # advice on speed
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # from lightning's own call of torch's pytree
def test_callback_of_lightning_tells_what_came_of_it(tmp_path):
    """Its figures go to loggers. Its checks of gradients leave the run as it is."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    def fit(*callbacks, convert=False):
        torch.manual_seed(0)
        module = lightning_module("nowhere")
        if convert:
            fewbit.convert(module, 4)
        logger = CSVLogger(tmp_path / str(len(callbacks)), flush_logs_every_n_steps=1)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        run = lightning.Trainer(
            max_epochs=3, accelerator="cpu", callbacks=[*callbacks], logger=logger, log_every_n_steps=1, **quiet
        )
        run.fit(module, torch.utils.data.DataLoader(examples(), batch_size=64))
        return module, logger

    watched, logger = fit(fewbit.callbacks.lightning_callback(4, check=2))
    plain, _ = fit(convert=True)
    assert all(torch.equal(each, watched.state_dict()[name]) for name, each in plain.state_dict().items())
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["fewbit_kept_share"]]
    assert len(rows) == 1
    assert 0 < float(rows[0]["fewbit_kept_share"]) < 1
    assert 0 < float(rows[0]["fewbit_gradient_error"]) < 1


def lightning_module(where):
    import lightning

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.found = regression(), []
            if where == "init":
                fewbit.convert(self.net, bits=ALL)

        def configure_model(self):
            if where == "configure_model":
                fewbit.convert(self.net, bits=ALL)

        def training_step(self, batch, index):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.found.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Regression()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # advice on speed
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # from lightning's own call of torch's pytree
@pytest.mark.parametrize("where", [pytest.param("init", marks=SLOW), "configure_model"])
def test_lightning(where, tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = lightning_module(where)
    keys = list(lightning_module("nowhere").state_dict())
    run = lightning.Trainer(
        max_epochs=3, accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ModelCheckpoint(tmp_path, filename="last")], log_every_n_steps=1,
    )  # fmt: skip
    run.fit(module, torch.utils.data.DataLoader(examples(), batch_size=64))
    assert module.found[-1] < 0.5 * module.found[0]
    x = examples().tensors[0]
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert list(saved) == keys
    exact = lightning_module("nowhere")
    exact.load_state_dict(saved)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.net(x), module.net(x))
        assert bytes_kept(module.net, x) < 0.55 * bytes_kept(exact.net, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestWhatLooksUpClasses:
    """Quantizers and explainers look up `type(module)` in a table of torch's classes. Use them after `revert`."""

    @staticmethod
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def test_before_revert_they_find_nothing(self):
        quantized = torch.ao.quantization.quantize_dynamic(fewbit.convert(self.model(), bits=4), {nn.Linear})
        assert isinstance(quantized[0], fewbit.Linear)

    def test_dynamic_quantization(self):
        x = torch.randn(4, 8)
        model, reference = (
            torch.ao.quantization.quantize_dynamic(each, {nn.Linear})
            for each in (fewbit.revert(fewbit.convert(self.model(), bits=4)), self.model())
        )
        assert type(model[0]) is type(reference[0]) is torch.ao.nn.quantized.dynamic.Linear
        assert torch.equal(model(x), reference(x))

    def test_quantization_aware_training(self):
        model = fewbit.revert(fewbit.convert(self.model(), bits=4))
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        prepared = torch.ao.quantization.prepare_qat(model)
        assert type(prepared[0]) is torch.ao.nn.qat.Linear
        prepared(torch.randn(4, 8)).sum().backward()

    def test_tables_of_classes(self):
        model = fewbit.revert(fewbit.convert(self.model(), bits=4))
        assert [type(module) in {nn.Linear: 1, nn.ReLU: 2} for module in model] == [True] * 3
