"""Functions of exact codes: torch's signatures, outputs and gradients, in all dtypes and layouts; and when torch's own runs."""

import inspect

import pytest
import torch
from support import bytes_kept, compiled
from torch.func import grad, jvp, vmap
from torch.nn import functional

import fewbit
from fewbit.errors import InputError
from fewbit.functional.exact_codes import FUNCTIONS

CODED = fewbit.functional
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {1: (2, 3, 16), 2: (2, 3, 16, 14), 3: (2, 3, 8, 9, 7)}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def calls(dims):
    """Name of the function, its arguments, and its named arguments."""
    ones, twos = (1,) * dims, [2] * dims
    return [
        (f"max_pool{dims}d", (2,), {}),
        (f"max_pool{dims}d", (3, 2, 1), {}),
        (f"max_pool{dims}d", (twos,), {"stride": ones, "padding": ones, "dilation": 2, "ceil_mode": True}),
        (f"max_pool{dims}d", (2,), {"stride": []}),
        (f"max_pool{dims}d", (2,), {"return_indices": True}),
        (f"adaptive_max_pool{dims}d", (3,), {}),
        (f"adaptive_max_pool{dims}d", (twos, True), {}),
        (f"avg_pool{dims}d", (2,), {}),
        (f"avg_pool{dims}d", (3, 2, 1, True, False), {}),
        (f"avg_pool{dims}d", (twos,), {"ceil_mode": True}),
        (f"adaptive_avg_pool{dims}d", (3,), {}),
        (f"adaptive_avg_pool{dims}d", (1,), {}),
        *([(f"avg_pool{dims}d", (2,), {"divisor_override": 3})] if dims > 1 else []),
        *([(f"adaptive_{each}_pool{dims}d", ((None, *twos[1:]),), {}) for each in ("max", "avg")] if dims > 1 else []),
        *[("pad", ((2, 1) * dims, mode), {}) for mode in ("reflect", "replicate", "circular", "constant")],
        ("pad", ((2, 1) * dims,), {"value": 1.5}),
        ("interpolate", (), {"scale_factor": 0.5, "mode": "area"}),
        ("interpolate", (5,), {"mode": "area"}),
        ("interpolate", (5,), {}),
    ]


def inputs(dims):
    x = torch.randn(SHAPES[dims])
    yield x
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield x[:, :, ::2]
    yield x[0]
    if dims > 1:
        yield x.to(memory_format=FORMATS[dims])


def results(function, x, autocast, *arguments, **named):
    """The output, indices, first and second gradients, each with its strides; None if torch refuses the call."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = function(x * 1, *arguments, **named)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return type(error), str(error)
    y, *indices = found if isinstance(found, tuple) else (found,)
    grads = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y).requires_grad_()
    (first,) = torch.autograd.grad(y, x, grads, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.arange(first.numel()).view(first.shape) % 7).sum(), grads)
    (once,) = torch.autograd.grad(y, x, grads)
    return [(each.detach(), each.stride()) for each in (y, *indices, first, second, once)]


@pytest.mark.filterwarnings("ignore:Note that order of the arguments:UserWarning")  # from torch
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", SHAPES)
def test_are_torchs(dims, dtype, autocast):
    compared = 0
    for name, arguments, named in calls(dims):
        for x in inputs(dims):
            given = x.to(dtype)
            ours = results(getattr(CODED, name), given, autocast, *arguments, **named)
            true = results(getattr(functional, name), given, autocast, *arguments, **named)
            if isinstance(true, tuple):
                assert ours == true
                continue
            for (found, strides), (expected, of_torch) in zip(ours, true, strict=True):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), (name, arguments, named, x.shape, x.stride())
                assert strides == of_torch
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_torchs(name):
    ours, torchs = getattr(CODED, name), getattr(functional, name)
    if name.startswith("max_pool") or name.startswith("adaptive_max_pool"):
        torchs = getattr(functional, f"{name}_with_indices")
    try:
        expected = inspect.signature(torchs)
    except ValueError:  # of a function in C; its signature is in its docstring
        stem = {"avg_pool1d": 6, "avg_pool2d": 7, "avg_pool3d": 7, "adaptive_avg_pool1d": 2}
        assert len(inspect.signature(ours).parameters) == stem[name]
        assert all(f"{each}" in torchs.__doc__ for each in inspect.signature(ours).parameters)
        return
    mine = inspect.signature(ours).parameters.values()
    assert [(each.name, each.default) for each in mine] == [(each.name, each.default) for each in expected.parameters.values()]


@pytest.mark.parametrize("wrong", [lambda x: CODED.max_pool2d(x), lambda x: CODED.dropout(x, q=2), lambda x: CODED.pad(x)])
def test_arguments_that_torch_does_not_take(wrong):
    with pytest.raises(TypeError):
        wrong(torch.randn(2, 3, 4, 4, requires_grad=True))


EXAMPLES = {
    "dropout": lambda module, x: module.dropout(x, 0.5),
    "max_pool1d": lambda module, x: module.max_pool1d(x[0], 2),
    "max_pool2d": lambda module, x: module.max_pool2d(x, 2),
    "adaptive_max_pool2d": lambda module, x: module.adaptive_max_pool2d(x, 3),
    "avg_pool1d": lambda module, x: module.avg_pool1d(x[0], 2),
    "avg_pool2d": lambda module, x: module.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda module, x: module.adaptive_avg_pool2d(x, 3),
    "pad": lambda module, x: module.pad(x, (1, 1, 1, 1), "reflect"),
}


TRANSFORMS = {
    "grad": grad,
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).sum()),
    "vmap of grad": lambda f: vmap(grad(f), randomness="different"),
}


def image(**keywords):
    return torch.randn(2, 4, 32, 32, **keywords)


@pytest.mark.parametrize("name", EXAMPLES)
class TestWhereTheyAreTorchsOwn:
    def kept(self, name, x):
        return [bytes_kept(lambda m=module: EXAMPLES[name](m, x * 1)) for module in (CODED, functional)]

    def test_else_they_keep_less(self, name):
        ours, torchs = self.kept(name, image(requires_grad=True))
        assert ours < torchs / 8

    def test_in_exact(self, name):
        with fewbit.exact():
            ours, torchs = self.kept(name, image(requires_grad=True))
        assert ours == torchs

    def test_without_a_gradient(self, name):
        assert self.kept(name, image()) == [0, 0]
        assert EXAMPLES[name](CODED, image()).grad_fn is None

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_under_transforms(self, name, transform):
        x, found = torch.stack([image()] * 2), []
        for module in (CODED, functional):
            torch.manual_seed(1)
            value = lambda x, m=module: EXAMPLES[name](m, x).square().sum()  # noqa: E731
            found.append(TRANSFORMS[transform](value)(x if "vmap" in transform else x[0]))
        assert torch.equal(*found)

    def test_forward_mode(self, name):
        x, tangent, found = image(), image(), []
        for module in (CODED, functional):
            torch.manual_seed(1)
            found.append(jvp(lambda x, m=module: EXAMPLES[name](m, x), (x,), (tangent,)))
        assert all(map(torch.equal, *found))

    def test_empty(self, name):
        x = torch.randn(2, 0, 32, 32, requires_grad=True)
        outcomes = []
        for module in (CODED, functional):
            try:
                outcomes.append(EXAMPLES[name](module, x).shape)
            except RuntimeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]

    def test_refuse_what_has_no_codes(self, name):
        with pytest.raises(InputError, match=r"takes a float16, .* or float64 tensor, got torch\.complex64"):
            EXAMPLES[name](CODED, image(dtype=torch.complex64, requires_grad=True))


@pytest.fixture
def fresh():
    """A compiler that has not seen this code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", EXAMPLES)
def test_compiled(name):
    x, results = image(requires_grad=True), []
    for module in (CODED, functional):
        function = compiled(lambda x, m=module: EXAMPLES[name](m, x * 1))
        torch.manual_seed(1)
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("fresh")
def test_compiled_they_keep_less():
    """Except max_pool, which is torch's own there."""
    for name in ("dropout", "avg_pool2d", "adaptive_avg_pool2d", "pad"):
        x = image(requires_grad=True)
        ours, torchs = (bytes_kept(compiled(lambda x, m=m, n=name: EXAMPLES[n](m, x * 1)), x) for m in (CODED, functional))
        assert ours < torchs / 7, name


@pytest.mark.usefixtures("fresh")
def test_compiled_readers_of_a_dropout_share_the_code_of_its_input():
    weight = torch.randn(32, 64, requires_grad=True)

    def block(x):
        hidden = CODED.gelu(x * 1, bits=4, shared=True)
        return CODED.linear(CODED.dropout(hidden, 0.5), weight, bits=4)

    x = torch.randn(256, 64, requires_grad=True)
    codes, mask, tables = 256 * 64 // 2, 256 * 64 // 8, 2500
    assert bytes_kept(compiled(block), x, leave_out=(weight,)) < codes + mask + tables


def test_exported_programs_hold_torchs_operations():
    class Net(torch.nn.Module):
        def forward(self, x):
            return CODED.dropout(CODED.avg_pool2d(CODED.max_pool2d(x, 2), 2), 0.5)

    names = {str(node.target) for node in torch.export.export(Net(), (image(),)).graph.nodes}
    assert {"aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.dropout.default"} <= names
