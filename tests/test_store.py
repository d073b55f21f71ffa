import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

import fewbit
from fewbit import activations, files, store
from fewbit.constants import CHANNELS, RUNGS, SHIPPED_BITS, SHIPPED_CODINGS, WEIGHTS
from fewbit.design.request import Request
from fewbit.design.table import dump_tables
from fewbit.errors import ActivationError, DesignError, TableFileError
from fewbit.weights import Weight

REQUEST = {"activation": "elu", "bits": 2, "alpha": 0.5}


def cached_file(folder):
    (path,) = folder.glob("*.json")
    return path


def check_shipped(name):
    """Assert that the shipped file of a name is the result of a design, number for number.

    Mirror images count as equal: if f' is symmetric and the best table is not, both have the same error. Then the last bit
    decides, which depends on the processor.
    """
    shipped, designed = (store.tables_directory() / f"{name}.json").read_text(), dump_tables(store.shipped_designs(name))
    if shipped == designed:
        return
    for ours, theirs in zip(*(json.loads(text)["tables"] for text in (designed, shipped)), strict=True):
        if ours != theirs:
            numbers = ("thresholds", "codes", "levels")
            assert {key: ours[key] for key in ours if key not in numbers} == {
                key: theirs[key] for key in theirs if key not in numbers
            }
            check_mirrored(*({key: np.array(each[key]) for key in numbers} for each in (ours, theirs)))


def check_mirrored(ours, theirs):
    """Assert that the first table's levels at x are the other's at -x, for tables of the derivative alone."""
    np.testing.assert_allclose(ours["thresholds"], -theirs["thresholds"][::-1], rtol=1e-8)
    by_interval = [each["levels"][0][each["codes"]] for each in (ours, theirs)]
    even = np.allclose(by_interval[0], by_interval[1][::-1], rtol=1e-8)
    assert even or np.allclose(by_interval[0], 1 - by_interval[1][::-1], rtol=1e-8)  # f'(-x) = 1 - f'(x)


@pytest.mark.parametrize("name", ["tanh", "relu6", "hardswish", "identity"])
def test_shipped_files_are_what_a_design_gives(name):
    check_shipped(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", activations.SHIPPED)
def test_all_shipped_files_are_what_a_design_gives(name):
    check_shipped(name)


def test_everything_promised_is_shipped(record, empty_cache):
    for weight in WEIGHTS:
        for coding in SHIPPED_CODINGS:
            for bits in SHIPPED_BITS:
                table = fewbit.load_table(record.name, bits, weight=weight, coding=coding)
                assert (table.activation, table.bits, table.weight, table.coding) == (record.name, bits, weight, coding)
    for bits in SHIPPED_BITS:
        table = fewbit.load_table(record, bits, channels=("derivative", "value"))
        assert (table.bits, table.weight, table.coding, table.balance) == (bits, "normal", "interval", 1.0)
        assert table.channels == ("derivative", "value")
    for channels in (("derivative",), ("derivative", "value")):
        for bits in SHIPPED_BITS:
            for rung in store.load_ladder(record, bits, channels=channels):
                assert (rung.activation, rung.bits, rung.channels) == (record.name, bits, channels)
    assert not empty_cache.exists()


class TestLadders:
    @pytest.mark.parametrize(("name", "bits"), [("gelu", 3), ("tanh", 2), ("softsign", 4)])
    @pytest.mark.parametrize("channels", [("derivative",), ("derivative", "value")])
    def test_each_rung_is_the_design_for_its_standard_deviation(self, name, bits, channels):
        ladder = store.load_ladder(name, bits, channels=channels)
        for k, rung in zip(range(-4, 5), ladder, strict=True):
            reach, balance = max(10.0, 6 * 2.0**k), 4.0**-k if len(channels) > 1 else 1.0
            request = {"weight": f"normal(std={2.0**k})", "domain": (-reach, reach), "balance": balance}
            assert rung == fewbit.design(name, bits, channels=channels, **request)

    def test_each_rung_is_better_than_its_neighbours_under_its_own_weight(self, record):
        ladder = store.load_ladder(record, 3)
        for i, rung in enumerate(ladder if len(ladder) > 1 else ()):

            def density(x, std=RUNGS[i]):
                return np.exp(-0.5 * (x / std) ** 2)

            error, *others = (
                oracles.dense_mse(replace(each, domain=rung.domain), record.df, density, 400_001)
                for each in (rung, *ladder[max(i - 1, 0) : i], *ladder[i + 1 : i + 2])
            )
            assert error == pytest.approx(rung.mse, rel=1e-3)
            assert error < min(others)

    def test_where_one_table_is_exact_it_is_all(self):
        for name in ("relu", "hardtanh", "threshold", "softshrink"):
            assert store.load_ladder(name, 2) == (fewbit.load_table(name, 2),)
        assert len(store.load_ladder("relu", 2, channels=("derivative", "value"))) == 9

    def test_rungs_of_straight_lines_are_scaled_copies(self):
        for name in ("relu", "leaky_relu"):
            ladder = store.load_ladder(name, 3, channels=("derivative", "value"))
            for std, rung in zip(RUNGS, ladder, strict=True):
                np.testing.assert_allclose(rung.levels[0], ladder[4].levels[0], atol=1e-8)
                np.testing.assert_allclose(rung.levels[1], std * ladder[4].levels[1], rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("name", [name for name in activations.names() if activations.get(name).derivative_shape.even])
    def test_even_derivatives_have_even_rungs(self, name):
        assert all(rung.even for bits in SHIPPED_BITS for rung in store.load_ladder(name, bits))

    def test_is_designed_and_cached_where_it_is_not_shipped(self, empty_cache, monkeypatch):
        ladder = store.load_ladder("elu", 2, alpha=0.5)
        assert [rung.parameters["alpha"] for rung in ladder] == [0.5] * 9
        assert len(list(empty_cache.glob("*.json"))) == 10  # and the table of load_table, which may have been exact
        store._load.cache_clear()
        monkeypatch.setattr(store, "_search", lambda request: pytest.fail("designed again"))
        assert store.load_ladder("elu", 2, alpha=0.5) == ladder

    def test_where_the_activation_leaves_the_range_of_floats_the_next_rung_stands_in(self, empty_cache):
        def explosive(x):
            return torch.exp(2 * x)

        ladder = store.load_ladder(explosive, 2, channels=("derivative", "value"))
        assert ladder[:6] == tuple(store._load(Request.rung(activations.get(explosive), 2, CHANNELS, s)) for s in RUNGS[:6])
        assert ladder[7] == ladder[8] != ladder[5]
        assert np.abs(ladder[8].levels).max() < 3e38

    def test_errors_are_those_of_load_table(self):
        with pytest.raises(DesignError, match="got 9"):
            store.load_ladder("gelu", 9)
        with pytest.raises(ActivationError, match="alpha"):
            store.load_ladder("gelu", 2, alpha=1.0)
        with pytest.raises(DesignError, match="channels must be some of"):
            store.load_ladder("gelu", 2, channels="slope")


def test_quantizers_are_shipped(empty_cache):
    for bits in range(1, 9):
        table = fewbit.load_table("identity", bits, channels="value")
        assert (table.activation, table.bits, table.weight) == ("identity", bits, "normal")
        assert table.levels.shape == (1, 2**bits)
    assert not empty_cache.exists()


@pytest.mark.parametrize(
    "other",
    [{"bits": 6}, {"balance": 3.0}, {"weight": "student"}, {"coding": "uniform"}, {"channels": ("value", "derivative")}],
)
def test_joint_tables_that_are_not_shipped_are_designed_and_cached(other, empty_cache):
    request = {"bits": 3, "channels": ("derivative", "value"), **other}
    assert fewbit.load_table("gelu", **request) == fewbit.design("gelu", **request)
    assert cached_file(empty_cache).name.startswith(f"gelu-{request['bits']}bit-")


@pytest.mark.slow
def test_build_writes_only_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SHIPPED", {name: activations.get(name) for name in ("relu", "threshold")})
    assert list(store.build_tables(tmp_path / "new")) == [("relu", True), ("threshold", True)]
    (tmp_path / "new" / "relu.json").write_text("{}")
    assert list(store.build_tables(tmp_path / "new", check=True)) == [("relu", True), ("threshold", False)]
    assert (tmp_path / "new" / "relu.json").read_text() == "{}"
    assert list(store.build_tables(tmp_path / "new")) == [("relu", True), ("threshold", False)]


def test_a_mirror_image_is_as_good_as_the_table_and_a_damaged_one_is_not():
    request = Request.rung(activations.get("silu"), 4, ("derivative",), 16)
    table = store._load(request)
    mirrored = replace(
        table, thresholds=-table.thresholds[::-1], codes=table.codes[::-1], levels=1 - table.levels
    )  # SiLU's f'(-x) = 1 - f'(x)
    assert store._as_good(request, mirrored, table)
    moved = replace(table, thresholds=table.thresholds + 1e-4 * np.eye(table.thresholds.size)[2])
    assert not store._as_good(request, moved, table)
    assert not store._as_good(request, fewbit.load_table("silu", bits=3), table)


def test_designed_on_a_miss_and_found_again(empty_cache, monkeypatch):
    table = fewbit.load_table(**REQUEST)
    assert table == fewbit.design(**REQUEST)
    path = cached_file(empty_cache)
    assert path.name.startswith("elu-2bit-")
    store._load.cache_clear()
    monkeypatch.setattr(store, "_search", lambda request: pytest.fail("designed again"))
    assert fewbit.load_table(**REQUEST) == table


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.25},
        {"bits": 3},
        {"weight": "normal"},
        {"coding": "interval"},
        {"coding": "uniform"},
        {"domain": (-3, 3)},
        {"channels": "value"},
    ],
)
def test_all_arguments_are_part_of_the_key(change, empty_cache):
    first, second = fewbit.load_table(**REQUEST), fewbit.load_table(**{**REQUEST, **change})
    assert first != second
    assert second == fewbit.design(**{**REQUEST, **change})
    assert len(list(empty_cache.glob("*.json"))) == 2


@pytest.mark.parametrize("extra", [{"levels": 5}, {"cells": 64}])
def test_arguments_that_no_table_file_records_are_refused(extra, empty_cache):
    with pytest.raises(ActivationError, match="elu has no parameter"):
        fewbit.load_table(**REQUEST, **extra)
    assert not empty_cache.exists()


def test_a_weight_of_ones_own_is_not_cached(empty_cache):
    class Spike(Weight):
        center = 0.0

        def density(self, x):
            return np.exp(-((x - self.center) ** 2))

    weight = Spike()
    before = fewbit.load_table("gelu", 2, weight=weight)
    weight.center = 3.0
    assert fewbit.load_table("gelu", 2, weight=weight).levels.tolist() != before.levels.tolist()
    assert not empty_cache.exists()


def test_samples_are_a_key_too(empty_cache):
    samples = [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]]
    assert fewbit.load_table("gelu", 1, weight=samples) == fewbit.load_table("gelu", 1, weight=samples)
    fewbit.load_table("gelu", 1, weight=[0.1, 0.2])
    assert len(list(empty_cache.glob("*.json"))) == 2


def test_a_function_as_weight_is_not_cached(empty_cache):
    assert fewbit.load_table("gelu", 1, weight=lambda x: x * 0 + 1).weight.startswith("custom")
    assert not empty_cache.exists()


class TestOwnActivations:
    def test_changed_under_its_old_name(self, empty_cache):
        activations.register("mine", torch.tanh)
        before = fewbit.load_table("mine", 2)
        activations.register("mine", torch.sigmoid, overwrite=True)
        after = fewbit.load_table("mine", 2)
        assert before != after
        assert after == fewbit.design("mine", 2)
        assert len(list(empty_cache.glob("*.json"))) == 2

    def test_jumps_are_part_of_the_key(self, empty_cache):
        def corner(x):
            return torch.where(x > 0.013, x, 0.5 * x)

        activations.register("corner", corner)
        assert fewbit.load_table("corner", 1).mse > 0
        activations.register("corner", corner, jumps=(0.013,), overwrite=True)
        assert fewbit.load_table("corner", 1).mse == 0

    def test_the_shipped_table_is_not_taken_for_a_replacement(self, empty_cache):
        shipped = fewbit.load_table("gelu", 2)
        activations.register("gelu", torch.tanh, overwrite=True)
        table = fewbit.load_table("gelu", 2)
        assert table.levels.tolist() != shipped.levels.tolist()
        assert empty_cache.exists()
        store._load.cache_clear()
        assert fewbit.load_table("gelu", 2) == table == fewbit.CodeTable.load(cached_file(empty_cache))

    @pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/b", "..", "", "x" * 300, "a\x00b", "<lambda>"])
    def test_no_name_leaves_the_cache(self, name, empty_cache, monkeypatch):
        def function(x):
            return x * x

        function.__name__ = name
        for _ in range(2):  # designed, then found
            assert fewbit.load_table(function, 2).activation == name
            store._load.cache_clear()
            monkeypatch.setattr(store, "_search", lambda request: pytest.fail("designed again"))
        assert cached_file(empty_cache).parent == empty_cache
        assert os.listdir(empty_cache.parent) == ["cache"]


@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "newer", "empty", "other table", "binary", "wrong levels", "no errors", "no tables"]
)
def test_a_damaged_cache_file_is_designed_anew(damage, empty_cache):
    table = fewbit.load_table(**REQUEST)
    path = cached_file(empty_cache)
    text = path.read_text()
    other = fewbit.design("silu", 1)
    damaged = {
        "truncated": text[: len(text) // 2],
        "foreign": json.dumps({"model": "resnet"}),
        "newer": text.replace('"version": 1', '"version": 2'),
        "empty": "",
        "wrong levels": text.replace(json.dumps(table.levels.tolist()), json.dumps((table.levels + 0.1).tolist())),
        "no errors": text.replace(json.dumps(list(table.errors)), "null"),
        "no tables": json.dumps({**json.loads(text), "tables": []}),
    }
    if damage == "other table":
        other.save(path)
    elif damage == "binary":
        path.write_bytes(b"\xff\x00")
    else:
        path.write_text(damaged[damage])
    store._load.cache_clear()
    with pytest.warns(UserWarning, match=f"designing the table anew: .*{path.name}") as seen:
        assert fewbit.load_table(**REQUEST) == table
    assert seen[0].filename == __file__  # the warning points at the caller
    assert path.read_text() == text


def test_a_damaged_shipped_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gelu.json").write_text("{")
    monkeypatch.setattr(store, "tables_directory", lambda: tmp_path)
    store._load.cache_clear()
    store._shipped.cache_clear()
    try:
        with pytest.raises(
            TableFileError, match=r"gelu.json is not valid JSON, perhaps cut short .*; delete it or write it anew"
        ):
            fewbit.load_table("gelu", 3)
    finally:
        store._shipped.cache_clear()


def test_a_cache_that_cannot_be_written_warns_once(tmp_path, monkeypatch, empty_cache):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEWBIT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot write to the cache .*; set FEWBIT_CACHE_DIR to a writable folder") as seen:
        tables = [fewbit.load_table("elu", 2, alpha=alpha) for alpha in (0.5, 0.6)]
    assert [warning.filename for warning in seen] == [__file__]
    assert tables == [fewbit.design("elu", 2, alpha=alpha) for alpha in (0.5, 0.6)]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_cache(empty_cache):
    empty_cache.mkdir()
    empty_cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot write to the cache"):
        fewbit.load_table(**REQUEST)


def test_a_cache_that_cannot_be_searched(empty_cache, monkeypatch):
    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store.os, "stat", forbidden)
    monkeypatch.setattr(store.Path, "mkdir", forbidden)
    with pytest.warns(UserWarning, match="cannot write to the cache .*Permission denied"):
        assert fewbit.load_table(**REQUEST) == fewbit.design(**REQUEST)


def test_a_full_disk(empty_cache, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        fewbit.load_table(**REQUEST)
    assert list(empty_cache.iterdir()) == []


def test_two_processes_at_once(empty_cache):
    code = "import fewbit; print(fewbit.load_table('elu', 4, alpha=0.7, coding='interval').mse)"
    environment = {**os.environ, "FEWBIT_CACHE_DIR": str(empty_cache)}

    def run(_):
        return subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(run, range(2)))
    assert [result.stderr for result in results] == ["", ""]
    assert results[0].stdout == results[1].stdout != ""
    assert len(list(empty_cache.iterdir())) == 1  # no temporary file is left


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWBIT_CACHE_DIR", str(tmp_path))
    assert store.cache_directory() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEWBIT_CACHE_DIR", "~/tables")
    if os.name == "posix":
        assert store.cache_directory() == tmp_path / "tables"
    monkeypatch.setenv("FEWBIT_CACHE_DIR", "~nobody-of-that-name/tables")
    assert store.cache_directory().name == "tables"
    monkeypatch.delenv("FEWBIT_CACHE_DIR")
    assert store.cache_directory().name == "fewbit"


def test_wrong_requests_fail_before_anything_is_written(empty_cache):
    with pytest.raises(DesignError, match="got 9"):
        fewbit.load_table("gelu", 9)
    assert not empty_cache.exists()


def test_requests_describe_their_tables():
    request = Request.of("elu", 2, alpha=0.5, weight="normal(std=2)", domain=(-4, 4))
    assert request.answered_by(fewbit.design("elu", 2, alpha=0.5, weight="normal(std=2)", domain=(-4, 4)))
    assert not request.answered_by(fewbit.design("elu", 2, alpha=0.5, weight="normal(std=2)"))
