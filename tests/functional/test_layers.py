"""Coded layers: torch's outputs bit for bit, and the gradients that naive code computes at the decoded values."""

import inspect

import layer_oracles as naive
import pytest
import torch
from layer_oracles import CASES, NORMS, PRODUCTS, gradients, leaves, relative
from support import bytes_kept
from torch import nn
from torch.nn import functional

import fewbit
from fewbit import packing
from fewbit.errors import DesignError, InputError, TableError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # from torch
GELU, VALUE = fewbit.load_table("gelu"), naive.value_table(4)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GATES = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "reglu": functional.relu,
}
LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels_last": lambda x: x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]),
}


class TestForward:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_torchs(self, name, dtype):
        case = CASES[name]
        x, parameters = leaves(*case.make(dtype))
        y, exact = case.coded(x, parameters, bits=3), case.exact(x, parameters)
        assert torch.equal(y, exact)
        assert (y.dtype, y.stride(), y.requires_grad) == (exact.dtype, exact.stride(), True)
        with torch.no_grad():
            assert torch.equal(case.coded(x, parameters), exact)

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_of_other_layouts(self, name, layout):
        case = CASES[name]
        x, parameters = case.make()
        if layout == "channels_last" and x.dim() < 4:
            pytest.skip("channels_last is of four or five dimensions")
        view = LAYOUTS[layout](x)
        results = []
        for function in (lambda x: case.coded(x, parameters), lambda x: case.exact(x, parameters)):
            leaf = view.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = function(LAYOUTS[layout](leaf))
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
        (y, grad), (exact, exact_grad) = results
        assert torch.equal(y, exact)
        if exact_grad.norm() > 1e-2:  # otherwise 0, for rows that are all alike
            assert relative(grad, exact_grad) < (1e-6 if name in PRODUCTS else 0.3)

    @pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d", "layer_norm", "rms_norm", "group_norm"])
    def test_of_an_empty_batch(self, name):
        case = CASES[name]
        x, parameters = case.make()
        for run in (case.coded, case.exact):
            empty, own = leaves(x[:0], parameters)
            y = run(empty, own)
            assert y.shape[0] == 0
            y.sum().backward()
            assert empty.grad.shape == empty.shape
            assert all(not each.grad.any() for each in own.values())

    @pytest.mark.parametrize("name", GATES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_gated_units(self, name, dtype):
        gate, up = torch.randn(2, 5, 7, 6).to(dtype).requires_grad_().unbind()
        assert torch.equal(getattr(fewbit.functional, name)(gate, up, bits=2), GATES[name](gate) * up)
        for dim in (-1, 0, 1):
            x = torch.randn(4, 6, 8).to(dtype).requires_grad_()
            assert torch.equal(fewbit.functional.glu(x, dim, bits=2), functional.glu(x, dim))

    def test_of_gelu_by_tanh(self):
        gate, up = torch.randn(2, 50, requires_grad=True).unbind()
        y = fewbit.functional.geglu(gate, up, approximate="tanh")
        assert torch.equal(y, functional.gelu(gate, approximate="tanh") * up)


class TestGradients:
    @pytest.mark.parametrize("name", PRODUCTS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
    def test_of_products(self, name, dtype, tolerance):
        case = PRODUCTS[name]
        x, parameters = case.make(dtype)
        grad = torch.randn(case.exact(x, parameters).shape).to(dtype)
        found = gradients(case, x, parameters, grad, bits=4)
        expected = naive.product_gradients(case, x, parameters, grad, naive.value_table(4))
        assert all(found[each].dtype == dtype for each in found)
        assert {each: relative(found[each], expected[each]) < tolerance for each in found} == dict.fromkeys(found, True)
        exact = naive.torch_gradients(case, x, parameters, grad)
        for each in {"x", "bias"} & set(found):
            torch.testing.assert_close(found[each], exact[each])
            if "linear" not in name:  # torch's linear may multiply matrices in another order
                assert torch.equal(found[each], exact[each])

    @pytest.mark.parametrize("name", NORMS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
    def test_of_norms(self, name, dtype, tolerance):
        case = NORMS[name]
        x, parameters = case.make(dtype)
        grad = torch.randn(x.shape).to(dtype)
        found = gradients(case, x, parameters, grad, bits=4)
        expected = naive.norm_gradients(case, x, parameters, grad, naive.value_table(4))
        if dtype == torch.bfloat16 and case.function in ("group_norm", "batch_norm"):
            tolerance = 0.15  # the threshold moves with the statistics: values next to it may fall on its other side
        assert {each: relative(found[each], expected[each]) < tolerance for each in found} == dict.fromkeys(found, True)

    @pytest.mark.parametrize("name", CASES)
    def test_approach_the_exact_ones(self, name):
        case = CASES[name]
        x, parameters = case.make(torch.float64)
        grad = torch.randn(case.exact(x, parameters).shape, dtype=torch.float64)
        exact = naive.torch_gradients(case, x, parameters, grad)
        coded = {bits: gradients(case, x, parameters, grad, bits=bits) for bits in (2, 5, 8)}
        for each in exact:
            errors = [relative(found[each], exact[each]) for found in coded.values()]
            if errors[0] > 1e-12:  # otherwise exact, or of a single row, which its scales describe completely
                assert errors[0] > errors[1] > errors[2]
            assert errors[2] < 0.02

    @pytest.mark.parametrize("name", GATES)
    def test_of_gated_units(self, name):
        record = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}[name]
        joint = fewbit.load_table(record, 4, channels=("derivative", "value"))
        gate, up = (torch.randn(9, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
        grad = torch.randn(9, 20, dtype=torch.float64)
        y = getattr(fewbit.functional, name)(gate, up, bits=4)
        by_gate, by_up = torch.autograd.grad(y, [gate, up], grad)
        torch.testing.assert_close(
            by_gate, grad * naive.lookup(joint, gate, 0) * naive.scaled_values(naive.value_table(4), up, -1)
        )
        torch.testing.assert_close(by_up, grad * naive.lookup(joint, gate, 1))

    @pytest.mark.parametrize("dim", [-1, 0, 1])
    def test_of_glu(self, dim):
        x = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
        found, exact = (
            torch.autograd.grad(f(x, dim).square().sum(), x)[0]
            for f in (lambda *a: fewbit.functional.glu(*a, bits=8), functional.glu)
        )
        assert relative(found, exact) < 0.02

    @pytest.mark.parametrize(("gate", "up"), [((1, 8), (5, 8)), ((5, 8), (8,)), ((5, 1), (1, 8))])
    def test_of_gated_units_that_are_broadcast(self, gate, up):
        gate, up = torch.randn(gate, requires_grad=True), torch.randn(up, requires_grad=True)
        found, exact = (
            torch.autograd.grad(y.square().sum(), [gate, up])
            for y in (fewbit.functional.swiglu(gate, up, bits=8), functional.silu(gate) * up)
        )
        assert all(each.shape == true.shape and relative(each, true) < 0.05 for each, true in zip(found, exact, strict=True))

    @pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d", "conv2d, groups"])
    @pytest.mark.parametrize("needed", ["x", "weight", "bias", "x weight", "x bias", "weight bias"])
    def test_only_those_asked_for(self, name, needed):
        case = PRODUCTS[name]
        x, parameters = case.make()
        tensors = {"x": x, **parameters}
        for each in needed.split():
            tensors[each].requires_grad_()
        y = case.coded(x, parameters, bits=8)
        grad = torch.randn(y.shape)
        y.backward(grad)
        exact = naive.torch_gradients(case, x, parameters, grad)
        for each, tensor in tensors.items():
            assert (tensor.grad is not None) == (each in needed.split())
            if tensor.grad is not None:
                assert relative(tensor.grad, exact[each]) < 0.02

    def test_without_bias_or_weight_of_norms(self):
        for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm"):
            case = NORMS[name]
            x, parameters = case.make()
            y = case.coded(x.requires_grad_(), parameters, bits=8)
            grad = torch.randn(y.shape)
            y.backward(grad)
            exact = naive.torch_gradients(case, x, parameters, grad)
            assert relative(x.grad, exact["x"]) < 0.05
            own = {each: tensor.clone().requires_grad_() for each, tensor in parameters.items()}
            case.coded(x.detach(), own, bits=8).backward(grad)
            assert all(relative(own[each].grad, exact[each]) < 0.02 for each in own)


class TestKept:
    """The measured bytes that a layer keeps."""

    @pytest.mark.parametrize("bits", [1, 4, 8])
    def test_a_linear_keeps_codes_and_scales(self, bits):
        x, weight = torch.randn(64, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True)
        kept = bytes_kept(lambda: fewbit.functional.linear(x, weight, bits=bits), leave_out=(weight,))
        assert kept == packing.packed_bytes(64 * 512, bits) + 4 * (64 + 2 * 512)

    @pytest.mark.parametrize("name", PRODUCTS)
    def test_a_frozen_weight_keeps_nothing(self, name):
        case = PRODUCTS[name]
        x, parameters = case.make()
        if "bias" in parameters:
            parameters["bias"].requires_grad_()
        assert bytes_kept(lambda: case.coded(x.requires_grad_(), parameters), leave_out=(parameters["weight"],)) == 0

    def test_nothing_that_needs_a_gradient_keeps_nothing(self):
        for case in CASES.values():
            x, parameters = case.make()
            assert bytes_kept(lambda case=case, x=x, parameters=parameters: case.coded(x, parameters)) == 0

    def test_an_input_without_gradient_is_kept_as_it_is(self):
        """The caller holds a batch anyway. The weight is not kept, since no gradient goes through it."""
        x, weight = torch.randn(64, 512), torch.randn(8, 512, requires_grad=True)
        assert bytes_kept(lambda: fewbit.functional.linear(x, weight, bits=4)) == 4 * 64 * 512
        found, exact = (
            torch.autograd.grad(f(x, weight).sum(), weight)[0] for f in (fewbit.functional.linear, functional.linear)
        )
        assert torch.equal(found, exact)

    def test_an_input_smaller_than_its_codes_is_kept_as_it_is(self):
        x, weight = torch.randn(2, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True)
        assert bytes_kept(lambda: fewbit.functional.linear(x, weight, bits=4), leave_out=(weight,)) == 4 * 2 * 512

    @pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
    def test_a_norm_keeps_codes_and_a_few_numbers_a_row_and_channel(self, function):
        x, weight = torch.randn(64, 512, requires_grad=True), torch.ones(512, requires_grad=True)
        kept = bytes_kept(lambda: getattr(fewbit.functional, function)(x, (512,), weight, bits=4), leave_out=(weight,))
        assert kept == 64 * 512 // 2 + 4 * (64 + 2 * 512)

    def test_a_batch_norm_keeps_codes_and_a_few_numbers_a_channel(self):
        x, weight, bias = torch.randn(32, 64, 16, 16, requires_grad=True), torch.ones(64, requires_grad=True), torch.zeros(64)
        kept = bytes_kept(lambda: fewbit.functional.batch_norm(x, None, None, weight, bias, True, bits=4), leave_out=(weight,))
        assert 0 <= kept - x.numel() // 2 <= 3 * 4 * 64

    def test_a_gated_unit_keeps_two_codes(self):
        gate, up = torch.randn(64, 512, requires_grad=True), torch.randn(64, 512, requires_grad=True)
        kept = bytes_kept(lambda: fewbit.functional.swiglu(gate, up, bits=4))
        assert kept == 2 * 64 * 512 // 2 + 4 * (64 + 2 * 512) + 1  # the number of the gate's rung


class TestArguments:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda f, x, w: f.linear(x, w, bits=9), DesignError, "bits must be an integer from 1 to 8, got 9"),
            (lambda f, x, w: f.linear(x, w, rounding="up"), DesignError, "rounding must be one of .* got 'up'"),
            (lambda f, x, w: f.linear(x.long(), w), InputError, "linear takes a float16, .* got torch.int64"),
            (lambda f, x, w: f.linear([1.0], w), InputError, "linear takes a torch.Tensor, got list"),
            (lambda f, x, w: f.linear(x, w, table=GELU), TableError, "linear needs .* the channel 'value' alone"),
            (lambda f, x, w: f.linear(x, w, table="x"), TableError, "must be a fewbit.CodeTable, got str"),
            (lambda f, x, w: f.linear(x, w, bits=2, table=VALUE), TableError, "bits=2 contradicts the table, which has 4"),
            (lambda f, x, w: f.swiglu(x, x, table=VALUE), TableError, "'derivative' and 'value'"),
            (
                lambda f, x, w: f.conv1d(x, w[:, :, None], padding="full"),
                InputError,
                "'same', 'valid' or integers, got 'full'",
            ),
            (
                lambda f, x, w: f.conv1d(x, w[:, :, None], stride=2, padding="same"),
                InputError,
                "padding='same' needs stride=1",
            ),
            (lambda f, x, w: f.linear(x, w[:, 1:]), RuntimeError, "shapes cannot be multiplied"),
            (lambda f, x, w: f.layer_norm(x, (5,)), RuntimeError, "normalized_shape"),
            (lambda f, x, w: f.batch_norm(x[:1, :], None, None, training=True), ValueError, "more than 1 value per channel"),
        ],
    )
    def test_wrong_ones(self, call, error, message):
        with pytest.raises(error, match=message):
            call(fewbit.functional, torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True))

    @pytest.mark.parametrize("name", sorted({case.function for case in CASES.values()} | {"glu"}))
    def test_signatures_are_torchs_plus_ours(self, name):
        own = inspect.signature(getattr(fewbit.functional, name)).parameters
        assert list(own)[-3:] == ["bits", "table", "rounding"]
        try:
            torchs = inspect.signature(getattr(functional, name)).parameters
        except ValueError:
            return  # a builtin, which has no signature
        assert list(own)[:-3] == list(torchs)
        assert [each.default for each in own.values()][:-3] == [each.default for each in torchs.values()]

    def test_own_tables(self):
        x = torch.randn(90, 8, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(90, 3, dtype=torch.float64)
        weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        table = fewbit.design("identity", 3, channels="value", coding="uniform")
        (found,) = torch.autograd.grad(fewbit.functional.linear(x, weight, table=table), weight, grad)
        torch.testing.assert_close(found, grad.T @ naive.scaled_values(table, x, -1))


def test_modules_are_torchs_with_the_same_state():
    for name, own in fewbit.nn._layers.CLASSES.items():
        torchs = getattr(nn, name, None)
        if torchs is None:
            continue
        arguments = {"Linear": (4, 3), "LayerNorm": (4,), "RMSNorm": (4,), "GroupNorm": (2, 4), "GLU": ()}.get(name, (4,))
        arguments = (4, 3, 3) if "Conv" in name else arguments
        coded, exact = own(*arguments, bits=2), torchs(*arguments)
        assert list(coded.state_dict()) == list(exact.state_dict())
        coded.load_state_dict(exact.state_dict())
        assert repr(coded) == repr(exact)[:-1] + (", bits=2)" if not repr(exact).endswith("()") else "bits=2)")
