"""The batches that commands run a model on: random numbers, or a user's own file. It loads torch, so it is imported late."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import nn

from fewbit.files import is_special
from fewbit.text import shown

Tensor = torch.Tensor
_IDS = ("input_ids", "decoder_input_ids", "labels")  # inputs of transformers that are tokens if they have two dimensions


@dataclass(frozen=True)
class Input:
    """An input as `--input` describes it.

    text    as it was given
    name    the argument of the model's forward; "" for an input by position
    dtype   None if none was given
    values  integers are drawn from 0 up to this, exclusive; None if none was given: they are zeros
    """

    text: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    values: int | None

    @classmethod
    def of(cls, text: str) -> Input:
        """The input that the text [NAME=]SHAPE[:DTYPE[:VALUES]] describes.

        >>> found = Input.of("labels=8,128:int64:1000")
        >>> found.name, found.shape, found.dtype, found.values
        ('labels', (8, 128), torch.int64, 1000)
        """
        name, _, rest = text.rpartition("=")
        sizes, dtype, values = (*rest.split(":", 2), "", "")[:3]
        kind = getattr(torch, dtype, None) if dtype else None
        try:
            shape = tuple(int(size) for size in sizes.split(",")) if sizes else ()
            number = int(values) if values else None
        except ValueError:
            shape, number = (-1,), None
        if (dtype and not isinstance(kind, torch.dtype)) or any(size < 0 for size in shape):
            raise typer.BadParameter(
                f"--input takes a shape such as 8,3,224,224; with a dtype, such as 8,128:int64; for random integers below "
                f"1000, such as 8,128:int64:1000; got {shown(text)}"
            )
        found = cls(text, name, shape, kind, number)
        if number is not None and not 0 < number <= found.most_values:
            raise typer.BadParameter(
                f"--input {text}: the number of values of {dtype} must be 1 to {found.most_values}, got {number}"
                if found.most_values
                else f"--input {text}: only integers take a number of values; leave :{number} out"
            )
        return found

    @property
    def most_values(self) -> int:
        """How many integers the dtype has, from 0 on; 0 for a floating-point dtype."""
        if self.dtype is None or self.dtype.is_floating_point or self.dtype.is_complex:
            return 0
        try:
            return 2 if self.dtype == torch.bool else min(torch.iinfo(self.dtype).max + 1, 2**62)
        except TypeError:  # quantized numbers
            return 0

    @property
    def is_zeros(self) -> bool:
        """Whether the input is all zeros."""
        return self.values is None and self.dtype is not None and not self.dtype.is_floating_point

    def tensor(self, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        """Random numbers of the generator, or zeros. Without a generator, a tensor without numbers on the meta device.

        dtype  used if none was given
        """
        kind = self.dtype or dtype
        try:
            if generator is None:
                return torch.empty(self.shape, dtype=kind, device="meta")
            if self.values is not None:
                return torch.randint(self.values, self.shape, generator=generator).to(kind)
            if kind.is_floating_point:
                return torch.randn(self.shape, generator=generator).to(kind)
            return torch.zeros(self.shape, dtype=kind)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # too large, or no dtype for such numbers
            raise typer.BadParameter(
                f"--input {self.text}: this tensor cannot be made here ({error}); `fewbit memory --fake` needs no memory"
            ) from error


def parse_inputs(texts: Sequence[str]) -> list[Input]:
    """The inputs that `--input` describes, each by its text."""
    found = [Input.of(text) for text in texts]
    names = [each.name for each in found if each.name]
    if names and len({*names}) != len(found):
        raise typer.BadParameter("--input: give different names to all inputs, or no names at all")
    return found


def with_vocabulary(inputs: Sequence[Input], model: nn.Module) -> list[Input]:
    """The same inputs. Tokens of a transformers model are drawn from its vocabulary, unless a number of values was given."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        return list(inputs)
    return [
        replace(each, values=size) if each.name in _IDS and each.is_zeros and len(each.shape) == 2 else each for each in inputs
    ]


@dataclass(frozen=True)
class Place:
    """The device of a model and its inputs.

    dtype  of inputs that have no dtype of their own
    fake   whether they are on the meta device, where they have sizes but no numbers
    """

    device: torch.device
    dtype: torch.dtype
    fake: bool = False


def drawn(inputs: Sequence[Input], place: Place, number: int, seed: int) -> Iterator[Any]:
    """`number` batches of random numbers."""
    generator = None if place.fake else torch.Generator().manual_seed(seed)
    for _ in range(number):
        tensors = [each.tensor(place.dtype, generator) for each in inputs]
        yield _batch([each.name for each in inputs], tensors if place.fake else [each.to(place.device) for each in tensors])


def cut(arrays: Mapping[str, np.ndarray], place: Place, number: int, samples: int) -> Iterator[Any]:
    """`number` batches of `samples` samples each, or as many as there are."""
    for i in range(0, min(_samples(arrays) // samples, number) * samples, samples):
        tensors = [torch.from_numpy(np.array(each[i : i + samples], _native(each))) for each in arrays.values()]
        yield _batch([*arrays], [each.to(place.device, place.dtype if each.is_floating_point() else None) for each in tensors])


def _batch(names: Sequence[str], tensors: Sequence[Tensor]) -> Any:
    """A batch of these tensors: a mapping by name. A tuple if they have no names, or the names that numpy.savez gives to arrays
    without names. A single tensor without a name is the batch itself."""
    if all(not name or name == f"arr_{i}" for i, name in enumerate(names)):
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    return dict(zip(names, tensors, strict=True))


def _samples(arrays: Mapping[str, np.ndarray]) -> int:
    return min(len(each) for each in arrays.values())


def _native(array: np.ndarray) -> np.dtype:
    """The dtype in the byte order of this machine; torch has no other order."""
    return array.dtype.newbyteorder("=")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file, by name. A file that numpy.save wrote holds a single array without a name."""
    try:
        if is_special(path):
            raise ValueError("it is not a regular file")
        found = np.load(path, mmap_mode="r")  # reads no more of a single array than is used
        arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
        if not arrays:
            raise ValueError("there are no arrays in it")
        for each in arrays.values():
            torch.from_numpy(np.empty(0, _native(each)))  # raises if torch has no such dtype
        if len({each.shape[:1] or None for each in arrays.values()} | {None}) != 2:
            shapes = ", ".join(f"{name} {each.shape}".strip() for name, each in arrays.items())
            raise ValueError(f"the first dimension counts the samples and must be the same in all arrays; got {shapes}")
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise typer.BadParameter(
            f"--data takes a file of numbers, .npy for one input or .npz with an array for each: {path}: {error}"
        ) from error
    return arrays


def check_samples(arrays: Mapping[str, np.ndarray], samples: int) -> None:
    """Raise if there are not enough samples for a batch."""
    if (there := _samples(arrays)) < samples:
        raise typer.BadParameter(f"--data has {there} samples, too few for a batch of {samples}; give a smaller --batch-size")
