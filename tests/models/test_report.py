"""The parts that all reports share."""

import csv
import io
import json
from dataclasses import dataclass

import pytest
from matplotlib.figure import Figure

from fewbit import terminal
from fewbit.models.report import Report


@dataclass(repr=False)
class Lengths(Report):
    of: dict

    def rows(self):
        return [{"name": name, "length": length} for name, length in self.of.items()]

    def totals(self):
        return {"all": sum(self.of.values())}

    def view(self):
        table = terminal.table(("name",), ("length",))
        for name, length in self.of.items():
            table.add_row(name, str(length))
        return table

    def figure(self):
        return Figure()


@pytest.fixture
def report():
    return Lengths({"a, b": 1, "[bold]c": 20})


def test_prints_its_table(report):
    assert str(report).splitlines()[0].split() == ["name", "length"]
    assert "[bold]c" in str(report)
    assert all(line == line.rstrip() for line in str(report).splitlines())
    assert repr(report) == str(report)


def test_exports_what_it_has(report, tmp_path):
    assert json.loads(report.to_json()) == report.to_dict() == {"all": 21, "rows": report.rows()}
    assert list(csv.DictReader(io.StringIO(report.to_csv()))) == [
        {"name": "a, b", "length": "1"},
        {"name": "[bold]c", "length": "20"},
    ]
    for export, name in ((report.to_json, "a.json"), (report.to_csv, "a.csv")):
        assert export(tmp_path / name) == (tmp_path / name).read_text()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(start):
    name = f'{start}HYPERLINK("http://x")'
    (row,) = csv.DictReader(io.StringIO(Lengths({name: -1}).to_csv(), newline=""))
    assert row == {"name": f"'{name}", "length": "-1"}  # numbers stay numbers


def test_saves_its_picture(report, tmp_path):
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
