"""The operators fewbit::encode and fewbit::decode, and tools that record or skip them: make_fx, fake tensors, export, fx."""

import oracles
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fewbit
from fewbit import packing, resolve
from fewbit.errors import InputError
from fewbit.kernels import ops  # noqa: F401  it registers the operators

# from torch: export reads .grad of each input that is not a leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


class TestOperators:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(0,), (1,), (1025,), (3, 7), (2, 3, 129)], ids=str)
    def test_opcheck(self, dtype, shape):
        device_table = resolve.device_tables(fewbit.load_table("gelu", 3), dtype, torch.device("cpu"))[0]
        tensors = device_table.thresholds, device_table.codes, device_table.levels, device_table.bits
        x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        torch.library.opcheck(torch.ops.fewbit.encode, (x, *tensors))
        packed = torch.ops.fewbit.encode(x, *tensors)
        torch.library.opcheck(torch.ops.fewbit.decode, (packed, grad, *tensors))

    def test_sizes_that_do_not_fit(self):
        thresholds, codes, levels = torch.zeros(1), torch.zeros(2, dtype=torch.uint8), torch.zeros(2)
        with pytest.raises(InputError, match="m thresholds, m \\+ 1 uint8 codes"):
            torch.ops.fewbit.encode(torch.zeros(5), torch.zeros(2), codes, levels, 1)
        with pytest.raises(InputError, match="up to 2 levels"):
            torch.ops.fewbit.encode(torch.zeros(5), thresholds, codes, torch.zeros(3), 1)
        packed = torch.ops.fewbit.encode(torch.zeros(5), thresholds, codes, levels, 1)
        with pytest.raises(InputError, match="2000 codes of 1 bits take 256 bytes, got 128"):
            torch.ops.fewbit.decode(packed, torch.zeros(2000), thresholds, codes, levels, 1)

    def test_rows_are_packed_each_on_its_own(self):
        device_table = resolve.device_tables(fewbit.load_table("silu", 2), torch.float32, torch.device("cpu"))[0]
        tensors = device_table.thresholds, device_table.codes, device_table.levels, device_table.bits
        x = torch.randn(3, 4, 50)
        packed = torch.ops.fewbit.encode(x, *tensors)
        codes = oracles.lookup(x.reshape(-1).numpy(), device_table.thresholds.numpy(), device_table.codes.numpy()).reshape(
            12, 50
        )
        for row, expected in zip(packed.reshape(12, -1), codes, strict=True):
            assert row.tolist() == oracles.pack(expected, 2, packing.words(50, 2)).tolist()

    def test_changed_tables_are_noticed(self):
        thresholds, codes = torch.tensor([0.0]), torch.tensor([0, 1], dtype=torch.uint8)
        levels = torch.tensor([2.0, 3.0])
        for factor in (1, 10):
            packed = torch.ops.fewbit.encode(torch.tensor([-1.0, 1.0]), thresholds, codes, levels, 1)
            product = torch.ops.fewbit.decode(packed, torch.ones(2), thresholds, codes, levels, 1)
            assert product.tolist() == [2.0 * factor, 3.0 * factor]
            levels.mul_(10)

    def test_tables_made_in_inference_mode(self):
        with torch.inference_mode():
            tensors = torch.tensor([0.0]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([2.0, 3.0])
            packed = torch.ops.fewbit.encode(torch.tensor([-1.0, 1.0]), *tensors, 1)
            assert torch.ops.fewbit.decode(packed, torch.ones(2), *tensors, 1).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators(mode):
    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(fewbit.functional.gelu(x).sum(), x)[0]

    graph = make_fx(gradient, tracing_mode=mode)(torch.randn(6, 8))
    assert {"fewbit.encode.default", "fewbit.decode.default"} <= {str(node.target) for node in graph.graph.nodes}
    x = torch.randn(6, 8)
    assert torch.equal(graph(x), oracles.expected_gradient(fewbit.load_ladder("gelu", 3), x, torch.ones(6, 8)))


def test_fake_tensors_leave_nothing_fake_behind():
    table = fewbit.CodeTable([0.125], [0, 1], [[0.0, 1.0]], 1)  # not seen before
    with torch._subclasses.FakeTensorMode():
        x = torch.randn(6, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(fewbit.functional.gelu(x, table=table).sum(), x)
        assert (grad.shape, type(grad).__name__) == (x.shape, "FakeTensor")
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    assert torch.autograd.grad(fewbit.functional.gelu(x, table=table).sum(), x)[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_torchs_own_operation(strict):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), fewbit.GELU(), fewbit.LeakyReLU(0.2))
    x = torch.randn(3, 4)
    program = torch.export.export(model, (x,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"aten.linear.default", "aten.gelu.default", "aten.leaky_relu.default"}
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "function"), [("gelu", lambda x: fewbit.functional.gelu(x)), ("batch_norm", fewbit.BatchNorm1d(3))]
)
def test_symbolic_trace_is_refused_with_the_reason(name, function):
    with pytest.raises(InputError, match=rf"torch.fx.symbolic_trace cannot look into {name}.*torch.export"):
        torch.fx.symbolic_trace(function)


def test_symbolic_trace_of_modules_holds_torchs_own_operation():
    layers = torch.nn.Conv1d(3, 4, 2), torch.nn.GroupNorm(2, 4), torch.nn.GELU(), torch.nn.ConvTranspose1d(4, 4, 1)
    model = torch.nn.Sequential(*layers, torch.nn.GLU(1), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    traced, x = torch.fx.symbolic_trace(fewbit.convert(model)), torch.randn(5, 3, 7, requires_grad=True)
    y = traced(x)
    assert torch.equal(y, model(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(fewbit.revert(model)(x).sum(), x)[0])
