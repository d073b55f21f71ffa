import io

import pytest
import torch
from rich.console import Console

from fewbit import demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "curves.png"
    text = io.StringIO()
    runs = demo.run(3, [3, 1], "cpu", output, Console(file=text, width=120))
    return runs, output, text.getvalue()


def test_runs_start_from_the_same_weights_and_see_the_same_batches(finished):
    exact, *coded = finished[0]
    assert [run.label for run in finished[0]] == ["exact", "3-bit GELUs", "1-bit GELUs", "5-bit model"]
    for each in coded:
        assert exact.losses[0] == each.losses[0]  # forward is exact
        assert exact.losses[-1] != each.losses[-1]
        assert exact.losses[-1] == pytest.approx(each.losses[-1], rel=0.01)


def test_bytes(finished):
    exact, three, one, everything = finished[0]
    elements = demo.LAYERS * demo.BATCH * demo.CONTEXT * 4 * demo.WIDTH
    assert exact.gelu_bytes == 4 * elements
    rungs = demo.LAYERS  # a byte for each code
    assert three.gelu_bytes == 3 * elements // 8 + rungs
    assert one.gelu_bytes == elements // 8 + rungs
    assert exact.total_bytes - three.total_bytes == exact.gelu_bytes - three.gelu_bytes
    assert everything.total_bytes < 0.25 * exact.total_bytes


def test_what_is_shown(finished):
    _, output, text = finished
    assert output.read_bytes().startswith(b"\x89PNG")
    for part in ("3-bit GELUs", "0.094", "16.00", "step 3 of 3", f"wrote {output}"[:20]):
        assert part in text
    assert max(len(line.rstrip()) for line in text.splitlines() if str(output) not in line) <= 80  # nothing is cut


def test_total_counts_shared_storages_once():
    model = demo.GPT(None)
    batch = torch.randint(256, (2, 17))
    gelu, total = demo._kept_bytes(model, batch)
    assert gelu == 4 * demo.LAYERS * 2 * 16 * 4 * demo.WIDTH
    unit = 4 * 2 * 16 * demo.WIDTH
    assert 15 * demo.LAYERS * unit < total < 20 * demo.LAYERS * unit
