"""The contracts of the functional activations, for every activation of the registry."""

import gc
import inspect
import weakref

import numpy as np
import oracles
import pytest
import torch
from support import signature
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit import activations, kernels, packing
from fewbit.errors import ActivationError, DesignError, InputError, TableError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, ::2, 1:],
    "reversed dims": lambda x: x.permute(3, 2, 1, 0),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "with ones": lambda x: x[:1, :, :1],
}


def drop_in(record):
    return getattr(fewbit.functional, record.name)


def saved_tensors(function):
    """What `function()` returns, and the tensors that autograd saves during the call."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    return result, saved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("all_bits", [(1, 3), pytest.param((8,), marks=pytest.mark.slow)])  # its tables are designed here
def test_forward_is_torchs_and_gradient_is_the_tables(record, dtype, inplace, all_bits):
    leaf = (3 * torch.randn(7, 33)).to(dtype).requires_grad_()
    for bits in all_bits:
        x = leaf * 1
        y = drop_in(record)(x, bits=bits, inplace=inplace)
        assert torch.equal(y, record.forward(leaf))
        assert (y is x) == inplace
        assert y.dtype == dtype
        grad = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, leaf, grad)
        assert torch.equal(found, oracles.expected_gradient(fewbit.load_ladder(record, bits), leaf, grad))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (7,), (5, 5, 5), (1023,), (2, 1024), (100_003,)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_kept_bytes(shape, bits):
    x = torch.randn(shape, requires_grad=True)
    y, saved = saved_tensors(lambda: fewbit.functional.gelu(x, bits=bits))
    packed, anchor = saved  # the codes, and a place in the graph without data
    assert y.shape == x.shape
    assert packed.dtype == torch.uint8
    assert anchor.untyped_storage().nbytes() == 0
    needed = packing.packed_bytes(x.numel(), bits) + 1  # and the number of the rung
    assert packed.untyped_storage().nbytes() == needed <= -(-x.numel() * bits // 8) + 512
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_no_reference_to_the_input_or_output(record):
    x = torch.randn(64, requires_grad=True) * 1
    y = drop_in(record)(x, bits=2)
    z = y.sum()
    references = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    z.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["as output", "contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("name", ["silu", "relu", "tanh", "tanhshrink", "logsigmoid", "threshold", "quick_gelu"])
def test_layouts_follow_torch(layout, grad_layout, name):
    base = torch.randn(4, 5, 6, 7)
    x = LAYOUTS[layout](base.requires_grad_())
    y, exact = drop_in(activations.get(name))(x), activations.get(name).forward(x)
    assert torch.equal(y, exact)
    assert y.stride() == exact.stride()
    values = torch.arange(y.numel(), dtype=torch.float32).view(y.shape)
    grad = {
        "as output": torch.empty_like(y).copy_(values),
        "contiguous": values,
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(()).expand(y.shape),
    }[grad_layout]
    (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(found, oracles.expected_gradient(fewbit.load_ladder(name, 3), x, grad))


@pytest.mark.parametrize("mode", ["no_grad", "inference", "no grad wanted"])
@pytest.mark.parametrize("inplace", [False, True])
def test_without_grad_it_is_torchs_own_operation(record, mode, inplace, monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda *_: pytest.fail("coded"))
    x = torch.randn(50, requires_grad=mode == "no_grad")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "no grad wanted": torch.enable_grad}[mode]
    expected = record.forward(x.detach())
    with context():
        y, saved = saved_tensors(lambda: drop_in(record)(x.detach() if inplace else x, inplace=inplace))
    assert torch.equal(y, expected)
    assert saved == []
    assert not y.requires_grad


def test_non_finite_inputs(record):
    x = torch.tensor([1.0, float("nan"), 0.5, float("inf"), -0.25, -float("inf"), 0.0, -0.0, 2.0], requires_grad=True)
    y = drop_in(record)(x, bits=4)
    torch.testing.assert_close(y, record.forward(x), rtol=0, atol=0, equal_nan=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(record.forward(x).sum(), x)
    torch.testing.assert_close(grad, exact, rtol=0, atol=0, equal_nan=True)  # left to torch
    table = fewbit.load_table(record, 4)
    assert table(np.nan) == table(np.inf)


def test_gradients_of_elements_do_not_mix():
    """One element's gradient at a time: it does not reach any other element."""
    x = torch.randn(40, requires_grad=True)
    y = fewbit.functional.gelu(x, bits=3)
    for i in range(x.numel()):
        (grad,) = torch.autograd.grad(y[i], x, retain_graph=True)
        assert grad[i] == oracles.expected_gradient(fewbit.load_ladder("gelu", 3), x, torch.ones_like(x))[i]
        grad[i] = 0
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(record, dtype):
    leaf = torch.randn(16, 16, requires_grad=True)
    weight = torch.randn(16, 16)
    with torch.autocast("cpu", dtype):
        x = leaf @ weight
        y, exact = drop_in(record)(x), record.forward(x)
    assert x.dtype == dtype
    assert y.dtype == exact.dtype
    assert torch.equal(y, exact)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, oracles.expected_gradient(fewbit.load_ladder(record, 3), x, torch.ones_like(y)))


def test_checkpoint_recomputes_the_same():
    x = torch.randn(20, requires_grad=True)
    y = checkpoint(lambda t: fewbit.functional.gelu(t * 2, bits=2), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (direct,) = torch.autograd.grad(fewbit.functional.gelu(x * 2, bits=2).sum(), x)
    assert torch.equal(grad, direct)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # from torch, when it makes dual numbers
def test_forward_mode_raises_and_is_never_a_silent_zero():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, requires_grad=True), torch.ones(3))
        with pytest.raises(InputError, match="gelu has no forward-mode derivative"):
            fewbit.functional.gelu(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(record):
    x = torch.randn(1000, device="cuda", requires_grad=True)
    y = drop_in(record)(x)
    y.sum().backward()
    assert torch.equal(y, record.forward(x))
    assert torch.equal(x.grad.cpu(), oracles.expected_gradient(fewbit.load_ladder(record, 3), x.cpu(), torch.ones(1000)))


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "arguments", "keywords"),
        [
            ("elu", (0.5,), {}),
            ("elu", (), {"alpha": 0.5}),
            ("hardtanh", (-2.0, 0.5), {}),
            ("softplus", (2.0, 10.0), {}),
            ("leaky_relu", (0.2,), {}),
            ("threshold", (0.5, -1.0), {}),
            ("softshrink", (0.25,), {}),
            ("gelu", (), {"approximate": "tanh"}),
        ],
    )
    def test_torchs_parameters(self, name, arguments, keywords):
        x = torch.randn(400, dtype=torch.float64, requires_grad=True)
        y = getattr(fewbit.functional, name)(x, *arguments, **keywords, bits=8)
        exact = getattr(torch.nn.functional, name)(x, *arguments, **keywords)
        assert torch.equal(y, exact)
        coded, true = (torch.autograd.grad(value.sum(), x)[0] for value in (y, exact))
        torch.testing.assert_close(coded, true, rtol=0, atol=0.02)

    def test_parameters_are_read_at_each_call(self):
        x, alpha = -torch.ones(3), torch.tensor(0.5)
        for value in (0.5, 3.0):
            alpha.fill_(value)
            assert torch.equal(fewbit.functional.elu(x, alpha=alpha), torch.nn.functional.elu(x, alpha=value))

    def test_positional_inplace_as_in_torch(self):
        x = torch.randn(5)
        assert fewbit.functional.elu(x, 1.0, True) is x

    @pytest.mark.parametrize("name", [name for name in activations.names() if name != "quick_gelu"])  # torch has none
    def test_signatures_are_torchs_plus_ours(self, name):
        own = list(inspect.signature(getattr(fewbit.functional, name)).parameters)
        assert own[-4:] == ["inplace", "bits", "table", "shared"]
        try:
            torchs = list(inspect.signature(activations.get(name)._torch_call).parameters)
        except ValueError:
            pytest.skip("torch's function is a builtin, which shows no signature")
        assert own[: len(torchs)] == torchs if "inplace" in torchs else own[:-4] == torchs

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda f, x: f.gelu(x, bits=9), DesignError, "bits must be an integer from 1 to 8, got 9"),
            (lambda f, x: f.gelu(x.detach(), bits=0), DesignError, "got 0"),
            (lambda f, x: f.gelu(x, bits=True), DesignError, "got True"),
            (lambda f, x: f.gelu(x.long()), InputError, "gelu takes a float16, .* got torch.int64; convert it"),
            (lambda f, x: f.relu(x.bool()), InputError, "got torch.bool"),
            (lambda f, x: f.tanh(x.to(torch.complex64)), InputError, "got torch.complex64"),
            (lambda f, x: f.gelu(x.detach().to(torch.float8_e4m3fn)), InputError, "got torch.float8_e4m3fn"),
            (lambda f, x: f.relu(x.to_sparse()), InputError, "relu can code dense tensors, got torch.sparse_coo"),
            (lambda f, x: f.elu(x, alpha=[1.0, 2.0]), ActivationError, "parameter alpha must be a finite number"),
            (lambda f, x: f.gelu([1.0]), InputError, "takes a torch.Tensor, got list"),
            (lambda f, x: f.gelu(x, approximate="erf"), ActivationError, "gelu takes .*'none'.* or .*'tanh'.*, got"),
            (lambda f, x: f.elu(x, alpha="x"), ActivationError, "elu: parameter alpha must be a finite number"),
            (lambda f, x: f.elu(x, 1.0, False, 3), TypeError, "too many positional arguments"),
            (lambda f, x: f.elu(x, aplha=1.0), TypeError, r"elu\(input.*, alpha.*= 1.0, .*unexpected keyword argument 'aplha'"),
            (lambda f, x: f.gelu(x, table=fewbit.load_table("silu")), TableError, "the table is for silu, not for gelu"),
            (lambda f, x: f.elu(x, 0.5, table=fewbit.load_table("elu")), TableError, "for elu alpha=1, not for elu alpha=0.5"),
            (
                lambda f, x: f.gelu(x, bits=2, table=fewbit.load_table("gelu")),
                TableError,
                "bits=2 contradicts the table, which has 3",
            ),
            (lambda f, x: f.gelu(x, table="gelu.json"), TableError, "must be a fewbit.CodeTable, got str"),
            (
                lambda f, x: f.gelu(x, table=fewbit.design("gelu", 3, channels="value")),
                TableError,
                "the channel 'derivative' alone",
            ),
        ],
    )
    def test_wrong_arguments(self, call, error, message):
        with pytest.raises(error, match=message):
            call(fewbit.functional, torch.randn(4, requires_grad=True))

    def test_own_tables(self):
        x = torch.randn(100, requires_grad=True)
        for table in (fewbit.design("gelu", 5, weight="normal"), fewbit.CodeTable([0.0], [0, 1], [[0.0, 1.0]], 1)):
            (grad,) = torch.autograd.grad(fewbit.functional.gelu(x, table=table).sum(), x)
            assert torch.equal(grad, oracles.expected_gradient(table, x, torch.ones(100)))

    def test_unknown_names(self):
        with pytest.raises(AttributeError, match="has no attribute 'gleu'"):
            fewbit.functional.gleu  # noqa: B018

    def test_all_are_listed(self):
        assert set(activations.names()) <= set(dir(fewbit.functional))


@pytest.mark.parametrize("bits", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_registered_activations_have_a_drop_in(bits):
    fewbit.register("snake", lambda x, a: x + (a * x).sin() ** 2 / a, parameters={"a": 1.0})
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    y = fewbit.functional.snake(x, a=2.0, bits=bits)
    assert torch.equal(y, x + (2 * x).sin() ** 2 / 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, oracles.expected_gradient(fewbit.load_ladder("snake", bits, a=2.0), x, torch.ones(200)))
    if bits == 6:
        torch.testing.assert_close(grad, 1 + (4 * x).sin(), rtol=0, atol=0.05)
    shown = "(input, a=1.0, inplace=False, *, bits=None, table=None, shared=False)"
    assert signature(fewbit.functional.snake) == shown


def test_thresholds_between_float32_values_part_float32_inputs_as_in_float64():
    """0.1 lies between two float32 values. Rounding it up would put the upper value on the wrong side."""
    table = fewbit.CodeTable([0.1], [0, 1], [[0.0, 1.0]], 1)
    upper = np.float32(0.1)
    assert float(upper) > 0.1
    x = torch.tensor([upper, np.nextafter(upper, np.float32(0))], requires_grad=True)
    (grad,) = torch.autograd.grad(fewbit.functional.gelu(x, table=table).sum(), x)
    assert grad.tolist() == table(x.detach().double().numpy()).tolist() == [1.0, 0.0]


def test_many_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        x = torch.randn(999, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        fewbit.functional.gelu(x, bits=1 + seed % 4).sum().backward()
        return torch.equal(x.grad, oracles.expected_gradient(fewbit.load_ladder("gelu", 1 + seed % 4), x, torch.ones(999)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
