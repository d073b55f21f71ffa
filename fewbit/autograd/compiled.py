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
from collections.abc import Callable
from typing import Any

import torch

from fewbit.autograd import traced
from fewbit.kernels import Coder

Tensor = torch.Tensor
_exact: dict[str, Callable[[Tensor], Tensor]] = {}
_numbers = itertools.count()


class Constants:
    """What a graph needs of an activation: the coder, the name under which `activation` finds the exact operation, and
    whether to overwrite the input. Flat, since dynamo follows attributes of such an object, but no functions in it."""

    def __init__(self, coder: Coder, forward: Callable[[Tensor], Tensor], label: str, inplace: bool):
        self.thresholds, self.codes, self.levels, self.bits = coder.thresholds, coder.codes, coder.levels, coder.bits
        self.inplace = inplace
        self.name = next((name for name, known in _exact.items() if known is forward), f"{label} #{next(_numbers)}")
        _exact[self.name] = forward


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), called once while the code is traced and not looked into."""
    return function(*args, **kwargs)


@torch.compiler.allow_in_graph
def activation(x: Tensor, thresholds: Tensor, codes: Tensor, levels: Tensor, bits: int, name: str) -> Tensor:
    """The exact operation of that name on x, coded where a gradient may be asked for; exported programs hold it alone, since
    an exported graph keeps no autograd Function."""
    traced.check_no_tangent(x, name.partition(" ")[0])
    if torch.compiler.is_exporting() or not (torch.is_grad_enabled() and traced.wants_gradient(x)):
        return _exact[name](x)
    return traced.coded_activation(x, _exact[name], Coder(thresholds, codes, levels, bits))
