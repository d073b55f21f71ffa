"""The device on which tests run the CUDA kernels with CPU tensors: Triton's interpreter, or a real device.

Triton interprets if TRITON_INTERPRET=1 is set when the kernels are decorated. Here it takes two thirds of its usual time.
"""

from functools import cache

import torch
from triton import knobs
from triton.runtime import interpreter

from fewbit.kernels import DeviceTable

INTERPRETED = bool(knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class OnDevice:
    """A module of kernels. Its functions take and return CPU tensors, and run on DEVICE."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        found = getattr(self._module, name)
        return found if INTERPRETED or isinstance(found, type) or not callable(found) else _there(found)


def _there(function):
    def call(*arguments):
        moved = {}
        results = function(*(_moved(each, moved) for each in arguments))
        for one, other in moved.values():
            if one.is_contiguous():
                one.data.copy_(other)  # what is marked in vectors
        return _back(results)

    return call


def _moved(value, moved):
    """The tensor on the device, with the same strides. `moved` records which tensors went where."""
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            whole = value.detach().untyped_storage().to(device=DEVICE)
            there = torch.empty(0, dtype=value.dtype, device=DEVICE)
            there.set_(whole, value.storage_offset(), value.shape, value.stride())
            moved[id(value)] = value, torch._neg_view(there) if value.is_neg() else there
        return moved[id(value)][1]
    if isinstance(value, DeviceTable):
        return _table(value)
    if isinstance(value, tuple):
        parts = [_moved(each, moved) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@cache
def _table(table):
    return DeviceTable(*(each.to(DEVICE) for each in (table.thresholds, table.codes, table.levels)), table.bits)


def _back(results):
    if isinstance(results, torch.Tensor):
        return results.cpu()
    if isinstance(results, tuple):
        parts = [_back(each) for each in results]
        return type(results)(*parts) if hasattr(results, "_fields") else tuple(parts)
    return results


@cache
def _patched(fn):
    interpreter._patch_lang(fn)


def _call(function, *args, **kwargs):
    _patched(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


# At every call of one device function by another, Triton searches the whole language for things to replace. They were already
# replaced when the kernel started, or when the function was first called.
interpreter.InterpretedFunction.__call__ = _call
