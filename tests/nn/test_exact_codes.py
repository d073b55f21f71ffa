"""Modules with exact codes: the same as torch's, except for what they keep."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from support import bytes_kept
from torch import nn

import fewbit
from fewbit.nn.exact_codes import CLASSES

ARGUMENTS = {
    "Dropout": [(), (0.3,)],
    "MaxPool": [(2,), (3, 2, 1, 1, False, True)],
    "AdaptiveMaxPool": [(5,), (5, True)],
    "AvgPool": [(2,), (3, 2, 1, True, False)],
    "AdaptiveAvgPool": [(5,)],
    "ReflectionPad": [(2,)],
    "ReplicationPad": [(2,)],
}
SHAPES = {"1": (2, 3, 256), "2": (2, 3, 32, 32), "3": (2, 3, 12, 12, 12), "u": (2, 3, 32, 32)}
CASES = [(name, arguments) for name in CLASSES for arguments in ARGUMENTS[re.sub(r"[123]d$", "", name)]]


def result(module, x):
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    found = module(leaf * 1)
    y, *others = found if isinstance(found, tuple) else (found,)
    return y.detach(), *others, *torch.autograd.grad(y.square().sum(), leaf)


def test_all_classes():
    assert len(CLASSES) == 19
    assert all(name in dir(fewbit) and getattr(fewbit, name) is CLASSES[name] for name in CLASSES)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_are_torchs(name, arguments):
    ours, torchs = getattr(fewbit, name)(*arguments), getattr(nn, name)(*arguments)
    x = torch.randn(SHAPES[name[-2]])
    assert isinstance(ours, type(torchs))
    assert repr(ours) == repr(torchs)
    assert vars(ours).keys() == vars(torchs).keys()
    assert inspect.signature(type(ours)) == inspect.signature(type(torchs))
    for each in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).eval()):
        torchs.train(each.training)
        assert all(map(torch.equal, result(each, x), result(torchs, x)))
        kept, of_torch = (bytes_kept(lambda module=module: module(x.requires_grad_() * 1)) for module in (each, torchs))
        assert kept < of_torch or kept == of_torch == 0


def test_cannot_be_scripted():
    with pytest.raises(fewbit.InputError, match=r"torch\.jit\.script cannot compile MaxPool2d of fewbit"):
        torch.jit.script(fewbit.MaxPool2d(2))
