import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewbit
from fewbit.design.table import FORMAT, VERSION, CodeTable, dump_tables, parse_tables
from fewbit.errors import TableError, TableFileError

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


@st.composite
def tables(draw):
    bits = draw(st.integers(1, 8))
    channels = draw(st.sampled_from([("derivative",), ("value",), ("derivative", "value")]))
    count = draw(st.integers(1, min(2**bits, 12)))
    thresholds = sorted(draw(st.sets(FINITE, max_size=20)))
    codes = draw(st.lists(st.integers(0, count - 1), min_size=len(thresholds) + 1, max_size=len(thresholds) + 1))
    levels = draw(st.lists(st.lists(FINITE, min_size=count, max_size=count), min_size=len(channels), max_size=len(channels)))
    return CodeTable(thresholds, codes, levels, bits, channels)


def simple(**changes):
    return CodeTable(**{"thresholds": [-1.0, 2.0], "codes": [0, 1, 0], "levels": [[0.25, 0.75]], "bits": 1, **changes})


@given(table=tables(), x=st.lists(st.floats(allow_nan=True), min_size=1, max_size=20))
def test_lookup_by_definition(table, x):
    """thresholds[i-1] < x <= thresholds[i]; NaN in the last interval."""
    for each in x:
        interval = next((i for i, t in enumerate(table.thresholds) if each <= t), table.thresholds.size)
        code = table.codes[interval]
        assert table.encode(each) == code
        found = table(each)
        expected = table.levels[:, code]
        np.testing.assert_array_equal(found, expected if len(table.channels) > 1 else expected[0])


@given(table=tables())
def test_text_form_round_trips(table):
    (again,) = parse_tables(dump_tables([table]), "text")
    assert again == table
    assert hash(again) == hash(table)
    assert pickle.loads(pickle.dumps(table)) == table


def test_shapes_and_types():
    table = simple()
    assert table(np.zeros((2, 3))).shape == (2, 3)
    assert table.encode(np.zeros((2, 3))).dtype == np.uint8
    assert table.thresholds.dtype == table.levels.dtype == np.float64
    assert np.isnan(table.mse)
    assert np.isnan(table.relative_rms)


def test_immutable():
    thresholds = np.array([-1.0, 2.0])
    table = simple(thresholds=thresholds)
    thresholds[0] = 5.0
    assert table.thresholds[0] == -1.0
    for array in (table.thresholds, table.codes, table.levels, pickle.loads(pickle.dumps(table)).levels):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.bits = 2  # type: ignore[misc]
    assert copy.deepcopy(table) is table
    assert copy.copy(table) is table


def test_parameters_are_frozen_too():
    with pytest.raises(TypeError, match="does not support item assignment"):
        fewbit.load_table("elu", 3).parameters["alpha"] = 9.0  # type: ignore[index]


def test_numpy_integers_are_integers(tmp_path):
    simple(bits=np.int64(1)).save(tmp_path / "t.json")
    assert type(CodeTable.load(tmp_path / "t.json").bits) is int


def test_equality_looks_at_everything():
    assert simple() == simple()
    for change in ({"bits": 2}, {"codes": [1, 0, 1]}, {"levels": [[0.25, 0.5]]}, {"activation": "relu"}, {"weight": "normal"}):
        assert simple(**change) != simple()
    assert simple() != "table"


def test_relative_rms():
    table = simple(channels=("derivative", "value"), levels=[[0, 1], [2, 3]], errors=(0.25, 0.0), powers=(1.0, 0.0))
    assert table.mse == (0.25, 0.0)
    assert table.relative_rms == (0.5, 0.0)


def test_repr():
    expected = "CodeTable(gelu, 1 bit, derivative, student, level, 2 intervals, 2 levels, relative rms 0.281)"
    assert repr(fewbit.load_table("gelu", 1)) == expected
    assert repr(simple()) == "CodeTable(custom, 1 bit, derivative, 3 intervals, 2 levels)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": [2.0, -1.0]}, r"thresholds must ascend strictly, but thresholds\[0\] = 2.0 is followed by -1.0"),
        ({"thresholds": [1.0, 1.0]}, "must ascend strictly"),
        ({"thresholds": [0.0, np.nan]}, "thresholds must be finite"),
        ({"thresholds": [[0.0, 1.0]]}, r"1 dimension\(s\), got shape \(1, 2\)"),
        ({"thresholds": ["a", "b"]}, "thresholds must be numbers"),
        ({"codes": [0, 1]}, "got 2 thresholds, 2 codes"),
        ({"codes": [0, 1, 2]}, "got code 2 with 2 levels"),
        ({"codes": [0, -1, 0]}, "integers from 0 to 255"),
        ({"codes": [0.0, 1.0, 0.0]}, "integers from 0 to 255"),
        ({"levels": [[0.0, 1.0, 2.0]]}, "1 bits hold at most 2 levels, got 3"),
        ({"levels": [0.0, 1.0]}, r"levels must be finite and have 2 dimension\(s\)"),
        ({"levels": [[0.0, np.inf]]}, "levels must be finite"),
        ({"levels": [[0.0, 1.0], [0.0, 1.0]]}, "a row for each of the channels"),
        ({"channels": ("slope",)}, "channels must be some of"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": "1"}, "bits must be an integer from 1 to 8, got '1'"),
    ],
    ids=str,
)
def test_broken_invariants(changes, message):
    with pytest.raises(TableError, match=message):
        simple(**changes)


def test_save_and_load(tmp_path):
    table = fewbit.design("elu", 2, alpha=0.5, weight="normal(std=2)")
    path = tmp_path / "table.json"
    table.save(path)
    assert fewbit.CodeTable.load(path) == table
    assert fewbit.CodeTable.load(str(path)).parameters == {"alpha": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_failed_save_leaves_nothing(tmp_path):
    path = tmp_path / "missing" / "table.json"
    with pytest.raises(FileNotFoundError, match=r"table\.json"):
        simple().save(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        simple().save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def text_of(**changes):
    content = json.loads(dump_tables([simple()]))
    content.update(changes)
    return json.dumps(content)


def table_with(**changes):
    content = json.loads(dump_tables([simple()]))
    content["tables"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON, perhaps cut short"),
        (dump_tables([simple()])[:-40], "is not valid JSON, perhaps cut short"),
        ("[1, 2]", "is not a fewbit table file"),
        (text_of(format="other"), "is not a fewbit table file"),
        (text_of(version=VERSION + 1), f"has version {VERSION + 1}, this fewbit reads version {VERSION}; upgrade"),
        (text_of(tables=[]), "holds 0 tables, not one"),
        (text_of(tables=[{"bits": 1}]), "holds a broken table: .*missing"),
        (text_of(tables=[3]), "holds a broken table"),
        (table_with(thresholds=[2.0, -1.0]), "holds a broken table: thresholds must ascend strictly"),
        (table_with(extra=1), r"unknown \['extra'\]"),
        (table_with(parameters=3), "parameters must be named numbers, got 3"),
        (table_with(parameters={"a": "x"}), "parameter a must be numbers"),
        (table_with(activation=5), "activation must be a text or None, got 5"),
        (table_with(balance=-1), "balance must be positive"),
        (table_with(domain=[5, -5]), "domain must ascend"),
        (table_with(errors=[-1.0]), "errors and powers cannot be negative"),
        (table_with(thresholds=[10**400, 1]), "thresholds must be numbers"),
        ("[" * 100_000, "is not valid JSON"),
        (table_with(errors="many"), "errors must be numbers"),
        (table_with(domain=[1.0]), r"domain must be 2 number\(s\), got \(1.0,\)"),
    ],
)
def test_damaged_files_are_refused_by_name(text, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(TableFileError, match=f"table.json.*{message}"):
        fewbit.CodeTable.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(TableFileError, match=r"cannot read .*none.json: No such file"):
        fewbit.CodeTable.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableFileError, match="is not text"):
        fewbit.CodeTable.load(tmp_path / "binary.json")


def test_format_is_stable():
    assert (FORMAT, VERSION) == ("fewbit-table", 1)
    lines = dump_tables([simple()]).splitlines()
    assert '   "thresholds": [-1.0, 2.0],' in lines  # one entry a line, for readable diffs
