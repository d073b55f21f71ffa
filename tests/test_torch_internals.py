"""Every private name of torch that fewbit uses exists and does what fewbit expects; and only one file uses them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

import fewbit
from fewbit import torch_internals as internals

PACKAGE = Path(fewbit.__file__).parent
HOME = PACKAGE / "torch_internals.py"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != HOME]


def names_of_torch(path):
    """Dotted names that begin with torch, and imported modules of torch, in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", name):
                yield name


# private attributes of torch's tensors and modules, for objects of any name
ATTRIBUTES = {"_version", "_base", "_cdata", "_is_view", "_is_zerotensor", "_indices", "_values", "_orig_mod"}
ATTRIBUTES |= {"_compiled_call_impl", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_names_what_is_private(path):
    found = {name for name in names_of_torch(path) if any(re.match(r"_(?!_)", part) for part in name.split("."))}
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not found
    assert not attributes & ATTRIBUTES


def test_every_function_has_its_reason():
    tree = ast.parse(HOME.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


class _Double(internals.EagerFunction):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_an_eager_function_is_one_of_torchs():
    x = torch.randn(3, requires_grad=True)
    y = _Double.apply(x, 2)
    assert type(y.grad_fn).__name__ == "_DoubleBackward"
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


class TestWhatLooksOn:
    def test_nothing(self):
        x = torch.randn(3)
        assert not internals.is_watched(x)
        assert not internals.is_watched_in_eager(x)
        assert not internals.is_traced()
        assert not internals.is_transformed()
        assert not internals.is_dispatched()
        assert not internals.in_forward_mode()
        assert list(internals.levels(x)) == [x]

    def test_transforms(self):
        seen = []

        def look(x):
            wrapped, plain = internals.levels(x)
            seen.append((internals.is_watched(x), internals.is_transformed(), plain.shape, wrapped is x))
            with internals.unwatched():
                seen.append(internals.is_transformed())
            return x.sum()

        torch.func.vmap(look)(torch.randn(2, 3))
        assert seen == [(True, True, (2, 3), True), False]

    def test_the_older_vmap(self):
        seen = []

        class Look(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                seen.append(internals.is_watched(grad))
                return grad

        x = torch.randn(3, requires_grad=True)
        torch.autograd.grad(Look.apply(x), x, torch.eye(3), is_grads_batched=True)
        assert seen == [True]

    def test_modes(self):
        with internals.fake_mode() as mode:
            x = torch.empty(3)
            assert internals.is_watched(x)
            assert internals.is_dispatched()
            assert isinstance(x, internals.fake_tensor_class())
        assert not internals.is_dispatched()
        assert isinstance(mode.from_tensor(torch.ones(2)), internals.fake_tensor_class())

    def test_forward_mode(self):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
            assert internals.in_forward_mode()
            assert internals.has_tangent(dual)
            assert not internals.has_tangent(torch.ones(2))
        found = []
        torch.func.jvp(lambda x: (found.append(internals.has_tangent(x)), x)[1], (torch.ones(2),), (torch.ones(2),))
        assert found == [True]

    def test_function_modes(self):
        class Mode(torch.overrides.TorchFunctionMode):
            pass

        with Mode() as outer, Mode() as inner:
            assert [*internals.function_modes()][:2] == [inner, outer]
        assert outer not in internals.function_modes()


class TestTensors:
    def test_state_and_versions(self):
        x = torch.zeros(2, 3)
        before = internals.state_of(x)
        assert internals.state_of(x) == before
        x += 1
        assert internals.state_of(x) != before
        assert internals.versions_of(x, torch.zeros(1)) == (1, 0)
        before = internals.state_of(x)
        x.data = torch.ones(2, 3)
        assert internals.state_of(x) != before

    def test_no_version_in_inference_mode(self):
        with torch.inference_mode():
            x = torch.zeros(2)
        with pytest.raises(RuntimeError):
            internals.versions_of(x)

    def test_views(self):
        x = torch.zeros(4)
        assert internals.base_of(x[:2]) is x
        assert internals.base_of(x) is None
        assert internals.is_view(x[:2])
        assert not internals.is_view(x)
        y = torch.zeros(4, requires_grad=True) * 1
        assert internals.is_view_of_several(y.chunk(2)[0])
        assert not internals.is_view_of_several(y[:2])

    def test_is_empty(self):
        assert internals.is_empty(torch.ones(3, 0))
        assert not internals.is_empty(torch.ones(3))

    def test_storages_and_parts(self):
        x = torch.zeros(4)
        assert internals.storage_key(x.untyped_storage()) == internals.storage_key(x[:2].untyped_storage())
        assert internals.storage_key(x.untyped_storage()) != internals.storage_key(torch.zeros(4).untyped_storage())
        assert [part.numel() for part in internals.parts_of(torch.eye(3).to_sparse())] == [6, 3]
        assert [*internals.parts_of(x)] == [x]

    def test_zeros_without_memory(self):
        assert internals.is_zero(torch._efficientzerotensor(3))
        assert not internals.is_zero(torch.zeros(3))


class TestOperations:
    def test_batch_norm(self):
        x, weight = torch.randn(4, 3, 5), torch.rand(3)
        y, mean, scale, *_ = internals.batch_norm_with_statistics(x, weight, None, None, None, True, 0.1, 1e-5, False)
        assert torch.equal(y, functional.batch_norm(x, None, None, weight, None, True))
        torch.testing.assert_close(mean, x.mean((0, 2)))
        torch.testing.assert_close(scale, (x.var((0, 2), correction=0) + 1e-5).rsqrt())

    def test_batch_size(self):
        internals.check_batch_size(torch.Size((2, 3)))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            internals.check_batch_size(torch.Size((1, 3)))

    def test_memory_format(self):
        x = torch.zeros(2, 3, 4, 5)
        assert internals.memory_format_of(x) is torch.contiguous_format
        assert internals.memory_format_of(x.to(memory_format=torch.channels_last)) is torch.channels_last

    def test_native_functions(self):
        assert functional.gelu is internals.native_functions().gelu


class TestBackward:
    def test_runs(self):
        seen = []
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: seen.append(internals.is_backward()))
        y.sum().backward()
        assert seen == [True]
        assert not internals.is_backward()

    def test_what_nodes_hold(self):
        x = torch.ones(2, requires_grad=True)
        y = x.tanh()
        assert len([*internals.raw_saved(y.grad_fn)]) == 1
        assert internals.keeps_its_output(type(y.grad_fn))
        assert not internals.keeps_its_output(type((x * 2).grad_fn))
        assert not internals.keeps_its_output(type((x**x).grad_fn))

    def test_hooks_on_accumulated_gradients(self):
        x = nn.Parameter(torch.ones(2))
        assert not internals.has_hook_on_accumulated_gradient(x)
        x.register_post_accumulate_grad_hook(lambda parameter: None)
        assert internals.has_hook_on_accumulated_gradient(x)


class TestWhatRuns:
    def test_operators(self):
        seen, x = [], torch.ones(3, requires_grad=True)
        with internals.each_operator(lambda operator, args, kwargs, output: seen.append((str(operator), args, output))):
            y = x.mul(2.0)
            y.sum().backward()
        assert [name for name, *_ in seen][:2] == ["aten.mul.Tensor", "aten.sum.default"]
        assert seen[0][1][0] is x
        assert seen[0][2].tolist() == [2.0] * 3
        assert any(name == "aten.mul.Tensor" for name, *_ in seen[2:])  # of backward
        assert not internals.is_dispatched()

    def test_operators_that_write_into_arguments(self):
        aten = torch.ops.aten
        for writes in (aten.mul_.Tensor, aten.mul.out, aten.copy_.default):
            assert internals.writes_into_arguments(writes)
        for leaves_them in (aten.mul.Tensor, aten.view.default, aten.convolution.default):
            assert not internals.writes_into_arguments(leaves_them)

    def test_allocations(self):
        def act():
            held = torch.empty(1000, dtype=torch.uint8)
            torch.empty(3000, dtype=torch.uint8)
            del held

        assert internals.allocations(act) == [1000, 3000, -3000, -1000]

    def test_allocations_write_nothing(self):
        """In a process of its own: in this one, an earlier profile may have given the messages."""
        code = "import torch; from fewbit import torch_internals; print(torch_internals.allocations(lambda: torch.empty(100)))"
        found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert (found.stdout.strip(), found.stderr) == ("[400, -400]", "")


def test_what_torchs_layers_leave_to_subclasses():
    """fewbit/nn/layers.py overrides or calls these."""
    assert callable(nn.Conv2d._conv_forward)
    assert callable(nn.ConvTranspose2d._output_padding)
    assert callable(nn.BatchNorm2d._check_input_dim)
    assert nn.Conv2d(1, 1, 3, padding=1)._reversed_padding_repeated_twice == (1, 1, 1, 1)


class TestModules:
    def test_registered(self):
        norm = nn.BatchNorm1d(3)
        found = internals.registered(norm)
        assert set(found["_parameters"]) == {"weight", "bias"}
        assert internals.buffers_of(norm) is found["_buffers"]

    def test_compiled(self):
        model = nn.Linear(2, 2)
        assert not internals.is_compiled(model)
        assert internals.uncompiled(model) is model
        wrapped = torch.compile(model)
        assert internals.uncompiled(wrapped) is model
        assert internals.is_compiled(wrapped)
        assert internals.dynamo_is_loaded()
        model.compile()
        assert internals.is_compiled(model)


def test_containers():
    nested = {"a": (torch.ones(2), 3), "b": [torch.zeros(1)]}
    assert len([each for each in internals.leaves(nested) if isinstance(each, torch.Tensor)]) == 2
    assert internals.map_tensors(lambda tensor: tensor.numel(), nested) == {"a": (2, 3), "b": [1]}
    assert internals.constant_number(3) == 3
