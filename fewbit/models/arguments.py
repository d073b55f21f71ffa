"""What the functions on whole models take: a model, batches, and a loss.

A batch is what the model is called with: a single tensor, a tuple (or list) of arguments, or a mapping of named ones. Batches
are any iterable of them; if they are a tensor, its rows are the batches. A loss function takes the model and a batch, which may
then be anything. Without a loss function, the loss is the `loss` of what the model returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.torch_internals import leaves, uncompiled

Tensor = torch.Tensor
LossFunction = Callable[[Any, Any], Tensor]
Filter = Callable[[nn.Module, str], bool]  # of a module and its dotted name
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def check_model(name: str, model: Any) -> nn.Module:
    """The model, without the wrapper of `torch.compile`. InputError, naming the function `name`, if it is not a module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} takes a torch.nn.Module first, got {type(model).__name__}; pass the model itself")
    return uncompiled(model)


def check_batches(name: str, batches: Any, loss_fn: Any) -> None:
    """Raise InputError if `batches` is not an iterable of batches, or if the loss cannot be called."""
    if isinstance(batches, Mapping):
        raise InputError(
            f"{name}(model, batches, loss_fn) goes through several batches, but a {type(batches).__name__} is one batch; "
            "pass a list of batches, or [batch]"
        )
    if not isinstance(batches, Iterable):
        raise InputError(
            f"{name}(model, batches, loss_fn) goes through an iterable of batches, such as a list or a DataLoader; got "
            f"{type(batches).__name__}"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(
            f"loss_fn must be a function of the model and a batch that returns the loss, got {type(loss_fn).__name__}; give "
            "other arguments by name, such as bits=4 or budget=0.3"
        )


def check_filter(filter_fn: Any) -> None:
    """Raise InputError for a filter that cannot be called."""
    if filter_fn is not None and not callable(filter_fn):
        raise InputError(
            f"filter_fn must be a function of a module and its dotted name, or None for all modules; got {filter_fn!r}. "
            "Give numbers of bits by kind as bits, such as bits={'activation': 3, 'linear': 4}"
        )


def check_names(argument: str, names: Any) -> list[str]:
    """The names of modules. InputError, naming the argument, if they are not a collection of texts."""
    found = [*names] if isinstance(names, Iterable) and not isinstance(names, str) else None
    if found is None or not all(isinstance(each, str) for each in found):
        raise InputError(f"{argument} takes a list of the dotted names of modules, such as ['blocks.0']; got {names!r}")
    return found


def names_passed(model: nn.Module, filter_fn: Filter | None) -> Filter | None:
    """A filter that repeats the given filter's answers of now, even if modules get another class later. The given filter is
    still asked about new names."""
    if filter_fn is None:
        return None
    answers = {name: filter_fn(module, name) for name, module in model.named_modules()}
    return lambda module, name: answers[name] if name in answers else filter_fn(module, name)


def no_batch(name: str) -> InputError:
    """The error of the function `name` if there was no batch."""
    return InputError(f"{name} needs a batch, and `batches` gave none; a generator can be used only once, so pass a list")


def arguments_of(batch: Any) -> Arguments:
    """The arguments that a batch passes to a model.

    >>> arguments_of((1, 2)), arguments_of({"x": 1})
    (((1, 2), {}), ((), {'x': 1}))
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def run(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output for a batch. InputError if the model does not take these arguments."""
    args, kwargs = arguments_of(batch)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model does not take this batch ({error}): a batch is a tensor, a tuple or list of forward's arguments, or a "
            "mapping of named ones; give such batches, or, if yours also hold targets, a loss_fn that computes the loss"
        ) from error


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `loss` of what the model returns for a batch; InputError if it has none."""
    loss = loss_in(run(model, batch))
    if loss is None:
        raise InputError("the model's output has no `loss`; give loss_fn, a function of the model and a batch")
    return loss


def surrogate_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `loss` of what the model returns. If there is none, the sum of all outputs times fixed normal numbers."""
    output = run(model, batch)
    loss = loss_in(output)
    if loss is not None:
        return loss
    tensors = [each for each in leaves(output) if isinstance(each, Tensor) and each.requires_grad]
    if not tensors:
        raise InputError("the model returns no tensor that depends on its trainable parameters; give a loss_fn")
    generator, total = torch.Generator().manual_seed(0), torch.zeros((), device=tensors[0].device)
    for each in tensors:
        direction = torch.randn(each.shape, generator=generator).to(each)
        total = total + (each * direction).sum()
    return total


def roots_of(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> list[Tensor]:
    """The tensors at which backward begins: the loss, or all outputs if there is none. InputError if none needs a gradient."""
    if loss_fn is not None:
        return [check_loss(loss_fn(model, batch))]
    output = run(model, batch)
    if (loss := loss_in(output)) is not None:
        return [check_loss(loss)]
    found = [each for each in leaves(output) if isinstance(each, Tensor) and each.requires_grad]
    if not found:
        raise InputError("the model returns no tensor that needs a gradient; is all of it frozen, or does it use no_grad?")
    return found


def check_loss(loss: Any) -> Tensor:
    """The loss. InputError if backward cannot begin with it."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        got = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn(model, batch) must return a real tensor of one element, got {got}; reduce it, as by mean()")
    if not loss.requires_grad:
        raise InputError("the loss depends on no parameter that requires a gradient; does loss_fn detach it, or use no_grad?")
    return loss


def loss_in(output: Any) -> Tensor | None:
    """The `loss` of what a model returned, if it has one."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that need a gradient; InputError if there are none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("no parameter of the model requires a gradient, so nothing is kept for backward; unfreeze some first")
    return parameters
