"""torch's own samples of its operations, on fewbit's functions and under `patch`: outputs, errors, and bounded gradients."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import fewbit
from fewbit import activations
from fewbit.functional.layers import FUNCTIONS
from tools.fuzz.check import Judge, Way, run
from tools.fuzz.networks import Network

pytest.importorskip("expecttest", reason="torch's database of operations needs it")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # from torch, about its database
LACKS = {
    "gelu_tanh",
    "quick_gelu",
    "swiglu",
    "geglu",
    "reglu",
    *(n for n, each in FUNCTIONS.items() if each.kind == "recurrent"),
}
NAMES = sorted({*activations.names(), *FUNCTIONS} - LACKS)
BITS = (2, 4, 8)  # in turns: tables that are not shipped are designed, a ladder for each parameter of a sample
DTYPES = {torch.float32: 100, torch.float64: 100, torch.bfloat16: 40, torch.float16: 40}  # samples of each


class Call(nn.Module):
    """A function with the arguments of a sample. Tensors that need a gradient are parameters, others are buffers."""

    def __init__(self, function, sample):
        super().__init__()
        self.function = function
        self.args, self.kwargs = tree_map_only(torch.Tensor, self._owned, (sample.args, sample.kwargs))

    def _owned(self, tensor):
        name = f"tensor{len([*self.parameters(), *self.buffers()])}"
        if tensor.requires_grad:
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
        else:
            self.register_buffer(name, tensor.clone())
        return _Owned(name)

    def forward(self, x):
        args, kwargs = tree_map_only(_Owned, lambda each: getattr(self, each), (self.args, self.kwargs))
        return self.function(x, *args, **kwargs)

    def calling(self, function):
        other = Call.__new__(Call)
        other.__dict__ = {**vars(self), "function": function}
        return other


class _Owned(str):
    """The name of a tensor that the module owns."""


def entries(name):
    """The entries of the database that are torch's operation of that name."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [
        each
        for each in op_db
        if each.name in (name, f"nn.functional.{name}") and each.variant_test_name in ("", "without_cudnn")
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, dtype):
    samples = (
        (entry.op, sample)
        for entry in entries(name)
        if dtype in entry.dtypes
        for sample in entry.sample_inputs("cpu", dtype, requires_grad=True)
        if not sample.kwargs.get("dropout_p")  # it draws other numbers each time
    )
    samples = [*islice(samples, DTYPES[dtype])]
    assert samples
    failures = []
    for i, (op, sample) in enumerate(samples):
        net = Network(0, Call(op, sample), sample.input.detach(), sample.input.requires_grad, "a sample")
        judge, bits = Judge(net), BITS[i % 3]
        failures += [(sample.summary(), "patch", each) for each in judge.failures(Way("patch", bits))]
        coded = run(net, net.module.calling(partial(getattr(fewbit.functional, name), bits=bits)))
        failures += [(sample.summary(), name, each) for each in judge.compare(Way(name, bits), judge.exact, coded)]
    assert not failures


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    """What torch refuses is refused too."""
    for entry in entries(name):
        if entry.error_inputs_func is None:
            continue
        for each in entry.error_inputs("cpu"):
            sample = each.sample_input
            if not isinstance(sample.input, torch.Tensor) or not sample.input.is_floating_point():
                continue
            x = sample.input.detach().requires_grad_()
            with pytest.raises(each.error_type), fewbit.patch(4):
                entry.op(x, *sample.args, **sample.kwargs)
            with pytest.raises(Exception):  # noqa: B017, PT011
                getattr(fewbit.functional, name)(x, *sample.args, **sample.kwargs)
