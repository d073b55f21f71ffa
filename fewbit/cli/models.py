"""Options that the commands on whole models share: the model and its inputs, and the look-ups that find both."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.options import choice_option, file_option, named, working_folder_on_path
from fewbit.constants import DEFAULT_MODEL_BITS, DTYPES
from fewbit.errors import FewbitError, InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from fewbit.cli.inputs import Input, Place
    from fewbit.models.conversion.setting import Bits

HUGGING_FACE = "hf:"
SAMPLES = 8  # samples in a batch from a file, unless another number is given

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:factory or ./file.py:factory. The factory is called without arguments, or is a module itself. "
        "hf:path/to/config.json makes a Hugging Face model with random weights."
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Shape of an input: 8,3,224,224. A name and a dtype may be added: mask=8,128:bool. Repeat it for each input. "
        "Floating-point numbers are random. Integers are zeros; 8,128:int64:1000 makes them random below 1000. Tokens of hf: "
        "models are random words of the vocabulary.",
    ),
]
ClassName = Annotated[
    str | None, typer.Option("--class", help="For hf: models, the class of transformers. By default the first one in the file.")
]
Dtype = Annotated[
    str | None,
    choice_option("--dtype", known=DTYPES, help="dtype of the model's floating-point numbers, and of inputs without a dtype."),
]
AutocastDtype = Annotated[
    str | None,
    choice_option("--autocast", known=("bfloat16", "float16"), help="Run the model under torch.autocast with this dtype."),
]
DeviceName = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, …", metavar="cpu|cuda")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of random weights and inputs.")]
_BITS = "Bits of one code: 4 is for every kind of saved tensor, activation=3,linear=4 is by kind"
BitsByKind = Annotated[str, typer.Option("--bits", help=f"{_BITS}.")]
BitsIfAny = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help=f"{_BITS}. By default {DEFAULT_MODEL_BITS} for every kind. A model that is already converted keeps its own bits.",
    ),
]
OptimizerName = Annotated[
    str | None, typer.Option("--optimizer", help="Optimizer of the training step whose peak is shown, such as adamw.")
]
Gradient = Annotated[bool, typer.Option("--gradient", help="Floating-point inputs require a gradient.")]
Fake = Annotated[bool, typer.Option("--fake", help="Run on fake tensors, for models too large for this machine.")]
Batches = Annotated[
    int, typer.Option("--batches", min=1, help="Number of batches to run on. Fewer if --data does not have as many.")
]
Data = Annotated[
    Path | None,
    file_option(
        "--data",
        help="A file with your own inputs, instead of random ones: .npz with an array for each input, under its name, or .npy "
        "for a single input. The first dimension counts the samples.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help=f"Samples in each batch that is cut from --data. By default {SAMPLES}."),
]
LossName = Annotated[
    str | None, typer.Option("--loss", help="package.module:function of the model and a batch. It returns the loss.")
]


@dataclass(frozen=True)
class ModelOptions:
    """The options with which a command names a model and its inputs, as they were given. `check` raises if they are wrong,
    before the model is made."""

    name: str
    inputs: Sequence[str] | None = None
    class_name: str | None = None
    dtype: str | None = None
    autocast_dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    fake: bool = False
    gradient: bool = False

    def check(self, needs_inputs: bool = True) -> None:
        """Raise if the options are wrong, as far as that is known without the model."""
        if ":" not in self.name:
            raise typer.BadParameter(
                f"the model is given as package.module:factory, ./file.py:factory or hf:config.json, got {self.name!r}"
            )
        if self._configuration is None and self.class_name is not None:
            raise typer.BadParameter(f"--class is for hf:config.json; leave it out for {self.name}")
        if self._configuration is not None and not self._configuration.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._configuration))
        if self.fake and self.device != "cpu":
            raise typer.BadParameter("--fake runs only on the CPU; leave --device out")
        if needs_inputs and not self.inputs:
            raise typer.BadParameter("--input is missing: the shape of an input, as in --input 8,3,224,224; once for each")
        with told_as_usage("--device"):
            _ = self.place
        _ = self.parsed

    @cached_property
    def place(self) -> Place:
        """The device and dtype of the model and its inputs. InputError if there is no such device."""
        import torch

        from fewbit.cli.inputs import Place
        from fewbit.measuring import find_device

        return Place(find_device(self.device), getattr(torch, self.dtype or "float32"), self.fake)

    @cached_property
    def parsed(self) -> list[Input]:
        from fewbit.cli.inputs import parse_inputs

        return parse_inputs(self.inputs or ())

    def make(self) -> nn.Module:
        """Make the model. InputError if that fails in any way, or if the result is not a model."""
        import torch
        from torch import nn

        from fewbit import terminal

        path = self._configuration
        with terminal.progress(f"making {self.name}"), making(self.name):
            torch.manual_seed(self.seed)
            found = named(self.name) if path is None else partial(_configured, path, self.class_name, self.fake)
            if not isinstance(found, nn.Module):
                torch.manual_seed(self.seed)  # again, since an import may draw random numbers, but only once in a process
                found = found()
        if not isinstance(found, nn.Module):
            raise InputError(f"{self.name} made a {type(found).__name__}, not a torch.nn.Module")
        if isinstance(found, torch.jit.ScriptModule):
            raise InputError(
                f"{self.name} made a scripted module, and fewbit cannot see its parts; give the module that it was made from"
            )
        with making(self.name):
            found = found if self.fake else found.to(self.place.device)
            return found if self.dtype is None else found.to(self.place.dtype)

    def inputs_of(self, model: nn.Module) -> list[Input]:
        """The inputs. Tokens of a Hugging Face model are from its vocabulary."""
        from fewbit.cli.inputs import with_vocabulary

        return self.parsed if self._configuration is None else with_vocabulary(self.parsed, model)

    def batch(self, model: nn.Module) -> Any:
        """One batch of random inputs. They require a gradient if that was asked for."""
        from fewbit.cli.inputs import drawn
        from fewbit.models.memory.saved import tensors_in

        (batch,) = drawn(self.inputs_of(model), self.place, 1, self.seed)
        for each in tensors_in(batch):
            each.requires_grad_(self.gradient and each.is_floating_point())
        return batch

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model must run."""
        import torch

        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.place.device.type, getattr(torch, self.autocast_dtype))

    @property
    def _configuration(self) -> Path | None:
        """The file that describes a Hugging Face model, or None for other models. In a folder it is the file config.json."""
        if not self.name.startswith(HUGGING_FACE):
            return None
        path = Path(os.path.expanduser(self.name.removeprefix(HUGGING_FACE)))
        return path / "config.json" if path.is_dir() else path


@dataclass(frozen=True)
class BatchOptions:
    """The options with which a command names the batches for a model, and the loss."""

    model: ModelOptions
    number: int
    data: Path | None = None
    samples: int | None = None
    loss: str | None = None

    def check(self) -> None:
        """Raise if the options are wrong, as far as that is known without the model."""
        if self.data is not None and self.model.inputs:
            raise typer.BadParameter("--data and --input exclude each other: the file has the inputs")
        if self.data is None and self.samples is not None:
            raise typer.BadParameter("--batch-size is only for --data; the first size of an --input is the size of its batch")
        self.model.check(needs_inputs=self.data is None)
        if self.data is not None:
            from fewbit.cli.inputs import check_samples

            check_samples(self.arrays, self.samples or SAMPLES)
        check_loss_name(self.loss)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays in the file."""
        from fewbit.cli.inputs import read_arrays

        assert self.data is not None, "the caller has checked that there is a file"
        return read_arrays(self.data)

    def batches(self, model: nn.Module) -> list[Any]:
        """The batches that the model runs on."""
        from fewbit.cli.inputs import cut, drawn

        if self.data is not None:
            return list(cut(self.arrays, self.model.place, self.number, self.samples or SAMPLES))
        return list(drawn(self.model.inputs_of(model), self.model.place, self.number, self.model.seed))

    def loss_function(self) -> Callable[[Any, Any], Any] | None:
        """The named function of the model and a batch, under autocast; None if none is named. InputError if it is not a
        function."""
        return None if self.loss is None else self.under_autocast(loss_of_name(self.loss))

    def around(self) -> AbstractContextManager[Any]:
        """The context to run the model in. It sets autocast only if no loss function does so."""
        return self.model.autocast() if self.loss is None else nullcontext()

    def under_autocast(self, loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The loss as in training: only forward runs under autocast."""

        def cast(model: Any, batch: Any) -> Any:
            with self.model.autocast():
                return loss(model, batch)

        return loss if self.model.autocast_dtype is None else cast

    def notes(self, model: nn.Module, used: int) -> list[str]:
        """Notes of a report on its inputs."""
        batches = "1 batch" if used == 1 else f"{used} batches"
        if self.data is not None:
            return [f"{batches} of {self.samples or SAMPLES} samples from {self.data}"]
        zeros = [each.name or str(i) for i, each in enumerate(self.model.inputs_of(model)) if each.is_zeros]
        figures = "figures are for the model's present weights and such inputs"
        notes = [f"{batches} of random inputs, seed {self.model.seed}: {figures}"]
        if zeros:
            notes.append(f"all zeros: input {', '.join(zeros)}; for random integers give their number, as in 8,128:int64:1000")
        return notes


@contextmanager
def making(name: str) -> Iterator[None]:
    """In this context imports also look in the working folder. Any error becomes an InputError that names the model."""
    try:
        with working_folder_on_path():  # the factory may import from there too
            yield
    except FewbitError:
        raise
    except (Exception, SystemExit) as error:  # the module may raise anything on import, and the factory on a call
        raise InputError(f"cannot make a model of {name}: {type(error).__name__}: {error}") from error


@contextmanager
def running() -> Iterator[None]:
    """In this context any error of the model becomes an InputError."""
    try:
        yield
    except FewbitError:
        raise
    except (Exception, SystemExit) as error:  # the model may raise anything for such inputs
        raise InputError(f"the model raised {type(error).__name__} for these inputs: {error}") from error


@contextmanager
def told_as_usage(option: str) -> Iterator[None]:
    """In this context a value that the library refuses is wrong usage of the option."""
    try:
        yield
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def check_loss_name(name: str | None) -> None:
    """Raise if the text cannot name a function."""
    if name is not None and ":" not in name:
        raise typer.BadParameter(f"--loss is given as package.module:function, got {name!r}")


def loss_of_name(name: str) -> Callable[[Any, Any], Any]:
    """The function of the model and a batch. InputError if it cannot be imported or is not a function."""
    try:
        found = named(name)
    except (Exception, SystemExit) as error:  # the module may raise anything on import
        raise InputError(f"cannot import {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{name} is not a function of the model and a batch, but a {type(found).__name__}")
    return found


def check_step(optimizer: str | None, budget: str | None = None) -> None:
    """Raise if torch does not have the optimizer, or if the budget is not a number of bytes."""
    from fewbit.models.memory.peak import optimizer_of
    from fewbit.terminal import parse_bytes

    with told_as_usage("--optimizer"):
        optimizer_of(optimizer)
    with told_as_usage("--budget"):
        _ = None if budget is None else parse_bytes(budget)


def parsed_bits(text: str) -> Bits:
    """The bits that `--bits` means. DesignError if no conversion can have them."""
    from fewbit.models.conversion.setting import Setting, parse_bits

    found = parse_bits(text)
    Setting.of(found)
    return found


def _configured(path: Path, class_name: str | None, fake: bool) -> nn.Module:
    """The model of transformers that a config.json describes, with random weights."""
    import json
    from importlib import import_module

    import torch

    try:
        transformers = import_module("transformers")  # not among fewbit's requirements
    except ImportError as error:
        raise InputError(f"hf: needs the package transformers ({error}); pip install transformers") from error
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise InputError(f"{path} is not a Hugging Face configuration, a JSON object; got {type(settings).__name__}")
    wanted = class_name or next(iter(settings.get("architectures") or ()), None)
    if wanted is None:
        raise InputError(f"{path} names no architectures; give a class of transformers with --class")
    kind = getattr(transformers, str(wanted), None)
    if kind is None or not hasattr(kind, "config_class"):
        raise InputError(f"transformers has no model {wanted!r}; give one of its classes with --class, such as GPT2LMHeadModel")
    with torch.device("meta" if fake else "cpu"):
        return kind(kind.config_class.from_dict(settings)).train()
