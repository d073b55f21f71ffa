"""Values that no caller should give, and files that fewbit did not write: short errors of fewbit, at once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fewbit
from fewbit import activations, weights
from fewbit.design.table import dump_tables
from fewbit.errors import FewbitError, TableError, TableFileError
from fewbit.models.calibration.calibration import CalibratedLayer
from fewbit.text import file_name, plain, shown

VALUES = [
    *(None, True, "", "x" * 10**6, "\x1b[2J", b"bytes", object(), lambda x: x, float),
    *(0, -1, 10**400, 10**5000, -(10**400), 1e300, -1e300, 1e-300, 5e-324, float("nan"), float("inf"), 1j),
    *([], [[]], [1] * 10**6, [10**400], [1e300], [[1, 2], [3]], ["a"], [None], [[[1]]], {}, {"a": 10**400}, {1: 2}, ((),)),
    *(np.array([]), np.array(1e300), np.array(["a"]), np.array([object()]), np.zeros((2, 2, 2))),
]
# values of JSON
JSON = [value for value in VALUES if isinstance(value, type(None) | bool | str | int | float | list | dict) and value != {1: 2}]
JSON = [value for value in JSON if value != 10**5000]
LARGE = [1e300, -1e300, 1e-300, 5e-324, 10**400, 10**5000]


def check(call, *arguments, **named):
    """Assert that a call succeeds, or raises a short error of fewbit."""
    try:
        said = repr(call(*arguments, **named))
    except FewbitError as error:
        said = str(error)
    assert len(said) <= 2000
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("entry", fewbit.CodeTable.__dataclass_fields__)
def test_entries_of_tables(entry):
    whole = fewbit.load_table("elu", 3, channels=("derivative", "value")).to_dict()
    for value in VALUES:
        check(fewbit.CodeTable.from_dict, {**whole, entry: value})
        check(fewbit.CodeTable, **{**whole, entry: value})


@pytest.mark.parametrize("entry", fewbit.CodeTable.__dataclass_fields__)
@pytest.mark.filterwarnings("error")
def test_entries_of_table_files(entry, tmp_path):
    whole = json.loads(dump_tables([fewbit.load_table("elu", 3, channels=("derivative", "value"))]))
    for value in JSON:
        changed = {**whole, "tables": [{**whole["tables"][0], entry: value}]}
        (tmp_path / "a.json").write_text(json.dumps(changed))
        check(fewbit.CodeTable.load, tmp_path / "a.json")


@pytest.fixture(scope="module")
def calibration_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "a.json"
    model = fewbit.convert(nn.Sequential(nn.Linear(4, 4), nn.ELU(0.5), nn.Linear(4, 4)), bits=3)
    fewbit.calibrate(model, [torch.randn(64, 4)]).save(path)
    return path.read_text()


@pytest.mark.parametrize("entry", CalibratedLayer.__dataclass_fields__)
def test_entries_of_calibrations(entry, calibration_text, tmp_path):
    whole = json.loads(calibration_text)
    for value in JSON:
        layers = [{**layer, entry: value} for layer in whole["layers"]]
        (tmp_path / "a.json").write_text(json.dumps({**whole, "layers": layers}))
        check(fewbit.Calibration.load, tmp_path / "a.json")


@pytest.mark.parametrize("argument", ["bits", "weight", "coding", "channels", "balance", "domain", "levels", "cells", "alpha"])
@pytest.mark.filterwarnings("error")
def test_arguments_of_designs(argument):
    for value in VALUES:
        if not (argument == "weight" and callable(value)):
            check(fewbit.design, "elu", **{"bits": 2, argument: value})


@pytest.mark.parametrize("name", activations.names())
@pytest.mark.filterwarnings("error")
def test_parameters_of_activations(name):
    for parameter in activations.get(name).parameters:
        for value in LARGE:
            check(fewbit.design, name, 2, **{parameter: value})
            check(fewbit.load_table, name, 2, **{parameter: value})


@pytest.mark.parametrize("kind", [weights.Normal, weights.Student])
@pytest.mark.filterwarnings("error")
def test_arguments_of_weights(kind):
    for argument in kind.__dataclass_fields__:
        for value in VALUES:
            check(lambda value=value, argument=argument: fewbit.design("gelu", 2, weight=kind(**{argument: value})))
    for text in ("normal(std=1e300)", "normal(std=1e-300)", "normal(mean=1e300)", "student(df=1e300)", "student(scale=1e-320)"):
        check(fewbit.design, "gelu", 2, weight=text)


@pytest.mark.filterwarnings("error")
def test_domains():
    for domain in ((-1e300, 1e300), (-1e-300, 1e-300), (0, 5e-324), (1e300, 2e300), (-(10**400), 0), (0, 1e-12), (-1e9, 1e9)):
        for channels in ("derivative", "value"):
            check(fewbit.design, "gelu", 3, domain=domain, channels=channels)


def test_parameters_of_own_functions():
    for value in LARGE:
        check(fewbit.register, "mine", lambda x, a=1.0: x * a, parameters={"a": value}, overwrite=True)
        check(fewbit.design, lambda x, a=1.0: x * a, 2, a=value)


WRONG = {
    "levels in another order": {"levels": lambda levels: [row[::-1] for row in levels]},
    "scaled levels": {"levels": lambda levels: [[1.1 * each for each in row] for row in levels]},
    "one level": {"levels": lambda levels: [[*row[:-1], row[-1] + 0.5] for row in levels]},
    "shifted thresholds": {"thresholds": lambda thresholds: [each + 0.3 for each in thresholds]},
    "codes in another order": {"codes": lambda codes: codes[::-1]},
    "one code for all": {"codes": lambda codes: [0] * len(codes)},
    "errors": {"errors": lambda errors: [each / 2 for each in errors]},
    "no error at all": {"errors": lambda errors: [0.0] * len(errors)},
    "powers": {"powers": lambda powers: [2 * each for each in powers]},
    "no power at all": {"powers": lambda powers: [0.0] * len(powers)},
    "another activation": {"activation": lambda _: "silu"},
    "another weight": {"weight": lambda _: "uniform"},
    "another domain": {"domain": lambda _: [-2.0, 2.0]},
    "another channel": {"channels": lambda channels: ["value" if each == "derivative" else "derivative" for each in channels]},
    "a parameter that there is not": {"parameters": lambda _: {"alpha": 1.0}},
}


@pytest.mark.parametrize("channels", ["derivative", ("derivative", "value")], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_tables_that_look_right_and_are_not(wrong, channels, tmp_path):
    content = json.loads(dump_tables([fewbit.load_table("gelu", 3, channels=channels)]))
    table = content["tables"][0]
    table.update({name: change(table[name]) for name, change in WRONG[wrong].items()})
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(TableFileError, match=r"a\.json holds a broken table: (it states errors|gelu has no parameter)"):
        fewbit.CodeTable.load(tmp_path / "a.json")


@pytest.mark.parametrize("weight", ["normal", "student(df=5)", "normal(std=3)"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "hardswish", "threshold", "identity"])
def test_tables_that_are_right_pass(activation, weight, tmp_path):
    for arguments in ({"bits": 2}, {"bits": 5, "coding": "uniform"}, {"bits": 4, "channels": "value", "domain": (-3, 5)}):
        table = fewbit.design(activation, weight=weight, cells=300, **arguments)
        table.save(tmp_path / "a.json")
        assert fewbit.CodeTable.load(tmp_path / "a.json") == table


def test_a_calibration_whose_table_contradicts_its_label(calibration_text, tmp_path):
    whole = json.loads(calibration_text)
    (at,) = (i for i, layer in enumerate(whole["layers"]) if layer["activation"] == "elu")
    for change, message in (
        ({"parameters": {"alpha": 1.0}}, "the table is for elu alpha=0.5, its layer is elu alpha=1"),
        ({"activation": "celu"}, "its layer is celu alpha=0.5"),
        ({"table": fewbit.load_table("gelu", 3).to_dict()}, "the table is for gelu, its layer is elu alpha=0.5"),
    ):
        layers = list(whole["layers"])
        layers[at] = {**layers[at], **change}
        (tmp_path / "a.json").write_text(json.dumps({**whole, "layers": layers}))
        with pytest.raises(TableFileError, match=f"a.json holds a broken layer: .*{message}"):
            fewbit.Calibration.load(tmp_path / "a.json")


def test_no_power():
    table = fewbit.CodeTable([0.0], [0, 1], [[0.0, 1.0]], 1, errors=[0.1], powers=[0.0])
    assert table.relative_rms == np.inf
    assert "relative rms inf" in repr(table)


@pytest.mark.skipif(os.name != "posix", reason="pipes and links as POSIX has them")
@pytest.mark.parametrize("load", ["CodeTable", "Calibration"])
def test_what_is_no_file_of_tables(load, tmp_path):
    """In a process with little memory, which shows hangs and endless files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with open(tmp_path / "spaces", "wb") as file:
        file.truncate(1 << 30)
    code = f"""
import resource, sys, fewbit
load = fewbit.{load}.load
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
for name in ("pipe", "endless", "spaces", ".", "missing", "a\\0b"):
    try:
        load({str(tmp_path)!r} + "/" + name)
    except fewbit.TableFileError as error:
        print(error)
if sys.platform == "linux":  # where ru_maxrss begins at the peak of the process that started this one
    print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    lines = found.stdout.splitlines()
    assert len(lines) == 7, found.stderr
    for line, message in zip(lines, ["not a regular file"] * 2 + ["larger than the"], strict=False):
        assert message in line
    assert int(lines[-1]) < 1000  # MiB: torch takes 250 of them, and "spaces" has 1024


class TestTexts:
    def test_plain(self):
        assert plain("a\x1b[31m\x07\x9b\r\n\u202e\u200bä中") == "a\\x1b[31m\\x07\\x9b\\r\n\\u202e\\u200bä中"

    def test_shown(self):
        class Broken:
            def __repr__(self):
                raise RuntimeError

        assert (shown(10**5000), shown("a")) == ("<int>", "'a'")
        assert shown(Broken()).startswith("<Broken")
        assert all(len(shown(value)) < 200 for value in VALUES)

    def test_file_name(self):
        names = ["../../outside", "/etc/passwd", "", "..", "a b", "<lambda>", "con", "x" * 999, "a\0b", "ä", "C:\\x"]
        for name in names:
            assert set(file_name(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
            assert 0 < len(file_name(name)) <= 64


def test_messages_are_plain():
    with pytest.raises(TableError) as caught:
        fewbit.CodeTable.load("a\x1b[2Jb")
    assert "\\x1b[2J" in str(caught.value)


@pytest.mark.parametrize("kind", [fewbit.TableError, fewbit.InputError, fewbit.ConversionWarning, fewbit.DriftWarning])
def test_errors_and_warnings_are_plain_and_short(kind):
    assert str(kind("a\x1b[2J")) == "a\\x1b[2J"
    assert len(str(kind("x" * 10**6))) <= 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_beyond_float32_in_a_table(dtype):
    x = torch.linspace(-3, 3, 7, dtype=dtype, requires_grad=True)
    far = fewbit.CodeTable([-1e300, 0.0, 1e300], [0, 0, 1, 1], [[0.25, 0.75]], 1)
    fewbit.functional.gelu(x, table=far).sum().backward()
    assert x.grad.tolist() == [0.25] * 4 + [0.75] * 3
    large = fewbit.CodeTable([0.0], [0, 1], [[0.0, 1e300]], 1)
    if dtype == torch.float64:
        fewbit.functional.gelu(x, table=large).sum().backward()
    else:
        with pytest.raises(TableError, match="has levels beyond float32; use another table, or inputs of float64"):
            fewbit.functional.gelu(x, table=large)
