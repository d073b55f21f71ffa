"""The CUDA backend: in Triton's interpreter, compiled without a device, and on a device if there is one."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_kernels import DTYPES, SIZES, adversarial, random_device_table

import fewbit
from fewbit import activations, kernels, resolve
from fewbit.kernels import DeviceTable, cuda, reference
from tools import aot_layers, aot_report

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not cuda.available(), reason="Triton is not installed")


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


OF_KERNELS = ["tests/kernels/cuda_activations.py", "tests/kernels/cuda_layers.py"]


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(
    ("marked", "files"),
    [("not slow", OF_KERNELS), *(("slow", [file]) for file in OF_KERNELS)],
    ids=["quick", "slow", "slow, layers"],
)
@pytest.mark.slow
def test_in_the_interpreter(marked, files):
    """Run in a process in which Triton interprets: that is decided when the kernels are decorated."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-m", marked, *files]
    result = run_python(*command, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_without_triton_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda.available.cache_clear()
    try:
        assert not cuda.available()
        assert not cuda.supports(torch.device("cpu"), torch.float32)
        assert not cuda.has_formula("gelu")
    finally:
        cuda.available.cache_clear()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_shipped_tables_are_searched_in_registers(record, bits):
    for dtype in (torch.float32, torch.float64):
        device_table = resolve.device_tables(fewbit.load_table(record, bits), dtype, torch.device("cpu"))[0]
        search = cuda.ProgramTable.of(device_table).search
        assert search.depth == 0
        assert len(search.extras) <= 4


def test_tensors_on_the_cpu_are_not_taken():
    x = torch.zeros(3)
    assert not cuda.supports(x.device, x.dtype)
    assert kernels.backend(x) is not cuda
    assert kernels.backend(x.to("meta")) is reference


def check_machine_code(row):
    """Assert that nothing spills; that x, y, grad and product move by 128 bits in the unmasked body; and planes by whole words.

    row      of `tools/aot_report.py`, which needs no GPU, as a dictionary
    """
    words = 4 if row["dtype"] == "float32" else 8  # of a thread, by 128 bits in each lane
    loads, stores = Counter({128: row["lanes"]}) + Counter({32: row["scalars"]}), Counter()
    if row["kernel"] != "decode":
        stores += Counter({8 * words: row["bits"]})
        if row["lanes"] == 1:  # a search in memory, and the code from there
            loads += Counter({8: words, 32: row["loads"][32] - loads[32]})
    else:
        loads += Counter({8 * words: row["bits"]})
        loads += Counter({32: 8 * words if row["bits"] > 2 else 0})  # a level an element
    if row["kernel"] != "encode":
        stores += Counter({128: row["lanes"]})
    assert row["loads"] == loads, row
    assert row["stores"] == stores, row
    assert row["wide_loads"] >= loads[128], row  # the whole kernel has them too
    assert row["wide_stores"] >= stores[128], row
    assert row["spills"] == 0, row
    assert 0 < row["registers"] <= 168, row  # 12 warps or more on a multiprocessor; mish takes most, 141
    if (row["activation"], row["dtype"], row["bits"], row["arch"]) == ("gelu", "bfloat16", 3, 90):
        assert row["instructions"] <= MOST_INSTRUCTIONS[row["kernel"]], row


# Measured instructions for each element of the unmasked body on sm_90, for bfloat16 at 3 bits; gelu itself takes 33 of them
MOST_INSTRUCTIONS = {"encode": 17, "decode": 10.5, "forward": 50}


@needs_triton
@pytest.mark.slow
def test_machine_code():
    """The report that the tool prints, in a process of its own."""
    options = ["--json", "--kernels", "encode", "decode", "--dtypes", "bfloat16", "--bits", "3"]
    result = run_python("tools/aot_report.py", *options)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["kernel"] for row in rows] == ["encode", "decode"]
    for row in rows:
        widths = {name: {int(width): count for width, count in row[name].items()} for name in ("loads", "stores")}
        check_machine_code(row | widths)


# Measured instructions for each element on sm_90, for bfloat16 at 3 bits, in the text of full programs
MOST_OF_LAYERS = {"encode rows": 41, "encode values": 24, "decode rows": 26, "decode values": 19, "gate backward": 36}
BY_16_BYTES = {  # at least so many accesses of a thread in each lane: of x, grad or the result
    "encode rows": ("loads", 8),
    "encode images": ("loads", 8),
    "decode rows": ("stores", 8),
    "decode images": ("stores", 8),
    "batch norm": ("stores", 8),
    "gate backward": ("stores", 16),
    "layer norm": ("stores", 1),
}


def check_layer_code(rows):
    """Assert few spills, around the slow paths of divisions where a sample is read; 128-bit accesses; and that two blocks fit.

    rows  of `tools/aot_layers.py` for one call, as dictionaries
    """
    for row in rows:
        slow_paths = {"standardize": 8, "row_scales": 4}
        assert row["spills"] <= slow_paths.get(row["kernel"], 0), row
        assert 0 < row["registers"] * row["warps"] <= max(168 * 4, 96 * 16), row
        most = MOST_OF_LAYERS.get(row["call"], 0)
        if most and (row["dtype"], row["bits"], row["arch"]) == ("bfloat16", 3, 90):
            assert row["instructions"] <= most, row
    side, count = BY_16_BYTES.get(rows[-1]["call"], ("loads", 0))
    if rows[-1]["bits"] > 4 and rows[-1]["kernel"] == "encode":
        count //= 8  # searched in memory, in a loop: the text has one lane
    assert sum(row[side].get(128, 0) for row in rows) >= count, rows


@needs_triton
@pytest.mark.slow
def test_machine_code_of_layers():
    options = ["-m", "tools.aot_layers", "--json", "--dtypes", "bfloat16", "--bits", "3", "--calls"]
    result = run_python(*options, "encode values", "decode values", "layer norm")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["kernel"] for row in rows] == ["encode", "decode", "rows_backward", "add_parts"]
    for call in ("encode values", "decode values", "layer norm"):
        widths = [
            row | {side: {int(width): count for width, count in row[side].items()} for side in ("loads", "stores")}
            for row in rows
            if row["call"] == call
        ]
        check_layer_code(widths)


LAYER_CODE = [  # of two similar neighbours, one is compiled for sm_80 at 4 bits and the other for sm_90 at 2
    (call, *target)
    for i, call in enumerate(aot_layers.calls(torch.float32, 1))
    for target in (("bfloat16", 3, 90), ("float16", 8, 90), (("float32", 4, 80), ("float32", 2, 90))[i % 2])
]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("call", "dtype", "bits", "arch"), LAYER_CODE)
def test_machine_code_of_every_layer(call, dtype, bits, arch):
    check_layer_code([asdict(row) for row in aot_layers.report(call, dtype, bits, arch)])


KERNELS, ACTIVATIONS = ("encode", "decode", "forward"), {"bfloat16": "gelu", "float16": "tanh", "float32": "softplus"}
EVERY_TWO = [  # of kernel, dtype and bits
    (KERNELS[(i + j) % 3], dtype, bits) for i, dtype in enumerate(ACTIVATIONS) for j, bits in enumerate((8, 1, 3, 2, 4))
]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "dtype", "bits"), EVERY_TWO)
def test_machine_code_of_every_kernel(kernel, dtype, bits):
    check_machine_code(asdict(aot_report.report(kernel, ACTIVATIONS[dtype], dtype, bits, 90)))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "n_divides"), [(80, False), (90, True)], ids=["sm_80", "16 divides n"])
@pytest.mark.parametrize(("kernel", "dtype"), [("encode", "float16"), ("decode", "bfloat16"), ("forward", "float32")])
def test_machine_code_elsewhere(kernel, dtype, arch, n_divides):
    check_machine_code(asdict(aot_report.report(kernel, "silu", dtype, 3, arch, n_divides)))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*activations.names()} - {"gelu"}))
def test_machine_code_of_formulas(name):
    check_machine_code(asdict(aot_report.report("forward", name, "bfloat16", 3, 90)))
    if name == "softsign":  # it divides, as silu and softplus above, in float32 exactly
        check_machine_code(asdict(aot_report.report("forward", name, "float32", 3, 90)))


def test_every_activation_has_a_formula():
    assert all(map(cuda.has_formula, activations.names())) == cuda.available()
    assert not cuda.has_formula("nothing")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnADevice:
    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bytes_and_gradients_are_the_references(self, bits, dtype, rng):
        for intervals, even in [(1, False), (20, False), (20, True), (256, False)]:
            for n in (*SIZES, 1_000_001):
                device_table = random_device_table(rng, bits, intervals, dtype, even)
                on_device = DeviceTable(
                    device_table.thresholds.cuda(), device_table.codes.cuda(), device_table.levels.cuda(), bits
                )
                x, grad = adversarial(device_table, n, rng).to(dtype), torch.from_numpy(rng.normal(size=n)).to(dtype)
                assert kernels.backend(x.cuda()) is cuda
                packed = cuda.encode(x.cuda(), on_device)
                assert torch.equal(packed.cpu(), reference.encode(x, device_table))
                product = cuda.decode(packed, grad.cuda(), on_device)
                assert torch.equal(product.cpu(), reference.decode(packed.cpu(), grad, device_table))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_is_torchs_to_one_unit(self, record, dtype):
        x = torch.cat([torch.randn(1_000_001) * 4, torch.linspace(-100, 100, 5001)]).to(dtype).cuda()
        device_table = resolve.device_tables(fewbit.load_table(record, 3), torch.promote_types(dtype, torch.float32), x.device)[
            0
        ]
        y, packed = cuda.forward(x, device_table, record.name, record.parameters)
        assert torch.equal(packed, reference.encode(x, device_table))
        expected = record.forward(x)
        inf = torch.full_like(x, torch.inf)
        near = (
            (y == expected) | (y == expected.nextafter(inf)) | (y == expected.nextafter(-inf)) | (y.isnan() & expected.isnan())
        )
        assert near.all()

    def test_views_that_start_anywhere(self, rng):
        device_table = random_device_table(rng, 3, 10)
        on_device = DeviceTable(device_table.thresholds.cuda(), device_table.codes.cuda(), device_table.levels.cuda(), 3)
        x, grad = torch.randn(5000), torch.randn(5000)
        packed = cuda.encode(x.cuda()[1:], on_device)
        assert torch.equal(packed.cpu(), reference.encode(x[1:].clone(), device_table))
        product = cuda.decode(packed, grad.cuda()[1:], on_device)
        assert torch.equal(product.cpu(), reference.decode(packed.cpu(), grad[1:].clone(), device_table))
