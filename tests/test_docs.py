"""docs/: the Python of each page runs, from its first block to its last; commands, names and figures exist."""

import re
import subprocess
import sys

import pytest
from documents import PAGES, ROOT, blocks, commands, namespace

import fewbit
from tools import pictures

RUN = ["index", "convert", "memory", "safety", "tables", "trainers"]  # pages with blocks of Python
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


@pytest.mark.parametrize("page", RUN)
def test_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # they write files
    names = namespace()
    for block in blocks(ROOT / "docs" / f"{page}.md"):
        exec(block, names)
    written, printed = {each.name for each in tmp_path.iterdir()}, capsys.readouterr().out
    assert written >= {"memory": {"conversion.json"}, "tables": {"mine.json", "tables.json"}}.get(page, set())
    assert ("coded gradient errs by" in printed) == (page in {"index", "safety", "memory"})


def test_all_blocks_run():
    assert {path.stem for path in PAGES if blocks(path)} == set(RUN)


@pytest.fixture(scope="module")
def known():
    """The commands that exist."""
    listed = subprocess.run([sys.executable, "-m", "fewbit", "--help"], capture_output=True, text=True).stdout
    return set(re.findall(r"^│ (\w+) ", listed, re.MULTILINE))


@each_page
def test_commands_are_there(path, known):
    assert commands(path) <= known


def test_every_command_is_shown(known):
    assert set().union(*map(commands, PAGES)) | {"demo"} == known


@each_page
def test_studies_and_scripts_are_there(path):
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (tools[\w.]*\w)", " ".join(text.split())):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for script in re.findall(r"(?:sh|python) (tools/[\w./]+|\.ci/\w+)", text):
        assert (ROOT / script).is_file(), script


def test_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"heading: fewbit\.(\w+)$", page, re.MULTILINE))
    assert shown == set(fewbit.__all__) - {"functional", "nn", "callbacks"}
    for place, name in re.findall(r"^::: (fewbit[\w.]*)\.(\w+)$", page, re.MULTILINE):
        __import__(place)
        assert getattr(sys.modules[place], name).__doc__


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="`sh tools/docs` installs it")
    from tools.docstrings import as_markdown

    docstring = "Add *args, x < y.\n\nx      a number,\n       positive\nother  `*another*`\n\n>>> 1 + 1\n2"
    items = "- **x**: a number, positive\n- **other**: `*another*`"
    assert as_markdown(docstring) == f"Add \\*args, x &lt; y.\n\n{items}\n\n```pycon\n>>> 1 + 1\n2\n```"


def test_site_lists_every_page():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": ([\w-]+)\.md$", settings, re.MULTILINE)) == {path.stem for path in PAGES}


def test_picture_shows_the_results(tmp_path):
    pictures.draw(tmp_path / "drawn.svg")
    drawn, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "drawn.svg", pictures.PICTURE))
    assert texts(drawn) == texts(kept)
    assert lines(drawn) == pytest.approx(lines(kept), abs=0.1)  # in points: bars and curves end where the results say
    labels = [f"{each[i]:.2f}" for i in range(3) for each in pictures.peaks().values()]
    assert " ".join(labels) in " ".join(texts(kept))


def test_picture_has_losses_of_the_same_runs():
    steps, losses = pictures.losses()
    assert steps[-1] == 1200
    assert {len(each) for each in losses.values()} == {len(steps)}
    exact = losses["exact"]
    for label, each in losses.items():
        assert each[0] == pytest.approx(exact[0], rel=0.001), label  # other starts or orders differ by more
        assert each == pytest.approx(exact, rel=0.01)


def lines(svg):
    return [float(number) for path in re.findall(r' d="([^"]+)"', svg) for number in re.findall(r"-?[\d.]+", path)]


def texts(svg):
    return re.findall(r">([^<>]+)</text>", svg)
