"""`fewbit bench`: what is measured and how it is shown. Times themselves are not tested."""

import copy
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console

import fewbit
from fewbit import activations, cli, packing
from fewbit.bench import measure
from fewbit.bench import report as bench_report
from fewbit.errors import DesignError, FewbitError, InputError
from fewbit.record import from_callable


def settings(**changes):
    words = {"bits": [3, 1], "dtypes": ["float32", "bfloat16"], "sizes": ["100", "2^12"], "devices": ["cpu"]}
    others = {"threads": 1, "repeats": 3, "parts": True}
    names = changes.pop("names", ["gelu", "hardsigmoid"])
    return measure.settings_of([activations.get(name) for name in names], **{**words, **others, **changes})


@pytest.fixture(scope="module")
def report():
    return measure.run(settings())


def shown(report):
    text = io.StringIO()
    bench_report.show(report, Console(file=text, width=100, force_terminal=True, color_system=None))
    return text.getvalue()


def test_every_combination_is_measured_once(report):
    found = [(case.dtype, case.activation, case.elements) for case in report.cases]
    assert found == [
        (dtype, name, n) for dtype in ("float32", "bfloat16") for name in ("gelu", "hardsigmoid") for n in (100, 4096)
    ]
    for case in report.cases:
        assert [run.run for run in case.runs] == ["exact", "3 bits", "1 bit"]
        assert [(part.part, part.bits) for part in case.parts] == [
            (part, bits) for bits in (3, 1) for part in ("encode", "decode")
        ]
    assert measure.Settings([], [3, 3], [], [8, 8], [], 1, 1).sizes == (8,)


def test_bytes(report):
    for case in report.cases:
        width = {"float32": 4, "bfloat16": 2}[case.dtype]
        tensor = width * case.elements
        exact, *coded = case.runs
        assert (exact.kept_bytes, exact.moved_bytes) == (tensor, 5 * tensor)
        assert case.copy_bytes == 2 * tensor
        for run, (encode, decode) in zip(coded, (case.parts[:2], case.parts[2:]), strict=True):
            is_ladder = len(fewbit.load_ladder(case.activation, run.bits)) > 1
            codes = packing.packed_bytes(case.elements, run.bits) + is_ladder
            assert (run.kept_bytes, run.moved_bytes) == (codes, 4 * tensor + 2 * codes)
            assert encode.moved_bytes + decode.moved_bytes == 3 * tensor + 2 * codes


def test_figures_of_known_samples():
    samples = {("copy", "copy"): np.array([1.0, 2.0, 3.0])}
    for phase in measure.PHASES:
        samples[phase, "exact"] = np.array([10.0, 20.0, 30.0])
        samples[phase, "3 bits"] = np.array([30.0, 20.0, 45.0])
    run = measure._run_result(measure.Run("3 bits", torch.tanh, 3), kept=50, made=50, copy_bytes=800, samples=samples)
    assert run.ratio["both"]["median"] == 1.5  # of 3, 1 and 1.5; the ratio of the medians is 1.5 too, that of the means 1.58
    assert run.ratio["both"]["p25"] == 1.25
    assert run.extra_seconds["forward"]["median"] == 15.0
    assert run.seconds["backward"]["median"] == 30.0
    assert run.moved_bytes == 1700
    assert run.copy_share["median"] == pytest.approx(1700 / 800 * 3 / 45)
    exact = measure._run_result(measure.Run("exact", torch.tanh), kept=400, made=0, copy_bytes=800, samples=samples)
    assert set(exact.ratio["both"].values()) == {1.0}
    assert exact.copy_share["median"] == pytest.approx(2000 / 800 / 10)


def test_json_form(report):
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(found) == {"format", "version", "date", "versions", "devices", "threads", "repeats", "cases", "notes"}
    assert (found["format"], found["version"], found["threads"], found["repeats"]) == ("fewbit-bench", 1, 1, 3)
    assert {"fewbit", "python", "torch", "numpy", "numba"} <= set(found["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert list(found["devices"]) == ["cpu"]
    for case in found["cases"]:
        assert set(case) == {
            *("activation", "parameters", "dtype", "elements", "device", "copy_bytes", "copy_seconds", "runs", "parts")
        }
        for run in case["runs"]:
            for name in ("seconds", "ratio", "extra_seconds"):
                assert list(run[name]) == ["forward", "backward", "both"]
            for quantiles in (*run["seconds"].values(), *run["ratio"].values(), run["copy_share"]):
                ordered = [quantiles[name] for name in ("p10", "p25", "median", "p75", "p90")]
                assert ordered[0] > 0
                assert ordered == sorted(ordered)
                assert math.isfinite(ordered[-1])


def test_table(report):
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "float32 on cpu (" in text
    assert "3 rounds, 1 thread" in text
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[:3] == ["gelu", "2^12", "exact"] for row in rows) == 2
    assert any(row[:2] == ["3", "bits"] and row[-2:] == ["1.50", "KiB"] for row in rows)
    assert any(row[:3] == ["hardsigmoid", "100", "3"] for row in rows)
    assert text.count("encode and decode alone") == 2
    assert text.count("µs") > 8


def test_table_fits_with_long_times_too(report):
    slow = copy.deepcopy(report)
    for run in (run for case in slow.cases for run in case.runs):
        for quantiles in (*run.seconds.values(), *run.extra_seconds.values()):
            quantiles.update((name, 0.987654) for name in quantiles)
        run.ratio["both"].update(p25=98.76, p75=98.76)
    text = shown(slow)
    assert "987654" in text
    assert "98.8–98.8" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_panels(report):
    panels = bench_report.panels(report)
    assert list(panels) == ["gelu, float32", "hardsigmoid, float32", "gelu, bfloat16", "hardsigmoid, bfloat16"]
    for (case, larger), lines in zip(zip(report.cases[::2], report.cases[1::2], strict=True), panels.values(), strict=True):
        assert list(lines) == ["3 bits", "1 bit"]
        for run, other, points in zip(case.runs[1:], larger.runs[1:], lines.values(), strict=True):
            assert [point[:2] for point in points] == [
                (100, run.ratio["both"]["median"]),
                (4096, other.ratio["both"]["median"]),
            ]
            assert all(low <= median <= high for _, median, low, high in points)


def test_what_torch_cannot_compile_becomes_a_note(monkeypatch):
    def refuse(function, **options):
        def call(x):
            raise ValueError("no compiler\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    found = measure.run(settings(names=["gelu"], compiled=True, repeats=1, parts=False))
    assert found.notes == ["torch.compile left out for gelu on cpu: ValueError: no compiler"]
    assert [run.run for run in found.cases[0].runs] == ["exact", "3 bits", "1 bit"]
    assert shown(found).endswith(found.notes[0] + "\n")


def test_a_compiled_run_is_one_more(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = measure.run(settings(names=["gelu"], compiled=True, repeats=1))
    for case in found.cases:
        assert [run.run for run in case.runs] == ["exact", "3 bits", "1 bit", "compiled"]
        assert case.runs[-1].kept_bytes == case.runs[0].kept_bytes
    assert list(bench_report.panels(found)["gelu, float32"]) == ["3 bits", "1 bit", "compiled"]


def test_what_torch_cannot_compute_is_told():
    def picky(x):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'\nwith details")
        return x.exp()

    given = measure.settings_of([from_callable(picky)], [3], ["bfloat16"], ["100"], ["cpu"], threads=1, repeats=1)
    with pytest.raises(FewbitError, match=r"^cannot measure picky, bfloat16, 100 elements on cpu: RuntimeError: not impl.*'$"):
        measure.run(given)


@pytest.mark.parametrize(("text", "elements"), [("1", 1), ("2^0", 1), ("16384", 2**14), ("2^31", 2**31), ("007", 7)])
def test_sizes(text, elements):
    assert measure.parse_size(text) == elements


@pytest.mark.parametrize("text", ["1M", "0", "-4", "2^32", "2^99", "3^2", "2**4", "1e6", "", "²", "9999999999"])
def test_bad_sizes(text):
    with pytest.raises(InputError, match=r"a size must be a number of elements from 1 to 2\^31, such as 16384 or 2\^14; got"):
        measure.parse_size(text)


def test_bad_settings():
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, float64; got 'int8'"):
        settings(dtypes=["int8"])
    with pytest.raises(DesignError, match="bits must be an integer from 1 to 8, got 9"):
        settings(bits=[3, 9])
    assert settings(threads=None).threads == torch.get_num_threads()


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "bench relu torch:sin --bits 1 2 --dtype float32 --size 256 --repeats 2 --threads 1"
    assert cli.main([*argv.split(), "--json", "results.json", "--plot", "ratios.png"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith("wrote results.json\nwrote ratios.png\n")
    found = json.loads((tmp_path / "results.json").read_text())
    assert [case["activation"] for case in found["cases"]] == ["relu", "sin"]
    assert [run["bits"] for run in found["cases"][0]["runs"]] == [None, 1, 2]
    assert found["cases"][0]["parts"] == []
    assert "encode" not in captured.out
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_defaults(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(measure, "run", lambda settings, track: seen.append(settings) or measure.Report("", {}, {}, 1, 1))
    assert cli.main(["bench"]) == 0
    (given,) = seen
    assert [record.name for record in given.records] == ["gelu", "silu"]
    assert (given.bits, given.dtypes) == ((3,), (torch.float32, torch.bfloat16))
    assert given.sizes == (2**10, 2**16, 2**22)
    assert (given.devices, given.repeats) == ((torch.device("cpu"),), 30)
    assert not given.parts
    assert not given.compiled


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses deprecated parts of torch
def test_torch_compile():
    found = measure.run(settings(names=["gelu"], compiled=True, dtypes=["float32"], repeats=2))
    if found.notes:  # without a C++ compiler
        assert "torch.compile left out for gelu on cpu" in found.notes[0]
    else:
        assert [case.runs[-1].run for case in found.cases] == ["compiled", "compiled"]
        assert [case.runs[-1].kept_bytes for case in found.cases] == [400, 4 * 4096]
