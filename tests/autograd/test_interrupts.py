"""An interrupt at any point of a training step leaves no switch on and no object behind."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.autograd import sharing

ROOT = Path(fewbit.__file__).parent


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(),
        nn.Linear(1152, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.GLU(), nn.Dropout(0.1), nn.Linear(16, 4),
    )  # fmt: skip


class Interrupt:
    """Raises KeyboardInterrupt before the instruction of this number in fewbit's own code."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(str(ROOT)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def step(coded, x, at):
    """Whether the step was finished before an interrupt at that instruction."""
    before = sys.gettrace()
    sys.settrace(Interrupt(at))
    try:
        coded(x).sum().backward()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(("stride", "first"), [(61, 1), pytest.param(7, 2, marks=pytest.mark.slow)])
def test_an_interrupt_leaves_all_as_it_was(stride, first):
    coded, x = fewbit.convert(model(), bits=4), torch.randn(8, 3, 16, 16)
    coded(x).sum().backward()  # this resolves tables, and compiles
    gc.collect()
    entries, interrupted = len(sharing._recipes), 0
    at = first
    while not step(coded, x, at):
        interrupted += 1
        at += stride
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu") is False
    assert interrupted > 3000 / stride
    gc.collect()
    assert len(sharing._recipes) == entries


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "linear", "swiglu", "batch_norm"])
def test_no_mode_is_switched_in_a_forward_pass(name, monkeypatch):
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    calls = {
        "gelu": lambda: fewbit.functional.gelu(x),
        "layer_norm": lambda: fewbit.functional.layer_norm(x, (64,)),
        "linear": lambda: fewbit.functional.linear(x * 1, weight),
        "swiglu": lambda: fewbit.functional.swiglu(x, weight),
        "batch_norm": lambda: fewbit.functional.batch_norm(x, None, None, training=True),
    }
    calls[name]()

    def switched(*_):
        raise AssertionError("a mode was switched")

    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled):
        monkeypatch.setattr(mode, "__init__", switched)
    calls[name]()
