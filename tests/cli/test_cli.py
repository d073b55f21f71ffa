"""The command line: a table of arguments and outcomes, and the pictures and files that it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import fewbit
from fewbit import activations, cli, store


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--help"],
            [
                "list",
                "table",
                "tables",
                "plot",
                "demo",
                "bench",
                "memory",
                "plan",
                "fidelity",
                "calibrate",
                "allocate",
                "prepare",
            ],
        ),
        (["plot", "-h"], ["--gallery"]),
        (["fidelity", "-h"], ["--data", "--autocast", "Inputs are random unless --data gives real ones"]),
        (["bench", "-h"], ["--parts", "--compile", "--json"]),
        (["--version"], [f"fewbit {fewbit.__version__}"]),
        (["list"], ["gelu_tanh", "min_val=-1, max_val=1", "0.0641", "exact"]),
        (["table", "gelu"], ["gelu: 3 bits, weight student, level coding", "-2.477302", "1.097579", "relative rms 0.06407"]),
        (["table", "elu", "--param", "alpha=0.5", "--bits", 1], ["elu alpha=0.5: 1 bit", "0.000000"]),
        (["table", "tanh", "--coding", "interval", "--weight", "normal(std=2)"], ["weight normal(std=2), interval coding"]),
        (["table", "gelu", "--coding", "uniform", "--bits", 2], ["weight student, uniform coding", "-1.500000", "0.000774"]),
        (
            ["table", "gelu", "--channels", "derivative", "value"],
            [
                "gelu: 3 bits, derivative and value, balance 1, weight normal, interval coding",
                "derivative      value",
                "derivative: mse 0.00468674",
                "value: mse 0.00941103, relative rms 0.148768 on [-10, 10]",
            ],
        ),
        (
            ["table", "identity", "--channels", "value", "--bits", 4],
            ["4 bits, value, weight normal", "-0.128395", "\nmse 0.0095"],
        ),
        (
            ["table", "silu", "--channels", "value", "--channels", "derivative", "--balance", 3],
            ["value and derivative, balance 3"],
        ),
        (["table", "silu", "--domain", -4, 5], ["on [-4, 5]"]),
        (["table", "torch:sin", "--bits", 1], ["sin: 1 bit"]),
        (
            ["table", "gelu", "--ladder"],
            ["gelu: 3 bits, by standard deviation of the input", "std", "0.0625", "0.0183", "0.0646", "0.0200"],
        ),
        (
            ["table", "elu", "--ladder", "--param", "alpha=1", "--channels", "derivative", "value"],
            ["rms of value"],
        ),
        (["table", "relu", "--ladder"], ["any", "0.0000"]),
        (["tables", "--help"], ["build"]),
    ],
    ids=str,
)
def test_prints(capsys, argv, parts):
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    for part in parts:
        assert part in out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["table", "geluu"], 2, "unknown activation 'geluu'; did you mean 'gelu'?"),
        (["table", "gelu", "--bits", 9], 2, "bits must be an integer from 1 to 8, got 9"),
        (["table", "gelu", "--bits", "x"], 2, "--bits"),
        (["table", "gelu", "--coding", "levle"], 2, "coding must be one of"),
        (["table", "gelu", "--ladder", "--weight", "normal"], 2, "--ladder takes only --bits, --channels and --param"),
        (["table", "gelu", "--ladder", "--json"], 2, "--ladder shows several tables"),
        (["table", "gelu", "--channels", "slope"], 2, "channels must be some of ('derivative', 'value'), each once"),
        (["table", "gelu", "--channels", "value", "value"], 2, "each once; got ('value', 'value')"),
        (["table", "gelu", "--channels", "derivative", "value", "--coding", "level"], 2, "use coding='interval' for several"),
        (["table", "gelu", "--channels", "derivative", "value", "--balance", 0], 2, "balance must be a positive number"),
        (["plot", "--gallery", "--channels", "value"], 2, "neither takes other options of a table"),
        (["table", "gelu", "--weight", "gauss"], 2, "weight must be one of student, normal, uniform"),
        (["table", "gelu", "--domain", 3, 1], 2, "domain must be two finite numbers"),
        (["table", "gelu", "--param", "alpha"], 2, "--param takes NAME=NUMBER, such as alpha=0.5; got 'alpha'"),
        (["table", "gelu", "--param", "bits=2"], 2, "gelu has no parameter 'bits'"),
        (["table", "celu", "--param", "alpha=0"], 2, "celu alpha=0 has no finite value"),
        (["table", "no.such:thing"], 2, "cannot import no.such:thing"),
        (["table", "torch:nothing"], 2, "cannot import torch:nothing"),
        (["table", "torch:cumsum"], 2, "cumsum must map a float64 tensor"),
        (["table", "torch:pi"], 2, "torch:pi is not a function"),
        (["table", "gelu", "--samples", "/no/such.npy"], 1, "/no/such.npy: No such file or directory"),
        (["table", "gelu", "--output", "/no/such/folder.json"], 1, "/no/such/folder.json: No such file or directory"),
        (["table"], 2, "Missing argument"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["plot"], 2, "give an activation's name, or --gallery, or --errors"),
        (["plot", "gelu", "--gallery"], 2, "give an activation's name, or --gallery, or --errors"),
        (["plot", "--gallery", "--bits", 1, 2], 2, "--gallery takes one --bits and --errors takes none"),
        (["plot", "gelu", "-o", "/no/such/p.png"], 1, "/no/such: No such folder"),
        (["plot", "--errors", "--weight", "uniform"], 2, "neither takes other options of a table"),
        (["plot", "--errors", "--bits", 2], 2, "--errors takes none"),
        (["demo", "-o", "curves.xyz"], 2, "curves.xyz must end in one of"),
        (["demo", "-o", "/no/such/curves.png"], 1, "/no/such: No such folder"),
        (["demo", "--device", "meta"], 1, "torch has no device 'meta' here"),
        (["bench", "geluu"], 2, "unknown activation 'geluu'; did you mean 'gelu'?"),
        (["bench", "--size", "1M"], 2, "a size must be a number of elements from 1 to 2^31, such as 16384 or 2^14; got '1M'"),
        (["bench", "--dtype", "int8"], 2, "dtype must be one of float32, bfloat16, float16, float64; got 'int8'"),
        (["bench", "--device", "abacus"], 2, "torch has no device 'abacus' here"),
        (["bench", "--bits", 3, 9], 2, "bits must be an integer from 1 to 8, got 9"),
        (["bench", "--repeats", 0], 2, "--repeats"),
        (["bench", "--plot", "ratios.xyz"], 2, "--plot ratios.xyz must end in one of"),
        (["bench", "--plot", "/no/such/ratios.png"], 1, "/no/such: No such folder"),
        (["bench", "--json", "/no/such/results.json"], 1, "/no/such: No such folder"),
        (["table", "gelu", "--bits", 3, 4], 2, "unexpected extra argument"),
        (["table", ":f"], 2, "cannot import :f"),
        (["table", "broken:f"], 2, "cannot import broken:f: SyntaxError"),
        (["plot", "gelu", "-o", "picture.xyz"], 2, "picture.xyz must end in one of"),
        (["demo", "--steps", 0], 2, "--steps"),
        (["demo", "--bits", 9], 2, "bits must be an integer from 1 to 8, got 9"),
        (["demo", "--device", "abacus"], 1, "torch has no device 'abacus' here"),
    ],
    ids=str,
)
def test_errors_take_one_line(capsys, argv, status, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *argv)
    assert found == status
    assert err.startswith("fewbit: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_json_is_the_table(capsys):
    status, out, _ = run(capsys, "table", "gelu", "--bits", 2, "--json")
    assert status == 0
    assert fewbit.CodeTable.from_dict(json.loads(out)) == fewbit.load_table("gelu", 2)


def test_output_is_a_table_file(capsys, tmp_path):
    path = tmp_path / "t.json"
    assert run(capsys, "table", "gelu", "--output", path)[1].endswith(f"wrote {path}\n")
    assert fewbit.CodeTable.load(path) == fewbit.load_table("gelu", 3)


def test_samples(capsys, tmp_path, rng):
    samples = rng.normal(size=1000)
    np.save(tmp_path / "x.npy", samples)
    _, out, _ = run(capsys, "table", "gelu", "--samples", tmp_path / "x.npy", "--json")
    assert fewbit.CodeTable.from_dict(json.loads(out)) == fewbit.design("gelu", 3, weight=samples)
    np.savez(tmp_path / "several.npy", a=samples)
    for content in (b"words", b"PK\x03\x04", b"", (tmp_path / "several.npy.npz").read_bytes()):
        (tmp_path / "bad.npy").write_bytes(content)
        status, _, err = run(capsys, "table", "gelu", "--samples", tmp_path / "bad.npy")
        assert status == 2
        assert "bad.npy is not a .npy file of numbers" in err


def test_a_function_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def square(x):\n    return x * x\n")
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "table", "mine:square", "--bits", 1)
    assert status == 0
    assert "square: 1 bit" in out


@pytest.mark.slow
def test_build_and_check(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SHIPPED", {"relu": activations.get("relu")})
    status, out, err = run(capsys, "tables", "build", "--output", tmp_path)
    assert (status, err) == (0, "")
    assert "written; changed: relu" in out
    assert (tmp_path / "relu.json").read_text() == (store.tables_directory() / "relu.json").read_text()
    status, out, _ = run(capsys, "tables", "build", "--check", "--output", tmp_path)
    assert status == 0
    assert "are up to date" in out
    (tmp_path / "relu.json").write_text("{}")
    status, _, err = run(capsys, "tables", "build", "--check", "--output", tmp_path)
    assert status == 1
    assert "1 files in" in err
    assert "relu; run `fewbit tables build`" in err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["gelu"], "fewbit-gelu.png"),
        (["elu", "--bits", "2", "--param", "alpha=0.5"], "fewbit-elu.png"),
        (["--gallery"], "fewbit-gallery.png"),
        (["--errors"], "fewbit-errors.png"),
        (["gelu", "--bits", "1", "3", "-o", "own.svg"], "own.svg"),
        (["gelu", "--channels", "derivative", "value", "--bits", "2"], "fewbit-gelu.png"),
        (["identity", "--channels", "value", "--coding", "uniform", "--bits", "3"], "fewbit-identity.png"),
    ],
)
def test_plots_name_the_file_they_wrote(capsys, argv, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "plot", *argv)
    assert (status, out, err) == (0, f"wrote {name}\n", "")
    assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        (["table", "gelu", "--bits", "3", "4"], ["table", "gelu", "--bits", "3", "4"]),
        (["plot", "gelu", "--bits", "1", "2", "3"], ["plot", "gelu", "--bits", "1", "--bits", "2", "--bits", "3"]),
        (["plot", "--bits", "1", "--bits", "2", "-o", "7"], ["plot", "--bits", "1", "--bits", "2", "-o", "7"]),
        (["table", "gelu", "--bits", "3", "--domain", "-5", "5"], ["table", "gelu", "--bits", "3", "--domain", "-5", "5"]),
        (["bench", "--bits", "3", "1", "gelu"], ["bench", "--bits", "3", "--bits", "1", "gelu"]),
        (["plot", "--channels", "value", "gelu"], ["plot", "--channels", "value", "gelu"]),
        (
            ["plot", "gelu", "--channels", "derivative", "value", "--bits", "1", "2"],
            ["plot", "gelu", "--channels", "derivative", "--channels", "value", "--bits", "1", "--bits", "2"],
        ),
        (
            ["table", "--channels", "derivative", "value", "gelu"],
            ["table", "--channels", "derivative", "--channels", "value", "gelu"],
        ),
        (["demo", "--bits", "3", "1", "--steps", "5"], ["demo", "--bits", "3", "--bits", "1", "--steps", "5"]),
    ],
    ids=str,
)
def test_options_with_several_values(given, spread):
    assert cli._spread(given) == spread


def test_a_backend_without_windows_gets_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.get_backend", lambda: "pdf")
    assert run(capsys, "plot", "relu", "--bits", 1) == (0, "wrote fewbit-relu.png\n", "")


def test_without_a_command_it_shows_help(capsys):
    for argv, expected in (((), 0), (("tables",), 2)):
        status, out, err = run(capsys, *argv)
        assert (status, err) == (expected, "")
        assert "Commands" in out


def test_help_loads_nothing_that_takes_long():
    code = "import sys; from fewbit import cli; cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Commands" in found.stdout
    loaded = found.stderr.split()
    assert "fewbit.cli" in loaded
    assert not {"torch", "numpy", "scipy", "numba", "matplotlib", "triton", "jinja2"} & {*loaded}


def test_a_reader_that_leaves_early_is_no_error():
    code = f"{sys.executable} -m fewbit list | head -1"
    result = subprocess.run(code, shell=True, capture_output=True, text=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


def test_env(capsys):
    status, out, err = run(capsys, "env")
    assert (status, err) == (0, "")
    found = dict(line.split(None, 1) for line in out.splitlines())
    assert found["torch"] == torch.__version__
    assert found["fewbit"] == fewbit.__version__
    assert found["cpu"].strip().endswith("kernels: cpu")
    assert {"python", "numba", "system", "threads", "GPUs", "cache"} <= found.keys()
