"""Counts the operators that run and the bytes that they move. This needs no clock and no GPU.

On a GPU, the cost of operators other than matrix products, convolutions and attention is their number of calls and the bytes
that they read and write. A count on a CPU gives the same figures, except for the few operators that torch has for only one of
the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fewbit.torch_internals import each_operator, leaves, parts_of, storage_key, writes_into_arguments

Tensor = torch.Tensor


class Use(NamedTuple):
    """The number of calls of an operator, and the bytes that they read and wrote."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """The operators that ran, by name without overload, such as "aten.add".

    products  matrix products, convolutions and attention
    others    all others that move bytes, so no views and no allocations
    """

    products: dict[str, Use] = field(default_factory=dict)
    others: dict[str, Use] = field(default_factory=dict)

    @property
    def total(self) -> Use:
        """The sum over all operators in `others`."""
        return Use(sum(use.calls for use in self.others.values()), sum(use.bytes for use in self.others.values()))


def traffic(function: Callable[[], Any]) -> Traffic:
    """The operators that function() runs in eager code. Backward passes in it count too.

    A tensor counts by its number of elements, also if it is expanded and takes less memory. A tensor that an operator gets
    twice counts once. A tensor that is changed in place counts as read and as written.

    >>> x = torch.ones(4)
    >>> traffic(lambda: x.view(2, 2).t().add(1).mul_(x[:2])).others
    {'aten.add': Use(calls=1, bytes=32), 'aten.mul_': Use(calls=1, bytes=40)}
    """
    found = Traffic()

    def look(operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        moved = moved_bytes(operator, args, kwargs, output)
        if moved is not None:
            uses = found.products if _is_product(operator.overloadpacket) else found.others
            name = str(operator.overloadpacket)
            before = uses.get(name, Use())
            uses[name] = Use(before.calls + 1, before.bytes + moved)

    with each_operator(look):
        function()
    return found


def moved_bytes(operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> int | None:
    """The bytes that a call of an operator reads and writes; None if the call reads and writes no elements."""
    given, returned = _tensors((args, kwargs)), _tensors(output)
    if _moves_nothing(operator, given, returned):
        return None
    read = given if torch.Tag.out not in operator.tags else [each for each in given if not _is_in(each, returned)]
    return _bytes(read) + _bytes(returned)


def flops(operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    """The multiplications and additions of a matrix product, convolution or attention, each counted as one; 0 for all others.

    They come from torch's flop counter, which knows only some variants of attention. For the others, the query, key and value
    are taken to be the first arguments, or in backward those after the output's gradient.
    """
    packet = operator.overloadpacket
    if not _is_product(packet):
        return 0
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=output)
    shapes = [each.shape for each in args if isinstance(each, Tensor) and each.dim() == 4]
    if "attention" not in packet.__name__ or len(shapes) < 3:
        return 0
    if "backward" in packet.__name__ and len(shapes) > 3:
        return sdpa_backward_flop_count(*shapes[:4])
    return sdpa_flop_count(*shapes[:3])


def _tensors(thing: Any) -> list[Tensor]:
    """Each tensor in nested containers once."""
    return list({id(each): each for each in leaves(thing) if isinstance(each, Tensor)}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _moves_nothing(operator: Any, given: list[Tensor], returned: list[Tensor]) -> bool:
    """Whether a call read and wrote no elements: it allocated, made views, or answered from sizes and dtypes alone."""
    if torch.Tag.inplace_view in operator.tags or "empty" in operator.overloadpacket.__name__.split("_"):
        return True
    if writes_into_arguments(operator):
        return False
    return _memory(returned) <= _memory(given) if returned else not given


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    """The storages of the tensors."""
    return {storage_key(part.untyped_storage()) for each in tensors for part in parts_of(each)}


def _is_in(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


@lru_cache(maxsize=1024)
def _is_product(operator: Any) -> bool:
    """Whether torch's flop counter lists the operator, or one whose name is part of the operator's name.

    The counter lists matrix products, convolutions and attention, but not all their variants, such as attention's
    `_scaled_dot_product_flash_attention_for_cpu`.
    """
    if operator in flop_registry:
        return True
    home, _, name = str(operator).partition(".")
    return home == "aten" and re.search(_names_of_products(), name) is not None


@lru_cache(maxsize=1)
def _names_of_products() -> str:
    names = {each.__name__.strip("_") for each in flop_registry}
    return rf"(^|_)({'|'.join(sorted(names))})(_|$)"
