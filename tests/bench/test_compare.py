"""`fewbit bench --model`: what is measured and how it is shown. Times themselves are not tested."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import fewbit
from fewbit import cli
from fewbit.bench import compare, compare_report, models
from fewbit.bench.models import Subject
from fewbit.errors import DesignError, FewbitError, InputError
from fewbit.traffic import traffic


def make():
    return models.gpt(2, 64, 2, 16)


def settings(factory=make, **changes):
    words = {"bits": ["4", "activation=3,linear=4"], "dtypes": ["float32", "bfloat16"], "devices": ["cpu"]}
    return compare.Settings.of("small", factory, **{**words, "threads": 1, "repeats": 2, **changes})


@pytest.fixture(scope="module")
def report():
    return compare.run(settings())


def shown(report, **options):
    text = io.StringIO()
    compare_report.show(report, Console(file=text, width=160), **options)
    return text.getvalue()


def test_every_case_has_every_run(report):
    assert [(case.device, case.dtype) for case in report.cases] == [("cpu", "float32"), ("cpu", "bfloat16")]
    for case in report.cases:
        assert [run.run for run in case.runs] == ["exact", "checkpoint", "4 bits", "activation=3,linear=4"]
        assert [run.bits for run in case.runs] == [None, None, "4", "activation=3,linear=4"]
        assert case.parameters == sum(parameter.numel() for parameter in make().model.parameters())
        assert case.batch == [f"(2, 16, 64) {case.dtype}"]
    assert settings(bits=["4", "4"]).bits == ("4",)


def test_figures_are_those_of_the_step(report):
    for case in report.cases:
        exact, checkpoint, coded, _ = case.runs
        subject = make()
        subject.model.to(getattr(torch, case.dtype))
        x = subject.batch.detach().to(getattr(torch, case.dtype)).requires_grad_()

        def step(model=subject.model, x=x):
            y = model(x)
            y.backward(torch.ones_like(y))

        with_ones = traffic(step).total
        assert exact.calls == with_ones.calls - 1
        assert exact.moved_bytes == with_ones.bytes - 2 * x.nbytes
        assert exact.kept_bytes == fewbit.memory(subject.model, x).activation_bytes
        assert coded.kept_bytes == fewbit.memory(fewbit.convert(subject.model, bits=4), x).activation_bytes
        assert checkpoint.kept_bytes == x.nbytes  # the second block's input
        assert exact.calls < checkpoint.calls < coded.calls
        assert exact.peak_bytes > exact.kept_bytes
        for run in case.runs:
            assert run.calls == sum(use["calls"] for use in run.operators.values())
            assert run.moved_bytes == sum(use["bytes"] for use in run.operators.values())
            assert run.seconds["median"] > 0
        assert set(exact.ratio.values()) == {1.0}
        assert exact.products["aten.addmm"]["calls"] == 8
        assert checkpoint.products["aten.addmm"]["calls"] == 14  # except the last of each block, of which nothing is kept


def test_json_form(report):
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(found) == {
        *("format", "version", "model", "date", "versions", "devices", "threads", "repeats", "cases", "notes")
    }
    assert (found["format"], found["version"], found["model"]) == ("fewbit-bench-model", 1, "small")
    assert {"fewbit", "python", "torch", "numpy", "numba"} <= set(found["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    run = found["cases"][0]["runs"][2]
    assert run["operators"]["fewbit.encode"]["calls"] > 0
    assert list(run["seconds"]) == ["p10", "p25", "median", "p75", "p90"]


def test_table(report):
    text = shown(report)
    assert "…" not in text
    assert "small: 0.1 million parameters, batch of (2, 16, 64) float32\nfloat32 on cpu (" in text
    assert "2 rounds, 1 thread" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["exact"][1:3] == ["32", "1.00"]
    assert rows["checkpoint"][1:3] == ["40", "1.25"]
    assert "aten.gelu" not in text


def test_operators_stand_side_by_side(report):
    text = shown(report, operators=True)
    rows = [line.split() for line in text.splitlines()]
    assert ["aten.gelu_backward", *["2", "96.0", "KiB"] * 2] in rows  # coded runs have none of them
    assert ["aten.gelu", "2", "64.0", "KiB", "4", "128", "KiB", *["2", "64.0", "KiB"] * 2] in rows
    assert any(row[:1] == ["fewbit.decode"] and len(row) == 7 for row in rows)


def test_a_model_without_blocks():
    def alone():
        return Subject(nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8))

    report = compare.run(settings(alone, dtypes=["float32"], bits=["4"], repeats=1))
    assert [run.run for run in report.cases[0].runs] == ["exact", "4 bits"]
    assert report.notes == ["nothing is checkpointed: small has no ModuleList or Sequential of blocks of one class"]
    assert shown(report).endswith(report.notes[0] + "\n")


def test_every_level_of_blocks_is_checkpointed():
    def stages():
        return Subject(nn.Sequential(make().model, make().model), make().batch)

    report = compare.run(settings(stages, dtypes=["float32"], bits=["4"], repeats=1))
    assert [run.run for run in report.cases[0].runs] == ["exact", "checkpoint 1", "checkpoint 2", "4 bits"]
    assert report.notes == ["checkpoint 1: each of 2 Sequential", "checkpoint 2: each of 4 Block"]
    exact, outer, inner, _ = report.cases[0].runs
    assert [run.kept_bytes // make().batch.nbytes for run in (outer, inner)] == [1, 3]
    assert exact.calls < inner.calls <= outer.calls


def test_unknown_peaks_are_no_numbers(report):
    from dataclasses import replace

    case = report.cases[0]
    runs = [replace(run, peak_bytes=None) for run in case.runs]
    text = shown(replace(report, cases=[replace(case, runs=runs)]))
    assert all(line.count(" –") == 2 for line in text.splitlines() if line.startswith(("exact", "4 bits")))


def test_what_cannot_be_measured_is_told():
    class Picky(nn.Sequential):
        def forward(self, x):
            if x.dtype == torch.bfloat16:
                raise KeyError("not in bfloat16")
            return super().forward(x)

    def picky():
        return Subject(Picky(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8))

    with pytest.raises(FewbitError, match=r"^cannot measure small in bfloat16 on cpu: KeyError: 'not in bfloat16'$"):
        compare.run(settings(picky, bits=["4"], repeats=1))
    with pytest.raises(InputError, match="there is nothing to compare: no module of the Flatten was converted"):
        compare.run(settings(lambda: Subject(nn.Flatten(), torch.randn(4, 8, requires_grad=True)), repeats=1))
    with pytest.raises(InputError, match="the model returns no tensor that needs a gradient"):
        compare.run(settings(lambda: Subject(nn.Linear(8, 8).requires_grad_(False), torch.randn(4, 8))))


def test_bad_settings():
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, float64; got 'int8'"):
        settings(dtypes=["int8"])
    with pytest.raises(InputError, match="torch has no device 'abacus' here"):
        settings(devices=["abacus"])
    for bits in ("9", "four", "linear=0", "colour=4"):
        with pytest.raises(DesignError, match="bits"):
            settings(bits=["4", bits])


FACTORIES = """
import torch
from torch import nn

def pair():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)

def with_loss():
    model, batch = pair()
    return model, {"x": batch}, lambda model, batch: model(batch["x"]).square().mean()

def model_alone():
    return nn.Linear(2, 2)

def frozen():
    return nn.Linear(8, 8).requires_grad_(False), torch.randn(4, 8)

def failing():
    raise OSError("no weights here")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_factories", raising=False)
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    return tmp_path


@pytest.mark.parametrize("factory", ["pair", "with_loss"])
def test_command(capsys, factories, factory):
    argv = (
        f"bench --model some_factories:{factory} --bits 4 2 --dtype float32 --repeats 1 --threads 1 --operators --json a.json"
    )
    assert cli.main(argv.split()) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"some_factories:{factory}: 0.0 million parameters, batch of (4, 8) float32\n")
    assert captured.out.endswith("wrote a.json\n")
    assert "fewbit.encode" in captured.out
    found = json.loads((factories / "a.json").read_text())
    assert [run["run"] for run in found["cases"][0]["runs"]] == ["exact", "4 bits", "2 bits"]


def test_defaults(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(compare, "run", lambda settings, track: seen.append(settings) or compare.Report("", "", {}, {}, 1, 1))
    assert cli.main(["bench", "--model", "gpt"]) == 0
    assert cli.main(["bench", "--model", "llama", "--blocks", "1"]) == 0
    defaults, one = seen
    assert (defaults.name, defaults.bits, defaults.repeats) == ("gpt", ("4",), 10)
    assert defaults.dtypes == (torch.float32, torch.bfloat16)
    assert defaults.devices == (torch.device("cpu"),)
    assert [len(each.make().model) for each in seen] == [4, 1]
    assert one.make().batch.shape == (8, 256, 512)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("--model gptt", 2, "--model gptt is none of gpt, llama, conv; others are given as package.module:factory"),
        ("--model no_such_module:factory", 1, "cannot make a model of no_such_module:factory: ModuleNotFoundError"),
        ("--model some_factories:nothing", 1, "cannot make a model of some_factories:nothing: AttributeError"),
        ("--model some_factories:failing", 1, "cannot make a model of some_factories:failing: OSError: no weights here"),
        ("--model some_factories:torch", 1, "cannot make a model of some_factories:torch: TypeError"),
        (
            "--model some_factories:model_alone",
            1,
            "a factory must return (model, batch) or (model, batch, loss_fn), got (Linear)",
        ),
        ("--model some_factories:frozen", 1, "the model returns no tensor that needs a gradient"),
        ("--model some_factories:pair --blocks 2", 2, "--blocks is for gpt, llama, conv; leave it out for some_factories:pair"),
        ("--model gpt --blocks 0", 2, "--blocks"),
        ("--model gpt --bits 9", 2, "bits must be an integer from 1 to 8"),
        ("--model gpt --bits colour=4", 2, "bits has an unknown kind 'colour'"),
        ("--model gpt --device abacus", 2, "torch has no device 'abacus' here"),
        ("--model gpt --device meta", 2, "torch has no device 'meta' here"),
        ("--model gpt --dtype int8", 2, "dtype must be one of float32"),
        ("--model gpt --json /no/such/a.json", 1, "/no/such: No such folder"),
        ("gelu --model gpt", 2, "--model takes no names of activations: that is for activations"),
        ("--model gpt --size 16", 2, "--model takes no --size: that is for activations"),
        ("--model gpt --plot a.png", 2, "--model takes no --plot"),
        ("gelu --operators", 2, "--operators is only for --model, as in --model gpt"),
        ("gelu --blocks 2", 2, "--blocks is only for --model, as in --model gpt"),
        ("gelu --bits linear=4", 2, "--bits of an activation is a number from 1 to 8, got 'linear=4'"),
    ],
    ids=str,
)
def test_errors_take_one_line(capsys, factories, argv, status, message):
    assert cli.main(["bench", *argv.split()]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fewbit: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
