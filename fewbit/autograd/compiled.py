"""The form of an operation for torch.compile: constants that are computed while it traces, and one call that it does not trace.

Dynamo could trace an autograd Function of ours. It would then lose the Function's vmap rules, and the error for second
derivatives: compiled, `grad(grad(f))` gave zeros. So the graph holds `call` as a whole. `call` runs as Python when AOTAutograd
traces the graph, under the transforms that are active. It leaves `fewbit::encode`, the exact operation and `fewbit::decode`.

`encode` and `decode` are opaque operators. torch operations would be possible too, but the bytes kept with inductor are the
same (`tools/compile_bytes.py` prints them): no output needs an `encode`, so the partitioner may move it into backward if its
input is kept anyway. torch operations would save the codes only if that input is cheap to recompute, as after a norm. Their
compiled code took five to eight times as long as the kernels on a CPU (65,536 to 1,048,576 elements).

There is a limit, which lies in torch. Second derivatives through a compiled region raise in `backward()`. But
`torch.autograd.grad` with chosen inputs bypasses the region, and does not raise, if the loss also depends on these inputs
directly and the region saved none of them. An exact operation saves its input and so raises. Codes do not.

This file is imported while tracing, because it loads dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
# Functions that graphs call: one entry for each operation in compiled code. Tables and bits are not part of the key. Entries
# stay forever, because graphs may.
_keys: dict[Any, str] = {}
_functions: dict[str, Callable[..., Tensor]] = {}


def remember(content: Any, label: str, function: Callable[..., Tensor]) -> str:
    """The key by which a graph finds the function. Equal content gives the same key."""
    if content not in _keys:
        _keys[content] = f"{label} #{len(_keys)}"
        _functions[_keys[content]] = function
    return _keys[content]


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], /, *args: Any) -> Any:
    """function(*args), called once while the code is traced. The call itself is not traced."""
    return function(*args)


@torch.compiler.allow_in_graph
def call(key: str, operands: list, tensors: list[Tensor], bits: int, exact: bool, by_name: bool) -> Tensor:
    """Call the function of that key with the other arguments."""
    return _functions[key](operands, tensors, bits, exact, by_name)
