"""Commands on whole models: what they print and write, where their inputs come from, and errors of wrong calls."""

import io
import json
import os
import sys

import numpy as np
import pytest
import rich.console
import rich.progress
import torch
from torch import nn

import fewbit
from fewbit import cli, terminal
from fewbit.cli.inputs import Input, parse_inputs, with_vocabulary


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


MODELS = """
from collections import OrderedDict

import fewbit
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("<script>alert(1)</script>", nn.Linear(8, 64))
        self.add_module('b&"act', nn.GELU())
        self.add_module("down", nn.Linear(64, 8))

    def forward(self, x, tokens=None):
        for each in self.children():
            x = each(x)
        return x

def make():
    return Odd()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.act, self.down = nn.Embedding(10, 8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 10)

    def forward(self, tokens, labels=None):
        seen.append(tokens.clone())
        x = self.down(self.act(self.up(self.words(tokens))))
        if labels is None:
            return x
        return {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}

class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)

    def forward(self, x):
        seen.append(x.clone())
        y = self.down(self.act(self.up(x)))
        dtypes.append(y.dtype)
        return y

class Stateless(nn.Module):
    def forward(self, x):
        return x + 1

def square(model, x):
    return model(x).square().mean() if torch.is_tensor(x) else model(*x).square().mean()

def converted():
    return fewbit.convert(Vector(), bits=2)

def nested():
    def stage():
        return nn.Sequential(OrderedDict(block_of_the_stage=nn.Sequential(nn.Linear(8, 8), nn.GELU())))
    return nn.Sequential(OrderedDict(encoder_of_the_model=nn.Sequential(stage(), stage())))

seen, dtypes = [], []
made = Odd()
fails = lambda: 1 / 0
number = lambda: 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("fake", [[], ["--fake"]])
def test_memory_shows_and_writes_all_of_it(capsys, models, fake):
    files = [part for name in ("json", "csv", "html") for part in (f"--{name}", f"a.{name}")]
    given = ["--input", "16,8", "--input", "16:int64", "--bits", "activation=3,linear=4", *files, *fake]
    status, out, err = run(capsys, "memory", "some_models:make", *given)
    assert (status, err) == (0, "")
    for part in (
        "Odd keeps ",
        "Odd keeps 8.00 KiB for backward",
        "converted with bits={'activation': 3, 'linear': 4}",
        "wrote a.html",
    ):
        assert part in out
    figures = json.loads((models / "a.json").read_text())
    assert figures["activations"] == figures["plan"]["before"] == 2 * 16 * 64 * 4
    assert figures["plan"]["bits"] == {"activation": 3, "linear": 4}
    assert len((models / "a.csv").read_text().splitlines()) == len(figures["rows"]) + 1
    html = (models / "a.html").read_text()
    assert html.count("<script") == 1  # the page's own script
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "b&amp;&#34;act" in html
    assert not [word for word in ("http:", "https:", "src=", "@import", "url(") if word in html]


@pytest.mark.parametrize(
    ("bits", "shown", "plan"),
    [
        (4, "bits=4", {"activation": 4, "linear": 4, "norm": 4, "product": 4, "attention": 4, "recurrent": 4, "rest": 8}),
        ("norm=5", "bits={'norm': 5}", {"norm": 5}),
        ("linear=4, activation=3", "bits={'activation': 3, 'linear': 4}", {"activation": 3, "linear": 4}),
    ],
)
def test_bits_of_a_plan(capsys, models, bits, shown, plan):
    status, out, err = run(capsys, "memory", "some_models:make", "--input", "16,8", "--bits", bits, "--json", "a.json")
    assert (status, err) == (0, "")
    assert f"converted with {shown}, the " in out
    assert json.loads((models / "a.json").read_text())["plan"]["bits"] == plan


def test_memory_of_a_module_itself_without_a_plan(capsys, models):
    status, out, _ = run(capsys, "memory", "some_models:made", "--input", "16,8", "--html", "a.html", "--plot", "a.png")
    assert status == 0
    assert "converted" not in out
    assert "What to do" not in (models / "a.html").read_text()
    assert (models / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_peak_and_the_largest_batch(capsys, models):
    options = ["--optimizer", "adamw", "--budget", "1 MiB", "--bits", 4, "--json", "a.json"]
    status, out, err = run(capsys, "memory", "./some_models.py:make", "--input", "16,8", *options)
    assert (status, err) == (0, "")
    assert "peak of a training step: " in out
    assert "after plan.convert(), peak of a training step: " in out
    assert "fits 1.00 MiB" in out
    figures = json.loads((models / "a.json").read_text())
    assert figures["largest_batch"]["budget"] == 2**20
    assert figures["peak_after"]["bytes"] <= figures["peak"]["bytes"]


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """A working folder with a Hugging Face configuration."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes}))
    return tmp_path


def test_a_model_of_a_configuration(capsys, configuration):
    """Files with inputs, also named ones."""
    inputs = ["--input", "input_ids=2,8:int64", "--input", "labels=2,8:int64"]
    status, out, _ = run(capsys, "memory", "hf:config.json", *inputs, "--fake")
    assert status == 0
    assert "GPT2LMHeadModel keeps " in out
    assert "peak of a training step: " in out
    status, out, _ = run(capsys, "memory", "hf:config.json", "--class", "GPT2Model", "--input", "input_ids=2,8:int64")
    assert status == 0
    assert "GPT2Model keeps " in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["hf:none.json", "--input", "2"], 1, "No such file"),
        (["./none.py:make", "--input", "2"], 1, "No such file"),
        (["some_models:make", "--input", "2,8", "--optimizer", "adamm"], 2, "adamw"),
        (["some_models:make", "--input", "2,8", "--budget", "much"], 2, "24 GiB"),
        (["some_models:make", "--input", "x=2,8", "--input", "2"], 2, "give different names to all inputs"),
        (["some_models:make", "--input", "x=2,8", "--input", "x=2"], 2, "give different names to all inputs"),
        (["some_models", "--input", "2"], 2, "given as package.module:factory"),
        (["some_models:make", "--input", "2,x"], 2, "--input takes a shape"),
        (["some_models:make", "--input", "2:integer"], 2, "--input takes a shape"),
        (["some_models:make", "--input", "2,8", "--html", "nowhere/a.html"], 1, "No such folder"),
        (["some_models:none", "--input", "2"], 1, "AttributeError"),
        (["some_models:fails", "--input", "2"], 1, "ZeroDivisionError"),
        (["some_models:number", "--input", "2"], 1, "made a int, not a torch.nn.Module"),
        (["some_models:make", "--input", "2,9"], 1, "the model raised RuntimeError"),
        (
            ["some_models:make", "--input", "2,8", "--bits", 9],
            2,
            "bits must be an integer from 1 to 8, for every kind, or a map",
        ),
        (["some_models:make", "--input", "2,8", "--bits", "norm=0"], 2, "got {'norm': 0}"),
        (
            ["some_models:make", "--input", "2,8", "--bits", "four"],
            2,
            "a number such as 4, or activation=3,linear=4; got 'four'",
        ),
        (
            ["some_models:make", "--input", "2,8", "--bits", "norm=x"],
            2,
            "a number such as 4, or activation=3,linear=4; got 'norm=x'",
        ),
        (["some_models:make", "--input", "2,8", "--bits", "linaer=4"], 2, "unknown kind 'linaer'; did you mean 'linear'?"),
        (["some_models:fails", "--input", "2,8", "--bits", 0], 2, "got 0"),  # before the model is made
        (["some_models:make", "--input", "2,8", "--inputs", 4], 2, "No such option: --inputs"),
    ],
)
def test_memory_tells_what_is_wrong(capsys, models, arguments, status, message):
    found, _, err = run(capsys, "memory", *arguments)
    assert found == status
    assert message in err
    assert err.count("\n") == 1


def module():
    """What the commands have imported."""
    return sys.modules["some_models"]


WORDS = ["some_models:Words", "--input", "tokens=8,4:int64:10", "--input", "labels=8,4:int64:10"]
VECTOR = ["some_models:Vector", "--input", "8,8"]


def test_plan(capsys, models):
    files = [
        part for name in ("json", "csv", "html", "plot") for part in (f"--{name}", "a.png" if name == "plot" else f"a.{name}")
    ]
    status, out, err = run(capsys, "plan", "some_models:make", "--input", "64,8", "--bits", 4, "--optimizer", "adamw", *files)
    assert (status, err) == (0, "")
    assert out.startswith("converted with bits=4, the ")
    assert "of the 32.0 KiB that exact training keeps" in out
    assert out.count("peak of a training step: ") == 2
    assert "optimizer" in out
    figures = json.loads((models / "a.json").read_text())
    assert figures["before"] == 2 * 64 * 64 * 4 > figures["best"]
    assert figures["peak_after"]["bytes"] < figures["peak"]["bytes"]
    assert (models / "a.csv").read_text().startswith("module,")
    assert "What to do" in (models / "a.html").read_text()


@pytest.mark.parametrize("command", ["memory", "plan"])
def test_a_loss_is_part_of_the_step(capsys, models, command):
    """What the loss keeps counts too."""
    given = [command, "some_models:Vector", "--input", "512,8", "--json", "a.json"]
    kept = []
    for loss in ([], ["--loss", "some_models:square"]):
        status, _, err = run(capsys, *given, *loss)
        assert (status, err) == (0, "")
        figures = json.loads((models / "a.json").read_text())
        kept.append(figures["activations" if command == "memory" else "before"])
    assert kept[1] > kept[0]
    assert run(capsys, *given, "--loss", "nothing")[0] == 2


def test_plan_within_a_budget(capsys, models):
    given = ["plan", "some_models:make", "--input", "64,8", "--bits", 4, "--budget", "50 KiB", "--fake"]
    status, out, err = run(capsys, *given, "--json", "a.json", "--plot", "a.png")
    assert (status, err) == (0, "")
    assert "the peak is " in out
    assert "plan.convert() does this" in out
    assert json.loads((models / "a.json").read_text())["budget"] == 50 * 1024
    status, out, _ = run(capsys, *given, "--html", "a.html")
    assert status == 0
    assert "wrote a.html" in out
    html = (models / "a.html").read_text()
    assert "All blocks alike" in html
    assert "b&amp;&#34;act" in html
    status, _, err = run(capsys, *given[:-2], "much")
    assert status == 2
    assert "24 GiB" in err


@pytest.mark.parametrize("command", ["fidelity", "calibrate", "allocate", "prepare"])
def test_commands_that_run_the_model_are_reproducible(capsys, models, command):
    given = [command, *VECTOR, "--batches", 3, "--json", "a.json", *(["--choices", "2,4"] if command == "allocate" else [])]
    status, out, err = run(capsys, *given)
    assert (status, err) == (0, "")
    assert "3 batches of random inputs, seed 0: figures are for the model's present weights and such inputs" in out
    figures = json.loads((models / "a.json").read_text())
    assert figures["notes"][0].startswith("Vector, ")
    run(capsys, *given)
    assert json.loads((models / "a.json").read_text()) == figures
    run(capsys, *given, "--seed", 1)
    assert json.loads((models / "a.json").read_text()) != figures


def test_fidelity_is_that_of_the_library(capsys, models):
    status, out, err = run(capsys, "fidelity", *WORDS, "--batches", 4, "--bits", 3, "--by", "module", "--json", "a.json")
    assert (status, err) == (0, "")
    assert "Words, converted with bits=3" in out
    assert "loss: the `loss` of the model's output" in out
    assert "all zeros" not in out
    figures = json.loads((models / "a.json").read_text())
    torch.manual_seed(0)
    model, generator = module().Words(), torch.Generator().manual_seed(0)
    names = ("tokens", "labels")
    batches = [{name: torch.randint(10, (8, 4), generator=generator) for name in names} for _ in range(4)]
    expected = fewbit.fidelity(fewbit.convert(model, bits=3), batches, by="module").to_dict()
    assert {name: figures[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["fidelity", "calibrate", "allocate", "memory"])
def test_tables_have_names_in_full(capsys, models, command):
    status, out, _ = run(capsys, command, "some_models:nested", "--input", "4,8")
    assert status == 0
    assert "…" not in out
    place = {"fidelity": "*", "memory": "0-1"}.get(command, "1")
    assert f"encoder_of_the_model.{place}.block_of_the_stage." in out
    assert not out.endswith("\n\n")


def test_calibrate_saves_tables_that_install(capsys, models):
    status, out, err = run(capsys, "calibrate", *VECTOR, "-o", "tables.json", "--bits", 2, "--loss", "some_models:square")
    assert (status, err) == (0, "")
    assert "loss: some_models:square" in out
    assert out.endswith("wrote tables.json\n")
    calibration = fewbit.Calibration.load("tables.json")
    assert calibration.by_gradient
    model = calibration.install(module().Vector())
    assert model.act.table.bits == 2


@pytest.mark.parametrize("command", [["allocate", "--budget", "10%", "--choices", "2,3"], ["prepare", "--budget", "1 MiB"]])
def test_conversions_are_saved(capsys, models, command):
    status, out, err = run(capsys, *command, *VECTOR, "--loss", "some_models:square", "-o", "conversion.json")
    assert (status, err) == (0, "")
    assert "loss: some_models:square" in out
    model = fewbit.load(module().Vector(), "conversion.json")
    assert isinstance(model.act, fewbit.GELU)
    assert command[0] == "allocate" or "the budget of 1.00 MiB is met" in out


def test_a_model_that_is_converted_stays_so_unless_bits_are_given(capsys, models):
    given = ["fidelity", "some_models:converted", "--input", "8,8", "--batches", 2]
    assert "as its factory converted it" in run(capsys, *given)[1]
    assert "converted with bits=6" in run(capsys, *given, "--bits", 6)[1]


def test_integers_are_zeros_unless_their_number_of_values_is_given(capsys, models):
    status, out, _ = run(capsys, "fidelity", "some_models:Words", "--input", "8,4:int64", "--batches", 2)
    assert status == 0
    assert "all zeros: input 0; for random integers give their number, as in 8,128:int64:1000" in out
    assert "the sum of all outputs times fixed random numbers, since the output has no" in out
    assert {int(each.max()) for each in module().seen} == {0}
    module().seen.clear()
    run(capsys, "fidelity", "some_models:Words", "--input", "80,40:int64:10", "--batches", 2)
    assert {(int(each.min()), int(each.max())) for each in module().seen} == {(0, 9)}


@pytest.mark.parametrize(
    ("given", "dtype", "after"),
    [
        ([], torch.float32, torch.float32),
        (["--dtype", "bfloat16"], torch.bfloat16, torch.bfloat16),
        (["--autocast", "bfloat16"], torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["memory", "plan", "fidelity", "calibrate", "allocate", "prepare"])
def test_dtype_and_autocast(capsys, models, command, given, dtype, after):
    more = [] if command in ("memory", "plan") else ["--batches", 2]
    more += ["--choices", "2,4"] if command == "allocate" else []
    status, _, err = run(capsys, command, *VECTOR, *more, *given)
    assert (status, err) == (0, "")
    assert {each.dtype for each in module().seen} == {dtype}
    assert {*module().dtypes} == {after}


def test_data(capsys, models, rng):
    tokens = rng.integers(0, 10, (20, 4))
    np.savez("both.npz", tokens=tokens, labels=tokens)
    status, out, err = run(capsys, "fidelity", "some_models:Words", "--data", "both.npz", "--batch-size", 6, "--batches", 2)
    assert (status, err) == (0, "")
    assert "2 batches of 6 samples from both.npz" in out
    assert len(module().seen) == 4  # each batch exact and coded
    assert torch.equal(module().seen[2], torch.from_numpy(tokens[6:12]))


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "big_endian.npy"])
def test_data_without_names(capsys, models, rng, name):
    x = rng.normal(size=(20, 8))
    np.save("x.npy", x)
    np.save("big_endian.npy", x.astype(">f8"))
    np.savez("x.npz", x)
    status, out, err = run(capsys, "calibrate", "some_models:Vector", "--data", name)
    assert (status, err) == (0, "")
    assert "2 batches of 8 samples" in out  # the rest is too small for a third one
    assert torch.equal(torch.cat(module().seen), torch.from_numpy(x[:16]).float())


@pytest.mark.parametrize("device", ["cuda"])
def test_on_a_device(capsys, models, device):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    for command in ("memory", "plan", "fidelity", "calibrate", "prepare"):
        status, _, err = run(capsys, command, *VECTOR, "--device", device)
        assert (status, err) == (0, "")
        assert {each.device.type for each in module().seen} == {device}


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["fidelity", "some_models:make"], 2, "--input is missing: the shape of an input"),
        (["plan", "some_models:make", "--fake"], 2, "--input is missing"),
        (["plan", "some_models:make", "--input", "2,8", "--bits", 9], 2, "bits must be an integer from 1 to 8"),
        (["plan", "some_models:fails", "--input", "2,8", "--optimizer", "adamm"], 2, "for --optimizer: torch.optim has no"),
        (
            ["plan", "some_models:make", "--input", "2,8", "--fake", "--device", "cuda"],
            2,
            "--fake runs only on the CPU",
        ),
        (["plan", "some_models:make", "--input", "2,8", "--class", "GPT2"], 2, "--class is for hf:config.json"),
        (["plan", "hf:none.json", "--input", "2"], 1, "none.json: No such file"),
        (["plan", "hf:folder", "--input", "2"], 1, "folder/config.json: No such file"),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--device", "abacus"],
            2,
            "for --device: torch has no device 'abacus'",
        ),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--dtype", "int8"],
            2,
            "it must be one of float32, bfloat16, float16",
        ),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--autocast", "float32"],
            2,
            "it must be one of bfloat16, float16; got",
        ),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--by", "name"],
            2,
            "it must be one of pattern, module, parameter",
        ),
        (["fidelity", "some_models:fails", "--input", "2,8", "--seed", -1], 2, "--seed"),
        (["fidelity", "some_models:fails", "--input", "2,8", "--batches", 0], 2, "--batches"),
        (["fidelity", "some_models:fails", "--input", "2,8:float32:3"], 2, "only integers take a number of values"),
        (["fidelity", "some_models:fails", "--input", "2,8:uint8:300"], 2, "must be 1 to 256, got 300"),
        (["fidelity", "some_models:fails", "--input", "2,8:int64:ten"], 2, "--input takes a shape such as"),
        (["fidelity", "some_models:fails", "--input", "2,8", "--batch-size", 3], 2, "--batch-size is only for --data"),
        (["fidelity", "some_models:fails", "--input", "2,8", "--data", "x.npy"], 2, "--data and --input exclude each other"),
        (["fidelity", "some_models:fails", "--data", "none.npy"], 1, "none.npy: No such file"),
        (["fidelity", "some_models:fails", "--data", "folder"], 2, "it is not a regular file"),
        (["fidelity", "some_models:fails", "--data", "words.npy"], 2, "--data takes a file of numbers"),
        (["fidelity", "some_models:fails", "--data", "single.npy"], 2, "the first dimension counts the samples"),
        (["fidelity", "some_models:fails", "--data", "lengths.npz"], 2, "the same in all arrays; got a (40, 8), b (30, 8)"),
        (["fidelity", "some_models:fails", "--data", "x.npy", "--batch-size", 41], 2, "40 samples, too few for a batch of 41"),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--loss", "square"],
            2,
            "--loss is given as package.module:function",
        ),
        (
            ["fidelity", "some_models:fails", "--input", "2,8", "--loss", "some_models:none"],
            1,
            "cannot import some_models:none",
        ),
        (["fidelity", "some_models:fails", "--input", "2,8", "--loss", "some_models:made"], 1, "ZeroDivisionError"),
        (["fidelity", "some_models:fails", "--input", "2,8", "--loss", "torch:nn"], 1, "torch:nn is not a function"),
        (["fidelity", "some_models:Words", "--input", "2,8:int64:1000"], 1, "the model raised IndexError for these inputs"),
        (["fidelity", "some_models:make", "--input", "y=2,8"], 1, "the model does not take this batch"),
        (["fidelity", "torch.nn:Identity", "--input", "2,8"], 1, "there is nothing to compare"),
        (["calibrate", "some_models:Stateless", "--input", "2,8"], 1, "calibrate found no activation"),
        (["calibrate", "some_models:fails", "--input", "2,8", "-o", "folder"], 1, "folder: Is a directory"),
        (["calibrate", "some_models:fails", "--input", "2,8", "-o", "no/a.json"], 1, "no: No such folder"),
        (["calibrate", "some_models:fails", "--input", "2,8", "--plot", "a.xyz"], 2, "--plot a.xyz must end in one of"),
        (["allocate", "some_models:fails", "--input", "2,8", "--budget", "much"], 2, "budget must be a share"),
        (["allocate", "some_models:fails", "--input", "2,8", "--choices", "2,9"], 2, "--choices takes numbers of bits"),
        (
            ["allocate", "some_models:make", "--input", "2,8", "--choices", 2, "--budget", "0.001%"],
            2,
            "budget must be at least",
        ),
        (["prepare", "some_models:fails", "--input", "2,8", "--budget", "much"], 2, "for --budget: a number of bytes is"),
        (["prepare", "some_models:fails", "--input", "2,8", "--batches", 1], 2, "--batches"),
    ],
    ids=lambda each: " ".join(map(str, each[:1] + each[-2:])) if isinstance(each, list) else "",
)
def test_what_is_wrong_takes_one_line(capsys, models, rng, argv, status, message):
    """Wrong calls are refused before the model is made: this one fails when it is made."""
    (models / "folder").mkdir()
    np.save("x.npy", rng.normal(size=(40, 8)))
    np.save("words.npy", np.array(["a"]))
    np.save("single.npy", np.float64(3))
    np.savez("lengths.npz", a=rng.normal(size=(40, 8)), b=rng.normal(size=(30, 8)))
    found, out, err = run(capsys, *argv)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("fewbit: ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="for root all may be written")
def test_what_may_not_be_written(capsys, models):
    (models / "a.json").touch(0o400)
    assert (
        run(capsys, "fidelity", "some_models:fails", "--input", "2,8", "--json", "a.json")[2]
        == "fewbit: a.json: Permission denied\n"
    )


def test_tokens_of_a_configuration_are_of_its_vocabulary(capsys, configuration):
    inputs = ["--input", "input_ids=2,8:int64", "--input", "labels=2,8:int64"]
    status, out, _ = run(capsys, "fidelity", "hf:config.json", *inputs, "--batches", 2, "--json", "a.json")
    assert status == 0
    assert "GPT2LMHeadModel, converted with bits=5" in out
    assert "all zeros" not in out
    assert json.loads((configuration / "a.json").read_text())["level"] in ("safe", "doubtful")


def test_the_vocabulary_is_for_tokens_alone():
    model = nn.Module()
    model.config = type("Config", (), {"vocab_size": 100})()
    given = parse_inputs(["input_ids=2,8:int64", "labels=2:int64", "attention_mask=2,8:int64", "labels2=2,8:int64:5"])
    assert [each.values for each in with_vocabulary(given, model)] == [100, None, None, 5]
    assert with_vocabulary(given, nn.Module()) == given


@pytest.mark.parametrize(
    ("text", "dtype", "shape", "values"),
    [
        ("8,3", torch.float32, (8, 3), None),
        ("", torch.float32, (), None),
        ("8,3:float64", torch.float64, (8, 3), None),
        ("mask=8,3:bool", torch.bool, (8, 3), {False}),
        ("mask=80,3:bool:2", torch.bool, (80, 3), {False, True}),
        ("80,3:uint8:3", torch.uint8, (80, 3), {0, 1, 2}),
        (" 8 , 3 ", torch.float32, (8, 3), None),
    ],
)
def test_inputs(text, dtype, shape, values):
    made = Input.of(text).tensor(torch.float32, torch.Generator().manual_seed(0))
    assert (made.dtype, made.shape) == (dtype, shape)
    assert values is None or {*made.flatten().tolist()} == values
    assert Input.of(text).tensor(torch.float32, None).is_meta


@pytest.mark.parametrize("command", ["memory", "plan", "fidelity", "calibrate", "allocate", "prepare"])
def test_each_command_shows_what_it_does(capsys, models, command, monkeypatch):
    screen, descriptions = rich.console.Console(file=io.StringIO(), force_terminal=True), []
    monkeypatch.setattr(terminal, "console", lambda stderr=False, at_least=0: screen)
    monkeypatch.setattr(rich.progress.Progress, "add_task", lambda self, text, **options: descriptions.append(text) or 0)
    monkeypatch.setattr(rich.progress.Progress, "update", lambda *args, **options: None)
    monkeypatch.setattr(rich.progress.Progress, "remove_task", lambda *args: None)
    more = ["--choices", "2"] if command == "allocate" else []
    assert run(capsys, command, *VECTOR, *more)[0] == 0
    assert descriptions[0] == "making some_models:Vector"
    assert len({*descriptions}) > 1
