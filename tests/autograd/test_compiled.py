"""torch.compile: one graph, codes are kept, and gradients are those of the oracle."""

import gc
import importlib.util
import warnings
import weakref
from pathlib import Path

import oracles
import pytest
import torch
from support import bytes_kept, compiled, gradient_at
from torch.func import grad, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit import activations, packing, resolve
from fewbit.errors import InputError
from fewbit.kernels import ops

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # from torch: dynamo reads .grad of each input that is not a leaf
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    # from torch, when it makes dual numbers
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
OWN_TABLE = fewbit.CodeTable([-1.0, 0.5], [1, 0, 1], [[0.25, 2.0]], 1)
CALLS = {
    "functional": (lambda x: fewbit.functional.gelu(x), lambda: fewbit.load_ladder("gelu", 3)),
    "bits": (lambda x: fewbit.functional.silu(x, bits=2), lambda: fewbit.load_ladder("silu", 2)),
    "parameter": (
        lambda x: fewbit.functional.leaky_relu(x, 0.2),
        lambda: fewbit.load_ladder("leaky_relu", 3, negative_slope=0.2),
    ),
    "option": (lambda x: fewbit.functional.gelu(x, approximate="tanh"), lambda: fewbit.load_ladder("gelu_tanh", 3)),
    "table": (lambda x: fewbit.functional.gelu(x, table=OWN_TABLE), lambda: OWN_TABLE),
    "inplace": (lambda x: fewbit.functional.relu(x, inplace=True), lambda: fewbit.load_ladder("relu", 3)),
    "module": (fewbit.GELU(approximate="tanh", bits=4), lambda: fewbit.load_ladder("gelu_tanh", 4)),
    "module, parameter": (fewbit.LeakyReLU(0.2), lambda: fewbit.load_ladder("leaky_relu", 3, negative_slope=0.2)),
    "module, table": (fewbit.SiLU(table=OWN_TABLE), lambda: OWN_TABLE),
    "module, inplace": (fewbit.ELU(inplace=True), lambda: fewbit.load_ladder("elu", 3)),
}


def check(function, table, x, backend="aot_eager", dynamic=None):
    """The compiled function of twice x, and its gradient for a random one."""
    call = compiled(lambda x: function(x * 2), backend, dynamic=dynamic)
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    exact = lambda x: function(x * 2)  # noqa: E731  without a gradient to compute, torch's own operation
    assert torch.equal(y, compiled(exact, backend, dynamic=dynamic)(x) if backend == "inductor" else exact(x))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(leaf.grad, 2 * oracles.expected_gradient(table, 2 * x, grad))
    return call


# The arguments of a call are fixed before shapes become symbolic, and both happen before the backend runs. Backends differ in
# how they treat operators, constants and in-place writes
RUNS = [
    *[(call, dynamic, "aot_eager") for call in CALLS for dynamic in (False, True)],
    ("functional", True, "inductor"),
    *[
        pytest.param(call, dynamic, backend, marks=pytest.mark.slow)
        for backend in ("eager", "inductor")
        for call, dynamic in [("functional", False), ("table", True), ("inplace", True), ("module, inplace", False)]
    ],
    pytest.param("module, parameter", True, "inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("call", "dynamic", "backend"), RUNS)
def test_gradients(call, dynamic, backend):
    function, table = CALLS[call]
    check(function, table(), torch.randn(40, 33), backend, dynamic)


@pytest.mark.slow
def test_every_activation(record):
    table = fewbit.load_ladder(record, 3)
    check(getattr(fewbit.functional, record.name), table, torch.randn(50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    check(fewbit.functional.silu, fewbit.load_ladder("silu", 3), torch.randn(300).to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_shapes(shape, dynamic):
    check(fewbit.functional.gelu, fewbit.load_ladder("gelu", 3), torch.randn(shape), dynamic=dynamic)


LAYOUTS, INCOMING = ("channels_last", "transposed", "sliced", "expanded"), ("contiguous", "channels_last", "expanded")
LAYOUT_RUNS = [
    *[(layout, incoming, False) for layout in LAYOUTS for incoming in INCOMING],
    *[pytest.param(layout, INCOMING[i % 3], True, marks=pytest.mark.slow) for i, layout in enumerate(LAYOUTS)],
]


@pytest.mark.parametrize(("layout", "incoming", "dynamic"), LAYOUT_RUNS)
def test_layouts(layout, incoming, dynamic):
    base = torch.randn(2, 3, 4, 5)
    view = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3),
        "sliced": lambda x: x[:, ::2, 1:],
        "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    }[layout]
    leaf = base.clone().requires_grad_()
    y = compiled(lambda x: fewbit.functional.gelu(view(x)), dynamic=dynamic)(leaf)
    grad = torch.randn(y.shape)
    grad = {
        "contiguous": grad,
        "channels_last": grad.contiguous(memory_format=torch.channels_last),
        "expanded": grad[:1, :1, :1, :1].expand(y.shape),
    }[incoming]
    y.backward(grad)
    plain = base.clone().requires_grad_()
    x = view(plain)
    x.backward(oracles.expected_gradient(fewbit.load_ladder("gelu", 3), x.contiguous(), grad))
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-6, atol=1e-6)  # expanded: sums have another order
    if layout != "expanded":
        assert torch.equal(leaf.grad, plain.grad)


def test_dense_inputs_are_read_in_place(monkeypatch):
    """channels_last: the memory of x itself is encoded."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    encode = ops.kernels.encode
    monkeypatch.setattr(
        ops.kernels, "encode", lambda flat, device_table: seen.append(flat.data_ptr()) or encode(flat, device_table)
    )
    compiled(fewbit.functional.gelu)(x)
    assert seen == [x.data_ptr()]


def test_one_graph_for_all_sizes_and_no_more_for_parameters_that_stay():
    torch._dynamo.utils.counters.clear()
    call = compiled(lambda x: fewbit.functional.elu(x, 0.5), dynamic=True)
    table = fewbit.load_ladder("elu", 3, alpha=0.5)
    for size in (5, 1000, 1024, 1025, 70_000):
        x = torch.randn(size, requires_grad=True)
        (grad,) = torch.autograd.grad(call(x).sum(), x)
        assert torch.equal(grad, oracles.expected_gradient(table, x, torch.ones(size)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_parameters_that_change_are_followed():
    call = compiled(lambda x, slope, bits: fewbit.functional.leaky_relu(x, slope, bits=bits))
    for slope, bits in ((0.2, 1), (0.3, 1), (0.4, 2), (0.5, 4)):
        x = -torch.rand(9).requires_grad_()
        (grad,) = torch.autograd.grad(call(x, slope, bits).sum(), x)
        torch.testing.assert_close(grad, torch.full((9,), slope))
    module = fewbit.Threshold(0.0, 1.0)
    call = compiled(module)
    for threshold in (0.0, 0.5, 1.5):
        module.threshold = threshold
        x = torch.ones(1, requires_grad=True)
        assert torch.autograd.grad(call(x), x)[0].item() == (threshold < 1)


def test_no_compilation_of_the_look_up():
    """dynamo warns about functions with an lru_cache. That shows that it traces what should be a constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = compiled(torch.nn.Sequential(fewbit.ELU(0.7), fewbit.GELU(bits=1)))(torch.randn(5))
    assert y.shape == (5,)


def test_constants_are_not_copied_and_made_once():
    call = compiled(lambda x: fewbit.functional.mish(fewbit.functional.gelu(x, bits=4), bits=2), backend="aot_eager")
    x = torch.randn(5000, requires_grad=True)
    call(x).sum().backward()
    known = dict(ops._known)
    for _ in range(3):
        call(x).sum().backward()
    assert ops._known == known


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
class TestMemory:
    N = 64 * 1024
    CONSTANTS = 512

    def bytes_of(self, models, backend):
        """For each model: the bytes kept, which may include copies of its parameters, and the size of its parameters."""
        x = torch.randn(64, 32, requires_grad=True)
        own = [sum(parameter.numel() * 4 for parameter in model.parameters()) for model in models]
        return [(bytes_kept(compiled(model, backend), x), size) for model, size in zip(models, own, strict=True)]

    def mlp(self, activation, frozen):
        model = torch.nn.Sequential(torch.nn.Linear(32, 1024), activation, torch.nn.Linear(1024, 32))
        return model.requires_grad_(not frozen)

    def test_frozen_linears_keep_codes_alone(self, backend):
        exact, coded = self.bytes_of([self.mlp(a, True) for a in (torch.nn.GELU(), fewbit.GELU(bits=3))], backend)
        assert 4 * self.N <= exact[0] <= 4 * self.N + exact[1]
        packed = packing.packed_bytes(self.N, 3)
        assert packed <= coded[0] <= packed + coded[1] + self.CONSTANTS

    def test_trained_linears_keep_codes_and_the_output(self, backend):
        exact, coded = self.bytes_of([self.mlp(a, False) for a in (torch.nn.GELU(), fewbit.GELU(bits=3))], backend)
        assert exact[0] >= 2 * 4 * self.N
        assert coded[0] <= 4 * self.N + packing.packed_bytes(self.N, 3) + coded[1] + self.CONSTANTS

    def test_dropout_after_the_activation(self, backend):
        def model(activation):
            return torch.nn.Sequential(torch.nn.Linear(32, 1024), activation, torch.nn.Dropout(0.1))

        exact, coded = self.bytes_of([model(torch.nn.GELU()), model(fewbit.GELU(bits=3))], backend)
        assert exact[0] - coded[0] >= 3.5 * self.N - coded[1] - self.CONSTANTS


def test_no_reference_to_the_output():
    x = torch.randn(4096, requires_grad=True)
    y = compiled(fewbit.functional.tanh)(x)
    z, reference = y.sum(), weakref.ref(y)
    del y
    gc.collect()
    assert reference() is None
    z.backward()


def test_without_grad_there_are_no_codes(monkeypatch):
    monkeypatch.setattr(ops.kernels, "encode", lambda *_: pytest.fail("coded"))
    x = torch.randn(50, requires_grad=True)
    call = compiled(fewbit.functional.gelu)
    with torch.no_grad():
        assert torch.equal(call(x), torch.nn.functional.gelu(x))
    assert torch.equal(call(x.detach()), torch.nn.functional.gelu(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast(backend):
    weight = torch.randn(16, 16)
    table = fewbit.load_ladder("gelu", 3)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return fewbit.functional.gelu(x @ weight)

    grads = []
    for call in (function, compiled(function, backend)):
        torch.manual_seed(1)
        x = torch.randn(8, 16, requires_grad=True)
        y = call(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    pre = (x.bfloat16() @ weight.bfloat16()).detach()
    expected = oracles.expected_gradient(table, pre, torch.ones_like(pre)) @ weight.bfloat16().T
    torch.testing.assert_close(grads[0], expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpoint(backend):
    def function(x):
        return checkpoint(lambda t: fewbit.functional.gelu(t * 2, bits=2), x, use_reentrant=False)

    table = fewbit.load_ladder("gelu", 2)
    for call in (compiled(function, backend), function):
        x = torch.randn(500, requires_grad=True)
        call(x).sum().backward()
        assert torch.equal(x.grad, 2 * oracles.expected_gradient(table, 2 * x, torch.ones(500)))


def test_checkpoint_of_a_compiled_region():
    x = torch.randn(500, requires_grad=True)
    checkpoint(compiled(fewbit.functional.gelu), x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, oracles.expected_gradient(fewbit.load_ladder("gelu", 3), x, torch.ones(500)))


def test_saved_tensors_hooks_see_the_codes():
    x = torch.randn(5000, requires_grad=True)
    tables = resolve.shipped_tables(activations.get("gelu"), ("derivative",), 3, torch.float32, x.device)
    constants = sum(each.nbytes for table in tables for each in (table.thresholds, table.codes, table.levels))
    packed = packing.packed_bytes(5000, 3) + 1  # and the number of the rung
    for call, kept in ((fewbit.functional.gelu, packed), (compiled(fewbit.functional.gelu), packed + constants)):
        assert packed <= bytes_kept(call, x) <= kept
        grad = gradient_at(call, x)
        assert torch.equal(grad, oracles.expected_gradient(fewbit.load_ladder("gelu", 3), x, torch.ones(5000)))
    with torch.autograd.graph.save_on_cpu():
        y = fewbit.functional.gelu(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)


@pytest.mark.slow
def test_registered_activations():
    fewbit.register("snake", lambda x, a: x + (a * x).sin() ** 2 / a, parameters={"a": 1.0})
    check(lambda x: fewbit.functional.snake(x, a=2.0), fewbit.load_ladder("snake", 3, a=2.0), torch.randn(100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f.gelu(x, bits=9), "bits must be an integer from 1 to 8, got 9"),
        (lambda f, x: f.gelu(x.long()), "gelu takes a float16"),
        (lambda f, x: f.elu(x, aplha=1.0), "unexpected keyword argument 'aplha'"),
        (lambda f, x: f.elu(x, 1.0, False, 3), "too many positional arguments"),
        (lambda f, x: f.elu(x, 1.0, alpha=2.0), "multiple values for argument 'alpha'"),
        (lambda f, x: f.elu(x, alpha=torch.ones(())), "parameters of activations are numbers, got a tensor"),
        (lambda f, x: f.gelu(x, table=OWN_RELU), "the table is for relu, not for gelu"),
        (lambda f, x: f.gelu(x, inplace=True), "a leaf Variable that requires grad"),
    ],
)
def test_wrong_arguments_say_so(call, message):
    with pytest.raises(Exception, match=message):
        compiled(lambda x: call(fewbit.functional, x))(torch.randn(4, requires_grad=True))


OWN_RELU = fewbit.load_table("relu", 1)


def test_second_derivatives_are_refused():
    for backend, error in (("eager", InputError), ("aot_eager", RuntimeError)):
        torch.compiler.reset()
        x = torch.randn(5, requires_grad=True)
        y = compiled(fewbit.functional.gelu, backend)(x).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(error, match=r"can be taken once|does not currently support double backward"):
            (y + grad.sum()).backward()


class TestFunctorchInside:
    """Transforms inside of a compiled function. dynamo itself refuses transforms of compiled functions."""

    def test_gradients(self):
        f, table, x = fewbit.functional.gelu, fewbit.load_ladder("gelu", 3), torch.randn(5, 7)
        expected = oracles.expected_gradient(table, x, torch.ones(5, 7))
        by_row = oracles.expected_by_row(table, x, torch.ones(5, 7))
        assert torch.equal(compiled(grad(lambda x: f(x).sum()))(x), expected)
        assert torch.equal(compiled(vmap(grad(lambda x: f(x).sum())))(x), by_row)
        assert torch.equal(compiled(grad(lambda x: vmap(f)(x).sum()))(x), by_row)
        assert torch.equal(compiled(jacrev(f))(x[0]), torch.diag(by_row[0]))

    def test_refusals(self):
        f, x = fewbit.functional.gelu, torch.randn(5)
        with pytest.raises(Exception, match="can be taken once"):
            compiled(grad(lambda x: grad(lambda x: f(x).sum())(x).sum()))(x)
        with pytest.raises(Exception, match="no forward-mode derivative"):
            compiled(jacfwd(f))(x)


def kept_bytes_tool():
    path = Path(fewbit.__file__).parent.parent / "tools" / "compile_bytes.py"
    spec = importlib.util.spec_from_file_location("compile_bytes", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_table_of_kept_bytes():
    """A row that tools/compile_bytes.py prints."""
    tool = kept_bytes_tool()
    assert set(tool.MODELS) >= {"Linear → act → Linear", "the same, frozen", "the same with LoRA", "act(a) * b"}
    model = tool.MODELS["the same, frozen"](fewbit.GELU(bits=3))
    assert tool.kept(model, model) == pytest.approx(0.375, abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_guide_shows_the_table_of_kept_bytes():
    tool = kept_bytes_tool()
    page = (Path(fewbit.__file__).parent.parent / "docs" / "convert.md").read_text(encoding="utf-8")
    for name, make in tool.MODELS.items():
        assert f"| {name} | {' | '.join(f'{value:.3f}' for value in tool.row(make, 3))} |" in page
