"""Products of tensors and casts, for compiled code.

In eager code the hooks of `fewbit.autograd.rest` code what torch's own operations save. These hooks see nothing in compiled
code. There, calls of torch's products and casts become operations of fewbit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from fewbit.autograd.products import cast, coded_products
from fewbit.design.table import CodeTable
from fewbit.functional.operation import DTYPES, Operation, is_codable, run

Tensor = torch.Tensor


class Product(NamedTuple):
    """What a function of torch multiplies.

    name        name of the torch function that takes the operands alone
    factors     positions of the factors among the operands
    by_element  whether the function multiplies element by element
    weights     positions of the factors that are parameters in a call
    """

    name: str
    factors: tuple[int, ...]
    by_element: bool = False
    weights: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of what it keeps. A factor of a parameter counts as the input of a linear layer."""
        return "product" if self.by_element else "linear" if self.weights else "rest"


def _named(*names: str) -> list[Any]:
    homes = torch, torch.Tensor
    return [getattr(home, name) for name in names for home in homes if hasattr(home, name)]


_SQUARE, _POWER = Product("square", (0,), by_element=True), Product("pow", (0,))
_PRODUCTS: Mapping[Any, Product] = {
    **dict.fromkeys(_named("mul", "multiply"), Product("mul", (0, 1), by_element=True)),
    **dict.fromkeys(_named("square"), _SQUARE),
    **dict.fromkeys(_named("pow"), _POWER),
    **{each: Product(name, (0, 1)) for name in ("matmul", "mm", "bmm") for each in _named(name)},
    **{each: Product(name, (1, 2)) for name in ("addmm", "baddbmm") for each in _named(name)},
}
_CASTS: Mapping[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def find(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Product | None:
    """The product that a call of torch computes, if its factors can be coded; None for any other call."""
    # __pow__ is a Python function, which dynamo does not find in mappings
    found = _POWER if function is torch.Tensor.__pow__ else _PRODUCTS.get(function)
    if found is not None and found.name == _POWER.name:
        is_square = len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2
        found, args = (_SQUARE, args[:1]) if is_square else (None, args)
    if found is None or kwargs or not all(map(is_codable, args)):
        return None
    factors = [args[each] for each in found.factors]
    weights = tuple(each for each in found.factors if isinstance(args[each], torch.nn.Parameter))
    is_mixed = any(each.dtype != args[0].dtype for each in args)
    # skip mixed dtypes if a factor is a scalar tensor (torch promotes it by other rules), or in matrix products (only autocast
    # makes their dtypes one)
    if is_mixed and (not found.by_element or any(each.dim() == 0 for each in args)):
        return None
    if not found.by_element and not weights and any(each.dim() < 3 for each in factors):  # these may be views of weights
        return None
    is_needed = any(each.requires_grad for each in factors) and len(weights) < len(factors)
    return found._replace(weights=weights) if is_needed else None


def product(found: Product, args: tuple, bits: int | None, table: CodeTable | None) -> Tensor:
    """The result of the call, with codes for backward."""
    operands = args[:1] if found.name == _SQUARE.name else args
    return run(_product, tuple(found), operands, bits, table, by_name=False)


def casted(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of a cast between dtypes that can be coded; None for any other call. It shares the codes of its input."""
    dtype = None if kwargs else _dtype_of_cast(function, args)
    if dtype not in DTYPES or not is_codable(args[0]) or dtype == args[0].dtype:
        return None
    return run(_cast, (dtype,), args[:1], by_name=False)


def _dtype_of_cast(function: Any, args: tuple) -> Any:
    if len(args) == 1:
        return _CASTS.get(function)
    if function is torch.Tensor.type_as:
        return args[1].dtype if args[1].device == args[0].device else None
    return args[1] if function is torch.Tensor.to and len(args) == 2 else None


def _product(name: str, factors: tuple[int, ...], by_element: bool, weights: tuple[int, ...]) -> Operation:
    exact = getattr(torch, name)
    coded = partial(coded_products, exact=exact, factors=factors, weights=weights, by_element=by_element)
    return Operation(name, exact, coded, coded, channels=("value",))


def _cast(dtype: torch.dtype) -> Operation:
    def exact(x: Tensor) -> Tensor:
        return x.to(dtype)

    coded = partial(cast, exact=exact)
    return Operation("cast", exact, coded, coded)
