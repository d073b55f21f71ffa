"""The record of one activation: f, f', the points where f' is not smooth, its parameters, and torch's function and module.

Records compute in float64 numpy. They only name torch's functions; torch is imported when a record is applied to a tensor.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbit.errors import ActivationError
from fewbit.text import plain, shown

if TYPE_CHECKING:
    import torch

Array = np.ndarray


@dataclass(frozen=True)
class DerivativeShape:
    """Where a derivative f' is not smooth, and whether it is even.

    jumps  points where f' jumps; f has a corner or a step there
    kinks  points where f' is continuous but has a corner
    even   whether f'(-x) = f'(x)
    """

    jumps: tuple[float, ...] = ()
    kinks: tuple[float, ...] = ()
    even: bool = False


@dataclass(frozen=True, eq=False)
class Activation:
    """A pointwise nonlinearity f with its derivative, bound to one set of parameters.

    name            torch's functional name, or the user's own
    function        f(x, **parameters), float64 arrays of any shape
    derivative      f'(x, **parameters), likewise; at a jump it takes the side that torch's backward takes
    torch_function  dotted name of torch's function, or a callable on tensors
    module          name of the module class in `torch.nn` and in `fewbit`
    parameters      parameter names in torch's order, with their values
    options         non-numeric arguments that select this variant of the torch function
    shape           a DerivativeShape, or a function of the parameters that gives one
    """

    name: str
    function: Callable[..., Array]
    derivative: Callable[..., Array]
    torch_function: str | Callable[..., torch.Tensor]
    module: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    shape: DerivativeShape | Callable[..., DerivativeShape] = DerivativeShape()

    def __post_init__(self):
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def f(self, x: Array) -> Array:
        """f(x) in float64; same shape as x."""
        return np.asarray(self.function(np.asarray(x, np.float64), **self.parameters))

    def df(self, x: Array) -> Array:
        """f'(x) in float64; same shape as x."""
        return np.asarray(self.derivative(np.asarray(x, np.float64), **self.parameters))

    def with_parameters(self, /, **parameters: float) -> Activation:
        """The same activation with other parameters. Raises ActivationError for an unknown name or a value that is not a finite
        number."""
        values = dict(self.parameters)
        for name, value in parameters.items():
            if name not in values:
                known = ", ".join(values) or "none"
                raise ActivationError(f"{self.name} has no parameter {name!r}; its parameters: {known}")
            values[name] = finite_number(self.name, name, value)
        return replace(self, parameters=values)

    @cached_property
    def derivative_shape(self) -> DerivativeShape:
        """Jumps, kinks and evenness of f' for these parameters. Jumps and kinks ascend, and each point occurs once."""
        try:
            shape = self.shape if isinstance(self.shape, DerivativeShape) else self.shape(**self.parameters)
        except ArithmeticError:  # f' does not exist for these parameters; a design reports that
            shape = DerivativeShape()
        return replace(shape, jumps=tuple(sorted(set(shape.jumps))), kinks=tuple(sorted(set(shape.kinks))))

    @property
    def torch_name(self) -> str:
        """Dotted name of torch's function, or the user's function's name."""
        return self.torch_function if isinstance(self.torch_function, str) else _name_of(self.torch_function).strip("_")

    @cached_property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """torch's own operation with these parameters, as a function of one tensor."""
        call, arguments = self._torch_call, {**self.parameters, **self.options}
        return partial(call, **arguments) if arguments else call

    @cached_property
    def forward_inplace(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same, but it writes into its argument and returns it. It is torch's own in-place form if there is one."""
        call, arguments = self._torch_call, {**self.parameters, **self.options}
        if _takes_inplace(call):
            return partial(call, **arguments, inplace=True)
        return lambda x: x.copy_(call(x, **arguments))

    @cached_property
    def _torch_call(self) -> Callable[..., torch.Tensor]:
        if callable(self.torch_function):
            return self.torch_function
        home, _, name = self.torch_function.rpartition(".")
        return getattr(importlib.import_module(home), name)

    @cached_property
    def _identity(self) -> tuple:
        return self.name, self.function, self.derivative, tuple(self.parameters.items()), self.derivative_shape

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activation) and self._identity == other._identity

    @cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, x: Array) -> Array:
        return self.f(x)

    def __str__(self) -> str:
        return label(self.name, self.parameters)


def label(name: str, parameters: Mapping[str, float]) -> str:
    """The name of an activation in messages and titles.

    >>> label("hardtanh", {"min_val": -1.0, "max_val": 1.0})
    'hardtanh min_val=-1 max_val=1'
    """
    return " ".join([plain(name), *(f"{key}={value:g}" for key, value in parameters.items())])


def plural(number: int, noun: str) -> str:
    """A number with its noun, for messages and titles.

    >>> plural(1, "bit"), plural(3, "bit")
    ('1 bit', '3 bits')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _numeric_defaults(function: Callable[..., Any]) -> dict[str, float]:
    """The parameters of a function: its arguments that have a number as default."""
    try:
        arguments = list(inspect.signature(function).parameters.values())[1:]
    except ValueError:  # a builtin
        return {}
    return {each.name: each.default for each in arguments if type(each.default) in (int, float)}


def _takes_inplace(call: Callable[..., Any]) -> bool:
    try:
        return "inplace" in inspect.signature(call).parameters
    except ValueError:  # a builtin, such as torch.tanh: those have no inplace argument
        return False


def from_callable(
    function: Callable[..., torch.Tensor],
    derivative: Callable[..., Array] | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    name: str | None = None,
) -> Activation:
    """A record, not registered, for a pointwise function on tensors; see `register` for the arguments."""
    name = name or _name_of(function)
    parameters = {**_numeric_defaults(function), **(parameters or {})}

    def value(x: Array, /, **parameters: float) -> Array:
        import torch

        return function(torch.from_numpy(np.array(x)), **parameters).detach().numpy()

    def by_autograd(x: Array, /, **parameters: float) -> Array:
        import torch

        with torch.enable_grad():
            leaf = torch.from_numpy(np.array(x)).requires_grad_()
            output = function(leaf, **parameters)
            (gradient,) = torch.autograd.grad(output.sum(), leaf)
        return gradient.numpy()

    values = {key: finite_number(name, key, number) for key, number in parameters.items()}
    record = Activation(name, value, derivative or by_autograd, function, name, values)
    _check_pointwise(record)
    return record


def _check_pointwise(record: Activation) -> None:
    x = np.linspace(-3.1, 2.9, 13)
    try:
        for at in (record.f, record.df):
            whole, part = at(x), at(x[4::-1])  # other neighbours, in another order
            if whole.shape != x.shape or not np.allclose(whole[4::-1], part, 1e-9, 1e-12, equal_nan=True):
                raise ActivationError(
                    f"{record.name} must be pointwise: element i of the output from element i of the input alone"
                )
    except ActivationError:
        raise
    except Exception as error:
        raise ActivationError(
            f"{record.name} must map a float64 tensor to one of the same shape, differentiably; on 13 points it raised "
            f"{type(error).__name__}: {error}"
        ) from error


def as_float(value: Any) -> float:
    """The value as a float; NaN if it is not a number, or too large for a float."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def finite_number(activation: str, name: str, value: Any) -> float:
    """The value of a parameter as a float. Raises ActivationError with both names if it is not a finite number."""
    number = as_float(value)
    if not np.isfinite(number):
        raise ActivationError(f"{plain(activation)}: parameter {name} must be a finite number, got {shown(value)}")
    return number
