"""patch: torch's functions keep codes inside, however they are called, and stay torch's own where they must."""

import inspect
import threading
from functools import partial

import pytest
import torch
from oracles import expected_by_row, expected_gradient, rung_of
from support import bytes_kept, gradient_at
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError, checkpoint

import fewbit
from fewbit import activations
from fewbit.errors import ActivationError, DesignError, InputError
from fewbit.models.conversion import interception

pytestmark = [
    # from torch: dynamo reads .grad of each input that is not a leaf
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    # from torch, when it makes dual numbers
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
SPELLINGS = [(function, target) for function, target in interception._TARGETS.items() if not target.layer]
NEEDED = {"threshold": (0.5, 0.25)}  # arguments that torch requires


def is_coded(y):
    return "Coded" in type(y.grad_fn).__name__


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("function", "target"), SPELLINGS, ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("bits", [1, 3])
def test_every_spelling(function, target, bits):
    """The output is torch's and the gradient that of the table. In-place functions write in place."""
    x, needed = leaf(50, 7), NEEDED.get(target.name, ())
    expected = function(x.detach().clone(), *needed)
    before = x * 1
    with fewbit.patch({"activation": bits}):
        y = function(before, *needed)
    assert torch.equal(y, expected)
    assert is_coded(y)
    assert (y is before) == target.inplace
    incoming = torch.randn(50, 7)
    y.backward(incoming)
    record = activations.get(target.name)
    table = fewbit.load_ladder(record.with_parameters(**dict(zip(record.parameters, needed, strict=False))), bits)
    assert torch.equal(x.grad, expected_gradient(table, x.detach(), incoming))


def test_the_registry_is_covered():
    """Every function of torch that is an activation is found, and every module of torch calls a function that is found."""
    found = {target.name for _, target in SPELLINGS}
    assert found == set(activations.BUILT_IN) - {"gelu_tanh", "quick_gelu"}  # an option of gelu; torch has no such function
    for record in activations.BUILT_IN.values():
        if hasattr(nn, record.module):
            arguments = (0.5, 0.25) if record.name == "threshold" else ()
            for module in (getattr(nn, record.module)(*arguments), getattr(fewbit, record.module)(*arguments)):
                with fewbit.patch():
                    assert is_coded(module(leaf(5)))


@pytest.mark.parametrize(
    ("call", "record"),
    [
        (lambda x: functional.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: functional.gelu(input=x), "gelu"),
        (lambda x: functional.relu(x * 1, inplace=True), "relu"),
        (lambda x: functional.relu(x * 1, True), "relu"),
        (lambda x: functional.tanh(x), "tanh"),
        (lambda x: x.sigmoid(), "sigmoid"),
        (lambda x: (x * 1).tanh_(), "tanh"),
        (lambda x: functional.leaky_relu(x, 0.25), activations.get("leaky_relu", negative_slope=0.25)),
        (lambda x: functional.hardtanh(x, min_val=-2, max_val=3), activations.get("hardtanh", min_val=-2, max_val=3)),
        (lambda x: functional.elu_(x * 1, 0.5), activations.get("elu", alpha=0.5)),
    ],
)
def test_arguments(call, record):
    x = leaf(40)
    with fewbit.patch({"activation": 2}):
        y = call(x)
    assert torch.equal(y, call(x.detach()))
    assert is_coded(y)
    y.sum().backward()
    assert torch.equal(x.grad, expected_gradient(fewbit.load_ladder(record, 2), x.detach(), torch.ones(40)))


class Hidden(torch.Tensor):
    """A subclass of Tensor that sees functions."""


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.tanh(torch.randn(4, dtype=torch.complex64, requires_grad=True)),
        lambda: torch.sigmoid(torch.ones(4, dtype=torch.int64)),
        lambda: torch.tanh(torch.eye(3).to_sparse().requires_grad_()),
        lambda: torch.relu(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged).requires_grad_()),
        lambda: torch.tanh(torch.ones(3).as_subclass(Hidden).requires_grad_()),
        lambda: torch.tanh(torch.randn(3), out=torch.empty(3)),
        lambda: functional.leaky_relu(leaf(3), torch.tensor(0.1)),
        lambda: torch._C._nn.elu(leaf(3), 1.0, 2.0, 1.0),
        lambda: functional.softplus(leaf(3), beta=0.0),
        lambda: functional.relu(torch.randn(3)),
        lambda: torch.no_grad()(functional.gelu)(leaf(3)),
    ],
)
def test_what_stays_torchs(call):
    torch.manual_seed(1)
    expected = call()
    torch.manual_seed(1)
    with fewbit.patch(bits=1):
        y = call()
    assert not is_coded(y)
    assert type(y) is type(expected)
    assert type(y.grad_fn) is type(expected.grad_fn)
    if not y.is_nested:
        assert torch.equal(y.to_dense(), expected.to_dense()) or y.isnan().any()


def test_errors_are_torchs():
    for call in (lambda x: functional.gelu(x, approximate="no"), lambda x: functional.gelu(x, 1), lambda x: torch.tanh(x, 3)):
        with pytest.raises((TypeError, RuntimeError)) as exact:
            call(leaf(3))
        with fewbit.patch(), pytest.raises(exact.type) as ours:
            call(leaf(3))
        assert str(ours.value) == str(exact.value)


def test_one_patch_many_entries():
    """Re-entered, nested, left by an exception, used again: the innermost one is in force, and none stays."""
    x, three = leaf(8000), fewbit.patch(bits=3)
    exact, sizes = bytes_kept(torch.tanh, x), {bits: 1000 * bits for bits in (1, 3)}
    with three:
        with three, fewbit.patch(bits=1), three:
            assert bytes_kept(functional.gelu, x) - sizes[3] < 512
        with fewbit.patch(bits=1):
            assert bytes_kept(functional.gelu, x) - sizes[1] < 512
        with pytest.raises(TypeError), fewbit.patch(bits=1):
            functional.gelu()
        with fewbit.patch(activations=()):
            assert bytes_kept(torch.tanh, x) == exact
        with fewbit.patch(bits=3), torch.device("cpu"):
            assert bytes_kept(functional.gelu, x) - sizes[3] < 512
        assert bytes_kept(functional.gelu, x) - sizes[3] < 512
    assert torch._C._len_torch_function_stack() == 0
    assert bytes_kept(torch.tanh, x) == exact
    with pytest.raises(InputError, match="reverse order"):
        three.__exit__(None, None, None)


def test_kinds_of_the_inner_one_alone():
    x, weight = leaf(64, 64), leaf(64, 64)
    with fewbit.patch(bits=4), fewbit.patch(bits={"activation": 3}):
        assert not is_coded(functional.linear(x, weight))
        assert is_coded(functional.gelu(x))
    with fewbit.patch(bits=4), fewbit.patch():
        assert is_coded(functional.linear(x, weight))


CALLS = {
    "activation": (functional.gelu, lambda x: x.sigmoid()),
    "linear": (lambda x: functional.linear(x, leaf(8, 8)), lambda x: functional.conv1d(x, leaf(4, 4, 1))),
    "norm": (lambda x: functional.layer_norm(x, (8,)), lambda x: functional.rms_norm(x, (8,)), functional.instance_norm),
    "product": (functional.glu,),
}


@pytest.mark.parametrize(
    "kinds", [("activation",), ("linear",), ("norm",), ("product",), ("norm", "linear"), ("rest",), tuple(CALLS)], ids=str
)
def test_kinds_by_name(kinds):
    """A mapping only codes calls of the kinds that it names."""
    with fewbit.patch(bits=dict.fromkeys(kinds, 4)):
        for kind, calls in CALLS.items():
            for call in calls:
                expected = kind in kinds and call is not functional.instance_norm
                assert is_coded(call(leaf(64, 4, 8))) == expected, kind


def test_bits_by_kind():
    """Inputs of linear layers are coded once, with the larger number of bits. Without linear layers, each kind has its own."""
    x = leaf(64, 64)
    for bits, expected in (({"activation": 2, "norm": 3}, 2), ({"activation": 2, "linear": 4}, 4), ({"activation": 5}, 5)):
        with fewbit.patch(bits):
            channels = ("derivative", "value") if "linear" in bits else "derivative"
            ladder = fewbit.load_ladder("gelu", expected, channels=channels)
            found = gradient_at(functional.gelu, x.detach())
        factors = ladder[rung_of(x)](x.detach().double().numpy())
        expected = torch.from_numpy(factors if factors.shape == x.shape else factors[0])
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_chosen_activations():
    x = leaf(9)
    with fewbit.patch(activations=["gelu_tanh", "relu"]):
        assert is_coded(functional.gelu(x, approximate="tanh"))
        assert is_coded(x.relu())
        assert not is_coded(functional.gelu(x))
        assert not is_coded(x.sigmoid())


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"bits": 9}, DesignError, "bits must be an integer from 1 to 8"),
        ({"bits": {"linear": 0}}, DesignError, "bits must be an integer from 1 to 8"),
        ({"bits": {"liner": 4}}, DesignError, "unknown kind 'liner'; did you mean 'linear'"),
        ({"bits": {}}, DesignError, "bits must name at least one kind"),
        ({"inputs": 4}, TypeError, "inputs"),
        ({"coding": "best"}, DesignError, "coding must be one of"),
        ({"activations": ["gelo"]}, ActivationError, "did you mean 'gelu'"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        fewbit.patch(**arguments)


def test_decorator():
    @fewbit.patch(bits=3)
    def coded(x, *, scale=1):
        """Mine."""
        return functional.gelu(x) * scale

    assert (coded.__name__, coded.__doc__) == ("coded", "Mine.")
    assert list(inspect.signature(coded).parameters) == ["x", "scale"]
    assert bytes_kept(coded, leaf(8000)) < 3000 + 512

    def numbers():
        yield 1

    for wrong in (numbers, nn.GELU):
        with pytest.raises(InputError, match="use `with fewbit"):
            fewbit.patch()(wrong)


def test_threads():
    """A patch holds for its own thread. Several threads can use one object."""
    shared, found = fewbit.patch(bits=1), {}
    inside = threading.Barrier(2)

    def work(name, enter):
        if enter:
            with shared:
                inside.wait(20)
                found[name] = is_coded(torch.tanh(leaf(4)))
                inside.wait(20)
        else:
            inside.wait(20)
            found[name] = is_coded(torch.tanh(leaf(4)))
            inside.wait(20)
        found[name, "left"] = torch._C._len_torch_function_stack()

    for modes in ((True, True), (True, False)):
        threads = [threading.Thread(target=work, args=(index, enter)) for index, enter in enumerate(modes)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert found == {0: True, 1: modes[1], (0, "left"): 0, (1, "left"): 0}


def mlp():
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 64), nn.GELU(),
        nn.Linear(64, 64), nn.GLU(), nn.Linear(32, 16), nn.RMSNorm(16),
    )  # fmt: skip


THREE_AND_FOUR = {"activation": 3, "linear": 4, "norm": 4, "product": 4}


@pytest.mark.parametrize("coding", [None, "interval"])
@pytest.mark.parametrize("bits", [{"activation": 3}, THREE_AND_FOUR, {"norm": 2, "linear": 3}, 4], ids=str)
def test_the_same_as_converted_modules(bits, coding):
    """Bytes and gradients are those of `convert` with the same arguments, bit for bit."""
    torch.manual_seed(3)
    ours, theirs, x = mlp(), mlp(), torch.randn(200, 4, 8)
    theirs.load_state_dict(ours.state_dict())
    fewbit.convert(theirs, bits, coding=coding)
    with fewbit.patch(bits, coding=coding):
        y = ours(x)
    expected = theirs(x)
    assert torch.equal(y, expected)
    for each in (y, expected):
        each.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    with fewbit.patch(bits, coding=coding):
        assert bytes_kept(ours, x) == bytes_kept(theirs, x)


def test_layers_stay_torchs_where_they_must():
    x = leaf(4, 8)
    with fewbit.patch(bits=4):
        assert not is_coded(functional.linear(x, leaf(8)))  # a vector
        assert not is_coded(functional.linear(x.to(torch.complex64), leaf(3, 8).to(torch.complex64)))
        assert torch.layer_norm(x, (8,), None, None, 1e-5, False).shape == x.shape
        assert functional.linear(x, torch.ones(3, 8)).grad_fn is not None
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        assert attention(*(torch.randn(2, 3, 8),) * 3)[0].shape == (2, 3, 8)


def test_autocast():
    x = leaf(64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.gelu(x @ torch.eye(64))
        with fewbit.patch():
            y = functional.gelu(x @ torch.eye(64))
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_second_derivatives_raise():
    x = leaf(5)
    with fewbit.patch():
        (first,) = torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)
        with pytest.raises(InputError, match="once"):
            torch.autograd.grad(first.sum(), x)


def test_torch_func():
    x = torch.randn(6, 5)
    table = fewbit.load_ladder("gelu", 2)
    with fewbit.patch({"activation": 2}):
        found = vmap(grad(lambda row: functional.gelu(row).sum()))(x)
        tangent = jvp(functional.gelu, (x,), (torch.ones_like(x),))[1]
        exact = hessian(lambda row: torch.tanh(row).sum())
        second = exact(x[0])
    assert torch.equal(found, expected_by_row(table, x, torch.ones_like(x)))
    torch.testing.assert_close(tangent, grad(lambda x: functional.gelu(x).sum())(x))
    torch.testing.assert_close(second, hessian(lambda row: torch.tanh(row).sum())(x[0]))


def test_odd_layouts_in_a_backward_inside():
    """If the incoming gradient has another layout than the input, backward calls torch, not the patch."""
    x, incoming = leaf(2, 3, 4), torch.randn(4, 3, 2).permute(2, 1, 0)
    torch.tanh(x).backward(incoming)
    expected, x.grad = x.grad, None
    with fewbit.patch(bits=8):
        torch.tanh(x).backward(incoming)
    torch.testing.assert_close(x.grad, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backward", ["method", "function", "grad"])
def test_checkpoint_inside(backward):
    """Recomputed inside the block, whoever starts the backward pass."""
    x, net = leaf(30, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    table = fewbit.load_ladder("gelu", 1)
    with fewbit.patch({"activation": 1}):
        loss = checkpoint(net, x, use_reentrant=False).sum()
        if backward == "grad":
            (found,) = torch.autograd.grad(loss, x)
        else:
            loss.backward() if backward == "method" else torch.autograd.backward(loss)
            found = x.grad
    hidden = net[0](x.detach())
    expected = expected_gradient(table, hidden, torch.ones(30, 8) @ net[2].weight) @ net[0].weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [{"activation": 1}, {"activation": 1, "linear": 4, "norm": 4, "product": 4}], ids=str)
def test_checkpoint_outside(bits):
    """Recomputed after the block: torch refuses it, unless the checkpointed function is decorated."""
    x, net = leaf(30, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with fewbit.patch(bits):
        loss = checkpoint(net, x, use_reentrant=False).sum()
    with pytest.raises(CheckpointError):
        loss.backward()
    coded = fewbit.patch(bits)(net.forward)
    coded(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(coded, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("activations", [(), ("gelu",)])
def test_named_activations_are_all_that_is_coded(activations):
    with fewbit.patch(activations=activations):
        assert is_coded(functional.gelu(leaf(4, 8))) == bool(activations)
        for call in (*CALLS["linear"], *CALLS["norm"], *CALLS["product"]):
            assert not is_coded(call(leaf(2, 4, 8)))
    with fewbit.patch({"activation": 3, "linear": 4}, activations=activations):  # or whatever else a mapping names
        assert is_coded(functional.linear(leaf(4, 8), leaf(8, 8)))


def test_what_are_no_names():
    with pytest.raises(ActivationError, match=r"activations must be names such as .* got 3"):
        fewbit.patch(4, activations=3)


BY_KEYWORD = {
    "gelu": (functional.gelu, {"input": (64, 96)}),
    "linear": (functional.linear, {"input": (64, 96), "weight": (8, 96)}),
    "conv2d": (functional.conv2d, {"input": (4, 8, 16, 16), "weight": (4, 8, 3, 3)}),
    "glu": (functional.glu, {"input": (64, 96)}),
    "attention": (functional.scaled_dot_product_attention, dict.fromkeys(("query", "key", "value"), (2, 2, 32, 16))),
    "max_pool2d": (partial(functional.max_pool2d, kernel_size=2), {"input": (4, 8, 16, 16)}),
    "dropout": (functional.dropout, {"input": (64, 96)}),
}


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_arguments_by_keyword(name):
    """What is kept of operands that others have computed does not depend on how they are passed."""
    function, shapes = BY_KEYWORD[name]
    tensors = {each: torch.randn(shape, requires_grad=True) for each, shape in shapes.items()}

    def kept(call):
        with fewbit.patch(bits=4):
            made = {each: tensor * 1 if each != "weight" else tensor for each, tensor in tensors.items()}
            return bytes_kept(lambda: call(made), leave_out=(tensors["weight"],) if "weight" in tensors else ())

    by_keyword, by_place = kept(lambda made: function(**made)), kept(lambda made: function(*made.values()))
    assert by_keyword == by_place < bytes_kept(lambda: function(*(each * 1 for each in tensors.values())))
