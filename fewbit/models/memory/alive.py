"""Which memory is alive while operators run, and at the worst moment. Operators are seen, and storages until they are freed.

The place in the model is read from the stack in the forward pass. In backward it is the module that made the running node.
torch's own tracker, `torch.distributed._tools.MemTracker`, does not tell the place; the tests compare the bytes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch

from fewbit.models.memory.saved import running_module, storages_of
from fewbit.torch_internals import current_node, each_operator, leaves, sequence_number, sequence_number_of, storage_key

Tensor = torch.Tensor
_BLOCK = 512  # the allocator of CUDA devices rounds up to whole blocks of so many bytes
KEPT, TEMPORARY, GRADIENTS = "kept", "temporary", "gradients"


class Place(NamedTuple):
    """A place in a training step.

    phase   "forward", "backward" or "optimizer"
    module  the name of the module that runs; "" for the model itself, None outside of it, as in a loss
    """

    phase: str
    module: str | None

    def __str__(self) -> str:
        if self.phase == "optimizer":
            return "step of the optimizer"
        return f"{self.phase} of {'the loss' if self.module is None else self.module or 'the model itself'}"


class Seen(NamedTuple):
    """One operator that ran: its place, the bytes alive before and after it, and its call. Do not keep the call: it holds
    tensors."""

    place: Place
    before: int
    after: int
    call: tuple[Any, tuple, dict[str, Any], Any]  # operator, arguments, named ones, output


@dataclass(frozen=True)
class Piece:
    """One storage: its bytes, how many numbers it has room for, its role, and the place in the step that made it, if any."""

    bytes: int
    numbers: int
    role: str
    place: Place | None


class Alive:
    """What is alive on a device.

    bytes    alive now
    most     the largest number of bytes since this was made or `forget` was called
    worst    the place where that was
    pieces   the storages that were alive there
    makers   how many numbers a storage has room for -> the module that made the first such storage in the forward pass
    """

    def __init__(
        self,
        device: torch.device,
        names: Mapping[int, str],
        gradients: Callable[[], Iterable[Tensor]],
        tell: Callable[[Seen], None] | None = None,
    ):
        """names: identity of a module -> its name; gradients: gives the gradients of now; tell: is called with each operator"""
        self.bytes = self.most = 0
        self.worst, self.pieces = Place("forward", None), list[Piece]()
        self.makers: dict[int, str | None] = {}
        self._device, self._names, self._gradients, self._tell = device, names, gradients, tell
        self._alive: dict[int, Piece] = {}
        self._watched: dict[int, Any] = {}
        self._modules: dict[int, str | None] = {}  # number of a node -> the module that made it
        self._next, self._last = sequence_number(), None
        self._in_optimizer = False

    def enter(self, tensors: Iterable[Tensor], role: str) -> None:
        """Count tensors that no operator made, or that got another role, such as the state of an optimizer."""
        for tensor in tensors:
            for storage in storages_of(tensor):
                self._enter(tensor, storage, role, None)

    def watching(self, optimizer: bool = False) -> AbstractContextManager[Any]:
        """A context in which operators are seen; optimizer: whether they belong to the optimizer's step."""
        self._in_optimizer = optimizer
        return each_operator(self._look)

    def forget(self) -> None:
        """Begin again to look for the largest number of bytes."""
        self.most = 0

    def _look(self, operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        place, before = self._place(), self.bytes
        for tensor in leaves(output):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                for storage in storages_of(tensor):
                    if storage_key(storage) not in self._alive:
                        self._enter(tensor, storage, KEPT if place.phase == "forward" else TEMPORARY, place)
        if self.bytes > self.most:
            self.most, self.worst = self.bytes, place
            self.pieces = self._pieces()
        if self._tell is not None:
            self._tell(Seen(place, before, self.bytes, (operator, args, kwargs, output)))

    def _pieces(self) -> list[Piece]:
        gradients = {storage_key(storage) for each in self._gradients() for storage in storages_of(each)}
        if not gradients & self._alive.keys():
            return list(self._alive.values())
        return [
            Piece(piece.bytes, piece.numbers, GRADIENTS, piece.place) if key in gradients else piece
            for key, piece in self._alive.items()
        ]

    def _place(self) -> Place:
        if self._in_optimizer:
            return Place("optimizer", None)
        module, node = running_module(self._names), current_node()
        if node is None:
            now = sequence_number()
            self._modules.update(dict.fromkeys(range(self._next, now), module))
            self._next = now
            return Place("forward", module)
        if module is None:  # else the module is checkpointed and runs again
            module = self._modules.get(sequence_number_of(node), self._last)
        self._last = module
        return Place("backward", module)

    def _enter(self, tensor: Tensor, storage: torch.UntypedStorage, role: str, place: Place | None) -> None:
        key = storage_key(storage)
        if tensor.device != self._device:
            return
        if key in self._alive:
            self._leave(key)
        size = storage.nbytes()
        taken = -(-size // _BLOCK) * _BLOCK if self._device.type == "cuda" else size
        piece = self._alive[key] = Piece(taken, size // tensor.element_size(), role, place)
        if place is not None and place.phase == "forward":
            self.makers.setdefault(piece.numbers, place.module)
        self._watched[key] = ref(storage, lambda _: self._leave(key))
        self.bytes += taken

    def _leave(self, key: int) -> None:
        piece = self._alive.pop(key, None)
        self._watched.pop(key, None)
        self.bytes -= piece.bytes if piece is not None else 0
