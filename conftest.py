from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings

from fewbit import activations, store

settings.register_profile("fewbit", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("fewbit")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing of it remembered in memory before or after."""
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
    """Activations that a test registers are gone after it."""
    before = dict(activations._REGISTRY)
    yield
    activations._REGISTRY.clear()
    activations._REGISTRY.update(before)


@pytest.fixture
def fresh_compiler():
    """torch.compile has nothing of other tests, and leaves nothing to them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
