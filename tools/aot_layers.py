"""What the CUDA kernels of layers and ladders compile to, without a GPU: registers, spills, accesses, instructions an element.

    python -m tools.aot_layers --bits 4 --dtypes bfloat16 --arch 80 90
    python -m tools.aot_layers --calls "layer norm" "batch norm"

Each call runs on CPU tensors, and the kernels that it would launch are compiled instead. Instructions an element are given only
if the text has neither loops nor masks. This holds for kernels on the packed layout, except for maps of 7 × 7 and for ladders:
their text also has a body with masks. The text includes the slow paths of divisions and roots, and the rare path that marks
numbers that are not finite.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fewbit import activations
from fewbit.kernels import cuda, layers_cuda
from fewbit.kernels.grid import Grid
from fewbit.kernels.layers_reference import Codes, First, Vectors, wide_dtype
from fewbit.resolve import shipped_tables
from tools.aot_report import opcodes_of, registers_of, widths_of

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES if dtype.is_floating_point}
CPU = torch.device("cpu")
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # program, arguments, options


@dataclass(frozen=True)
class Row:
    """One kernel of a call. loads, stores: width in bits -> number of accesses to global memory in the text."""

    call: str
    kernel: str
    dtype: str
    bits: int
    arch: int
    warps: int
    registers: int
    spills: int
    loads: dict[int, int]
    stores: dict[int, int]
    text: int
    instructions: float | None


def calls(dtype: torch.dtype, bits: int) -> dict[str, Callable[[], object]]:
    """Name -> call of a layer, on (1024, 1024) tokens, (16, 64, 32 × 32) images or (16, 64, 7 × 7) maps."""
    wide, tokens, images, maps = wide_dtype(dtype), Grid(1024, 1024), Grid(16, 64, 1024), Grid(16, 64, 49)
    x, image, small = (torch.zeros(grid[:3], dtype=dtype) for grid in (tokens, images, maps))
    packed = torch.zeros(bits * tokens.n // 8 + 1, dtype=torch.uint8)[:-1]
    rows, vectors, by_channel = torch.zeros(1024, dtype=wide), torch.zeros(5, 1024, dtype=wide), torch.zeros(5, 64, dtype=wide)
    weight, channels = torch.zeros(1024, dtype=dtype), torch.zeros(64, dtype=wide)
    (normal,) = shipped_tables(activations.IDENTITY, ("value",), bits, wide, CPU)
    alone = shipped_tables(activations.get("gelu"), ("derivative",), bits, wide, CPU)[0]
    derivative, value = shipped_tables(activations.get("gelu"), ("derivative", "value"), bits, wide, CPU)
    norm, batch, none = First(rows, rows, True, 1e-5), First(channels, channels, False), First(None, rows, True)
    where, plain = Vectors.of(True, True, False, True), Vectors()
    of_rows = Codes(packed, tokens, vectors, where, rows, 1e-5, normal)
    of_values = Codes(packed, tokens, vectors, plain, rows, None, normal)
    of_images = Codes(packed, images, by_channel, where, None, None, normal)
    of_groups = Codes(packed, images._replace(groups=8), by_channel, plain, rows, 1e-5, normal)
    kernels = layers_cuda
    return {
        "encode, ladder": lambda: cuda.encode(x, alone),
        "encode, joint ladder": lambda: cuda.encode(x, derivative),
        "decode, ladder": lambda: cuda.decode(packed, x, alone),
        "magnitudes": lambda: kernels.magnitudes(x, tokens),
        "row scales": lambda: kernels.row_scales(x, tokens, rows),
        "row moments": lambda: kernels.row_moments(x, tokens, 1e-5, True),
        "standardize": lambda: kernels.standardize(x, tokens, norm, None, normal, weight, weight, False, True),
        "standardize, signs": lambda: kernels.standardize(
            image, images, batch, None, normal, weight[:64], weight[:64], True, True
        ),
        "encode rows": lambda: kernels.encode(x, tokens, norm, vectors[:3], normal, vectors, where),
        "encode values": lambda: kernels.encode(x, tokens, none, vectors[:3], normal, vectors, None),
        "encode images": lambda: kernels.encode(image, images, batch, by_channel[:3], normal, by_channel, where),
        "encode maps": lambda: kernels.encode(small, maps, batch, by_channel[:3], normal, by_channel, where),
        "decode rows": lambda: kernels.decode(of_rows, dtype),
        "decode values": lambda: kernels.decode(of_values, dtype),
        "decode images": lambda: kernels.decode(of_images, dtype),
        "decode maps": lambda: kernels.decode(of_images._replace(grid=maps), dtype),
        "slopes": lambda: kernels.times_slope(of_rows, x.view(-1), 0.25, 1.0),
        "layer norm": lambda: kernels.rows_backward(of_rows._replace(where=plain), x, rows, weight, True, True),
        "group norm": lambda: kernels.rows_backward(of_groups, image, rows, weight[:64], True, True),
        "batch norm": lambda: kernels.channels_backward(of_images._replace(where=plain), image, channels, weight[:64], True),
        "gate backward": lambda: kernels.gate_backward(of_values, packed, x, derivative, value),
        "gate value": lambda: kernels.gate_value(of_values, packed, value, dtype),
    }


def launches(call: Callable[[], object]) -> list[Launch]:
    """The kernels that the call would launch on a GPU."""
    found: list[Launch] = []

    def note(program: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found.append((program, arguments, cuda.OPTIONS | options))

    with mock.patch.object(cuda, "launch", note):
        call()
    return found


def report(call: str, dtype: str, bits: int, arch: int) -> list[Row]:
    """Compile the kernels of a call for that architecture, and read their figures from the result."""
    return [_row(call, dtype, bits, arch, *launch) for launch in launches(calls(DTYPES[dtype], bits)[call])]


def _row(call: str, dtype: str, bits: int, arch: int, program: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    compiled: Any = triton.compile(_source(program, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    opcodes, warps = opcodes_of(listing), options["num_warps"]
    tile = arguments[-1]
    straight = program.__name__ in ("encode", "decode") and isinstance(tile, layers_cuda.Tile) and tile.full
    return Row(
        call,
        program.__name__,
        dtype,
        bits,
        arch,
        warps,
        registers=registers_of(listing),
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        loads=widths_of(opcodes, "LDG"),
        stores=widths_of(opcodes, "STG"),
        text=len(opcodes),
        instructions=round(len(opcodes) * 32 * warps / (8 * tile.block), 1) if straight else None,
    )


def _source(program: Any, arguments: tuple[Any, ...]) -> Any:
    """The source, specialized as Triton does for a launch: 1 is a constant; integers and addresses that 16 divides are marked
    as such."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for parameter, value in zip(program.params, arguments, strict=True):
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        small = not is_tensor and -(2**31) <= value < 2**31
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32" if small else "i64"
        if is_tensor or (value % 16 == 0 and not free):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(program, signature, constants, attributes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(calls(torch.float32, 1))
    parser.add_argument("--calls", nargs="+", default=names, choices=names, metavar="CALL", help=", ".join(names))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--arch", nargs="+", type=int, default=[90], help="80 is an A100, 90 an H100 or H200")
    parser.add_argument("--json", action="store_true", help="one row a line, as JSON")
    options = parser.parse_args()
    if not options.json:
        print(f"{'call':20} {'kernel':18} {'dtype':9} bits sm warps regs spills  text instr/element  loads | stores by width")
    for arch in options.arch:
        for dtype in options.dtypes:
            for bits in options.bits:
                for call in options.calls:
                    for row in report(call, dtype, bits, arch):
                        print(json.dumps(asdict(row)) if options.json else _line(row), flush=True)


def _line(row: Row) -> str:
    loads, stores = (
        " ".join(f"{count}×{width}" for width, count in widths.items()) or "none" for widths in (row.loads, row.stores)
    )
    each = "-" if row.instructions is None else f"{row.instructions:.1f}"
    return (
        f"{row.call:20} {row.kernel:18} {row.dtype:9} {row.bits:4} {row.arch:2} {row.warps:5} {row.registers:4} "
        f"{row.spills:6} {row.text:5} {each:>13}  {loads} | {stores}"
    )


if __name__ == "__main__":
    main()
