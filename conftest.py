from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings

from fewbit import activations, store
from fewbit.kernels import layer_loops, layer_rows, layer_sample, layer_sums, loops

settings.register_profile("fewbit", deadline=None)  # the time of an example depends on the load of the machine
settings.load_profile("fewbit")


def pytest_collection_modifyitems(items):
    """Any order is allowed, but the longest tests come first, so that no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def session_folder(request, tmp_path_factory):
    """A folder for all processes that test at the same time."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own  # of pytest-xdist


@pytest.fixture(scope="session", autouse=True)
def session_cache(session_folder):
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_CACHE_DIR", str(session_folder / "cache"))
        yield


OF_LAYERS = [layer_sample.sampler, layer_loops.rebuilder, layer_loops.encoder, layer_rows.row_statistics]
OF_LAYERS += [layer_sums.rows_backward, layer_sums.channel_sums]
ELEMENTS = ["float32", "float64", "int16", "uint16"]
KERNELS = [
    *((make, wide) for make in OF_LAYERS for wide in ELEMENTS[:2]),
    *((loops.encoder, element, True) for element in ELEMENTS),
    *((loops.encoder, element, False) for element in ELEMENTS[2:]),
    *((loops.decoder, element) for element in ELEMENTS),
]


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request, session_folder):
    """Processes that test at the same time share the compilation of kernels, which takes a minute."""
    if not hasattr(request.config, "workerinput"):
        return
    for i, (make, *arguments) in enumerate(KERNELS):
        try:
            (session_folder / f"kernel{i}").mkdir()
        except FileExistsError:  # another process has it
            continue
        make(*arguments)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder. Nothing is remembered in memory before or after."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEWBIT_CACHE_DIR", str(folder))
    for memory in (store._load, store._warn_once):
        memory.cache_clear()
    yield folder
    for memory in (store._load, store._warn_once):
        memory.cache_clear()


@pytest.fixture(params=activations.names())
def record(request):
    """Every built-in activation in turn."""
    return activations.get(request.param)


@pytest.fixture(autouse=True)
def registry_restored():
    """Activations that a test registers are removed after it."""
    before = dict(activations._REGISTRY)
    yield
    activations._REGISTRY.clear()
    activations._REGISTRY.update(before)


@pytest.fixture
def fresh_compiler():
    """torch.compile has nothing left of other tests, and leaves nothing to them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
