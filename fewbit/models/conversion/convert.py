"""Convert whole models in place: let torch's modules keep codes, and undo that."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import nn

from fewbit.autograd.sharing import is_kept_exactly
from fewbit.constants import DEFAULT_MODEL_BITS, EXACT
from fewbit.errors import ConversionWarning
from fewbit.models.arguments import Filter, check_filter, check_model, check_names
from fewbit.models.conversion.engine import CALLS, Converted, convert_modules, left_exact, revert_modules
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.grouping import some
from fewbit.nn.activations import CodedActivation
from fewbit.record import plural

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("fewbit")


def convert(
    model: Model,
    bits: Bits = DEFAULT_MODEL_BITS,
    filter_fn: Filter | None = None,
    *,
    coding: str | None = None,
    recompute: Collection[str] = (),
) -> Model:
    """Let the modules of a model keep codes for backward, in place. The forward pass stays exact, bit for bit.

    model      Modules of known classes are converted: activations (torch's and Hugging Face's), linear layers, convolutions,
               norms, GLU, recurrent layers, dropout, pooling and padding. Subclasses are converted too if they do not override
               `forward`. All other modules that have a forward of their own, and torch's MultiheadAttention,
               TransformerEncoderLayer and TransformerDecoderLayer, run that forward as it is. The calls of torch's functions
               in it are coded, as by `fewbit.patch`: gates, written-out norms, attention, losses. Each module stays the same
               object, with its weights, hooks, names and state. Only its class changes, to a subclass of its own class.
    bits       Bits of one code, 1 to 8. One number is for every kind of saved tensor. A mapping names kinds, such as
               {"activation": 3, "linear": 4}, and all other kinds stay exact. The kinds are "activation"; "linear", inputs of
               linear layers and convolutions, and of other products with weights; "norm"; "product", factors of elementwise
               products, and squares; "attention", where query and key get one bit more; "recurrent", inputs and outputs of
               LSTMs, GRUs and plain RNNs; "rest", what else torch's operations keep, at 8 bits or more if one number is given.
               Dropout, pooling and padding are always converted, since their codes lose nothing.
               If "linear" is named, the operation that makes a linear layer's input codes it once, for both. That code has the
               larger of the two numbers of bits.
    filter_fn  A function of a module and its dotted name that says whether to convert the module. Modules that it leaves out
               stay exact, also inside converted ones.
    coding     Coding of the tables, as in `fewbit.design`. None is the optimal one.
    recompute  Dotted names of modules, such as the blocks of a model. They keep only their inputs and run their forward again
               in backward, as `torch.utils.checkpoint` does. They may be coded too.
    Returns    the model

    A former conversion of the model is undone first. Modules that were built as fewbit's stay as they are. The logger "fewbit"
    reports at level INFO what was done. A ConversionWarning says that nothing was converted. If only some kinds are coded, a
    model may keep more bytes than an exact one. `fewbit.memory(model, batch).plan(bits).convert()` converts only what pays.

    Raises DesignError (bits, coding) or InputError (not a module, a filter that cannot be called, names to recompute that the
    model lacks) before anything is changed.

    >>> model = convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), bits=4)
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True, bits=4)
      (1): GELU(approximate='none', bits=4, shared=True)
      (2): Linear(in_features=16, out_features=8, bias=True, bits=4)
    )
    >>> revert(model)[1]
    GELU(approximate='none')
    """
    check_model("convert", model)
    check_filter(filter_fn)
    setting = Setting.of(bits, coding)
    names = check_names("recompute", recompute)
    log_conversion(model, setting, convert_modules(model, setting, filter_fn, recompute=names), names)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`, in place: the modules have torch's own classes again. Returns the model.

    Modules that were built as fewbit's stay as they are. Raises InputError if `model` is not a module.
    """
    check_model("revert", model)
    reverted = revert_modules(model)
    _log.info("revert: %s of the %s", plural(len(reverted), "module"), type(model).__name__)
    return model


def log_conversion(
    model: nn.Module, setting: Setting, converted: Sequence[Converted], recomputed: Collection[str] = ()
) -> None:
    """Log what a conversion did, in one line, or warn that it did nothing."""
    if recomputed:
        _log.info("convert: %s of the %s run again in backward", plural(len(recomputed), "module"), type(model).__name__)
    elif not converted:
        warnings.warn(
            f"no module of the {type(model).__name__} was converted with {setting}: no module is of these kinds, or "
            f"filter_fn let none through{_left_exact(model, setting)}. Modules that were built as fewbit's stay as they are. "
            "To code calls of functions such as torch.nn.functional.gelu, put `with fewbit.patch(bits):` around that code",
            ConversionWarning,
            stacklevel=3,
        )
    if converted and _log.isEnabledFor(logging.INFO):
        kinds = Counter(each.kind for each in converted)
        calls = kinds.pop(CALLS, 0)
        numbers = [f"{number} {_described(kind, setting)}" for kind, number in kinds.items()]
        numbers += [f"{calls} whose calls of functions are coded"] if calls else []
        total = plural(sum(1 for _ in model.modules()), "module")
        _log.info(
            "convert: %d of %s of the %s: %s%s",
            len(converted),
            total,
            type(model).__name__,
            ", ".join(numbers),
            _left_exact(model, setting) + _caveat(converted, setting),
        )


def _described(kind: str, setting: Setting) -> str:
    return "by exact codes" if kind == EXACT else f"{kind} at {plural(setting.bits_of(kind) or 0, 'bit')}"


def _left_exact(model: nn.Module, setting: Setting) -> str:
    """A note on modules that stay exact although their class could be converted, with the reasons."""
    text = ""
    for reason, names in left_exact(model, setting).items():
        text += f"; left exact: {some(names)} ({plural(len(names), 'module')}), since {reason}"
    return text


def _caveat(converted: Sequence[Converted], setting: Setting) -> str:
    """A note on activations whose codes may come in addition to the output that an exact linear layer keeps anyway."""
    if setting.shares:
        return ""
    activations = [each.module for each in converted if isinstance(each.module, CodedActivation)]
    names = Counter(type(module).record(module).name for module in activations if _keeps_its_output(module))
    if not names:
        return ""
    return (
        f"; exact training keeps only the output of {', '.join(names)}, and an exact linear layer after it keeps that output "
        "too: there, codes take additional bytes; fewbit.memory(model, batch).plan(bits).convert() leaves such activations "
        "exact"
    )


def _keeps_its_output(module: CodedActivation) -> bool:
    """Whether the exact operation keeps its output for backward. The operation runs to find out."""
    with torch.inference_mode(False), torch.enable_grad():
        return is_kept_exactly(type(module).record(module).forward(torch.zeros(1, requires_grad=True)))
