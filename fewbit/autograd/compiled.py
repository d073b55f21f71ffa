"""What a drop-in is to torch.compile: constants found while it traces, and one function that it does not look into.

Dynamo would trace an autograd Function of ours too, but then forgets its rules for vmap, and drops the refusal of second
derivatives: compiled, `grad(grad(f))` gave zeros. Left whole in the graph, `activation` runs as Python when AOTAutograd traces
the graph, under the very transforms that are active, and leaves `fewbit::encode`, the exact operation and `fewbit::decode`.

Those two stay opaque operators, where torch operations would be possible. With inductor the partitioner keeps the same bytes in
both forms (`tools/compile_bytes.py` prints them), since it may move an `encode`, which no output needs, into backward where its
input is kept anyway. Only where that input is cheap to recompute, after a norm, would torch operations save the codes; against
that, their code took five to eight times as long as the kernels on a CPU (65,536 to 1,048,576 elements).

A limit, torch's more than ours: second derivatives through a compiled region raise in `backward()`, but `torch.autograd.grad`
with chosen inputs passes the region by if the loss also depends on these inputs directly and the region saved none of them. An
exact operation saves its input and so raises; codes do not.

Imported while tracing, since it loads dynamo.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbit.autograd import handle, traced
from fewbit.autograd.activation import activation_of_coded, coded_activation
from fewbit.kernels import Coder

Tensor = torch.Tensor
_known: dict[str, Any] = {}
_numbers = itertools.count()


class Constants:
    """What a graph needs of an activation: the tensors of its coder, and of the second one's levels, the name under which
    `activation` finds the rest, and whether to overwrite the input. Dynamo follows the attributes of such an object, but no
    functions in it."""

    def __init__(
        self,
        coder: Coder,
        value_coder: Coder | None,
        slopes: tuple[float, float] | None,
        forward: Callable[[Tensor], Tensor],
        label: str,
        inplace: bool,
    ):
        self.tensors = [coder.thresholds, coder.codes, coder.levels]
        if value_coder is not None:
            self.tensors.append(value_coder.levels)
        self.bits, self.inplace = coder.bits, inplace
        self.name = _remember((forward, slopes), label)


class LayerConstants:
    """The same of a layer: three tensors a coder."""

    def __init__(self, exact: Callable[..., Tensor], coded: Callable[..., Tensor], coders: Sequence[Coder], label: str):
        self.tensors = [tensor for coder in coders for tensor in (coder.thresholds, coder.codes, coder.levels)]
        self.bits, self.name = coders[0].bits, _remember((exact, coded), label)


def _remember(thing: Any, label: str) -> str:
    """A name for something that a graph cannot hold, the same for what is equal."""
    name = next((name for name, known in _known.items() if known == thing), f"{label} #{next(_numbers)}")
    _known[name] = thing
    return name


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), called once while the code is traced and not looked into."""
    return function(*args, **kwargs)


@torch.compiler.allow_in_graph
def activation(x: Tensor, tensors: list[Tensor], bits: int, name: str, exact: bool) -> Tensor:
    """The operation of that name on x, coded where a gradient may be asked for and the code is not to be `exact`; exported
    programs hold torch's alone, since an exported graph keeps no autograd Function."""
    forward, slopes = _known[name]
    if exact:
        return forward(x)
    traced.check_no_tangent(x, name.partition(" ")[0])
    if torch.compiler.is_exporting() or not (torch.is_grad_enabled() and traced.wants_gradient(x)):
        return forward(x)
    thresholds, codes, *levels = tensors
    coder, *value_coder = (Coder(thresholds, codes, each, bits) for each in levels)
    recipe = handle.find(x) if slopes and not traced.is_transformed() else None
    if recipe is not None and recipe.keeps_sign:
        return activation_of_coded(x, recipe, forward, slopes)
    return coded_activation(x, forward, coder, value_coder=value_coder[0] if value_coder else None)


@torch.compiler.allow_in_graph
def overwriting_activation(x: Tensor, tensors: list[Tensor], bits: int, name: str, exact: bool) -> Tensor:
    """As `activation`, overwriting x, which then has the recipe of the result."""
    y = activation(x.clone() if exact else x, tensors, bits, name, exact)
    recipe, x = handle.find(y), x.copy_(y)
    return x if recipe is None else handle.attach(x, recipe)


@torch.compiler.allow_in_graph
def layer(operands: list[Tensor | None], tensors: list[Tensor], bits: int, name: str, exact: bool) -> Tensor:
    """The layer of that name on its operands, coded as `activation` is."""
    operation, coded = _known[name]
    if exact or not traced.wants_codes(operands):
        return operation(*operands)
    parts = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
    return coded(*operands, *(Coder(thresholds, codes, levels, bits) for thresholds, codes, levels in parts))
