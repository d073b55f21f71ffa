"""The package as a whole: what an import costs, and the direction of imports."""

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fewbit

PACKAGE = Path(fewbit.__file__).parent
# a part may import those on the lines below its own
RANKS = [
    {"__main__"},
    {"cli"},
    {"bench"},
    {"demo", "callbacks"},
    {"models"},
    {"plots", "terminal", "measuring", "traffic"},
    {"nn"},
    {"functional"},
    {"resolve", "autograd"},
    {"store"},
    {"kernels", "design"},
    {"packing", "activations", "weights", "torch_internals", "compiling"},
    {"record", "files", "layout"},
    {"errors", "constants"},
    {"text", "interrupt"},
]
# and likewise inside of models
MODELS = [
    {"prepare"},
    {"calibration", "gradients"},
    {"memory"},
    {"conversion"},
    {"modules"},
    {"preserve", "arguments", "report", "blocks"},
    {"grouping"},
]
# no torch at module level, and no imports of the machinery
MATHEMATICS = {"store", "design", "activations", "weights", "record"}
MACHINERY = {"autograd", "kernels", "packing", "torch_internals"}


def imports_of(path):
    """Modules of fewbit that a file imports, anywhere in it, as dotted names without "fewbit"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fewbit":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewbit."):
            home = node.module.removeprefix("fewbit.")
            yield from (f"{home}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fewbit":
            yield "nn" if node.attr[0].isupper() else node.attr


def check(own, other, ranks, path):
    rank = {name: number for number, names in enumerate(ranks) for name in names}
    assert own == other or rank[other] > rank[own], f"{path} is of {own} and imports {other}"


FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    own = [part.removesuffix(".py") for part in path.parts]
    for other in (name.split(".") for name in imports_of(PACKAGE / path)):
        if own[0] == other[0] == "models" and own[1] != "__init__":
            check(own[1], other[1], MODELS, path)
        check(own[0], other[0], RANKS, path)
        assert not (own[0] in MACHINERY and other[0] in MATHEMATICS)
        assert not (own[0] in MATHEMATICS and other[0] in MACHINERY)


def imported_files(path):
    """The files of fewbit that a file imports, except what only type checkers import."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fewbit":
            home = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                places = (f"{home}/{alias.name}", home)  # a module of that name, or a name in a module
                found = (Path(f"{place}{end}".lstrip("/")) for place in places for end in (".py", "/__init__.py"))
                yield from itertools.islice((each for each in found if each in FILES), 1)


def test_no_file_imports_itself_through_others():
    """Imports inside of functions count too: they delay a cycle, but do not remove it."""
    imports = {path: set(imported_files(path)) - {path} for path in FILES}
    assert Path("functional/operation.py") in imports[Path("functional/layers.py")]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_every_part_has_a_rank():
    assert {path.parts[0].removesuffix(".py") for path in FILES} == set().union(*RANKS)
    inside = {path.parts[1].removesuffix(".py") for path in FILES if path.parts[0] == "models"}
    assert inside - {"__init__"} == set().union(*MODELS)


def modules_imported(path):
    """Top-level modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_what_is_imported_is_declared():
    declared = re.findall(r"^Requires-Dist: ([a-z0-9_-]+)(.*)$", str(metadata.metadata("fewbit")), re.MULTILINE)
    names = {name for name, rest in declared if "extra" not in rest or "cuda" in rest}
    imported = {name for path in FILES for name in modules_imported(PACKAGE / path)}
    third = imported - set(sys.stdlib_module_names) - {"fewbit"}
    assert third == names


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
    """Built, unpacked elsewhere and used from there: the shipped tables are inside, and are found."""
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
