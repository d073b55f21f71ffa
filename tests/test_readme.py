"""README.md: its Python runs on a small model, from the first block to the last; its commands and links exist."""

import re
import subprocess
import sys

from documents import README, ROOT, blocks, commands, namespace

import fewbit

TEXT = README.read_text(encoding="utf-8")


def test_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, found = namespace(), blocks(README)
    assert len(found) == 2
    for block in found:
        exec(block, names)
    plan, verdict = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    kept = re.search(r"keeps .* \(([\d.]+) %\)", plan)
    assert kept
    assert 0 < float(kept[1]) < 50
    assert re.match(r"coded gradient errs by .* of the SGD noise", verdict)
    assert isinstance(names["model"].block.act, fewbit.GELU)
    names["configure_model"](type("Module", (), {"net": names["model"]}))


def test_calls_are_there():
    """The commands that the text names, also outside of the blocks."""
    named = set(re.findall(r"`(?:with )?fewbit\.([\w.]+)\(", TEXT))
    assert named >= {"convert", "prepare", "patch", "exact", "GELU", "functional.linear"}
    for name in named:
        found = fewbit
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_command_is_shown():
    listed = subprocess.run([sys.executable, "-m", "fewbit", "--help"], capture_output=True, text=True).stdout
    there = set(re.findall(r"^│ (\w+) ", listed, re.MULTILINE))
    assert there
    assert commands(README) == there


def test_links_and_scripts_are_there():
    paths = re.findall(r"\]\((?!https://)([^)]+)\)", TEXT) + re.findall(r"sh (tools/\w+)", TEXT)
    assert len(paths) > 15
    assert all((ROOT / path).is_file() for path in paths)


def test_is_short():
    assert len(TEXT.splitlines()) <= 150
