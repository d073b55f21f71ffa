"""What an operation is to torch.compile: constants found while it traces, and one call that it does not look into.

Dynamo would trace an autograd Function of ours too, but then forgets its rules for vmap, and drops the refusal of second
derivatives: compiled, `grad(grad(f))` gave zeros. Left whole in the graph, `call` runs as Python when AOTAutograd traces the
graph, under the very transforms that are active, and leaves `fewbit::encode`, the exact operation and `fewbit::decode`.

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

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
# What graphs call, for as long as graphs may live: one entry for each operation that compiled code has used, whatever its
# tables and bits.
_keys: dict[Any, str] = {}
_functions: dict[str, Callable[..., Tensor]] = {}


def remember(content: Any, label: str, function: Callable[..., Tensor]) -> str:
    """A key by which a graph finds the function; the same for equal content."""
    if content not in _keys:
        _keys[content] = f"{label} #{len(_keys)}"
        _functions[_keys[content]] = function
    return _keys[content]


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], /, *args: Any) -> Any:
    """function(*args), called once while the code is traced and not looked into."""
    return function(*args)


@torch.compiler.allow_in_graph
def call(key: str, operands: list, tensors: list[Tensor], bits: int, exact: bool, by_name: bool) -> Tensor:
    """The function of that key, on the other arguments."""
    return _functions[key](operands, tensors, bits, exact, by_name)
