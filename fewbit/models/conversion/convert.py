"""Whole models: make torch's modules keep codes, in place, and make them torch's again."""

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
    """Let the modules of a model keep codes for backward, in place. The forward pass stays as it is, bit for bit.

    model      its modules are converted by class: activations, torch's and Hugging Face's, linear layers, convolutions, norms,
               GLU, recurrent layers, and, whatever kinds are named, dropout, pooling and padding, whose codes lose nothing.
               Subclasses are, if they leave as it is what fewbit replaces: `forward`, mostly. All other modules with a forward
               of their own, and torch's MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer, run it as it
               is, and what torch's functions keep that are called there is coded, as by `fewbit.patch`: gates and norms that
               are written out, attention, losses. Each module remains the same object, with its weights, hooks, names and
               state, and only changes its class, for one that its own is a base of.
    bits       of one code, 1 to 8: one number for every kind of what is kept, or a mapping from kind to number, as
               {"activation": 3, "linear": 4}; kinds that are not named stay exact. The kinds: "activation"; "linear", inputs of
               linear layers and convolutions, and of other products with weights; "norm"; "product", factors of products
               element by element, and squares; "attention", its query and key with one bit more; "rest", what else torch's
               operations keep, at 8 bits at least where one number is given; "recurrent", inputs and outputs of LSTMs, GRUs
               and their kin.
               With "linear", what linear layers read is coded once, by what made it, with the larger of both numbers of bits.
    filter_fn  of a module and its dotted name: whether to convert it; what is left out stays exact within others, too
    coding     of the tables, as in `fewbit.design`; None for the optimal one
    recompute  dotted names of modules that keep their inputs alone and run their forward again in backward, coded or not, as
               `torch.utils.checkpoint` does: the blocks of a model, say. What they change in their arguments and buffers, such
               as the running statistics of a batch norm, they change once, but for compiled code. Layers of transformers do it
               by their own way, in training. Codes are not shared across the edges of such a module.
    Returns    the model

    A model that was converted before has this setting alone afterwards; what was built of fewbit's modules stays. The logger
    "fewbit" tells at level INFO what was done, and a ConversionWarning that nothing was. Some kinds alone may keep more than
    nothing coded does: `fewbit.memory(model, batch).plan(bits).convert()` leaves out what does not pay.

    Raises DesignError (bits, coding) or InputError (something that is no module, a filter that cannot be called, names to
    recompute that the model lacks) before anything is changed.

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
    """Make what `convert` changed torch's own again, in place; modules that were built as fewbit's stay. Returns the model.

    Raises InputError for what is no module.
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
            f"no module of the {type(model).__name__} was converted with {setting}: none is of these kinds, or the filter let "
            f"none pass{_left_exact(model, setting)}. Modules that were built as fewbit's stay. Code that "
            "calls functions such as torch.nn.functional.gelu itself is coded by `with fewbit.patch(bits):` around it",
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
    """What to say of modules that stay exact for what others, or they themselves, have made of them."""
    text = ""
    for reason, names in left_exact(model, setting).items():
        text += f"; left exact: {some(names)} ({plural(len(names), 'module')}), since {reason}"
    return text


def _caveat(converted: Sequence[Converted], setting: Setting) -> str:
    """What to say of activations whose codes may come on top of the output that an exact linear layer keeps anyway."""
    if setting.shares:
        return ""
    activations = [each.module for each in converted if isinstance(each.module, CodedActivation)]
    names = Counter(type(module).record(module).name for module in activations if _keeps_its_output(module))
    if not names:
        return ""
    return (
        f"; {', '.join(names)} keep their output, which an exact linear layer behind them keeps anyway: there codes add to it, "
        "and fewbit.memory(model, batch).plan(bits).convert() leaves them out"
    )


def _keeps_its_output(module: CodedActivation) -> bool:
    """Whether the exact operation keeps its output for backward, asked of the operation."""
    with torch.inference_mode(False), torch.enable_grad():
        return is_kept_exactly(type(module).record(module).forward(torch.zeros(1, requires_grad=True)))
