"""Rebuilds matrices that torch makes from weights in backward, instead of keeping them.

Under autocast such a matrix is a cast of the weight. If a weight consists of quantized numbers and scales, as in torchao, the
matrix is a cast of these numbers, or the dequantized weight. Each layer would keep as much as an ordinary weight takes,
although the weight itself is in memory anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from fewbit.autograd.sharing import ByTensor, Recipe
from fewbit.torch_internals import is_distributed, is_fake, is_torchs_own, parts_of

Tensor = torch.Tensor


# torch's products of two factors. torch saves a factor if the other one needs a gradient. A saved matrix without a graph
# therefore is the frozen weight, or comes from it.
_functions = "mm", "addmm", "matmul"
PRODUCTS = frozenset(
    {torch.nn.functional.linear, Tensor.__matmul__, Tensor.__rmatmul__}  # type: ignore[attr-defined]
    | {getattr(home, name) for home in (torch, Tensor) for name in _functions}
)


class _Way(NamedTuple):
    """How a tensor comes from a weight: the number of the form in `_forms`, and whether it is transposed."""

    form: int
    is_transposed: bool


_ways: ByTensor[dict[Any, _Way | None]] = ByTensor()  # for each weight, ways by function, shape and dtype of the saved matrix


def made_of_frozen(tensor: Tensor, saved: Sequence[Tensor], function: Any, operands: Sequence[Any]) -> Recipe | None:
    """The recipe that rebuilds a saved matrix without a graph from the frozen weight among the operands; None if it may come
    from something else.

    saved     all tensors that the function saved
    function  the function that was called with the operands; only PRODUCTS are treated

    On the CPU the numbers are compared at each call. On other devices the process has to wait for a comparison, so they are
    compared only when the function first gets the weight.
    """
    if function not in PRODUCTS or tensor.dim() != 2 or is_distributed():
        return None
    weights = [each for each in operands if isinstance(each, torch.nn.Parameter) and not each.requires_grad and each.dim() == 2]
    alike = [each for each in saved if each.shape == tensor.shape and each.grad_fn is None]
    if len(weights) != 1 or len(alike) != 1:
        return None
    way = _known_way(weights[0], tensor, function)
    return None if way is None else Recipe((_forms(weights[0])[way.form],), partial(_rebuilt, way.is_transposed))


def cast_of_parameter(tensor: Tensor) -> Recipe | None:
    """The recipe that casts a parameter again, if the tensor's graph shows that it is a cast of the parameter; else None."""
    node: Any = tensor.grad_fn
    source: Any = node.next_functions[0][0] if type(node).__name__ == "ToCopyBackward0" else None
    if type(source).__name__ != "AccumulateGrad" or is_distributed():  # this may free the memory of a sharded weight
        return None
    parameter = source.variable
    if not isinstance(parameter, torch.nn.Parameter) or parameter.device != tensor.device:
        return None
    return Recipe((parameter,), partial(_rebuilt, False))


def _rebuilt(is_transposed: bool, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _numbers(kept[0], dtype, is_transposed)


def _known_way(weight: Tensor, tensor: Tensor, function: Any) -> _Way | None:
    known, key = _ways.find(weight), (function, tensor.shape, tensor.dtype)
    if known is None:
        _ways.note(weight, known := {})
    if key not in known or tensor.device.type == "cpu":
        known[key] = _way(weight, tensor)
    return known[key]


def _way(weight: Tensor, tensor: Tensor) -> _Way | None:
    for (number, form), is_transposed in product(enumerate(_forms(weight)), (False, True)):
        shape = form.shape[::-1] if is_transposed else form.shape
        is_same_thing = is_torchs_own(type(form)) and form.dtype == tensor.dtype  # the tensor is a view, which costs nothing
        if shape != tensor.shape or form.device != tensor.device or is_same_thing:
            continue
        if is_fake(tensor) or torch.equal(_numbers(form, tensor.dtype, is_transposed), tensor):
            return _Way(number, is_transposed)
    return None


def _forms(weight: Tensor) -> list[Tensor]:
    """The tensors from which a matrix may come: the weight itself or, for a class that wraps other tensors, these tensors, and
    the weight if it can be dequantized."""
    if is_torchs_own(type(weight)):
        return [weight]
    return [*parts_of(weight), *([weight] if type(weight).dequantize is not Tensor.dequantize else [])]


def _numbers(form: Tensor, dtype: torch.dtype, is_transposed: bool) -> Tensor:
    with torch.no_grad():
        numbers = (form if is_torchs_own(type(form)) else form.dequantize()).to(dtype)
        return numbers.t() if is_transposed else numbers
