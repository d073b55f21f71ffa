import functools
import inspect
import pickle

import numpy as np
import pytest
import torch
from support import compiled, gradient_at

import fewbit
from fewbit import activations
from fewbit.errors import ActivationError

# each parameter differs from its default, so that its effect shows
VARIANTS = [
    ("softplus", {"beta": 2.5, "threshold": 4.0}),
    ("elu", {"alpha": 0.5}),
    ("celu", {"alpha": 0.3}),
    ("hardtanh", {"min_val": -0.25, "max_val": 3.0}),
    ("leaky_relu", {"negative_slope": -0.4}),
    ("softshrink", {"lambd": 1.25}),
    ("hardshrink", {"lambd": 2.0}),
    ("threshold", {"threshold": 0.7, "value": -3.0}),
]
ALL = [activations.get(name) for name in activations.names()] + [activations.get(name, **values) for name, values in VARIANTS]
ALL.append(activations.IDENTITY)
WITH_UNLISTED = [*ALL, *activations.UNLISTED.values(), activations.get("clipped_gelu", min=-0.1, max=0.5)]


def torch_value_and_derivative(record, x):
    leaf = torch.tensor(x, requires_grad=True)
    y = record.forward(leaf)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("record", WITH_UNLISTED, ids=str)
def test_agrees_with_torch(record, rng):
    x = np.concatenate([np.linspace(-12, 12, 20_001), rng.normal(0, 4, 20_000)])
    y, gradient = torch_value_and_derivative(record, x)
    np.testing.assert_allclose(record.f(x), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(record.df(x), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("record", ALL, ids=str)
def test_follows_torch_at_jumps_and_kinks(record):
    shape = record.derivative_shape
    x = np.array([*shape.jumps, *shape.kinks, 0.0])
    y, gradient = torch_value_and_derivative(record, x)
    np.testing.assert_array_equal(record.f(x), y)
    np.testing.assert_array_equal(record.df(x), gradient)


@pytest.mark.parametrize("record", WITH_UNLISTED, ids=str)
def test_jumps_are_where_the_derivative_jumps_and_nowhere_else(record):
    h = 1e-9
    for jump in record.derivative_shape.jumps:
        step = abs(record.df(np.array(jump + h)) - record.df(np.array(jump - h)))
        assert step > (1e-10 if "softplus" in record.name else 1e-3)  # softplus: where torch changes to the identity
    x = np.linspace(-11.0, 11.0, 8191)
    at_jump = np.min(np.abs(x[:, None] - np.array([*record.derivative_shape.jumps, np.inf])), axis=1) < 2 * h
    steps = np.abs(record.df(x + h) - record.df(x - h))[~at_jump]
    assert steps.max() < 1e-6


@pytest.mark.parametrize("record", WITH_UNLISTED, ids=str)
def test_even_says_whether_the_derivative_is_even(record):
    x = np.linspace(0.013, 9.0, 1000)
    even = bool(np.allclose(record.df(x), record.df(-x), rtol=1e-12, atol=1e-12))
    assert even == record.derivative_shape.even


def test_kinks_are_listed():
    assert activations.get("softsign").derivative_shape.kinks == (0.0,)
    assert activations.get("elu").derivative_shape.kinks == (0.0,)
    assert activations.get("elu", alpha=0.5).derivative_shape.jumps == (0.0,)


def test_the_built_in_ones():
    wanted = """gelu gelu_tanh quick_gelu silu mish sigmoid tanh logsigmoid softplus softsign tanhshrink elu celu selu hardswish
    hardsigmoid hardtanh relu relu6 leaky_relu softshrink hardshrink threshold"""
    assert set(activations.BUILT_IN) == set(wanted.split())


def test_the_unlisted_are_known_and_have_no_drop_in():
    for name, record in activations.UNLISTED.items():
        assert activations.get(name) is record
        assert name not in activations.names()
        assert not hasattr(fewbit.functional, name)


def test_the_identity_is_known_and_no_activation():
    assert activations.get("identity") is activations.IDENTITY
    assert "identity" not in activations.names()
    assert not hasattr(fewbit.functional, "identity")
    assert set(activations.SHIPPED) == {*activations.BUILT_IN, "identity"}
    x = np.arange(3.0)
    assert not np.shares_memory(activations.IDENTITY.f(x), x)


@pytest.mark.parametrize("record", ALL, ids=str)
def test_in_place_form_equals_the_other(record):
    x = torch.randn(50)
    expected = record.forward(x)
    overwritten = record.forward_inplace(x)
    assert overwritten is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("geluu", {}, "unknown activation 'geluu'; did you mean 'gelu'"),
        ("SiLU", {}, "did you mean 'silu'"),
        ("identty", {}, "did you mean 'identity'"),
        ("zzz", {}, r"fewbit.register\(\) adds your own"),
        ("gelu", {"alpha": 1.0}, "gelu has no parameter 'alpha'; its parameters: none"),
        ("elu", {"beta": 1.0}, "elu has no parameter 'beta'; its parameters: alpha"),
        ("elu", {"alpha": float("nan")}, "elu: parameter alpha must be a finite number, got nan"),
        ("elu", {"alpha": "much"}, "elu: parameter alpha must be a finite number, got 'much'"),
    ],
)
def test_wrong_requests(name, parameters, message):
    with pytest.raises(ActivationError, match=message):
        activations.get(name, **parameters)


def test_records_are_frozen():
    with pytest.raises(TypeError, match="does not support item assignment"):
        activations.get("elu").parameters["alpha"] = 7.0  # type: ignore[index]


def test_drop_ins_stand_for_their_activation():
    assert activations.get(fewbit.functional.silu) is activations.get("silu")


def test_records_compare_by_what_they_compute():
    assert activations.get("elu", alpha=1.0) == activations.get("elu")
    assert activations.get("elu", alpha=0.5) != activations.get("elu")
    assert hash(activations.get("elu", alpha=1.0)) == hash(activations.get("elu"))


class TestRegister:
    def test_derivative_by_autograd(self):
        record = activations.register("snake", lambda x: x + x.sin() ** 2)
        x = np.linspace(-5, 5, 101)
        np.testing.assert_allclose(record.df(x), 1 + np.sin(2 * x), atol=1e-14)
        assert activations.get("snake") is record
        assert record.module == "Snake"

    def test_own_derivative_and_parameters(self):
        record = activations.register(
            "scaled_relu",
            lambda x, slope: slope * x.relu(),
            lambda x, slope: np.where(x > 0, slope, 0.0),
            parameters={"slope": 2.0},
            jumps=(0.0,),
        )
        assert record.module == "ScaledRelu"
        assert record.df(np.array([-1.0, 1.0])).tolist() == [0.0, 2.0]
        assert activations.get("scaled_relu", slope=3.0).df(np.array(1.0)) == 3.0

    def test_taken_name(self):
        with pytest.raises(ActivationError, match="'gelu' exists; pass overwrite=True"):
            activations.register("gelu", torch.sin)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_the_name_of_the_identity(self, overwrite):
        with pytest.raises(ActivationError, match=r"'identity' stands for f\(x\) = x, .*; choose another name"):
            activations.register("identity", torch.sin, overwrite=overwrite)

    def test_name_must_be_an_identifier(self):
        with pytest.raises(ActivationError, match="must be a Python identifier without leading underscore, got 'my act'"):
            activations.register("my act", torch.sin)

    def test_numeric_defaults_are_parameters(self):
        def wave(x, a=2.0, inplace=False):
            return (a * x).sin()

        record = activations.register("wave", wave)
        assert record.parameters == {"a": 2.0}
        assert activations.get(wave, a=3.0).df(np.array(0.0)) == 3.0
        assert activations.get(lambda x, b: x * b, b=4.0).df(np.array(1.0)) == 4.0

    def test_reserved_parameters(self):
        with pytest.raises(ActivationError, match=r"an argument that all activations take, .*: \['bits'\]"):
            activations.register("mine", lambda x, bits: x * bits, parameters={"bits": 2.0})

    @pytest.mark.parametrize("name", ["shared", "weight", "forward", "training", "parameters", "table_channels", "_taken"])
    def test_names_of_parameters_with_another_use_are_refused_at_once(self, name):
        function = eval(f"lambda x, {name}=2.0: x * {name}")
        with pytest.raises(ActivationError, match=rf"mine: .*parameter.*{name}"):
            activations.register("mine", function)
        assert "mine" not in activations.names()

    @pytest.mark.parametrize("name", ["two words", "class", 1])
    def test_parameters_that_cannot_be_named(self, name):
        with pytest.raises(ActivationError, match=f"parameter must be a Python identifier .*, got {name!r}"):
            activations.register("mine", lambda x, **parameters: x, parameters={name: 1.0})

    def test_what_stands_in_the_way_is_known(self):
        """The lists of names agree with what exists."""
        functions = {"operation", "activations", "layers", "recurrent"} & set(vars(fewbit.functional))
        assert {*fewbit.functional.layers.FUNCTIONS} | functions == activations.TAKEN
        assert {*fewbit.nn.layers.CLASSES, *fewbit.nn.recurrent.CLASSES} == activations.TAKEN_MODULES
        ours = {name for name in dir(fewbit.nn.activations.CodedActivation) if not name.startswith("_")}
        ours |= {*inspect.signature(fewbit.functional.relu).parameters}
        assert ours - set(dir(torch.nn.Module())) <= activations.RESERVED

    @pytest.mark.parametrize("name", ["linear", "swiglu", "layers"])
    def test_names_of_other_functions(self, name):
        with pytest.raises(ActivationError, match=f"fewbit.functional.{name} exists and is not an activation"):
            activations.register(name, torch.sin)

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ("Linear", "is a layer"),
            ("SiLU", "is the module of silu"),
            ("two words", "must be a Python identifier"),
            (3, "must be"),
        ],
    )
    def test_names_of_modules(self, module, message):
        with pytest.raises(ActivationError, match=f"{message}.*module="):
            activations.register("mine", torch.sin, module=module)

    @pytest.mark.parametrize("places", [{"jumps": (float("nan"),)}, {"kinks": ("a",)}])
    def test_places_must_be_numbers(self, places):
        with pytest.raises(ActivationError, match="must be a finite number"):
            activations.register("mine", torch.sin, **places)

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
    @pytest.mark.parametrize("name", ["self", "signature", "x", "up", "args", "record_", "given", "cls", "values"])
    def test_any_other_name_of_a_parameter_works_everywhere(self, name):
        function = eval(f"lambda tensor, {name}=2.0: tensor * {name} + tensor.tanh()")
        activations.register("mine", function)
        mine, x = fewbit.functional.mine, torch.randn(5, requires_grad=True)
        expected = gradient_at(lambda x: mine(x, 3.0, bits=2), x)
        module = fewbit.nn.Mine(**{name: 3.0}, bits=2)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), 3 * x + x.tanh())
        for form in (
            lambda x: mine(x, **{name: 3.0}, bits=2),
            module,
            fewbit.patch(bits=2)(lambda x: mine(x, 3.0, bits=2)),
            compiled(lambda x: mine(x, **{name: 3.0}, bits=2)),
        ):
            torch.testing.assert_close(gradient_at(form, x), expected)

    def test_a_replacement_keeps_the_module_name(self):
        record = activations.register("gelu", torch.nn.functional.gelu, overwrite=True)
        assert record.module == "GELU"

    @pytest.mark.parametrize("function", [functools.partial(torch.nn.functional.elu, alpha=2.0), torch.nn.ELU(2.0)])
    def test_any_callable(self, function):
        record = activations.register("mine", function)
        assert record.df(np.array([1.0, -1.0])) == pytest.approx([1.0, 2 / np.e])
        assert record.torch_name in ("partial", "ELU")

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x - x.cumsum(0), "must be pointwise"),
            (lambda x: x.sum(), "must be pointwise"),
            (lambda x: x.softmax(0), "must be pointwise"),
            (lambda x: x - x.mean(), "must be pointwise"),
            (lambda x: x.detach(), "differentiably; on 13 points it raised RuntimeError"),
            (lambda x: [1.0], "differentiably; on 13 points it raised AttributeError"),
        ],
    )
    def test_functions_that_are_none(self, function, message):
        with pytest.raises(ActivationError, match=message):
            activations.register("bad", function)
        assert "bad" not in activations.names()
