"""The notebooks run from start to end, and their stored outputs are of the kinds that such a run shows."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook):
    """The kinds of output of each code cell: "text/plain", "image/png", …"""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [sorted(output.get("data", {"stream": ""})) for output in outputs]


@each_notebook
def test_is_stored_as_one_run_left_it(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert any("image/png" in kinds for kinds in shown(notebook))
    text = path.read_text()
    assert "Traceback" not in text
    assert "/home/" not in text
    assert "/tmp/" not in text


@pytest.mark.slow
@each_notebook
# the kernel uses sockets of this machine, and jupyter warns of it
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore:.*event loop:RuntimeWarning")
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, 4)
    stored = shown(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(notebook) == stored
