"""The package as a whole: what an import costs, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

PACKAGE = Path(fewbit.__file__).parent
# a module may import those on the lines below its own
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "bench_report"},
    {"bench"},
    {"models"},
    {"plots", "terminal", "measuring"},
    {"nn"},
    {"functional"},
    {"layers"},
    {"drop_in"},
    {"coders"},
    {"autograd", "store"},
    {"kernels", "design"},
    {"packing", "activations", "weights"},
    {"record"},
    {"errors", "constants"},
]
MATHEMATICS = {"store", "design", "activations", "weights", "record"}
MACHINERY = {"autograd", "kernels", "packing"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part_of(path):
    """The file's top part: fewbit/design/grid.py -> design."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Parts of fewbit that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fewbit":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fewbit."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fewbit":
            yield "nn" if node.attr[0].isupper() else node.attr


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(path)
    for other in imports_of(path):
        assert other == own or RANK[other] > RANK[own], f"{own} imports {other}"
        assert not (own in MACHINERY and other in MATHEMATICS)
        assert not (own in MATHEMATICS and other in MACHINERY)


def loaded_after(code):
    modules = ("torch", "numpy", "scipy", "numba", "matplotlib", "triton", "rich")
    code += f"; import sys; print(*[name for name in {modules} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import fewbit") == set()


@pytest.mark.parametrize("statement", ["from fewbit.design.search import search", "import fewbit.weights, fewbit.activations"])
def test_the_mathematics_never_loads_torch(statement):
    assert not loaded_after(statement) & {"torch", "matplotlib"}


def test_shipped_tables_need_no_compiler():
    assert "numba" not in loaded_after("import fewbit; fewbit.load_table('gelu', 3)")
    assert not loaded_after("import fewbit; fewbit.GELU(bits=3)") & {"numba", "matplotlib"}


def test_triton_is_loaded_by_launches_alone():
    code = "import torch, fewbit; from fewbit.kernels import cuda; cuda.supports(torch.device('meta'), torch.float32)"
    assert "triton" not in loaded_after(code)


def test_a_second_process_compiles_nothing():
    code = """
import torch, fewbit
from fewbit.design import dynprog
from fewbit.kernels import loops
kernels = []
compile = loops._compile
loops._compile = lambda *arguments: kernels.append(compile(*arguments)) or kernels[-1]
for coding in ("interval", "level"):
    fewbit.design("gelu", 2, coding=coding)
fewbit.functional.gelu(torch.ones(9, requires_grad=True)).sum().backward()
programs = (dynprog._run_program.stats, dynprog._cluster_program.stats)
print([(len(program.cache_hits), len(program.cache_misses)) for program in programs], [kernel.cache_hits for kernel in kernels])
"""
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[(1, 0), (1, 0)] [1, 1]\n", result.stderr


def test_design_is_the_function_however_it_is_imported():
    code = "import fewbit.design.table; from fewbit.store import load_table; import fewbit; print(fewbit.design('relu', 1).mse)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0.0\n"


def test_public_names():
    for name in fewbit.__all__:
        assert getattr(fewbit, name) is not None
    with pytest.raises(AttributeError, match="module 'fewbit' has no attribute 'nothing'"):
        fewbit.nothing  # noqa: B018
    namespace = {}
    exec("from fewbit import *", namespace)
    assert set(fewbit.__all__) <= set(namespace)


@pytest.mark.slow
def test_the_wheel_works_away_from_the_source(tmp_path):
    """Built, unpacked elsewhere and used from there: shipped tables are inside, and found."""
    root = PACKAGE.parent
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, root],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    code = f"""
import sys; sys.path.insert(0, {str(wheel.with_suffix(""))!r})
import fewbit; from fewbit import store
assert fewbit.__file__.startswith({str(tmp_path)!r}), fewbit.__file__
assert store.tables_directory().parent == store.Path(fewbit.__file__).parent
print(len(list(store.tables_directory().glob("*.json"))), fewbit.load_table("gelu", 3).bits)
"""
    import zipfile

    zipfile.ZipFile(wheel).extractall(wheel.with_suffix(""))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "24 3\n", result.stderr
