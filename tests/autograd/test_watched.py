"""torch.func: reverse-mode transforms give the oracle's gradients, each sample its own; forward mode is refused."""

import oracles
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fewbit
from fewbit import activations, resolve
from fewbit.autograd import watched
from fewbit.errors import InputError
from fewbit.functional import gelu, leaky_relu, silu
from fewbit.kernels import ops

# from torch, when it makes dual numbers
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
FORWARD_MODE = "gelu has no forward-mode derivative"


def expected(x, grad=None, name="gelu", bits=3):
    return oracles.expected_gradient(fewbit.load_ladder(name, bits), x, torch.ones_like(x) if grad is None else grad)


def by_sample(dims, x, grad=None, name="gelu", bits=3):
    """`expected` for each sample, which has a rung of its own. Samples are indexed by the first dimensions."""
    if not dims:
        return expected(x, grad, name, bits)
    grads = torch.ones_like(x) if grad is None else grad
    pairs = zip(x.unbind(dims[0]), grads.unbind(dims[0]), strict=True)
    return torch.stack([by_sample(dims[1:], *pair, name, bits) for pair in pairs], dims[0])


def total(x):
    return gelu(x).sum()


def batched_cotangents(x):
    """The rows of diag(1), pulled back in one vmap through an existing graph."""
    y = gelu(leaf := x.clone().requires_grad_())
    rows = torch.eye(x.shape[0]).unsqueeze(2).expand(-1, -1, x.shape[1])
    return vmap(lambda row: torch.autograd.grad(y, leaf, row, retain_graph=True)[0])(rows).sum(0)


TRANSFORMS = {  # and the dimensions of samples
    "grad": (lambda x: grad(total)(x),),
    "vjp": (lambda x: vjp(gelu, x)[1](torch.ones_like(x))[0],),
    "vmap of grad": (lambda x: vmap(grad(total))(x), 0),
    "vmap of grad, last dim": (lambda x: vmap(grad(total), in_dims=1, out_dims=1)(x), 1),
    "grad of vmap": (lambda x: grad(lambda x: vmap(gelu)(x).sum())(x), 0),
    "grad of vmap, last dim": (lambda x: grad(lambda x: vmap(gelu, in_dims=1, out_dims=-1)(x).sum())(x), 1),
    "vmap of vmap of grad": (lambda x: vmap(vmap(grad(gelu)))(x), 0, 0),
    "vmap of grad of vmap": (lambda x: vmap(grad(lambda x: vmap(gelu)(x).sum()))(x), 0, 0),
    "grad of vmap of vmap": (lambda x: grad(lambda x: vmap(vmap(gelu))(x).sum())(x), 0, 0),
    "in chunks": (lambda x: vmap(grad(total), chunk_size=2)(x), 0),
    "grad and value": (lambda x: grad_and_value(total)(x)[0],),
    "inside no_grad": (lambda x: torch.no_grad()(grad(total))(x),),
    "in place": (lambda x: vmap(grad(lambda x: gelu(x * 1, inplace=True).sum()))(x), 0),
    "autograd outside": (lambda x: torch.autograd.grad(vmap(gelu)(leaf := x.clone().requires_grad_()).sum(), leaf)[0], 0),
    "vmap over autograd.grad": (lambda x: batched_cotangents(x),),
    "is_grads_batched": (
        lambda x: torch.autograd.grad(
            gelu(leaf := x.clone().requires_grad_()), leaf, torch.eye(x.numel()).view(-1, *x.shape), is_grads_batched=True
        )[0].sum(0),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 1100)], ids=str)
def test_gradients(transform, shape):
    if transform == "is_grads_batched" and shape != (5, 7):
        pytest.skip("a Jacobian of 2,200 by 2,200 says no more")
    x = 2 * torch.randn(shape)
    function, *dims = TRANSFORMS[transform]
    assert torch.equal(function(x), by_sample(dims, x))


def test_jacobians():
    x = torch.randn(3, 6)
    for row in x:
        assert torch.equal(jacrev(gelu)(row), torch.diag(expected(row)))
        assert torch.equal(torch.autograd.functional.jacobian(gelu, row), torch.diag(expected(row)))
        assert torch.equal(torch.autograd.functional.jacobian(gelu, row, vectorize=True), torch.diag(expected(row)))
    assert torch.equal(vmap(jacrev(gelu))(x), torch.diag_embed(by_sample([0], x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    x = torch.randn(4, 9).to(dtype)
    weight = torch.randn(4, 9).to(dtype)
    found = vmap(grad(lambda x, w: (silu(x, bits=2) * w).sum()))(x, weight)
    assert torch.equal(found, by_sample([0], x, weight, "silu", 2))


@pytest.mark.parametrize("shape", [(3,), (3, 0), (1, 1), (3, 2, 4, 5)], ids=str)
def test_shapes_of_samples(shape):
    x = torch.randn(shape)
    assert torch.equal(vmap(grad(total))(x), by_sample([0], x))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)], ids=str)
def test_layouts(order):
    x, weight = torch.randn(3, 4, 5, 6).permute(order), torch.randn(3, 4, 5, 6).permute(order).contiguous()
    for in_dim in range(4):
        found = vmap(grad(lambda x, w: (gelu(x) * w).sum()), in_dims=in_dim, out_dims=in_dim)(x, weight)
        assert torch.equal(found, by_sample([in_dim], x, weight))


def test_many_cotangents_for_one_input():
    """Codes without a batch dimension, gradients with one: as in jacrev, and in `is_grads_batched`."""
    x, cotangents = torch.randn(50), torch.randn(8, 50)
    _, pull = vjp(gelu, x)
    assert torch.equal(vmap(pull)(cotangents)[0], expected(x.expand(8, 50), cotangents))


def test_one_cotangent_for_many_inputs():
    x, cotangent = torch.randn(8, 50), torch.randn(50)
    found = vmap(lambda x: vjp(gelu, x)[1](cotangent)[0])(x)
    assert torch.equal(found, by_sample([0], x, cotangent.expand(8, 50)))


def test_parameters_and_tables():
    x, table = -torch.rand(4, 5), fewbit.design("silu", 5, weight="normal")
    assert vmap(grad(lambda x: leaky_relu(x, 0.25).sum()))(x).unique().tolist() == [0.25]
    found = vmap(grad(lambda x: silu(x, table=table).sum()))(x)
    assert torch.equal(found, oracles.expected_gradient(table, x, torch.ones(4, 5)))


def test_gradients_of_each_sample():
    """As in differentially private training: the gradient of each sample's loss, compared with a loop over the samples."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), fewbit.GELU(bits=2), torch.nn.Linear(40, 1))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x, y = torch.randn(12, 6), torch.randn(12, 1)

    def loss(parameters, x, y):
        return (functional_call(model, parameters, (x.unsqueeze(0),)) - y).pow(2).sum()

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(12):
        model.zero_grad()
        (model(x[i : i + 1]) - y[i]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(batched[name][i], parameter.grad, rtol=1e-5, atol=1e-6)


def test_neighbours_do_not_matter():
    """The gradient of a sample is the same in any batch."""
    x = torch.randn(6, 300)
    whole = vmap(grad(total))(x)
    x[1:] = 10
    assert torch.equal(vmap(grad(total))(x)[0], whole[0])


def test_codes_are_kept_and_the_input_is_not():
    x = torch.randn(4, 4096, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        vmap(gelu)(x)
    shared = [tensor for table in resolve.in_use for tensor in (table.thresholds, table.codes, table.levels)]
    own = {each.data_ptr(): each.nbytes for each in saved if each.data_ptr() not in {each.data_ptr() for each in shared}}
    assert sum(own.values()) <= x.numel() * 3 / 8 + 512


def test_no_codes_where_no_gradient_is_asked_for(monkeypatch):
    monkeypatch.setattr(ops.kernels, "encode", lambda *_: pytest.fail("coded"))
    x = torch.randn(3, 4)
    assert torch.equal(vmap(gelu)(x), torch.nn.functional.gelu(x))
    assert grad(lambda t: (vmap(gelu)(x) * t).sum())(x).shape == x.shape
    with torch.no_grad():
        vmap(gelu)(x.requires_grad_())


def test_plain_eager_code_takes_the_quick_way(monkeypatch):
    monkeypatch.setattr(watched, "activation", lambda *_: pytest.fail("the slow way"))
    gelu(torch.randn(3, requires_grad=True)).sum().backward()


def test_both_ways_agree():
    x, weight = torch.randn(3, 1000), torch.randn(3, 1000)
    results = []
    for function in (gelu, lambda x: watched.activation(x, torch.nn.functional.gelu, TABLE)[0]):
        leaf = x.clone().requires_grad_()
        (function(leaf) * weight).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


TABLE = resolve.shipped_tables(activations.get("gelu"), ("derivative",), 3, torch.float32, torch.device("cpu"))[0]


class TestSecondDerivatives:
    @pytest.mark.parametrize(
        "take",
        [
            lambda x: grad(lambda x: grad(total)(x).sum())(x),
            lambda x: jacrev(jacrev(total))(x),
            lambda x: grad(lambda x: grad(total)(x).sum() + gelu(x).sum())(x),
            lambda x: grad(lambda x: (grad(total)(x) * x).sum())(x),
            lambda x: vmap(grad(lambda x: grad(gelu)(x)))(x),
            lambda x: grad(lambda x: vmap(grad(gelu))(x).sum())(x),
            lambda x: vjp(lambda x: vjp(gelu, x)[1](torch.ones(3))[0], x)[1](torch.ones(3)),
        ],
    )
    def test_are_refused(self, take):
        with pytest.raises(InputError, match="can be taken once"):
            take(torch.randn(3))

    def test_with_respect_to_other_inputs_is_refused_too(self):
        """The gradient is linear in the cotangent. Codes could give its gradient, but it is refused, as in plain eager code."""
        x = torch.randn(3)
        with pytest.raises(InputError, match="can be taken once"):
            grad(lambda c: vjp(gelu, x)[1](c)[0].sum())(torch.ones(3))

    def test_of_other_parts_are_fine(self):
        x, t = torch.randn(3), torch.randn(3)
        found = grad(lambda t: grad(lambda t: (t**3).sum() + gelu(x).sum())(t).sum())(t)
        torch.testing.assert_close(found, 6 * t)


class TestForwardMode:
    @pytest.mark.parametrize(
        "take",
        [
            lambda x: jvp(gelu, (x,), (x,)),
            lambda x: jvp(vmap(gelu), (x,), (x,)),
            lambda x: vmap(lambda x: jvp(gelu, (x,), (x,)))(x),
            lambda x: jvp(grad(total), (x,), (x,)),
            lambda x: grad(lambda x: jvp(total, (x,), (x,))[1])(x),
            lambda x: jvp(lambda x: jvp(gelu, (x,), (x,))[1], (x,), (x,)),
            lambda x: jvp(lambda x: gelu(x * 1, inplace=True), (x,), (x,)),
            lambda x: jacfwd(gelu)(x),
            lambda x: hessian(total)(x),
        ],
    )
    def test_is_refused(self, take):
        with pytest.raises(InputError, match=FORWARD_MODE):
            take(torch.randn(3))

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("function", [gelu, vmap(gelu)], ids=["function", "vmap"])
    def test_dual_tensors_are_refused(self, function, requires_grad):
        x = torch.randn(3).requires_grad_(requires_grad)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones(3))
            with pytest.raises(InputError, match=FORWARD_MODE):
                function(dual)
            with pytest.raises((InputError, NotImplementedError), match=rf"{FORWARD_MODE}|must implement the jvp"):
                grad(total)(dual)

    @pytest.mark.parametrize("take", [lambda f, x: jvp(f, (x,), (x,))[1], lambda f, x: jacfwd(f)(x)], ids=["jvp", "jacfwd"])
    @pytest.mark.parametrize("module", [fewbit.GELU(), fewbit.GELU(shared=True), fewbit.GELU(inplace=True)], ids=repr)
    def test_modules_are_torchs_own(self, take, module):
        x = torch.randn(3)
        assert torch.equal(take(lambda x: module(x * 1), x), take(torch.nn.functional.gelu, x))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_modules_are_torchs_own_on_dual_tensors(self, requires_grad):
        x, tangents = torch.randn(3).requires_grad_(requires_grad), []
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones(3))
            for function in (fewbit.GELU(), torch.nn.functional.gelu):
                tangents.append(forward_ad.unpack_dual(function(dual)).tangent)
        assert torch.equal(*tangents)

    def test_where_no_codes_are_made_it_is_torchs_own(self):
        x = torch.randn(3)
        with torch.no_grad():
            assert torch.equal(jvp(gelu, (x,), (x,))[1], jvp(torch.nn.functional.gelu, (x,), (x,))[1])

    def test_tensors_without_a_tangent_pass(self):
        x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
        _, tangent = jvp(lambda t: gelu(x) * t, (x,), (torch.ones(3),))
        assert torch.equal(tangent, torch.nn.functional.gelu(x))
        with forward_ad.dual_level():
            gelu(leaf).sum().backward()
        assert torch.equal(leaf.grad, expected(leaf.detach()))


def test_device_tables_first_asked_for_under_a_transform_outlast_it():
    resolve.device_tables.cache_clear()
    torch.func.grad(lambda x: gelu(x).sum())(torch.randn(5))
    table = fewbit.load_table("gelu", 3)
    (device_table,) = resolve.device_tables(table, torch.float32, torch.device("cpu"))
    assert resolve.device_tables.cache_info().misses == 1
    for tensor in (device_table.thresholds, device_table.codes, device_table.levels):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
