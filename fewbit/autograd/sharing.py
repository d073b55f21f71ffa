"""Sharing: how the layers that read a tensor find the codes that already hold it.

What an operation keeps of its input for backward is a `Recipe`. An operation whose own codes hold its output too attaches
their recipe to that output, and a linear layer that made codes of its input attaches theirs to the input; a coded layer that
reads the very tensor, unchanged since, keeps the same codes and no more.

Recipes are found by the identity of the tensor object, and belong to one version of it: after an in-place change, for another
tensor that lies in the same memory, for a slice, a copy or the output of another operation none is found, and the reader makes
codes of its own. Only a view of all of a tensor, in another shape or with its dimensions in another order, counts as it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import torch

from fewbit.autograd.layout import Layout
from fewbit.torch_internals import (
    base_of,
    hook_on_saved,
    in_forward_mode,
    is_legacy_batch,
    is_torchs_own,
    is_transformed,
    keeps_its_output,
    leaves,
    state_of,
    storage_key,
)

Tensor = torch.Tensor
Value = TypeVar("Value")


class BySign(NamedTuple):
    """What codes that tell the sign of a tensor x exactly give besides. Both take what is kept, as saved.

    rebuild  of these, a dtype, and two slopes: x, nearly, times the slope `above` where it is positive, else times `below`
    times    of these, a gradient of x's shape, and two slopes: the gradient times them, likewise
    """

    rebuild: Callable[[Sequence[Tensor], torch.dtype, float, float], Tensor]
    times: Callable[[Sequence[Tensor], Tensor, float, float], Tensor]


class Recipe(NamedTuple):
    """How to make a tensor anew, nearly, from what is kept.

    kept        tensors to save for backward
    rebuild     of these, as saved, and a dtype: the tensor, of its shape and that dtype. It holds none of them itself, so that
                hooks on saved tensors (checkpointing, offloading) can free them.
    by_sign     more of the same; None where codes do not tell the sign
    bits        of codes that a reader made for itself, for readers that want no more; None for those of what made the tensor
    is_exact    whether it is the tensor itself that is kept
    hides       whether it gives ordinary numbers for what is not finite
    with_zeros  of the tensor: a recipe that gives zeros as zeros, nearly, if many of its numbers are; None where this one does
    """

    kept: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    by_sign: BySign | None = None
    bits: int | None = None
    is_exact: bool = False
    hides: bool = False
    with_zeros: Callable[[Tensor], Recipe] | None = None

    def viewed(self, shape: torch.Size, view: Layout) -> Recipe:
        """The recipe of the tensor, of that shape and contiguous, as a view of all of it."""
        rebuild, by_sign, with_zeros = self.rebuild, self.by_sign, self.with_zeros

        def seen(tensor: Tensor) -> Tensor:
            return view.unflatten(tensor.reshape(-1))

        def unseen(tensor: Tensor) -> Tensor:
            return view.flatten(tensor).view(shape)

        viewed = self._replace(rebuild=lambda kept, dtype: seen(rebuild(kept, dtype)))
        if by_sign is not None:
            viewed = viewed._replace(
                by_sign=BySign(
                    lambda kept, dtype, *slopes: seen(by_sign.rebuild(kept, dtype, *slopes)),
                    lambda kept, grad, *slopes: seen(by_sign.times(kept, unseen(grad), *slopes)),
                )
            )
        if with_zeros is not None:
            viewed = viewed._replace(with_zeros=lambda x: with_zeros(unseen(x)).viewed(shape, view))
        return viewed


class Source(NamedTuple):
    """A tensor of which another was made, and what makes the recipe of the other from that of the tensor."""

    tensor: Tensor
    of_recipe: Callable[[Recipe], Recipe]


class ByTensor(Generic[Value]):
    """What is known of tensors, as they were when it was noted. It does not keep them alive, and dies with them.

    What was noted outside of a checkpointed region is not found inside: when the region runs again, its input may be another
    tensor object, of which nothing is known, and both runs have to save the same.

    What removes an entry runs no Python: an interrupt cannot fall into it, where Python would swallow it and keep the entry.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], tuple, ref[Any] | None, Value]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether something was noted of the tensor, changed or not."""
        return id(tensor) in self._entries

    def note(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        dies = ref(tensor, partial(self._entries.pop, key))  # called with the reference, which is pop's default
        hook = region()
        self._entries[key] = dies, state_of(tensor), hook and ref(hook), value

    def find(self, tensor: Tensor) -> Value | None:
        """What was noted of the tensor, if it has not changed since."""
        found = self._entries.get(id(tensor))
        if found is None:
            return None
        _, state, hook, value = found
        return value if state == state_of(tensor) and (hook and hook()) is region() else None


def region() -> Any:
    """What packs saved tensors now: one function for each checkpointed region and each run of it; None outside of all."""
    hook = hook_on_saved()
    return getattr(hook, "__func__", hook)  # bound methods are made anew each time


_recipes: ByTensor[Recipe] = ByTensor()
_casts: ByTensor[tuple[ref[Tensor], tuple]] = ByTensor()  # what was cast, and its state then
_made: ByTensor[bool] = ByTensor()
_sources: ByTensor[tuple[ref[Tensor], tuple, Callable[[Recipe], Recipe]]] = ByTensor()


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Let the readers of the tensor, as it is now, find the recipe, and those of what it was cast from. Returns the tensor."""
    _recipes.note(tensor, recipe)
    source = _source_of(tensor)
    if source is not None and source not in _recipes:
        _recipes.note(source, recipe)
    return tensor


def note_cast(tensor: Tensor, source: Tensor) -> None:
    """Let a tensor share the recipe of another, of which it is a copy in another dtype, now or when either gets one."""
    recipe = find(source)
    if recipe is None:
        _casts.note(tensor, (ref(source), state_of(source)))
    else:
        _recipes.note(tensor, recipe)


def note_source(tensor: Tensor, source: Tensor, of_recipe: Callable[[Recipe], Recipe]) -> None:
    """Let readers of a tensor make codes of its source in its place, as long as that is there and unchanged.

    of_recipe  of a recipe of the source: one of the tensor
    """
    _sources.note(tensor, (ref(source), state_of(source), of_recipe))


def source_of(tensor: Tensor) -> Source | None:
    """What `note_source` told, if neither has changed since."""
    found = _sources.find(tensor) if tensor in _sources else None
    source = found and found[0]()
    if found is None or source is None or found[1] != state_of(source):
        return None
    return Source(source, found[2])


def note_made(result: Any, operands: Iterable[Any]) -> Any:
    """Tell of what an operation of a converted model gives without a graph that it was made of these operands, one of them a
    frozen parameter, or made of one: nobody holds it anyway, as the caller holds a batch. Returns the result.

    What lies in the memory of an operand is not made. What is computed of the batch alone is taken for a part of it, in eager
    code as in compiled code.
    """
    if not isinstance(result, Tensor) or result.requires_grad or not result.is_floating_point() or not torch.is_grad_enabled():
        return result
    if is_transformed() or in_forward_mode() or is_legacy_batch(result):
        return result
    given = [each for each in leaves(operands) if isinstance(each, Tensor)]
    if not any(isinstance(each, torch.nn.Parameter) or is_made(each) for each in given):
        return result
    if all(map(_has_memory, (result, *given))):
        place = storage_key(result.untyped_storage())
        if all(storage_key(each.untyped_storage()) != place for each in given):
            _made.note(result, True)
    return result


def _has_memory(tensor: Tensor) -> bool:
    """Whether the tensor is one piece of memory, as far as can be asked."""
    return is_torchs_own(type(tensor)) and tensor.layout == torch.strided and not tensor.is_nested


def is_made(tensor: Tensor) -> bool:
    """Whether the model made the tensor, which needs no gradient, or what it is a view of."""
    base = tensor if tensor in _made else base_of(tensor)
    return base is not None and not base.requires_grad and base in _made and bool(_made.find(base))


def _source_of(tensor: Tensor) -> Tensor | None:
    """What the tensor was cast from, if neither has changed since."""
    found = _casts.find(tensor) if tensor in _casts else None
    source = found and found[0]()
    return source if found is not None and source is not None and found[1] == state_of(source) else None


def find(tensor: Tensor) -> Recipe | None:
    """The recipe of the tensor, if there is one that holds for it as it is now."""
    if tensor in _recipes:
        return _recipes.find(tensor)
    source = _source_of(tensor)
    if source is not None:
        return find(source)
    base = base_of(tensor)
    recipe = None if base is None else find(base)
    if base is None or recipe is None:
        return None
    if tensor.numel() != base.numel() or not base.is_contiguous():
        return None
    layout = Layout.of(tensor)
    if not tensor.permute(layout.order).is_contiguous():
        return None
    if (tensor.dtype, tensor.is_neg(), tensor.storage_offset()) != (base.dtype, base.is_neg(), base.storage_offset()):
        return None
    if storage_key(tensor.untyped_storage()) != storage_key(base.untyped_storage()):  # after `tensor.data = ...`
        return None
    return recipe.viewed(base.shape, layout)


def as_it_is(tensor: Tensor) -> Recipe:
    """The recipe that keeps the tensor itself."""
    return Recipe((tensor,), lambda kept, dtype: kept[0].to(dtype), is_exact=True)


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Squeeze", "Unsqueeze", "Unflatten", "Flatten")
VIEW_NODES = frozenset(f"{name}Backward{number}" for name in _VIEWS for number in range(3))


def is_kept_exactly(tensor: Tensor) -> bool:
    """Whether the tensor is there anyway, or it is a view of one that is: a parameter, or what the operation that made it keeps
    for its own backward, as tanh and relu do. To keep the tensor exactly then costs nothing, and codes would."""
    node: Any = tensor.grad_fn
    output = tensor.output_nr
    if node is None:
        return isinstance(tensor, torch.nn.Parameter)
    while node is not None and type(node).__name__ in VIEW_NODES:
        node, output = node.next_functions[0]
    if node is not None and type(node).__name__ == "AccumulateGrad":
        return isinstance(node.variable, torch.nn.Parameter)
    return output == 0 and keeps_its_output(type(node))
