"""Callbacks for trainers. They convert the model when training starts, report its memory, and save it with checkpoints.

A run that is resumed from a checkpoint gets the conversion in that checkpoint. The trainers' packages are not among fewbit's
requirements: each is imported when its callback is made.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.constants import DEFAULT_MODEL_BITS
from fewbit.errors import InputError
from fewbit.models.arguments import Filter, LossFunction, check_filter, loss_in
from fewbit.models.conversion.convert import convert
from fewbit.models.conversion.engine import is_converted, revert_modules
from fewbit.models.conversion.setting import Bits, Setting
from fewbit.models.conversion.stored import from_text, load, save, to_text
from fewbit.models.gradients.fidelity import fidelity
from fewbit.models.gradients.watch import Watch, watch
from fewbit.models.memory.report import memory
from fewbit.models.preserve import preserved_structure
from fewbit.terminal import bytes_label, percent

_log = logging.getLogger("fewbit")
FILE = "fewbit.json"  # in the folder of a checkpoint of transformers
KEY = "fewbit"  # in a checkpoint of Lightning


def trainer_callback(
    bits: Bits = DEFAULT_MODEL_BITS, filter_fn: Filter | None = None, *, coding: str | None = None, check: int = 0
) -> Any:
    """Make a callback for `transformers.Trainer`, and for trainers derived from it, such as TRL's.

    When training starts, the callback converts the model with these settings, as `fewbit.convert` does. A model that is
    converted already stays as it is. If the run is resumed from a checkpoint folder with a conversion, the callback loads that
    one. It writes the conversion to each checkpoint, as fewbit.json.

    After the first batch, the logger "fewbit" and the trainer's `state.log_history` get the bytes that the model keeps for
    backward, coded and exact. Whenever the trainer logs, `state.log_history` also gets the number of layers that have drifted
    from their tables (`fewbit.watch`).

    bits, filter_fn, coding  as in `fewbit.convert`
    check  Number of batches at the start of the run on which `fewbit.fidelity` compares gradients. The comparison runs exact
           steps, which need the memory that codes save, and holds two gradients. Use it if exact steps fit into memory, or with
           a smaller batch.

    Raises InputError if transformers is missing, and the errors of `fewbit.convert` for wrong settings. It raises at this call,
    not when training starts.
    """
    base = _package("transformers", "Trainer").TrainerCallback
    make, figures = _Conversion(bits, filter_fn, coding), _Figures(check)

    class FewbitCallback(base):
        """Converts the model at the start of training, and saves the conversion with each checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            resumed = _checkpoint(args, state) / FILE
            if state.global_step and resumed.is_file():
                load(model, resumed)
            else:
                make(model)
            figures.begin(model)
            figures.take_from(model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if found := figures.when_ready(model, _loss_of_call):
                state.log_history.append({**found, "step": state.global_step})

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if found := figures.drift():
                state.log_history.append({**found, "step": state.global_step})

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            figures.end()

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            folder = _checkpoint(args, state)
            if state.is_world_process_zero and folder.is_dir() and _is_coded(model):
                save(model, folder / FILE)

    return FewbitCallback()


def lightning_callback(
    bits: Bits = DEFAULT_MODEL_BITS, filter_fn: Filter | None = None, *, coding: str | None = None, check: int = 0
) -> Any:
    """Make a callback for `lightning.Trainer`. It does what `trainer_callback` does.

    Checkpoints hold the conversion under "fewbit". Lightning's loggers get the figures.

    bits, filter_fn, coding  as in `fewbit.convert`
    check  as in `trainer_callback`; `training_step` is called for these batches without logging
    """
    base = import_module(f"{_package('lightning', 'Trainer').__name__}.pytorch.callbacks").Callback
    make, figures = _Conversion(bits, filter_fn, coding), _Figures(check)

    class FewbitCallback(base):
        """Converts the module when fitting starts, and saves the conversion in each checkpoint."""

        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
            make(pl_module)
            figures.begin(pl_module)

        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
            figures.take(batch)

        def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
            found = {**(figures.when_ready(pl_module, _loss_of_training_step) or {})}
            if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
                found |= figures.drift()
            for logger in trainer.loggers if found else ():
                logger.log_metrics(
                    {name: value for name, value in found.items() if not isinstance(value, str)}, trainer.global_step
                )

        def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
            figures.end()

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


class _Figures:
    """Figures about a conversion: bytes kept and gradient errors on the first batches, and drift of layers later on."""

    def __init__(self, check: int):
        """check: number of batches on which gradients are compared"""
        if isinstance(check, bool) or not isinstance(check, int) or check < 0 or check == 1:
            raise InputError(f"check must be 0 or a number of batches of at least 2, to tell noise from error; got {check!r}")
        self._check, self._batches, self._waiting = check, list[Any](), False
        self._watch: Watch | None = None
        self._hook: Any = None

    def begin(self, model: nn.Module) -> None:
        """A run starts."""
        self.end()
        self._batches, self._waiting = [], True
        with suppress(InputError):  # there may be nothing to watch
            self._watch = watch(model)

    def end(self) -> None:
        """The run has ended."""
        for each in (self._watch, self._hook):
            if each is not None:
                each.remove()
        self._watch = self._hook = None
        self._waiting = False

    def take(self, batch: Any) -> None:
        """Keep one of the first batches."""
        if self._waiting and len(self._batches) < max(1, self._check):
            self._batches.append(batch)

    def take_from(self, model: nn.Module) -> None:
        """Keep the first arguments with which the model is called in training, as (args, kwargs)."""

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                self.take((args, kwargs))

        self._hook = model.register_forward_pre_hook(see, with_kwargs=True)

    def when_ready(self, model: nn.Module, loss_fn: LossFunction) -> dict[str, Any] | None:
        """The figures, once there are enough batches; None before that and afterwards. They include gradient errors if the user
        asked for a check and training is not distributed."""
        if not self._waiting or len(self._batches) < max(1, self._check):
            return None
        self._waiting, batches, self._batches = False, self._batches, []
        if self._hook is not None:
            self._hook.remove()
        found = _kept(model, batches[0], loss_fn, may_run=self._check > 0)
        if self._check and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            gradients = fidelity(model, batches, loss_fn)
            found |= {"fewbit_gradient_error": gradients.whole.error, "fewbit_share_of_noise": gradients.whole.share}
            found |= {"fewbit_verdict": gradients.level}
            _log.info("%s", gradients.verdict)
        return found

    def drift(self) -> dict[str, Any]:
        """The number of watched layers that have drifted."""
        return {} if self._watch is None else {"fewbit_drifted": sum(layer.drifted for layer in self._watch.layers)}


def _kept(model: nn.Module, batch: Any, loss_fn: LossFunction, may_run: bool) -> dict[str, Any]:
    """Bytes that the model keeps for backward on a batch, coded and exact.

    may_run  whether exact steps may run; else the model runs on fake tensors

    Empty if the model does not run that way.
    """
    try:
        coded = memory(model, batch, fake=not may_run, loss_fn=loss_fn).activation_bytes
        with preserved_structure(model):
            revert_modules(model)
            exact = memory(model, batch, fake=not may_run, loss_fn=loss_fn).activation_bytes
    except Exception as error:  # whatever the model does
        _log.info("cannot tell what the model keeps for backward: %s: %s", type(error).__name__, error)
        return {}
    share = coded / exact if exact else 1.0
    text = f"keeps {bytes_label(coded)} for backward, {percent(share)} of the {bytes_label(exact)} that exact training keeps"
    _log.info("%s", text)
    return {"fewbit_kept_bytes": coded, "fewbit_kept_share": share}


def _loss_of_call(model: nn.Module, call: tuple[tuple, dict[str, Any]]) -> torch.Tensor:
    loss = loss_in(model(*call[0], **call[1]))
    if loss is None:
        raise InputError("the model's output has no `loss`, the trainer computes its own; call fewbit.fidelity with that loss")
    return loss


def _loss_of_training_step(module: Any, batch: Any) -> Any:
    with preserved_structure(module):
        module.log = module.log_dict = lambda *_, **__: None
        found = module.training_step(batch, 0)
    return found["loss"] if isinstance(found, dict) else found


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
