"""Sharing: how the layers that read a tensor find the codes that already hold it.

What an operation keeps of its input for backward is a `Recipe`. An operation whose own codes hold its output too attaches
their recipe to that output, and a linear layer that made codes of its input attaches theirs to the input; a coded layer that
reads the very tensor, unchanged since, keeps the same codes and no more.

Recipes are found by the identity of the tensor object, and belong to one version of it: after an in-place change, for another
tensor that lies in the same memory, for a slice, a copy or the output of another operation none is found, and the reader makes
codes of its own. Only a view of all of a tensor in the same order, a reshape, counts as the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fewbit.torch_internals import base_of, keeps_its_output, state_of, storage_key, weak_tensor_dictionary

Tensor = torch.Tensor


class Recipe(NamedTuple):
    """How to make a tensor anew, nearly, from what is kept.

    kept        tensors to save for backward
    rebuild     of these, as saved, and a dtype: the tensor, of its shape and that dtype. It holds none of them itself, so that
                hooks on saved tensors (checkpointing, offloading) can free them.
    keeps_sign  whether what is rebuilt is positive where the tensor is, and nowhere else
    bits        of codes that a reader made for itself, for readers that want no more; None for those of what made the tensor
    """

    kept: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    keeps_sign: bool = False
    bits: int | None = None


class _Entry(NamedTuple):
    recipe: Recipe
    state: tuple


_entries = weak_tensor_dictionary()


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Let the readers of the tensor, as it is now, find the recipe. Returns the tensor."""
    _entries[tensor] = _Entry(recipe, state_of(tensor))
    return tensor


def find(tensor: Tensor) -> Recipe | None:
    """The recipe of the tensor, if there is one that holds for it as it is now."""
    entry = _entries.get(tensor)
    if entry is not None:
        return entry.recipe if state_of(tensor) == entry.state else None
    base = base_of(tensor)
    entry = None if base is None else _entries.get(base)
    if base is None or entry is None or state_of(base) != entry.state:
        return None
    if tensor.numel() != base.numel() or not (tensor.is_contiguous() and base.is_contiguous()):
        return None
    if (tensor.dtype, tensor.is_neg(), tensor.storage_offset()) != (base.dtype, base.is_neg(), base.storage_offset()):
        return None
    if storage_key(tensor.untyped_storage()) != storage_key(base.untyped_storage()):  # after `tensor.data = ...`
        return None
    rebuild, shape = entry.recipe.rebuild, tensor.shape
    return entry.recipe._replace(rebuild=lambda kept, dtype: rebuild(kept, dtype).reshape(shape))


def as_it_is(tensor: Tensor) -> Recipe:
    """The recipe that keeps the tensor itself."""
    return Recipe((tensor,), lambda kept, dtype: kept[0].to(dtype))


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Squeeze", "Unsqueeze", "Unflatten", "Flatten")
_VIEW_NODES = frozenset(f"{name}Backward{number}" for name in _VIEWS for number in range(3))


def is_kept_exactly(tensor: Tensor) -> bool:
    """Whether the operation that made the tensor, or made what it is a view of, keeps this output for its own backward, as
    scaled_dot_product_attention, tanh and relu do. To keep the tensor exactly then costs nothing, and codes would."""
    node, output = tensor.grad_fn, tensor.output_nr
    while node is not None and type(node).__name__ in _VIEW_NODES:
        node, output = node.next_functions[0]
    return output == 0 and keeps_its_output(type(node))
