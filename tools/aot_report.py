"""What the CUDA kernels compile to, without a GPU: registers, spills, widths of memory accesses, instructions an element.

    python tools/aot_report.py --bits 3 4 --dtypes bfloat16 --arch 90
    python tools/aot_report.py --kernels forward --activations gelu silu tanh

Triton brings the assembler and disassembler. Registers and spills are those of the whole kernel. Accesses and instructions are
those of its unmasked body, compiled as a kernel of its own; all programs except the last ones run that body. Instructions are
counted in the text, which includes the slow paths of divisions. The text has only one loop, over lanes, for tables of more than
4 bits, which are searched in memory. There the figures are those of one lane.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit import activations, packing
from fewbit.kernels import cuda
from fewbit.resolve import device_tables
from fewbit.store import load_table

KERNELS = ("encode", "forward", "decode")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Row:
    """One kernel.

    wide_loads, wide_stores  number of 128-bit accesses in the whole kernel
    loads, stores            width in bits -> number of accesses in the unmasked body
    instructions             instructions of the unmasked body for each element
    lanes                    lanes in the text of the body: eight, or one if a loop runs over them
    scalars                  thresholds, constants or levels that a program keeps in registers
    """

    kernel: str
    activation: str
    dtype: str
    bits: int
    arch: int
    registers: int
    spills: int
    wide_loads: int
    wide_stores: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: float
    lanes: int
    scalars: int


def report(kernel: str, activation: str, dtype: str, bits: int, arch: int, n_divides: bool = False) -> Row:
    """Compile a kernel for that architecture, and read its figures from the result. `n_divides`: tell the compiler that 16
    divides n."""
    whole = _disassemble(kernel, activation, dtype, bits, arch, n_divides, body=False)
    body = _disassemble(kernel, activation, dtype, bits, arch, n_divides, body=True)
    opcodes = opcodes_of(whole.sass)
    body_opcodes = opcodes_of(body.sass)
    constants = _source(kernel, activation, dtype, bits, body=True)[2]
    lanes = 1 if "search" in constants and constants["search"].depth else packing.LANES
    elements = lanes * constants["block"] // (32 * cuda.OPTIONS["num_warps"])
    return Row(
        kernel,
        activation,
        dtype,
        bits,
        arch,
        registers=whole.registers,
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        wide_loads=widths_of(opcodes, "LDG").get(128, 0),
        wide_stores=widths_of(opcodes, "STG").get(128, 0),
        loads=widths_of(body_opcodes, "LDG"),
        stores=widths_of(body_opcodes, "STG"),
        instructions=round(len(body_opcodes) / elements, 2),
        lanes=lanes,
        scalars=_scalars(constants),
    )


@dataclass(frozen=True)
class _Compiled:
    sass: str
    registers: int


def _disassemble(kernel: str, activation: str, dtype: str, bits: int, arch: int, n_divides: bool, body: bool) -> _Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants = _source(kernel, activation, dtype, bits, body)
    aligned = [name for name, kind in signature.items() if kind.startswith("*")] + ["words"]
    aligned += ["first"] * body + ["n"] * n_divides
    names = function.arg_names
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(cuda.OPTIONS))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _Compiled(listing, registers_of(listing))


def registers_of(listing: str) -> int:
    """Registers a thread takes, from what cuobjdump prints."""
    usage = re.search(r"REG:(\d+)", listing)
    assert usage, f"cuobjdump names the registers; got {listing!r}"
    return int(usage[1])


def _source(kernel: str, activation: str, dtype: str, bits: int, body: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The Triton function, the types of its arguments, and its compile-time arguments."""
    from fewbit.kernels import formulas, programs

    own, wide = "*" + DTYPES[dtype], "*fp64" if dtype == "float64" else "*fp32"
    signature = {"packed": "*u8", "n": "i32", "words": "i32"}
    constants: dict[str, Any] = {"block": cuda.block_size(getattr(torch, dtype))}
    if kernel == "decode":
        signature |= {"grad": own, "levels": wide, "product": own}
        constants["bits"] = bits
    else:
        signature |= {"x": own, "y": own, "thresholds": wide, "codes": "*u8", "constants": wide}
        constants |= {"search": _search(activation, dtype, bits), "formula": None, "count": 0}
    if kernel == "forward":
        parameters = activations.get(activation).parameters
        count = formulas.constants(activation, parameters, getattr(torch, dtype)).numel()
        constants |= {"formula": formulas.FORMULAS[activation], "count": count}
    if body:
        signature["first"], constants["masked"] = "i64", False
    elif kernel == "decode":
        constants["ladder"] = False
    function = getattr(programs, ("decode" if kernel == "decode" else "encode") + "_block" * body)
    return function, signature, constants


def _scalars(constants: dict[str, Any]) -> int:
    if "search" in constants:
        return constants["search"].scalars + constants["count"]
    return 2 ** constants["bits"] if constants["bits"] <= 2 else 0


def _search(activation: str, dtype: str, bits: int) -> cuda.Search:
    wide = torch.float64 if dtype == "float64" else torch.float32
    return cuda.ProgramTable.of(device_tables(load_table(activation, bits), wide, torch.device("cpu"))[0]).search


def opcodes_of(sass: str) -> list[str]:
    """Opcodes in order, without predicates, operands and padding."""
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return [opcode for opcode in instructions if opcode != "NOP"]


def widths_of(opcodes: list[str], family: str) -> dict[int, int]:
    """Number of global loads (LDG) or stores (STG) by width in bits."""
    counts = Counter()
    for opcode in opcodes:
        if opcode.split(".")[0] == family:
            width = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
            counts[int(width[1]) if width else 32] += 1
    return dict(sorted(counts.items(), reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument(
        "--activations", nargs="+", default=["gelu"], help="use the tables and closed forms of these activations"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], choices=DTYPES)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--arch", nargs="+", type=int, default=[90], help="80 is an A100, 90 an H100 or H200")
    parser.add_argument("--n-divides", action="store_true", help="compile for an n that 16 divides")
    parser.add_argument("--json", action="store_true", help="one row a line, as JSON")
    options = parser.parse_args()
    if not options.json:
        print(f"{'kernel':8} {'table':10} {'dtype':9} bits sm  regs spills  instr/element  loads and stores by width")
    for arch in options.arch:
        for dtype in options.dtypes:
            for bits in options.bits:
                for kernel in options.kernels:
                    for activation in options.activations[:1] if kernel == "decode" else options.activations:
                        row = report(kernel, activation, dtype, bits, arch, options.n_divides)
                        print(json.dumps(asdict(row)) if options.json else _line(row), flush=True)


def _line(row: Row) -> str:
    accesses = [" ".join(f"{count}×{width}" for width, count in counts.items()) or "none" for counts in (row.loads, row.stores)]
    return (
        f"{row.kernel:8} {'any' if row.kernel == 'decode' else row.activation:10} {row.dtype:9} {row.bits:4} {row.arch:2} "
        f"{row.registers:5} {row.spills:6} {row.instructions:14.1f}  {accesses[0]} | {accesses[1]}"
    )


if __name__ == "__main__":
    main()
