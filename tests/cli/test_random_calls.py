"""Random command lines, with known and unknown words: no traceback, one line on stderr, a valid status."""

import os
import random
import subprocess
import sys
import warnings

import pytest

from fewbit import cli

MODULE = """
import sys
import torch
from torch import nn

class Named(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.GELU()))

    def forward(self, x):
        for each in self.children():
            x = each(x)
        return x

def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))

def odd():
    return Named("a$_{b", "$\\\\frac$", "[bold]", "[/x]", "\\x1b[2J", ":warning:", "=1+1", "\\u202e", "_", "ä\\n", "x" * 300)

def scripted():
    return torch.jit.script(mlp())

def traced():
    return torch.jit.trace(mlp(), torch.ones(2, 8))

class Own(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *inputs):
        return self.run(*inputs)

def tuples():
    return Own(lambda x: (x, {"a": [x * 2]}))

def nothing():
    return Own(lambda x: None)

def stops():
    return Own(lambda x: sys.exit("stopped"))

def raises():
    return Own(lambda x: {}["\\x1b[31m"])

def empty():
    return nn.Sequential()

def embedding():
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.GELU())

def quantized():
    return torch.ao.quantization.quantize_dynamic(mlp())

def leaves():
    sys.exit(3)

def loops():
    return loops()

def loss(model, batch): return model(*batch).square().mean()
square = lambda x: x * x
def odd_name(x): return torch.tanh(x)
odd_name.__name__ = "../../outside\\x1b[2J$a$"
def nan(x): return x / 0
def inplace(x): return x.mul_(2)
def ints(x): return x.long()
number = 3
"""

# fmt: off
NAMES = ["elu", "relu", "odd_models:odd_name", "odd_models:square", "identity", "gelu", "threshold", "hardtanh",
    "geluu", "", ":", "odd_models:nan", "odd_models:inplace", "odd_models:ints", "odd_models:number", "odd_models",
    "torch:tanh", "torch.nn:GELU", "os:getcwd", "no_such:f", "..:f", "odd_models:", ":f", "odd_models:leaves",
    "\x1b[2J", "a$_{b", "-x", "--", "ä" * 50]
PARTS = ["mlp", "odd", "scripted", "traced", "tuples", "nothing", "stops", "raises", "empty", "embedding", "quantized",
    "leaves", "loops", "number", "square", "", "nn", "torch.nn.GELU", "Named", "mlp.x"]
INPUTS = ["4,8", "2,8", "2,3,8", "8", "0,8", "", "2,3,8", "4,8:float64", "4,8:bfloat16", "4,8:int64", "4:int64",
    "4,8:bool", "4,8:complex64", "99999,99999,8", "99999999999999999999", "-1,8", "4,8:qint8", "4,8:float8_e4m3fn",
    "4,8:nn", "x", "1e3,8", "4,,8", " 4, 8 ", "4,8:", ":int64", "4,8:\x1b", "9" * 5000, "4,8:uint8", "4,8:float16",
    "4,8:int64:10", "4:int64:10", "4:int64:0", "4:uint8:999", "4,8:float32:2", "4:int64:" + "9" * 50, "4:bool:2", "x=4,8"]
FILES = ["a.png", "b.svg", "c.json.pdf", "d.png", "", ".", "..", "/", "a.json", "a.png", "a.svg", "a.pdf", "a.eps",
    "a.pgf", "a.xyz", "a", "no/such/a.png", "no/such/a.json", "/dev/null", "~/a.json", "~/a.png", "~nobody/a.png",
    "folder", "a.json/b.png", "\x1b.png", "[/x].json", "x" * 300 + ".png", "-", "a.tif", "a.webp", "a.svgz", "a.raw",
    "a.PNG", ".png", "a\0b.png", "/proc/self/mem", "samples.npy"]
NUMBERS = ["1", "2", "3", "4", "8", "0", "9", "-1", "x", "", "1e300", "1e400", "nan", "inf", "9" * 400, "2.5",
    "10" * 30, "-0"]
TEXTS = ["student", "normal", "uniform", "normal(std=2)", "normal(std=0)", "normal(std=1e300)", "student(df=x)",
    "gauss", "", "(", "\x1b"]
CODINGS = ["level", "interval", "uniform", "levle", ""]
PARAMETERS = ["alpha=0.5", "alpha=2", "alpha=1", "alpha=1.5", "alpha=1e300", "alpha=", "alpha", "=", "beta=1",
    "alpha=nan", "min_val=-2", "threshold=0.1", "\x1b=1", "bits=2"]
SAMPLES = ["samples.npy", "samples.npy", "samples.npy", "strings.npy", "empty.npy", "a.json", "none.npy", "folder",
    "/dev/null", "", "objects.npy", "huge.npy"]
LOSSES = ["odd_models:loss", "odd_models:loss", "odd_models:square", "odd_models:leaves", "odd_models:no", "loss", "",
    "odd_models:number", "odd_models:raises"]
BUDGETS = ["30%", "50%", "1 MiB", "0.5", "", "much", "-1", "0", "1e9", "9" * 400, "1 YiB"]
BITS = ["4", "norm=3", "linear=8", "activation=3,linear=4", "linaer=4", "0", "9", "", "norm=", "=", "4,4",
    "activation=3,activation=4", "x=\x1b"]
# fmt: on


def random_call(draw):
    """A list of arguments. Of each kind of value, the first, valid ones are as frequent as all others together."""

    def pick(values):
        return draw.choice(values[:4] if draw.random() < 0.6 else values)

    def option(name, values, much=0.3):
        if draw.random() > much:
            return []
        value = pick(values)
        return [f"{name}={value}"] if draw.random() < 0.5 else [name, value]

    def table():
        given = (
            option("--weight", TEXTS) + option("--coding", CODINGS) + option("--channels", ["derivative", "value", "slope", ""])
        )
        given += option("--balance", NUMBERS, 0.15) + option("--param", PARAMETERS) + option("--samples", SAMPLES, 0.1)
        if draw.random() < 0.15:
            given += ["--domain", "-3", pick(NUMBERS)]
        return given

    def on_device():
        given = option("--dtype", ["float32", "bfloat16", "float64", "float16", "int8", ""], 0.2) + option(
            "--seed", NUMBERS, 0.1
        )
        return (
            given
            + option("--autocast", ["bfloat16", "float16", "x"], 0.2)
            + option("--device", ["cpu", "abacus", "cuda:99"], 0.1)
        )

    running = ["fidelity", "calibrate", "allocate", "prepare"]
    command = draw.choice(
        ["table"] * 4 + ["plot"] * 3 + ["memory"] * 4 + ["plan", *running, "tables", "bench", "demo", "list", "no-such", ""]
    )
    given = [command]
    if command == "table":
        given += [pick(NAMES), *option("--bits", NUMBERS, 0.6), *table(), *option("--output", FILES)]
        given += ["--json"] * (draw.random() < 0.2)
    elif command == "plot":
        given += [pick(NAMES), "--bits", pick(NUMBERS), *table(), *option("--output", FILES, 0.8)]
    elif command in running:
        given += [f"odd_models:{pick(PARTS)}", *option("--batches", ["2", "1", "3", "0", "x", ""], 0.8), *on_device()]
        given += option("--data", SAMPLES, 0.9) if draw.random() < 0.3 else option("--input", INPUTS, 0.95)
        given += option("--loss", LOSSES) + option("--batch-size", NUMBERS, 0.2) + option("--json", FILES, 0.2)
        if command == "allocate":
            given += [*option("--budget", BUDGETS, 0.6), *option("--choices", ["2", "2,4", "1,2,3", "x", "", "9"], 0.9)]
        elif command == "prepare":
            given += option("--budget", BUDGETS, 0.5) + option("--optimizer", ["adamw", "sgd", "lbfgs", "", "x"], 0.3)
        given += option("--output", FILES, 0.2) if command != "fidelity" else option("--by", ["module", "x", ""], 0.3)
        given += option("--bits", BITS, 0.4) if command != "allocate" else []
    elif command in ("memory", "plan"):
        given += [f"odd_models:{pick(PARTS)}", *option("--input", INPUTS, 0.95), *option("--bits", BITS, 0.5)]
        for name in ("--json", "--csv", "--plot", "--html"):
            given += option(name, FILES, 0.2)
        given += on_device() + ["--fake"] * (draw.random() < 0.3) + ["--gradient"] * (draw.random() < 0.2)
    elif command == "tables":
        given += [draw.choice(["build", "", "no-such"]), "--check", *option("--output", ["no/such", "folder", "a.json"], 1.0)]
        given = [*given, "--unknown"] if given[1] == "build" else given  # designing all tables takes long
    elif command == "bench":
        given += [pick(NAMES), *option("--bits", NUMBERS), *option("--dtype", ["int8", "float32", ""]), "--repeats", "1"]
        given += ["--size", pick(["16", "0", "2^99", "x", "", "2^4"]), *option("--json", FILES), *option("--plot", FILES)]
        given += option("--device", ["cpu", "meta", "abacus", "cuda:99", ""]) + option("--threads", ["0", "1", "x", "9" * 30])
        given += option("--model", ["gptt", "", "odd_models", *(f"odd_models:{part}" for part in PARTS)], 0.2)
        given += option("--blocks", NUMBERS, 0.1) + ["--operators"] * (draw.random() < 0.1)
    elif command == "demo":
        given += ["--steps", draw.choice(["0", "x", "-1"]), *option("--bits", NUMBERS), *option("--output", FILES)]
    if draw.random() < 0.1:
        odd = ["--help", "--version", "--", "-o", "--no-such", "\x1b[2J", "", "=", "-"]
        given.insert(draw.randrange(len(given) + 1), draw.choice(odd))
    if draw.random() < 0.1:
        given.pop(draw.randrange(len(given)))
    return given


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that calls name. Nothing is written outside of it."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEWBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    (tmp_path / "odd_models.py").write_text(MODULE)
    (tmp_path / "folder").mkdir()
    np.save("samples.npy", np.linspace(-3, 3, 50))
    np.save("strings.npy", np.array(["a"]))
    np.save("empty.npy", np.zeros(0))
    np.save("huge.npy", np.array([-1e300, 1e300]))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    return tmp_path


def check(arguments, status, out, err):
    assert status in (0, 1, 2), arguments
    assert "Traceback" not in err, arguments
    assert "\x1b" not in out + err, arguments
    if status:
        assert err.count("\n") <= 1, (arguments, err)
        assert len(err) < 3000, arguments


SEEDS = 24
CALLS = 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_in_one_process(seed, folder, capsys):
    draw, path, torn = random.Random(seed), list(sys.path), []
    for _ in range(CALLS):
        arguments = random_call(draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status = cli.main(arguments)
        except BaseException as error:
            torn.append((arguments, repr(error)[:300]))
            capsys.readouterr()
            continue
        check(arguments, status, *capsys.readouterr())
    assert not torn
    assert sys.path == path
    assert not [name for name in os.listdir(folder.parent) if "outside" in name]


@pytest.mark.slow
def test_in_processes_of_their_own(folder):
    draw = random.Random(99)
    for _ in range(25):
        arguments = [each.replace("\0", "") for each in random_call(draw)]
        found = subprocess.run([sys.executable, "-m", "fewbit", *arguments], capture_output=True, text=True, timeout=100)
        assert found.returncode in (0, 1, 2), arguments
        assert "Traceback" not in found.stderr, arguments
        assert "\x1b" not in found.stdout + found.stderr, arguments
