"""All private names of torch that fewbit uses, with the reason for each.

Other files use only public names of torch, or this file. The exceptions are methods of torch's convolutions and batch norms
that `fewbit/nn/layers.py` overrides or calls: `_conv_forward`, `_output_padding`, `_check_input_dim` and
`_reversed_padding_repeated_twice`. `tests/test_torch_internals.py` checks that every name exists, so a release of torch that
drops one is noticed at once.

Code is called watched while a compiler, a functorch transform, a dispatch mode or forward-mode differentiation is active.
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
# whether a tensor is a batch of the older vmap, which `is_grads_batched` and `jacobian(vectorize=True)` use
is_legacy_batch: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
_number_of_modes = torch._C._len_torch_dispatch_stack


# Compilers, transforms, modes and levels. torch.compiler.is_compiling() is public; nothing public tells about the others.


def is_watched(x: Tensor) -> bool:
    """Whether a compiler, a functorch transform, a dispatch mode (fake tensors, a tracer, a counter) or forward-mode
    differentiation is active, or x is a batch of the older vmap.

    In these cases, old-style autograd functions and direct calls of kernels would be traced wrongly, or not at all.
    """
    return is_compiling() or is_watched_in_eager(x)


def is_watched_in_eager(x: Tensor) -> bool:
    """The same, for code that no compiler traces."""
    return _transform() is not None or _number_of_modes() > 0 or forward_ad._current_level >= 0 or is_legacy_batch(x)


def is_transformed() -> bool:
    """Whether a functorch transform is active, under which tensors change their identity."""
    return _transform() is not None


def is_dispatched() -> bool:
    """Whether a dispatch mode is active. It then has to be told about constants."""
    return _number_of_modes() > 0


# whether torch.jit.trace runs; torch.jit.is_tracing gives the same, but checks torch.jit.is_scripting first
is_traced: Callable[[], bool] = torch._C._is_tracing


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, of torch.autograd.forward_ad or of torch.func.jvp."""
    return forward_ad._current_level >= 0


def levels(x: Tensor) -> Iterator[Tensor]:
    """x at each level of functorch transforms, from the innermost wrapper to the plain tensor.

    Without this, x would seem to need no gradient in `grad(vmap(f))`, and f would silently keep nothing.
    """
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def has_tangent(x: Tensor) -> bool:
    """Whether x takes part in forward-mode differentiation at any level. Such calls raise, or the tangent would be lost."""
    # a tensor below the innermost transform does not show its tangent, but every jvp that it takes part in has wrapped it
    stack = _functorch.get_interpreter_stack() or []
    jvp_levels = {each.level() for each in stack if each.key() == _functorch.TransformType.Jvp}
    *wrappers, plain = levels(x)
    if any(_functorch.maybe_get_level(wrapper) in jvp_levels for wrapper in wrappers):
        return True
    return forward_ad.unpack_dual(plain).tangent is not None


def unwatched() -> AbstractContextManager[None]:
    """A context without modes and transforms. Tensors made in it outlast every mode and transform.

    Without this, a table that is first used under a transform would stay wrapped by it and break all later calls. If no mode or
    transform is active, nothing is switched off, so an interrupt cannot leave anything switched off.
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
    """A Function for use outside of functorch transforms. It skips two checks of `Function.apply`.

    These are whether a transform is active, and whether an argument has outlived its transform, which kernels refuse anyway.
    They take as long as the rest of the call.
    """

    apply = vars(torch._C._FunctionBase)["apply"]


# Tensors: their identity, and what may be done to them


def state_of(tensor: Tensor) -> tuple:
    """Version, strides and storage of a tensor. Any change of the tensor changes one of them; `tensor.data = ...` its storage.

    Without this, codes would be found for a tensor that no longer holds the same numbers.
    """
    return tensor._version, tensor.stride(), tensor.untyped_storage()._cdata


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor was changed in place. RuntimeError for tensors made in inference mode, which count no changes."""
    return tuple(each._version for each in tensors)


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor of which this one is a view, or None. It tells that a reshaped tensor holds the same numbers."""
    return tensor._base


def is_empty(tensor: Tensor) -> bool:
    """Whether the tensor is known to have no elements. If the size depends on data, the answer is False: a comparison would
    break a compiler's graph."""
    number: Any = tensor.numel()
    if isinstance(number, int):
        return number == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy

    return guard_or_false(number == 0)


def is_view(tensor: Tensor) -> bool:
    """Whether the tensor is a view. A Function with two outputs may not overwrite a view."""
    return tensor._is_view()


def is_view_of_several(tensor: Tensor) -> bool:
    """Whether torch forbids overwriting this view: it is one of several from a function such as chunk, or was made without
    gradients. torch checks this too, but only after it has written.
    """
    views: Any = torch._C._autograd  # type: ignore[attr-defined]
    return tensor._is_view() and views._get_creation_meta(tensor) != views.CreationMeta.DEFAULT


def not_a_view(tensor: Tensor) -> Tensor:
    """The same tensor in the same memory, but not a view.

    Without this, torch refuses in-place changes of a Function's output if its operation ended in a view.
    """
    return torch.ops.aten._unsafe_view(tensor, tensor.shape) if tensor._is_view() else tensor


def is_zero(tensor: Tensor) -> bool:
    """Whether the tensor stands for zeros without memory or address, which forward-mode differentiation makes."""
    return tensor._is_zerotensor()


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key that identifies a storage. It also works for fake tensors, whose address is 0."""
    return storage._cdata


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The dense tensors inside a sparse tensor or a wrapper subclass; for other tensors the tensor itself."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from parts_of(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout == torch.strided:
        yield tensor


# Operations that torch's own modules call. With them outputs equal torch's bit for bit.


def batch_norm_with_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    """The operation that torch.nn.functional.batch_norm calls. It also returns mean and 1/σ, so they are not computed again."""
    return torch._batch_norm_impl_index(*arguments)  # type: ignore[attr-defined]


def check_batch_size(size: Sequence[int]) -> None:
    """Raise torch's own error for a batch norm in training with one value per channel."""
    functional._verify_batch_size(size)  # type: ignore[attr-defined]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that torch's group norm gives its output. Without it, fewbit's output would have other strides."""
    from torch._prims_common import suggest_memory_format

    return suggest_memory_format(x)


# Backward


def without_graph() -> AbstractContextManager[None]:
    """A context in which operations leave no graph, but choose the same kernels as with gradients.

    Under torch.no_grad, and for detached tensors, some of torch's recurrent layers round differently. They check whether
    gradients are enabled, and whether weights need one.
    """
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[attr-defined]


def is_backward() -> bool:
    """Whether a backward pass runs on this thread. Checkpointing runs forward code in it again, which must not count twice."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def current_node() -> Any:
    """The node whose backward runs on this thread; None if none does. Public names give a node only in its own hooks."""
    return torch._C._current_autograd_node() if is_backward() else None  # type: ignore[attr-defined]


def raw_saved(node: Any) -> Iterator[Any]:
    """What an autograd node holds, without unpacking it. Unpacking would make a checkpointed region run again."""
    for name in _raw_saved_names(type(node)):
        saved = getattr(node, name)
        yield from saved if isinstance(saved, (list, tuple)) else (saved,)


def raw_saved_by_name(node: Any) -> Iterator[tuple[str, Any]]:
    """The objects that hooks made of the tensors that a node saved, with torch's names for these."""
    for attribute in _raw_saved_names(type(node)):
        saved = getattr(node, attribute)
        for each in saved if isinstance(saved, (list, tuple)) else (saved,):
            yield attribute.removeprefix("_raw_saved_"), getattr(each, "data", None)


# the number that the next node of this thread's graphs gets; it tells which nodes a call has made
sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]


def sequence_number_of(node: Any) -> int:
    """The number of a node; -1 for nodes that accumulate gradients, to which torch gives the highest number."""
    return -1 if type(node).__name__ == "AccumulateGrad" else node._sequence_nr()


@lru_cache(maxsize=1024)
def _raw_saved_names(node: type) -> list[str]:
    return [name for name in dir(node) if name.startswith("_raw_saved")]


def hook_on_saved() -> Any:
    """The hook that currently packs tensors saved for backward, as in checkpointing or offloading; None without a hook.

    Without this, codes would be shared across the edge of a checkpointed region. The region would not find them when it runs
    again.
    """
    hooks = hooks_on_saved()
    return hooks and hooks[0]


def hooks_on_saved() -> Any:
    """The hooks that currently pack and unpack tensors saved for backward; None without hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


def keeps_its_output(node: type) -> bool:
    """Whether nodes of this class hold their own output for backward. It takes the class: a node would unpack the tensor."""
    if node.__name__ == "PowBackward1":  # it keeps its output only for the exponent's gradient
        return False
    return hasattr(node, "_saved_result") or hasattr(node, "_saved_output")


def has_hook_on_accumulated_gradient(parameter: Tensor) -> bool:
    """Whether the parameter has a hook on its accumulated gradient, such as an optimizer that steps within backward."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


# What runs: operators and allocations


def each_operator(look: Callable[[Any, tuple, dict[str, Any], Any], None]) -> AbstractContextManager[Any]:
    """A context in which look(operator, args, kwargs, output) is called after each operator, also in backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        only_looks = True

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            output = func(*args, **(kwargs or {}))
            look(func, args, kwargs or {}, output)
            return output

    return Looking()


def writes_into_arguments(operator: Any) -> bool:
    """Whether an operator, as `each_operator` gives it, changes its arguments. Its result is then not a view."""
    return operator._schema.is_mutable


def allocations(action: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation on the CPU in action(), in order. Bytes that are given back are negative.

    The public part of a profile has only sums, which do not give the peak.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler writes to stderr when it begins and ends
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        action()
    ended: Any = profile
    return [event.nbytes() for event in ended.kineto_results.events() if event.name() == "[memory]"]


# Modules: their dictionaries of state. Public names do not let these be written back.


def registered(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The module's own dictionaries of parameters, buffers and submodules, by the names of the attributes that hold them."""
    return {name: vars(module)[name] for name in ("_parameters", "_buffers", "_modules")}


def buffers_of(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """The module's own dictionary of buffers."""
    return module._buffers


# The compiler and the interception of functions


def uncompiled(model: Any) -> Any:
    """The module inside an object that torch.compile returned; for other models the model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module was compiled, by torch.compile or its own method."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # it is loaded if anything was compiled
    wrapper = () if dynamo is None else dynamo.OptimizedModule
    return isinstance(module, wrapper) or module._compiled_call_impl is not None


def dynamo_is_loaded() -> bool:
    """Whether torch's compiler is loaded, which takes seconds. If it is not, nothing is compiled."""
    return "torch._dynamo" in sys.modules


def function_modes() -> Iterator[Any]:
    """The modes that intercept torch's functions on this thread, the innermost first."""
    for position in reversed(range(torch._C._len_torch_function_stack())):
        yield torch._C._get_function_stack_at(position)


def traces_a_region() -> bool:
    """Whether the compiler traces a graph within its graph, such as a checkpointed region. Modes cannot be entered there.

    Call this as a constant while the compiler traces.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return not InstructionTranslator.current_tx().output.is_root_tracer()


# whether a mode intercepts torch's functions on this thread; false within `unintercepted`
is_intercepted: Callable[[], bool] = torch._C._is_torch_function_mode_enabled  # type: ignore[attr-defined]

# a context in which calls go to torch directly; it saves a few microseconds at each access to a tensor
unintercepted: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction


def native_functions() -> Any:
    """The module of torch's C functions behind `torch.nn.functional`: F.gelu is torch._C._nn.gelu itself."""
    return torch._C._nn  # type: ignore[attr-defined]


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_torchs_own(kind: type[Tensor]) -> bool:
    """Whether operations on tensors of this class are torch's own.

    They are for plain tensors, parameters, and the classes of torch's own modes (fake and functional tensors). Other classes
    that intercept operations, such as DTensor, compute in their own way.
    """
    if kind is Tensor or hasattr(kind, "_mode_key"):
        return True
    sees_nothing = torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    return (kind.__torch_function__, kind.__torch_dispatch__) == sees_nothing  # type: ignore[attr-defined]


def fake_tensor_class() -> type[Tensor]:
    """The class of fake tensors, which are like plain tensors but have no memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether x is a fake tensor, which has a size but no numbers. Operations on it stand for those on a real tensor."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # it is loaded if there are fake tensors
    return fake is not None and type(x) is fake.FakeTensor


def is_rehearsal(x: Tensor) -> bool:
    """Whether x is a fake tensor in a run for sizes only, of which no trace is made. No other mode or transform is then active,
    except `each_operator`."""
    if not is_fake(x) or is_compiling() or is_transformed():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    others = [each for each in _get_current_dispatch_mode_stack() if not getattr(each, "only_looks", False)]
    return len(others) == 1


def fake_mode() -> Any:
    """A mode in which operations compute only sizes. It loads sympy."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def needs_numbers(error: BaseException) -> bool:
    """Whether the error was raised because fake tensors have no numbers: control flow or a shape depends on numbers."""
    from torch._subclasses import fake_tensor

    return isinstance(error, (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException))


@contextmanager
def silent_fakes() -> Iterator[None]:
    """Within this context torch logs no tracebacks of errors on fake tensors, for this thread. The error itself is enough."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def map_tensors(function: Any, thing: Any) -> Any:
    """The same containers with function(tensor) for each tensor. torch decides what is a container."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, thing)


def leaves(thing: Any) -> list[Any]:
    """All items of nested containers. torch decides what is a container."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(thing)


def constant_number(value: Any) -> Any:
    """The number as a constant. Without this, a compiler would make a symbol of a number that changes between calls."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # loads sympy

    return guard_scalar(value)
