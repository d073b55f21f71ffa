"""Every private name of torch that fewbit leans on, in one place: why it is needed, and what fails without it.

All other files use public names of torch alone, or what this file offers. The exception is what torch's convolutions and batch
norms leave to subclasses, which `fewbit/nn/layers.py` overrides or calls: `_conv_forward`, `_output_padding`,
`_check_input_dim` and `_reversed_padding_repeated_twice`. `tests/test_torch_internals.py` looks each name
up, so that a release of torch that drops one is noticed at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional

Tensor = torch.Tensor
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
_transform = _functorch.peek_interpreter_stack
# whether a tensor is a batch of the older vmap, behind `is_grads_batched` and `jacobian(vectorize=True)`
is_legacy_batch: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
_number_of_modes = torch._C._len_torch_dispatch_stack


# What looks on. torch.compiler.is_compiling() is public; nothing public tells of transforms, modes and levels.


def is_watched(x: Tensor) -> bool:
    """Whether a compiler, a functorch transform, a dispatch mode (fake tensors, a tracer, a counter) or forward-mode
    differentiation is active, or x is a batch of the older vmap behind `is_grads_batched` and `jacobian(vectorize=True)`.

    Without it autograd functions in the old style and direct calls of kernels would be traced wrongly, or not at all.
    """
    return is_compiling() or is_watched_in_eager(x)


def is_watched_in_eager(x: Tensor) -> bool:
    """The same in code that a compiler is known not to trace."""
    return _transform() is not None or _number_of_modes() > 0 or forward_ad._current_level >= 0 or is_legacy_batch(x)


def is_transformed() -> bool:
    """Whether a functorch transform is active, under which tensors change their identity."""
    return _transform() is not None


def is_dispatched() -> bool:
    """Whether a dispatch mode is active: constants have to be made known to it."""
    return _number_of_modes() > 0


# whether torch.jit.trace runs, which torch.jit.is_tracing asks too, behind torch.jit.is_scripting
is_traced: Callable[[], bool] = torch._C._is_tracing


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, of torch.autograd.forward_ad or of torch.func.jvp."""
    return forward_ad._current_level >= 0


def levels(x: Tensor) -> Iterator[Tensor]:
    """x as each functorch transform wrapped it, from the innermost transform to the plain tensor.

    Without it `grad(vmap(f))` would look as if x needed no gradient, and f would silently keep nothing.
    """
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def has_tangent(x: Tensor) -> bool:
    """Whether x takes part in forward-mode differentiation, at any level: such calls get an error, not a lost tangent."""
    # a tensor below the innermost transform does not show its tangent, but was wrapped by each jvp that it takes part in
    stack = _functorch.get_interpreter_stack() or []
    jvp_levels = {each.level() for each in stack if each.key() == _functorch.TransformType.Jvp}
    *wrappers, plain = levels(x)
    if any(_functorch.maybe_get_level(wrapper) in jvp_levels for wrapper in wrappers):
        return True
    return forward_ad.unpack_dual(plain).tangent is not None


def unwatched() -> AbstractContextManager[None]:
    """A context in which nothing looks on: tensors made here outlast every mode and transform.

    Without it a table first asked for under a transform would stay wrapped by it, and break all later calls. Where nothing
    looks on as it is, nothing is switched, so that an interrupt can leave nothing switched.
    """
    if is_transformed() or is_dispatched() or torch.is_inference_mode_enabled():
        return _with_all_switched_off()
    return nullcontext()


@contextmanager
def _with_all_switched_off() -> Iterator[None]:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


class EagerFunction(torch.autograd.Function):
    """A Function that is applied where no functorch transform is active, which `Function.apply` would ask for each time.

    That, and a look at each argument for tensors that have outlived their transform, which kernels refuse, takes as long as all
    the rest of the call.
    """

    apply = vars(torch._C._FunctionBase)["apply"]


# Tensors: what identifies one, and what may be done to it


def state_of(tensor: Tensor) -> tuple:
    """What differs after a tensor was changed: its version, its strides, and, after `tensor.data = ...`, its storage.

    Without it codes would be found for a tensor that no longer holds what they are of.
    """
    return tensor._version, tensor.stride(), tensor.untyped_storage()._cdata


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place. RuntimeError for tensors made in inference mode, which do not count."""
    return tuple(each._version for each in tensors)


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of; a reshape is then known to hold the same numbers."""
    return tensor._base


def is_empty(tensor: Tensor) -> bool:
    """Whether the tensor is known to have no elements: where only the data tell, a compiler that is asked breaks its graph."""
    number: Any = tensor.numel()
    if isinstance(number, int):
        return number == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy

    return guard_or_false(number == 0)


def is_view(tensor: Tensor) -> bool:
    """Whether the tensor is a view: a Function with two outputs may not overwrite one."""
    return tensor._is_view()


def is_view_of_several(tensor: Tensor) -> bool:
    """Whether torch forbids to overwrite this view: one of several of a function such as chunk, or made without gradients.

    torch checks it too, but after it has written.
    """
    views: Any = torch._C._autograd  # type: ignore[attr-defined]
    return tensor._is_view() and views._get_creation_meta(tensor) != views.CreationMeta.DEFAULT


def not_a_view(tensor: Tensor) -> Tensor:
    """The tensor, as one that is no view, in the same memory.

    Without it torch refuses to change what a Function returns in place, where its operation ended in a view.
    """
    return torch.ops.aten._unsafe_view(tensor, tensor.shape) if tensor._is_view() else tensor


def is_zero(tensor: Tensor) -> bool:
    """Whether the tensor stands for zeros without memory, as forward-mode differentiation makes them: it has no address."""
    return tensor._is_zerotensor()


def storage_key(storage: torch.UntypedStorage) -> int:
    """What identifies a storage; of fake tensors too, whose address is 0."""
    return storage._cdata


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The dense tensors that a sparse one or a subclass that wraps others consists of; else the tensor itself."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from parts_of(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout == torch.strided:
        yield tensor


# Operations that torch's own modules call, for outputs that are theirs bit for bit


def batch_norm_with_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    """What torch.nn.functional.batch_norm calls: it gives mean and 1/σ besides, which would else be computed again."""
    return torch._batch_norm_impl_index(*arguments)  # type: ignore[attr-defined]


def check_batch_size(size: Sequence[int]) -> None:
    """torch's own error for a batch norm in training that sees one value a channel."""
    functional._verify_batch_size(size)  # type: ignore[attr-defined]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that torch's group norm gives its output, of which it would else differ in strides."""
    from torch._prims_common import suggest_memory_format

    return suggest_memory_format(x)


# Backward


def without_graph() -> AbstractContextManager[None]:
    """A context in which operations leave no graph, yet choose their kernels as where gradients are computed.

    Under torch.no_grad, and for detached tensors, some of torch's recurrent layers round otherwise: they ask whether gradients
    are enabled, and whether weights need one.
    """
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[attr-defined]


def is_backward() -> bool:
    """Whether a backward pass runs on this thread: what checkpointing runs again then must not be counted twice."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def current_node() -> Any:
    """The node whose backward runs on this thread; None where none does. Public names tell of a node in its own hooks alone."""
    return torch._C._current_autograd_node() if is_backward() else None  # type: ignore[attr-defined]


def raw_saved(node: Any) -> Iterator[Any]:
    """What an autograd node holds, without unpacking it: to unpack makes a checkpointed region run again."""
    for name in _raw_saved_names(type(node)):
        saved = getattr(node, name)
        yield from saved if isinstance(saved, (list, tuple)) else (saved,)


def raw_saved_by_name(node: Any) -> Iterator[tuple[str, Any]]:
    """What hooks made of all that a node saved, by torch's names for that."""
    for attribute in _raw_saved_names(type(node)):
        saved = getattr(node, attribute)
        for each in saved if isinstance(saved, (list, tuple)) else (saved,):
            yield attribute.removeprefix("_raw_saved_"), getattr(each, "data", None)


# the number that the next node of this thread's graphs gets, by which to tell which nodes a call has made
sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]


def sequence_number_of(node: Any) -> int:
    """The number of a node; -1 for those that accumulate gradients, which have the highest of all."""
    return -1 if type(node).__name__ == "AccumulateGrad" else node._sequence_nr()


@lru_cache(maxsize=1024)
def _raw_saved_names(node: type) -> list[str]:
    return [name for name in dir(node) if name.startswith("_raw_saved")]


def hook_on_saved() -> Any:
    """The function that packs what is saved for backward now, as in checkpointing or offloading; None without one.

    Without it codes would be shared across the edge of a checkpointed region, which does not find them when it runs again.
    """
    hooks = hooks_on_saved()
    return hooks and hooks[0]


def hooks_on_saved() -> Any:
    """The functions that pack and unpack what is saved for backward now; None without."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


def keeps_its_output(node: type) -> bool:
    """Whether nodes of this class hold their own output for backward. Asked of the class: a node would unpack its tensor."""
    if node.__name__ == "PowBackward1":  # keeps its output for the exponent's gradient alone
        return False
    return hasattr(node, "_saved_result") or hasattr(node, "_saved_output")


def has_hook_on_accumulated_gradient(parameter: Tensor) -> bool:
    """Whether something waits for the parameter's gradient, such as an optimizer that steps within backward."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


# What runs: operators and allocations


def each_operator(look: Callable[[Any, tuple, dict[str, Any], Any], None]) -> AbstractContextManager[Any]:
    """A context in which look(operator, args, kwargs, output) is called after each operator, those of backward included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        only_looks = True

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            output = func(*args, **(kwargs or {}))
            look(func, args, kwargs or {}, output)
            return output

    return Looking()


def writes_into_arguments(operator: Any) -> bool:
    """Whether an operator, as `each_operator` shows it, changes tensors that it is called with: what it returns is no view."""
    return operator._schema.is_mutable


def allocations(action: Callable[[], Any]) -> list[int]:
    """Bytes that each allocation on the CPU in action() took, or gave back as a negative number, in order.

    What is public of a profile tells of sums alone, from which no peak follows.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr when it begins and ends
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        action()
    ended: Any = profile
    return [event.nbytes() for event in ended.kineto_results.events() if event.name() == "[memory]"]


# Modules: their tables of state, which have no public form that can be written back


def registered(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The module's own dictionaries of parameters, buffers and submodules, by the names of the attributes that hold them."""
    return {name: vars(module)[name] for name in ("_parameters", "_buffers", "_modules")}


def buffers_of(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """The module's own dictionary of buffers."""
    return module._buffers


# The compiler and the interception of functions


def uncompiled(model: Any) -> Any:
    """The module inside of what torch.compile returned, or the model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module was compiled, by torch.compile or its own method."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loaded by whoever has compiled something
    wrapper = () if dynamo is None else dynamo.OptimizedModule
    return isinstance(module, wrapper) or module._compiled_call_impl is not None


def dynamo_is_loaded() -> bool:
    """Whether torch's compiler is loaded, which takes seconds: without it nothing is compiled."""
    return "torch._dynamo" in sys.modules


def function_modes() -> Iterator[Any]:
    """The modes that intercept torch's functions on this thread, the innermost first."""
    for position in reversed(range(torch._C._len_torch_function_stack())):
        yield torch._C._get_function_stack_at(position)


def traces_a_region() -> bool:
    """Whether the compiler traces what becomes a graph within its graph, as a checkpointed region does: there it lets no mode
    be entered. To be asked while it traces, as a constant."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return not InstructionTranslator.current_tx().output.is_root_tracer()


# whether a mode intercepts torch's functions on this thread: within `unintercepted` none does
is_intercepted: Callable[[], bool] = torch._C._is_torch_function_mode_enabled  # type: ignore[attr-defined]

# a context in which calls go to torch directly, which spares a few microseconds at each look at a tensor
unintercepted: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction


def native_functions() -> Any:
    """The module of torch's functions that `torch.nn.functional` calls in C: F.gelu is torch._C._nn.gelu itself."""
    return torch._C._nn  # type: ignore[attr-defined]


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_torchs_own(kind: type[Tensor]) -> bool:
    """Whether operations on tensors of this class are torch's own: on plain tensors, parameters, and those with which torch
    itself looks on (fake and functional ones). Another class that sees operations, as DTensor, has a mind of its own."""
    if kind is Tensor or hasattr(kind, "_mode_key"):
        return True
    sees_nothing = torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    return (kind.__torch_function__, kind.__torch_dispatch__) == sees_nothing  # type: ignore[attr-defined]


def fake_tensor_class() -> type[Tensor]:
    """The class of fake tensors, a plain tensor in all but its memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether x is a fake tensor, of sizes alone: what is done to it stands for what would be done to a real one."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # loaded by whoever has made one
    return fake is not None and type(x) is fake.FakeTensor


def is_rehearsal(x: Tensor) -> bool:
    """Whether x is a fake tensor and no more than that looks on, `each_operator` apart: a run for its sizes, of which no trace
    is made."""
    if not is_fake(x) or is_compiling() or is_transformed():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    others = [each for each in _get_current_dispatch_mode_stack() if not getattr(each, "only_looks", False)]
    return len(others) == 1


def fake_mode() -> Any:
    """A mode in which operations compute sizes alone. Loads sympy."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def needs_numbers(error: BaseException) -> bool:
    """Whether it was raised since fake tensors have no numbers: control flow looked at some, or a shape depends on some."""
    from torch._subclasses import fake_tensor

    return isinstance(error, (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException))


@contextmanager
def silent_fakes() -> Iterator[None]:
    """Within this context torch logs on this thread no trace of what fails on fake tensors: the error itself tells."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def map_tensors(function: Any, thing: Any) -> Any:
    """The same containers with function(tensor) for each tensor; torch's own idea of what a container is."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, thing)


def leaves(thing: Any) -> list[Any]:
    """All that lies in nested containers, as torch sees them."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(thing)


def constant_number(value: Any) -> Any:
    """The number itself, of which a compiler would make a symbol where it changes between calls."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # loads sympy

    return guard_scalar(value)
