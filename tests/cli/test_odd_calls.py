"""The command line with unusual arguments: odd paths, names and models, full disks, interrupts."""

import os
import signal
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fewbit
from fewbit import cli

MODELS = """
import sys, torch
from torch import nn
def make(): return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
class recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(8, 8)
    def forward(self, x): return self.layer(x)[0]
def leaves(): sys.exit(3)
def scripted(): return torch.jit.script(nn.Linear(8, 8))
"""


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return tmp_path


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="links and devices as POSIX has them")
@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["table", "gelu", "-o"], "a.json"),
        (["plot", "gelu", "--bits", "1", "-o"], "a.png"),
        (["memory", "some_models:make", "--input", "2,8", "--json"], "a.json"),
        (["memory", "some_models:make", "--input", "2,8", "--csv"], "a.csv"),
        (["memory", "some_models:make", "--input", "2,8", "--html"], "a.html"),
        (["memory", "some_models:make", "--input", "2,8", "--plot"], "a.png"),
        (["plan", "some_models:make", "--input", "2,8", "--html"], "a.html"),
        (["fidelity", "some_models:make", "--input", "2,8", "--csv"], "a.csv"),
        (["calibrate", "some_models:make", "--input", "2,8", "--output"], "a.json"),
        (["prepare", "some_models:make", "--input", "64,8", "--output"], "a.json"),
        (["bench", "gelu", "--size", "16", "--dtype", "float32", "--repeats", "1", "--json"], "a.json"),
        (["bench", "gelu", "--size", "16", "--dtype", "float32", "--repeats", "1", "--plot"], "a.png"),
    ],
    ids=lambda argv: " ".join(argv[::5]) if isinstance(argv, list) else argv,
)
def test_outputs_leave_links_modes_and_devices(capsys, argv, name, models):
    target, link = models / "target", models / name
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to("target")
    assert run(capsys, *argv, link)[0] == 0
    assert link.is_symlink()
    assert mode_of(target) == 0o600
    assert target.stat().st_size > 100
    before = os.stat("/dev/null")
    status, out, err = run(capsys, *argv, "/dev/null")
    assert (status, err) == (0, "")
    assert out.endswith("wrote /dev/null\n")
    assert os.path.samestat(os.stat("/dev/null"), before)
    assert stat.S_ISCHR(before.st_mode)


def test_a_path_of_the_home_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert run(capsys, "table", "gelu", "--output=~/t.json")[0] == 0
    assert os.listdir(tmp_path) == ["t.json"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table", "gelu", "--output="], "Invalid value for '--output' / '-o': give the name of a file, got '.'"),
        (["memory", "some_models:make", "--input", "2,8", "--html="], "'--html': give the name of a file"),
        (["memory", "some_models:make", "--input", "2,8", "--html", "folder"], "folder: Is a directory"),
        (
            ["memory", "some_models:make", "--input", "99999,99999,99999,8"],
            "--input 99999,99999,99999,8: this tensor cannot",
        ),
        (["memory", "some_models:make", "--input", "9" * 40], "this tensor cannot be made here"),
        (["memory", "some_models:scripted", "--input", "2,8"], "scripted made a scripted module"),
        (["memory", "some_models:leaves", "--input", "2,8"], "cannot make a model of some_models:leaves: SystemExit: 3"),
        (["table", "some_models:leaves"], "leaves must map a float64 tensor"),
        (["memory", "some_models:\x1b[2J", "--input", "2,8"], "some_models:\\x1b[2J"),
        (["table", "\x1b[2J"], "unknown activation '\\x1b[2J'"),
        (["table", "gelu", "-o", "no\x1b[2J/a"], "no\\x1b[2J/a: No such file or directory"),
        (["\x1b[2J"], "No such command '\\x1b[2J'"),
    ],
    ids=lambda each: " ".join(each)[:60] if isinstance(each, list) else "",
)
def test_what_is_odd_takes_one_line_too(capsys, argv, message, models):
    (models / "folder").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from torch, about scripts
        status, _, err = run(capsys, *argv)
    assert status in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_the_path_of_imports_keeps_what_a_module_adds(capsys, tmp_path, monkeypatch):
    (tmp_path / "adds.py").write_text("import sys, torch\nsys.path.insert(0, '/added')\ndef f(x): return torch.tanh(x)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/first", *sys.path])
    monkeypatch.delitem(sys.modules, "adds", raising=False)
    before = list(sys.path)
    assert run(capsys, "table", "adds:f", "--bits", 1)[0] == 0
    assert sys.path == ["/added", *before]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_cannot_be_written():
    found = subprocess.run(f"{sys.executable} -m fewbit list > /dev/full", shell=True, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (1, "fewbit: cannot write the output: No space left on device\n")


def test_a_terminal_that_lacks_characters():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    found = subprocess.run([sys.executable, "-m", "fewbit", "list"], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_warning_takes_one_line(capsys, models):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = run(capsys, "memory", "some_models:recurrent", "--input", "4,2,8", "--fake")
    assert (status, out.count("workspaces of")) == (0, 1)
    assert err.startswith("fewbit: warning: More is kept than counted: fake tensors do not tell the size of the workspaces of")
    assert err.count("\n") == 1


# a module that takes long to import, and says when its import has begun
SLOW = "import sys, time\nprint('here', flush=True)\n"


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("module", ["typer", "numpy", "mine"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_interrupted_while_it_imports(module, swallowed, tmp_path):
    """Also if the imported module turns the interrupt into another exception."""
    lost = "try: time.sleep(100)\nexcept KeyboardInterrupt: raise ImportError" if swallowed else "time.sleep(100)"
    (tmp_path / f"{module}.py").write_text(SLOW + lost)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(fewbit.__file__).parents[1]}"}
    command = [sys.executable, "-m", "fewbit", "table", "mine:f" if module == "mine" else "gelu"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("fewbit: interrupted\n", 130)
