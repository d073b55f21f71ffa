import pytest


@pytest.fixture(autouse=True)
def whole_processor(monkeypatch):
    """Unset this variable: inductor then compiles wrong code, or none, for fewer abilities than the processor has."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
