import pytest


@pytest.fixture(autouse=True)
def whole_processor(monkeypatch):
    """What inductor compiles for less than the processor can do, as this variable asks for, is wrong, or does not compile."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
