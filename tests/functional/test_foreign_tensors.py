"""Operands that are subclasses of Tensor, as inputs and as weights. Models leave them to torch. Functions called by name refuse
them."""

import pytest
import torch
from support import compiled
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map_only

import fewbit
from fewbit.errors import InputError

CODED = fewbit.functional


class Named(torch.Tensor):
    """Sees only functions. Its results have its class."""


class Wrapper(torch.Tensor):
    """Sees operators. It holds another tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        place = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **place)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    def __repr__(self):  # compilers print it
        return f"Wrapper({self.inner})"

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return Wrapper(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda each: each.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, function(*args, **kwargs))


class Weight(nn.Parameter):
    """A parameter with another class name, which behaves as torch's in all ways."""


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture(params=["functions", "operators", "distributed"])
def foreign(request):
    """A function that makes such a tensor from a plain one."""
    if request.param == "distributed":
        mesh = request.getfixturevalue("mesh")
        return lambda x: distribute_tensor(x.detach().clone(), mesh, [Replicate()])
    return {"functions": lambda x: x.detach().clone().as_subclass(Named), "operators": lambda x: Wrapper(x.detach().clone())}[
        request.param
    ]


def plain(x):
    if isinstance(x, DTensor):
        return x.full_tensor()
    return x.inner if isinstance(x, Wrapper) else x.as_subclass(torch.Tensor)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (3, 4)),
    "convolution": (lambda: nn.Conv1d(4, 4, 1), (3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 4, 1), (3, 4, 5)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "GELU": (nn.GELU, (3, 4)),
    "GLU": (nn.GLU, (3, 4)),
}


def results(module, x):
    """The class, the output and all gradients; or the error if torch does not take this mixture."""
    try:
        y = module(x)
        y.sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return [type(y), *map(plain, (y.detach(), x.grad, *(each.grad for each in module.parameters())))]


@pytest.mark.parametrize("way", ["converted", "patched"])
@pytest.mark.parametrize("which", ["input", "weight", "both"])
@pytest.mark.parametrize("name", LAYERS)
def test_models_leave_them_to_torch(name, which, way, foreign):
    make, shape = LAYERS[name]
    if which == "weight" and not list(make().parameters()):
        pytest.skip("it has no weight")

    def case():
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        for key, each in list(module.named_parameters()) if which != "input" else ():
            setattr(module, key, nn.Parameter(foreign(each)))
        return module, (x if which == "weight" else foreign(x)).requires_grad_()

    true, (module, x) = results(*case()), case()
    if way == "converted":
        found = results(fewbit.convert(module, bits=2), x)
    else:
        with fewbit.patch(bits=2):
            found = results(module, x)
    if isinstance(true, str):
        assert found == true
    else:
        assert found[0] is true[0]
        assert all(map(torch.equal, found[1:], true[1:]))


@pytest.mark.parametrize("which", [0, 1])
def test_functions_by_name_refuse_them(which, foreign):
    operands = [torch.randn(3, 4), torch.randn(2, 4)]
    operands[which] = foreign(operands[which])
    for each in operands:
        each.requires_grad_()
    with pytest.raises(
        InputError, match=rf"linear can code torch's own tensors, got the subclass {type(operands[which]).__name__}"
    ):
        CODED.linear(*operands, bits=4)
    with torch.no_grad():
        CODED.linear(*map(plain, operands), bits=4)


@pytest.mark.filterwarnings("ignore:(Mismatch dtype between input and weight|Casting complex values to real):UserWarning")
def test_a_complex_weight():
    """On a real input, for the only layer in which torch accepts both."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(InputError, match=r"rms_norm takes a float16, .* got torch.complex64"):
        CODED.rms_norm(x, (4,), weight)
    module = nn.RMSNorm(4)
    module.weight = nn.Parameter(weight.detach())
    (true,) = torch.autograd.grad(module(x).abs().sum(), module.weight)
    (found,) = torch.autograd.grad(fewbit.convert(module, bits=4)(x).abs().sum(), module.weight)
    assert torch.equal(found, true)


def test_parameters_of_another_name_are_coded():
    module = nn.Linear(4, 4)
    module.weight = Weight(module.weight.detach())
    y = fewbit.convert(module, bits=4)(torch.randn(3, 4))
    assert type(y.grad_fn).__name__ == "_CodedProductBackward"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["converted", "patched"])
def test_compiled(way):
    def case():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))
        return model, Wrapper(torch.randn(3, 4)).requires_grad_()

    model, x = case()
    function = fewbit.convert(model, bits=2) if way == "converted" else fewbit.patch(bits=2)(lambda x: model(x))
    y = compiled(function)(x)
    y.sum().backward()
    true = results(*case())
    assert torch.equal(plain(y), true[1])
    for each, expected in zip(model.parameters(), true[3:], strict=True):
        torch.testing.assert_close(plain(each.grad), expected)


def test_calibration_passes_them_by():
    model = nn.Sequential(nn.GELU(), nn.SiLU())
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    report = fewbit.calibrate(model, [nested, torch.randn(50, 6)])
    assert [layer.elements for layer in report.layers] == [300, 300]
