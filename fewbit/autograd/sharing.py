"""Sharing of codes: several layers that read one tensor keep the same codes of it.

A `Recipe` says what is kept of a tensor for backward, and how the tensor is rebuilt from that. If the codes of an operation
also give its output, it attaches their recipe to the output. If a linear layer makes codes of its input, it attaches their
recipe to the input. A coded layer that reads the same tensor later finds the recipe and keeps the same codes.

A recipe belongs to one tensor object in one version. It is not found after an in-place change, nor for a slice, a copy, another
tensor in the same memory, or the output of another operation. The layer then makes its own codes. A view of the whole tensor in
another shape, or with its dimensions in another order, does find the recipe.
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
    """Two functions of codes that tell the exact sign of a tensor x. Both take the saved tensors first.

    rebuild  Also takes a dtype and two slopes. Gives the rebuilt x times the slope `above` where x is positive, else times
             `below`.
    times    also takes a gradient of x's shape and two slopes; gives the gradient times the slopes, chosen in the same way
    """

    rebuild: Callable[[Sequence[Tensor], torch.dtype, float, float], Tensor]
    times: Callable[[Sequence[Tensor], Tensor, float, float], Tensor]


class Recipe(NamedTuple):
    """What is kept of a tensor, and how the tensor is rebuilt from that, approximately.

    kept        tensors to save for backward
    rebuild     Takes these tensors, as saved, and a dtype. Gives the tensor in its shape and that dtype. It holds none of the
                saved tensors itself, so hooks on saved tensors (checkpointing, offloading) can free them.
    by_sign     more functions of the saved tensors; None if the codes do not tell the sign
    bits        Bits of codes that a layer made of its input. Other layers share them if they want no more bits. None for codes
                of the operation that made the tensor.
    is_exact    whether the tensor itself is kept
    hides       whether it rebuilds ordinary numbers where the tensor is not finite
    with_zeros  Takes the tensor. Gives a recipe that rebuilds zeros as zeros, if the tensor has many, else this recipe. None if
                this recipe already does.
    """

    kept: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    by_sign: BySign | None = None
    bits: int | None = None
    is_exact: bool = False
    hides: bool = False
    with_zeros: Callable[[Tensor], Recipe] | None = None

    def viewed(self, shape: torch.Size, view: Layout) -> Recipe:
        """The recipe of a view of the whole tensor. The tensor is contiguous and has this shape."""
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
    """A tensor from which another one was made, and a function that gives the recipe of the other from that of this tensor."""

    tensor: Tensor
    of_recipe: Callable[[Recipe], Recipe]


class ByTensor(Generic[Value]):
    """Values noted for tensors in their version at that time. An entry does not keep its tensor alive, and is removed with it.

    A value noted outside of a checkpointed region is not found inside. When the region runs again, its input may be another
    tensor object without values, and both runs have to save the same.

    Entries are removed without running Python code. An interrupt in such code would be swallowed, and the entry would stay.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], tuple, ref[Any] | None, Value]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a value was noted for the tensor, even if the tensor has changed since."""
        return id(tensor) in self._entries

    def note(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        dies = ref(tensor, partial(self._entries.pop, key))  # called with the reference, which is pop's default
        hook = region()
        self._entries[key] = dies, state_of(tensor), hook and ref(hook), value

    def find(self, tensor: Tensor) -> Value | None:
        """The value noted for the tensor, if the tensor has not changed since; else None."""
        found = self._entries.get(id(tensor))
        if found is None:
            return None
        _, state, hook, value = found
        return value if state == state_of(tensor) and (hook and hook()) is region() else None


def region() -> Any:
    """The hook that packs saved tensors now. It is another one for each run of each checkpointed region; None outside of
    all."""
    hook = hook_on_saved()
    return getattr(hook, "__func__", hook)  # bound methods are made anew each time


_recipes: ByTensor[Recipe] = ByTensor()
_casts: ByTensor[tuple[ref[Tensor], tuple]] = ByTensor()  # for the result of a cast: its source, and the source's state then
_made: ByTensor[bool] = ByTensor()
_sources: ByTensor[tuple[ref[Tensor], tuple, Callable[[Recipe], Recipe]]] = ByTensor()


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Let readers of the tensor in its present version find the recipe. If the tensor is a cast, readers of its source find the
    recipe too. Returns the tensor."""
    _recipes.note(tensor, recipe)
    source = _source_of(tensor)
    if source is not None and source not in _recipes:
        _recipes.note(source, recipe)
    return tensor


def note_cast(tensor: Tensor, source: Tensor) -> None:
    """Let a tensor and its source, of which it is a copy in another dtype, share the recipe that either has or gets later."""
    recipe = find(source)
    if recipe is None:
        _casts.note(tensor, (ref(source), state_of(source)))
    else:
        _recipes.note(tensor, recipe)


def note_source(tensor: Tensor, source: Tensor, of_recipe: Callable[[Recipe], Recipe]) -> None:
    """Let readers of a tensor make codes of its source instead, as long as the source exists and is unchanged.

    of_recipe  gives the tensor's recipe from a recipe of the source
    """
    _sources.note(tensor, (ref(source), state_of(source), of_recipe))


def source_of(tensor: Tensor) -> Source | None:
    """The source that `note_source` noted, if neither tensor has changed since."""
    found = _sources.find(tensor) if tensor in _sources else None
    source = found and found[0]()
    if found is None or source is None or found[1] != state_of(source):
        return None
    return Source(source, found[2])


def note_made(result: Any, operands: Iterable[Any]) -> Any:
    """Note that the model made a result that has no graph, if one of its operands is a frozen parameter or was made from one.

    Such a result is worth coding, because nobody else holds it. A batch, in contrast, is held by the caller. A result that is
    computed from the batch alone counts as a part of the batch, in eager and in compiled code. A result in the memory of an
    operand does not count as made. Returns the result.
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
    """Whether the tensor is dense and of one of torch's own classes, so that its storage can be compared."""
    return is_torchs_own(type(tensor)) and tensor.layout == torch.strided and not tensor.is_nested


def is_made(tensor: Tensor) -> bool:
    """Whether the tensor needs no gradient and was noted by `note_made`, or is a view of such a tensor."""
    base = tensor if tensor in _made else base_of(tensor)
    return base is not None and not base.requires_grad and base in _made and bool(_made.find(base))


def _source_of(tensor: Tensor) -> Tensor | None:
    """The tensor from which this one was cast, if neither has changed since."""
    found = _casts.find(tensor) if tensor in _casts else None
    source = found and found[0]()
    return source if found is not None and source is not None and found[1] == state_of(source) else None


def find(tensor: Tensor) -> Recipe | None:
    """The recipe of the tensor in its present version; None if there is none."""
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
    """Whether the tensor, or the tensor of which it is a view, is kept in memory anyway.

    Parameters are. So are outputs that an operation keeps for its own backward, as in tanh and relu. Keeping such a tensor
    exactly costs nothing, while codes would take memory.
    """
    node: Any = tensor.grad_fn
    output = tensor.output_nr
    if node is None:
        return isinstance(tensor, torch.nn.Parameter)
    while node is not None and type(node).__name__ in VIEW_NODES:
        node, output = node.next_functions[0]
    if node is not None and type(node).__name__ == "AccumulateGrad":
        return isinstance(node.variable, torch.nn.Parameter)
    return output == 0 and keeps_its_output(type(node))
