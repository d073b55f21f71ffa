"""patch and torch.compile: entered outside of compiled code, or inside."""

import pytest
import torch
from support import bytes_kept, compiled
from torch import nn
from torch.nn import functional

import fewbit
from fewbit import activations, resolve

pytestmark = [
    # from torch: dynamo reads .grad of each input that is not a leaf
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    # from torch, when it makes dual numbers
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
THREE_AND_FOUR = {"activation": 3, "linear": 4, "norm": 4, "product": 4}


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def both(x):
    return functional.leaky_relu(functional.gelu(x * 2) * 3, 0.25, inplace=True).unflatten(0, (4, -1)).tanh()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_entered_outside():
    """Each patch gets its own code, which is used again. None is left after the patch."""
    x, call = leaf(8000), compiled(both)

    def gradient(function):
        function(x).sum().backward()
        found, x.grad = x.grad, None
        return found

    exact = gradient(both)
    assert torch.equal(gradient(call), exact)
    for bits in (3, 1, 3):
        with fewbit.patch(bits):
            assert torch.equal(call(x), both(x))
            assert torch.equal(gradient(call), gradient(both))
            assert not torch.equal(gradient(call), exact)
    with fewbit.patch(1), fewbit.patch(3):
        assert torch.equal(gradient(call), gradient(fewbit.patch(3)(both)))
    with fewbit.patch(activations=()):
        assert torch.equal(gradient(call), exact)
    assert torch.equal(gradient(call), exact)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("outer", [None, 1])
def test_compiled_and_entered_inside(outer):
    x = leaf(8000)

    def function(x):
        with fewbit.patch(bits=2):
            y = functional.gelu(x * 2)
        return torch.special.expit(y)

    call = compiled(function)
    expected = 2000 + (32000 if outer is None else 1000)
    with fewbit.patch(outer) if outer else torch.enable_grad():
        assert torch.equal(call(x), function(x))
        assert expected <= bytes_kept(call, x) <= expected + 1024
        assert torch._C._len_torch_function_stack() == (outer is not None)
    torch.compiler.reset()
    call = compiled(fewbit.patch(bits=2)(lambda x: functional.gelu(x * 2)))
    assert bytes_kept(call, x) <= 2000 + 512


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers():
    net, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), leaf(100, 32)
    tables = resolve.shipped_tables(activations.get("gelu"), resolve.JOINT, 4, torch.float32, x.device)
    held = {each.data_ptr(): each.nbytes for table in tables for each in (table.thresholds, table.codes, table.levels)}
    constants = sum(held.values())  # by the graph, once for any number of calls
    with fewbit.patch(THREE_AND_FOUR):
        exactly, call = bytes_kept(net, x), compiled(net)
        assert bytes_kept(call, x, leave_out=net.parameters()) < exactly + constants + 512
        assert torch.equal(call(x), net(x))
    assert bytes_kept(net, x) > 5 * exactly


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("function", "coded"),
    [
        (lambda x: torch.relu_(x * 2), False),
        (lambda x: functional.elu_(x * 2), False),
        (lambda x: (x * 2).relu_(), True),
        (lambda x: functional.elu(x * 2, inplace=True), True),
    ],
    ids=["torch.relu_", "F.elu_", "method", "argument"],
)
def test_compiled_in_place(function, coded):
    """dynamo does not ask modes about functions that overwrite their input, except methods: these stay torch's own."""
    x = leaf(8000)
    with fewbit.patch({"activation": 1}):
        call = compiled(function)
        assert torch.equal(call(x), function(x))
        assert (bytes_kept(call, x) < 1000 + 512) == coded


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # dynamo reports graph breaks in several ways
def test_graph_breaks_inside_are_survived():
    def function(x):
        with fewbit.patch(bits=2):
            y = x * 2
            torch._dynamo.graph_break()
            return functional.gelu(y)

    x = leaf(8000)
    assert bytes_kept(torch.compile(function, backend="aot_eager"), x) <= 2000 + 512
    assert torch._C._len_torch_function_stack() == 0
