"""Products of tensors with codes of their factors, and recipes of products from the recipes of their factors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewbit.autograd import sharing
from fewbit.autograd.quantize import Quantizer, coded_by_shape, recipe_of
from fewbit.autograd.recomputed import Recomputed, in_autocast
from fewbit.autograd.sharing import Recipe, as_it_is

Tensor = torch.Tensor
LEAST = 4096  # tensors of fewer bytes are not worth the work


class _Product(Recomputed):
    """A class of its own, because reports show its name."""


def coded_products(
    *arguments: Any, exact: Callable[..., Tensor], factors: Sequence[int], weights: Sequence[int], by_element: bool
) -> Tensor:
    """exact(*operands), differentiated at the tensors that codes of the factors give.

    arguments   The operands, and last the DeviceTable of a standard normal number. Operands are tensors. They have one dtype,
                except in products element by element.
    exact       torch's operation, a polynomial in each of the factors
    factors     positions of the factors among the operands; backward needs only the shapes of the others
    weights     positions of the factors that are parameters
    by_element  whether it is the product of the operands element by element, or the square of the only operand

    A factor is kept only if another factor needs a gradient. Weights and broadcast factors are kept as they are.
    """
    *operands, table = arguments
    shape, recipes = None, []
    if by_element:
        shape, dtype = torch.broadcast_shapes(*(each.shape for each in operands)), torch.result_type(operands[0], operands[-1])
        operands = [each if each.dtype == dtype else cast(each, exact=lambda x: x.to(dtype)) for each in operands]
    for number, x in enumerate(operands):
        others = [operands[each] for each in factors if each != number] or [x]
        if number not in factors or not any(each.requires_grad for each in others):
            recipes.append(shape_of(x))
            continue
        stays = number in weights or (by_element and x.shape != shape)
        recipe = as_it_is(x) if stays else recipe_of(x, Quantizer(table), coded_by_shape)
        if recipe is None:
            return exact(*operands)
        recipes.append(recipe)
    if not by_element:  # autocast does not affect products element by element
        y, _ = _Product.apply(exact, recipes, None, *in_autocast(*operands))  # type: ignore[misc]
        return y
    y, _ = _Product.apply(exact, recipes, None, *operands)  # type: ignore[misc]
    return note_product(y, *(operands if len(operands) > 1 else 2 * operands))


def cast(x: Tensor, *, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """exact(x), which is x in another dtype. x and the result share their recipe."""
    y = exact(x)
    if y is not x:
        sharing.note_cast(y, x)
    return y


def note_product(y: Tensor, *factors: Any, by: Callable[[Any, Any], Tensor] = operator.mul) -> Tensor:
    """Attach a recipe to y, the product of two factors element by element, if the factors have recipes or are kept anyway.

    by  operator.truediv if y is the quotient of the factors

    A factor may be given as its recipe. Returns y.
    """
    first, second = map(_of_factor, factors)
    if first is None or second is None or (first.is_exact and second.is_exact):
        return y
    number, rebuilds, shape = len(first.kept), (first.rebuild, second.rebuild), y.shape

    def rebuild(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return by(rebuilds[0](kept[:number], dtype), rebuilds[1](kept[number:], dtype)).expand(shape)

    return sharing.attach(y, Recipe((*first.kept, *second.kept), rebuild, hides=first.hides or second.hides))


def _of_factor(x: Any) -> Recipe | None:
    if isinstance(x, Recipe):
        return x
    if not isinstance(x, Tensor):
        return Recipe((), lambda kept, dtype: x, is_exact=True)
    found = sharing.find(x)
    if found is not None:
        return found
    is_there = x.grad_fn is None or x.nbytes < LEAST or sharing.is_kept_exactly(x)
    return as_it_is(x.detach()) if is_there else None


def shape_of(x: Tensor) -> Recipe:
    """A recipe of zeros with x's shape. They take no memory."""
    shape, device = x.shape, x.device
    return Recipe((), lambda kept, dtype: torch.zeros((), dtype=dtype, device=device).expand(shape))
