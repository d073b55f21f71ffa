"""The path of every call: what is refused by name and left to torch elsewhere, what is remembered, and how short it is."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from support import compiled
from torch import nn
from torch.nn import functional

import fewbit
from fewbit.autograd import compiled as in_graphs
from fewbit.errors import DesignError, InputError, TableError
from fewbit.functional import operation

pytestmark = [  # from torch, about things that are new to it
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]
CODED = fewbit.functional
DENSE, TYPE = "{} can code dense tensors, got {}", "{} takes a float16, bfloat16, float32 or float64 tensor, got {}"


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=layout, requires_grad=True)


INPUTS = {
    "sparse": (lambda: torch.randn(6, 6).to_sparse().requires_grad_(), DENSE, "torch.sparse_coo"),
    "sparse rows": (lambda: torch.randn(6, 6).to_sparse_csr().requires_grad_(), DENSE, "torch.sparse_csr"),
    "nested": (lambda: nested(torch.strided), DENSE, "a nested tensor"),
    "jagged": (lambda: nested(torch.jagged), DENSE, "a nested tensor"),
    "complex": (lambda: torch.randn(6, 6, dtype=torch.complex64, requires_grad=True), TYPE, "torch.complex64"),
    "integer": (lambda: torch.arange(36).view(6, 6), TYPE, "torch.int64"),
}


def plain(x):
    """The comparable part of a tensor: its values in one dense tensor."""
    x = x.detach()
    if x.is_nested:
        return torch.cat([each.flatten() for each in x.unbind()])
    return x.to_dense() if x.layout != torch.strided else x


def outcome(function, x):
    """The function's output for x, and the gradient at x; or the message of torch's error."""
    try:
        y = function(x)
        needed = [x] if y.requires_grad and x.requires_grad else []
        grads = torch.autograd.grad(y, needed, torch.ones_like(y)) if needed else ()
        return [plain(each) for each in (y, *grads)]
    except RuntimeError as error:
        return str(error)


def check_same(found, exact):
    """Assert that both outcomes are the same, bit for bit, or the same error of torch."""
    if isinstance(exact, str):
        assert found == exact
        assert "fewbit" not in exact
    else:
        assert [each.dtype for each in found] == [each.dtype for each in exact]
        assert all(torch.equal(*pair) for pair in zip(found, exact, strict=True))


class TestWhatCannotBeCoded:
    @pytest.mark.parametrize("kind", INPUTS)
    @pytest.mark.parametrize("name", ["relu", "tanh", "linear", "layer_norm", "swiglu", "glu"])
    def test_is_refused_by_name(self, kind, name):
        make, message, got = INPUTS[kind]
        weight = torch.randn(6, 6, requires_grad=True)
        others = {"linear": (weight,), "layer_norm": ((6,),), "swiglu": (weight,)}.get(name, ())
        with pytest.raises(InputError, match=message.format(name, got)):
            getattr(CODED, name)(make(), *others)

    def test_is_refused_in_other_operands_too(self):
        with pytest.raises(InputError, match=r"linear can code dense tensors, got torch.sparse_coo"):
            CODED.linear(torch.randn(3, 6), torch.randn(6, 6).to_sparse().requires_grad_())

    @pytest.mark.parametrize("kind", INPUTS)
    @pytest.mark.parametrize(
        "module",
        [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.LayerNorm(6), nn.GLU(), nn.Conv1d(6, 2, 3)],
        ids=lambda module: type(module).__name__,
    )
    def test_is_left_to_torch_by_modules(self, kind, module):
        """Bit for bit, with torch's gradients or torch's errors."""
        x = INPUTS[kind][0]()
        module = copy.deepcopy(module).to(x.dtype) if x.is_complex() else module
        check_same(outcome(fewbit.convert(copy.deepcopy(module)), x), outcome(module, x))

    def test_leaves_complex_weights_their_gradient(self):
        x, module = torch.randn(4, 6, dtype=torch.complex64), fewbit.Linear(6, 3, dtype=torch.complex64, bits=2)
        weights = module.weight, module.bias
        y, exact = module(x), functional.linear(x, *weights)
        assert torch.equal(y, exact)
        for found, true in zip(*(torch.autograd.grad(each.abs().sum(), weights) for each in (y, exact)), strict=True):
            assert torch.equal(found, true)

    @pytest.mark.parametrize("kind", INPUTS)
    @pytest.mark.parametrize("function", [torch.relu, torch.tanh, functional.silu, functional.leaky_relu])
    def test_is_left_to_torch_under_patch(self, kind, function):
        x = INPUTS[kind][0]()
        with fewbit.patch(bits=2):
            found = outcome(function, x)
        check_same(found, outcome(function, x))

    @pytest.mark.usefixtures("fresh_compiler")
    def test_in_compiled_code(self):
        x, module = torch.randn(4, 6, dtype=torch.complex64), fewbit.Linear(6, 3, dtype=torch.complex64, bits=2)
        assert torch.equal(compiled(module)(x), functional.linear(x, module.weight, module.bias))
        with pytest.raises(Exception, match="linear takes a float16"):
            compiled(lambda x: CODED.linear(x, module.weight))(x)


@pytest.mark.parametrize("grad", [False, True], ids=["without a gradient", "with one"])
@pytest.mark.parametrize("name", ["gelu", "layer_norm"])
def test_bits_and_tables_are_checked_first(name, grad):
    """Whether or not codes are made in this call."""
    x, others = torch.randn(4, 6, requires_grad=grad), ((6,),) if name == "layer_norm" else ()
    for bits in (0, 9, 2.0, True, "3"):
        with pytest.raises(DesignError, match="bits must be an integer from 1 to 8"):
            getattr(CODED, name)(x, *others, bits=bits)
    with pytest.raises(TableError, match=r"must be a fewbit.CodeTable, got str"):
        getattr(CODED, name)(x, *others, table="x")


class TestRemembered:
    """Operations are made only once for equal options."""

    def made(self, call):
        """How many operations a call makes."""
        before = operation._operation.cache_info().misses
        call()
        return operation._operation.cache_info().misses - before

    def test_equal_options_give_one_operation(self):
        x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        alpha, eps = 0.5 + torch.rand(2, dtype=torch.float64) / 8  # not seen before
        calls = {
            "function": lambda **code: CODED.elu(x, alpha.item(), **code),
            "module": lambda **code: fewbit.ELU(alpha.item(), **code)(x),
            "norm": lambda **code: CODED.layer_norm(x, [6], weight, eps=eps.item(), **code),
            "norm, module": lambda **code: fewbit.GroupNorm(3, 6, eps=eps.item(), **code)(x),
            "product": lambda **code: CODED.conv1d(x, weight.view(1, 6, 1)[:, :4], padding=17, **code),
        }
        for call in calls.values():
            operation._operation.cache_clear()
            assert self.made(call) == 1
            assert self.made(call) == 0
            assert self.made(lambda call=call: call(bits=7)) == 0
            with torch.no_grad():
                assert self.made(call) == 0

    def test_other_options_give_another(self):
        x = torch.randn(4, requires_grad=True)
        operation._operation.cache_clear()
        for alpha in (0.25, 0.75):
            assert self.made(lambda alpha=alpha: CODED.elu(x, alpha)) == 1
            y = CODED.elu(x, alpha)
            assert torch.equal(y, functional.elu(x, alpha))

    def test_a_name_that_was_registered_anew_is_another(self):
        x = torch.randn(5, requires_grad=True)
        for slope in (2.0, 3.0):
            fewbit.register("scaled", lambda x, slope: x * slope, parameters={"slope": slope}, overwrite=True)
            assert torch.equal(CODED.scaled(x), x * slope)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    def test_ever_new_tables_leave_nothing_behind(self):
        x, sizes = torch.randn(8, requires_grad=True), []
        module = fewbit.Linear(8, 4)
        for i in range(4):
            derivatives = fewbit.CodeTable([i / 8], [0, 1], [[0.0, 1.0 + i]], 1)
            values = fewbit.CodeTable([i / 8], [0, 1], [[-1.0, 1.0 + i]], 1, channels=("value",))
            torch.compiler.reset()

            def step(x, derivatives=derivatives, values=values):
                return CODED.linear(CODED.gelu(x, table=derivatives), module.weight, table=values)

            (grad,) = torch.autograd.grad(compiled(step)(x).sum(), x)
            expected = torch.where(x > i / 8, 1.0 + i, 0.0) * module.weight.sum(0)
            torch.testing.assert_close(grad, expected)
            sizes.append((len(in_graphs._keys), len(in_graphs._functions)))
        assert sizes == sizes[:1] * 4

    def test_a_plain_average_of_batches_is_not_compiled_anew_at_each_step(self):
        exact = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 2))
        model = fewbit.convert(copy.deepcopy(exact), bits=4)
        call, counts = torch.compile(model, backend="aot_eager"), []
        for _ in range(12):  # more often than the compiler compiles anew
            x = torch.randn(16, 6)
            assert torch.equal(call(x), exact(x))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[2:] == counts[2:3] * 10
        for name, each in exact.state_dict().items():
            assert torch.equal(model.state_dict()[name], each)


def test_a_plain_call_takes_few_steps():
    """The number of Python functions of fewbit that run, from the call of a function to the kernel."""
    root, entered = Path(fewbit.__file__).parent, []
    gelu, x = CODED.gelu, torch.randn(100, requires_grad=True)
    gelu(x, bits=3)

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and root in path.parents:
            entered.append(f"{path.relative_to(root)}: {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        gelu(x, bits=3)
    finally:
        sys.setprofile(before)
    kernel = next(i for i, each in enumerate(entered) if each.startswith("kernels"))
    assert entered[0].endswith(": activation")
    assert kernel <= 10, entered[:kernel]


EMPTY = {
    "batch norm": (lambda: nn.BatchNorm2d(4), [(0, 4, 5, 5), (2, 4, 0, 5)]),
    "batch norm of rows": (lambda: nn.BatchNorm1d(4), [(0, 4), (0, 4, 5)]),
    "group norm": (lambda: nn.GroupNorm(2, 4), [(0, 4, 5, 5), (2, 4, 0, 5)]),
    "layer norm": (lambda: nn.LayerNorm(4), [(0, 4), (3, 0, 4)]),
    "RMS norm": (lambda: nn.RMSNorm(4), [(0, 4), (3, 0, 4)]),
    "linear": (lambda: nn.Linear(4, 3), [(0, 4), (3, 0, 4)]),
    "convolution": (lambda: nn.Conv2d(4, 3, 3, padding=1), [(0, 4, 5, 5)]),
    "GLU": (lambda: nn.GLU(1), [(0, 4), (2, 4, 0)]),
    "GELU": (nn.GELU, [(0,), (3, 0)]),
}
EMPTY_CASES = [(name, shape) for name, (_, shapes) in EMPTY.items() for shape in shapes]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "shape"), EMPTY_CASES)
def test_an_empty_input_is_torchs(name, shape, dtype, training):
    """As torch does, errors included. fewbit's calls of torch's kernels for statistics would end the process."""

    def results(module):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        try:
            y = module(x)
            y.sum().backward()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return [y.detach(), x.grad, *(each.grad for each in module.parameters())]

    exact = EMPTY[name][0]().to(dtype).train(training)
    coded = fewbit.convert(copy.deepcopy(exact), bits=4)
    found, true = results(coded), results(exact)
    if isinstance(true, str):
        assert found == true
    else:
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["batch norm", "group norm", "layer norm", "convolution", "GLU"])
def test_an_empty_input_is_torchs_in_compiled_code(name, training):
    make, (shape, *_) = EMPTY[name]
    exact = make().train(training)
    coded = fewbit.convert(copy.deepcopy(exact), bits=4)
    found = []
    for module in (exact, coded):
        torch.compiler.reset()
        x = torch.zeros(shape, requires_grad=True)
        try:
            y = compiled(module)(x)
        except (RuntimeError, ValueError) as error:
            found.append([type(error)])
            continue
        y.sum().backward()
        found.append([y.detach(), x.grad, *(each.grad for each in module.parameters()), *module.buffers()])
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, type) else torch.equal(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["layer norm", "RMS norm", "linear", "GELU"])
def test_sizes_that_only_the_data_tell_are_not_asked_for(name):
    """A mask selects the number of rows. Asking whether there are any would break the graph."""
    module = fewbit.convert(EMPTY[name][0](), bits=4)

    def selected(x, mask):
        return module(x[mask.nonzero().squeeze(1)])

    x, mask = torch.randn(5, 4, requires_grad=True), torch.tensor([True, False, True, True, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        y = compiled(selected)(x, mask)
    assert torch.equal(y, module(x[mask]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
