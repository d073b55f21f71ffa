"""Callbacks of trainers: convert the model when training starts, and keep the conversion with each checkpoint.

A run that is resumed from a checkpoint gets the conversion that lies in it, so that it goes on as it would have. The packages
are not among fewbit's requirements: each is imported when its callback is made.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.errors import InputError
from fewbit.models.arguments import Filter, check_filter
from fewbit.models.conversion.convert import convert
from fewbit.models.conversion.engine import is_converted
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.conversion.stored import from_text, load, save, to_text

FILE = "fewbit.json"  # in the folder of a checkpoint of transformers
KEY = "fewbit"  # in a checkpoint of Lightning


def trainer_callback(bits: Bits = DEFAULT_MODEL_BITS, filter_fn: Filter | None = None, *, coding: str | None = None) -> Any:
    """A callback for `transformers.Trainer`, and for trainers made from it, such as TRL's.

    When training starts, the model is converted with these settings, as by `fewbit.convert`, unless it is converted already, or
    the run is resumed from a checkpoint of its folder in which a conversion lies. Each checkpoint gets its own, fewbit.json.

    Raises InputError without transformers, and for settings as `fewbit.convert`, here and not when training starts.
    """
    base = _package("transformers", "Trainer").TrainerCallback
    make = _Conversion(bits, filter_fn, coding)

    class FewbitCallback(base):
        """Converts the model at the start of training, and saves the conversion with each checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            resumed = _checkpoint(args, state) / FILE
            if state.global_step and resumed.is_file():
                load(model, resumed)
            else:
                make(model)

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            folder = _checkpoint(args, state)
            if state.is_world_process_zero and folder.is_dir() and _is_coded(model):
                save(model, folder / FILE)

    return FewbitCallback()


def lightning_callback(bits: Bits = DEFAULT_MODEL_BITS, filter_fn: Filter | None = None, *, coding: str | None = None) -> Any:
    """The same for `lightning.Trainer`, whose checkpoints hold the conversion under "fewbit"."""
    base = import_module(f"{_package('lightning', 'Trainer').__name__}.pytorch.callbacks").Callback
    make = _Conversion(bits, filter_fn, coding)

    class FewbitCallback(base):
        """Converts the module when fitting starts, and saves the conversion in each checkpoint."""

        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
            make(pl_module)

        def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
            if _is_coded(pl_module):
                checkpoint[KEY] = to_text(pl_module)

        def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
            if KEY in checkpoint:
                from_text(pl_module, checkpoint[KEY], "the checkpoint")

    return FewbitCallback()


class _Conversion:
    """Converts models that are not converted yet."""

    def __init__(self, bits: Bits, filter_fn: Filter | None, coding: str | None):
        check_filter(filter_fn)
        Setting.of(bits, coding)
        self._bits, self._filter_fn, self._coding = bits, filter_fn, coding

    def __call__(self, model: nn.Module) -> None:
        if not _is_coded(model):
            convert(model, self._bits, self._filter_fn, coding=self._coding)


def _is_coded(model: nn.Module) -> bool:
    return any(is_converted(module) for module in model.modules())


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of transformers' checkpoint at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _package(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"this callback is for {name}.{what}, and {name} cannot be imported ({error}); install it") from error
