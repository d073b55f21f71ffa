"""What a forward pass keeps for backward: every storage that autograd holds, and which modules and operations saved it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn

from fewbit.autograd.rest import Held
from fewbit.torch_internals import dynamo_is_loaded, parts_of, raw_saved, storage_key

Tensor = torch.Tensor
ACTIVATIONS = "activations"
UNKNOWN = "unknown"
Slot = tuple[str, int]


class Saver(NamedTuple):
    """The module and the operation that saved a tensor.

    module     dotted name of the innermost module that was running; "" is the model itself
    operation  name of the autograd node without "Backward", such as "Addmm"; "checkpoint" for the input of a checkpointed
               region; "unknown" if the node cannot be reached from the model's outputs
    """

    module: str
    operation: str


@dataclass(frozen=True)
class Storage:
    """One piece of memory that is kept.

    role    "activations", "parameters", "buffers", "inputs" or "tables"
    dtype, shape  of the first saved tensor that lies in it
    savers  in the order of the forward pass; the storage counts for the first, the others share it
    slots   each time it was saved: the module, and how many tensors that module had saved before. In another run the slots of
            an unchanged module are the same
    """

    role: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    savers: tuple[Saver, ...]
    slots: tuple[Slot, ...]


class _Token:
    """Stands for a saved tensor in the graph, and dies with the node that saved it."""

    __slots__ = ("__weakref__", "caller", "module", "slot", "tensor")

    def __init__(self, tensor: Tensor, module: str, caller: str, number: int):
        self.tensor, self.module, self.caller, self.slot = tensor, module, caller, (module, number)


def record(model: nn.Module, call: Callable[[], Any], roles: Callable[[], Mapping[int, str]]) -> list[Storage]:
    """The storages that call(), a forward pass of the model, keeps for backward while its output lives, in the order of saving.

    roles  called after the forward pass; returns identity of a storage -> its role, for storages that are not activations

    This sees only what goes through `torch.autograd.graph.saved_tensors_hooks`: all that operations and autograd Functions save
    for backward, but not the tensors that a Function keeps as attributes.
    """
    names = {id(module): re.sub(r"(^|\.)_orig_mod$", "", name) for name, module in model.named_modules()}  # of torch.compile
    tokens: list[ref[_Token]] = []
    numbers: Counter[str] = Counter()

    def pack(tensor: Tensor) -> _Token:
        module, caller = _where(names)
        # detached: a saved output would hold its node, which holds this token, which holds the output: a cycle never freed
        token = _Token(tensor.detach(), module, caller, numbers[module])
        numbers[module] += 1
        tokens.append(ref(token))
        return token

    # a compiler would compile the hook too, so it is disabled; if none is loaded, this must not load it, which takes long
    hook: Any = torch.compiler.disable(pack) if dynamo_is_loaded() else pack
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda token: token.tensor):
        output = call()
    operations = _operations(tensor for root in (output, *map(vars, model.modules())) for tensor in tensors_in(root))
    living = [token for token in (each() for each in tokens) if token is not None]
    known = roles()
    pieces: dict[int, list[tuple[_Token, torch.UntypedStorage]]] = {}
    for token in living:
        for storage in storages_of(token.tensor):
            pieces.setdefault(storage_key(storage), []).append((token, storage))
    found = [_storage(known.get(key, ACTIVATIONS), saved, operations) for key, saved in pieces.items()]
    del output  # it held the graph until here, and so all that was counted
    return found


def _storage(role: str, saved: list[tuple[_Token, torch.UntypedStorage]], operations: Mapping[int, str]) -> Storage:
    savers = (Saver(token.module, operations.get(id(token), token.caller)) for token, _ in saved)
    first, storage = saved[0]
    dtype, shape = str(first.tensor.dtype).removeprefix("torch."), tuple(first.tensor.shape)
    slots = tuple(token.slot for token, _ in saved)
    return Storage(role, storage.nbytes(), dtype, shape, tuple(dict.fromkeys(savers)), slots)


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that a tensor lies in: one, or those of the parts of a sparse tensor or a tensor subclass."""
    yield from (part.untyped_storage() for part in parts_of(tensor))


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, a container, a dataclass or a plain object such as a model's output. Modules are left out."""
    seen, pending = set(), [thing]
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, (nn.Module, type, str, bytes, int, float)):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        else:
            pending += reversed(_parts(each))


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if is_dataclass(thing):
        return [getattr(thing, field.name, None) for field in fields(thing)]
    if type(thing).__module__.split(".")[0] not in ("torch", "builtins", "functools"):
        return list(getattr(thing, "__dict__", {}).values())
    return []


def _where(names: Mapping[int, str]) -> tuple[str, str]:
    """The innermost module whose method is running, and what to call the operation if its node cannot be found.

    Both are read from the stack. Hooks on modules would fail for modules that raise, recur or are called by another method than
    `forward`, and would make compiled modules compile again.
    """
    caller = UNKNOWN
    for frame in _frames():
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            caller = "checkpoint"
        if (name := _module_of(frame, names)) is not None:
            return name, caller
    return "", caller


def running_module(names: Mapping[int, str]) -> str | None:
    """The name of the innermost module whose method is running; None if there is none."""
    return next((name for frame in _frames() if (name := _module_of(frame, names)) is not None), None)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module_of(frame: FrameType, names: Mapping[int, str]) -> str | None:
    return names.get(id(frame.f_locals.get("self"))) if "self" in frame.f_code.co_varnames[:1] else None


def shape_label(tensor: Tensor) -> str:
    """dtype and shape, such as "float32 4×16"."""
    return dtype_and_shape(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> str:
    """The same text, from a dtype and a shape."""
    return f"{dtype} {'×'.join(map(str, shape)) or 'scalar'}"


def operation_name(node: Any) -> str:
    """What reports call the operation of an autograd node, such as "Addmm"."""
    return re.sub(r"Backward\d*$", "", type(node).__name__).lstrip("_")


def _operations(outputs: Iterable[Tensor]) -> dict[int, str]:
    """Identity of a token -> the operation of the node that holds it, for all nodes that the outputs depend on.

    What nodes hold is read without unpacking it, since unpacking makes a checkpointed region run again.
    """
    found: dict[int, str] = {}
    pending = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        name = operation_name(node)
        for saved in raw_saved(node):
            held = getattr(saved, "data", None)
            for packed in held.packed if isinstance(held, Held) else (held,):
                if isinstance(packed, _Token):
                    found[id(packed)] = name
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                pending.append(other)
    return found
