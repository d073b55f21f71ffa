"""The CUDA backend: in Triton's interpreter, compiled without a device, and on a device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit import kernels
from fewbit.kernels import cuda, reference

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not cuda.available(), reason="Triton is not installed")


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marked):
    """`interpreted_cuda.py`, in a process where Triton interprets: it decides when the kernels are decorated."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-m", marked, "tests/interpreted_cuda.py"]
    result = run_python(*command, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_without_triton_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert not cuda.supports(torch.zeros(3))
    assert not cuda.has_formula("gelu")
    code = """
import sys; sys.modules["triton"] = None  # as if it were not installed
import torch, fewbit
from fewbit.kernels import cuda
assert not cuda.available()
fewbit.functional.gelu(torch.ones(9, requires_grad=True)).sum().backward()
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_tensors_on_the_cpu_are_not_taken():
    x = torch.zeros(3)
    assert not cuda.supports(x)
    assert kernels._backend(x) is not cuda
    assert kernels._backend(x.to("meta")) is reference
