"""Checkpointing from codes: backward runs a function again, on inputs rebuilt from a few bits per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fewbit import activations, resolve
from fewbit.autograd import exact as exact_mode
from fewbit.autograd.quantize import Quantizer, coded_by_shape, recipe_of
from fewbit.autograd.sharing import Recipe, as_it_is
from fewbit.constants import DEFAULT_LAYER_BITS
from fewbit.design.table import CodeTable
from fewbit.errors import InputError
from fewbit.functional.operation import is_codable
from fewbit.torch_internals import is_transformed

Tensor = torch.Tensor


def recompute(
    function: Callable[..., Any], *tensors: Any, bits: int = DEFAULT_LAYER_BITS, table: CodeTable | None = None
) -> Any:
    """Call function(*tensors), exactly. Backward calls it again, on tensors that are rebuilt from codes.

    function  A function of these arguments. It may return anything. It may use parameters, random numbers and autocast, which
              are the same in backward. It must do the same both times, as for `torch.utils.checkpoint`.
    tensors   Its arguments. Floating-point tensors that need a gradient are kept as codes. They are standardized by channel
              (dimension 1 of tensors with four or five dimensions, else the last one) and scaled by row. A tensor that already
              has codes keeps those. All other arguments are kept as they are.
    bits      bits of one code, 1 to 8
    table     a CodeTable of your own with the channel "value", instead of bits
    Returns   what the function returns. Nothing else that the function computes is kept.

    The gradient is the exact one at the rebuilt inputs. In compiled code this is torch's checkpointing with exact inputs.

    Raises InputError (a function that cannot be called), DesignError (bits), TableError (a table of something else).

    >>> x = torch.randn(64, 32, requires_grad=True)
    >>> y = recompute(lambda x: x.softmax(-1) @ x.t(), x, bits=8)
    >>> torch.equal(y, x.softmax(-1) @ x.t())
    True
    """
    if not callable(function):
        raise InputError(f"recompute takes a function and its arguments, got {type(function).__name__}")
    bits = bits if table is None else table.bits if isinstance(table, CodeTable) else bits
    resolve.check("recompute", activations.IDENTITY, ("value",), bits, table)
    if torch.compiler.is_compiling():
        return checkpoint(function, *tensors, use_reentrant=False)
    if not torch.is_grad_enabled() or exact_mode.is_active() or is_transformed():
        return function(*tensors)
    recipes = [_recipe(each, bits, table) for each in tensors]
    needs = [isinstance(each, Tensor) and each.requires_grad for each in tensors]
    given: list[Any] | None = [*tensors]

    def run(*kept: Any) -> Any:
        nonlocal given
        if given is not None:  # this is the forward pass; the exact tensors are not held after it
            exact, given = given, None
            return function(*exact)
        return function(*_rebuilt(recipes, needs, kept))

    kept = [each for recipe in recipes for each in recipe.kept]
    recipes = [recipe._replace(kept=(None,) * len(recipe.kept)) for recipe in recipes]  # type: ignore[arg-type]
    return checkpoint(run, *kept, use_reentrant=False)


def _recipe(x: Any, bits: int, table: CodeTable | None) -> Recipe:
    """What is kept of an argument."""
    if not is_codable(x) or not x.requires_grad or x.numel() == 0:
        return Recipe((x,), lambda kept, dtype: kept[0], is_exact=True)
    tables = resolve.device_tables(table, x.dtype, x.device) if table is not None else None
    tables = tables or resolve.shipped_tables(activations.IDENTITY, ("value",), bits, x.dtype, x.device)
    recipe = recipe_of(x, Quantizer(tables[0]), coded_by_shape) or as_it_is(x)
    dtype = x.dtype
    return recipe._replace(rebuild=lambda kept, _, rebuild=recipe.rebuild: rebuild(kept, dtype))


def _rebuilt(recipes: list[Recipe], needs: list[bool], kept: tuple[Any, ...]) -> list[Any]:
    found = []
    for recipe, needed in zip(recipes, needs, strict=True):
        number = len(recipe.kept)
        made = recipe.rebuild(kept[:number], torch.float32)
        found.append(made.detach().requires_grad_() if needed else made)
        kept = kept[number:]
    return found
