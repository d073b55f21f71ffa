"""The modules of recurrent layers and their cells: torch's classes and constructors, plus `bits`, `table` and `rounding`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fewbit.functional import layers, recurrent
from fewbit.functional.layers import ADDED, Code
from fewbit.kernels.recurrent import KINDS
from fewbit.nn.layers import CodedLayer
from fewbit.torch_internals import dynamo_is_loaded

_FUNCTIONS = {getattr(torch, name): layers.FUNCTIONS[name] for mode in KINDS for name in (mode, f"{mode}_cell")}


class _WithCodes(TorchFunctionMode):
    """Makes torch's own forward call fewbit's operation instead of torch's. states: whether the user passes states."""

    def __init__(self, code: Code, states: bool):
        super().__init__()
        self.code, self.states = code, states

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        ours = _FUNCTIONS.get(func)
        if ours is None:
            return func(*args, **(kwargs or {}))
        if not self.states:  # torch has made zeros; they would be kept, so pass None instead
            place = 2 if _is_sizes(args[1]) else 1
            args = (*args[:place], None, *args[place + 1 :])
        return ours.with_code(self.code, *args, **(kwargs or {}))


def _is_sizes(argument: Any) -> bool:
    """Whether the argument holds the sizes of the steps of packed sequences. These come between the input and the states."""
    return isinstance(argument, torch.Tensor) and not argument.is_floating_point()


def _with_codes(forward: Any, code: Code, input: Any, hx: Any) -> Any:
    """The result of torch's forward, with fewbit's operation in place of torch's."""
    with _WithCodes(code, hx is not None):
        return forward(input, hx)


class _Layers(CodedLayer):
    coded_kind = recurrent.lstm.kind

    def forward(self, input: Any, hx: Any = None) -> Any:
        # torch.compile leaves such modules out of its graphs, but would trace what they call
        call: Any = torch.compiler.disable(_with_codes) if dynamo_is_loaded() else _with_codes
        return call(super().forward, self.code, input, hx)


class _Cell(CodedLayer):
    coded_kind = recurrent.lstm_cell.kind

    def forward(self, input: Any, hx: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(input, hx)
        return _with_codes(super().forward, self.code, input, hx)


class LSTM(_Layers, nn.LSTM):
    """torch.nn.LSTM, with codes of each layer's inputs and outputs."""


class GRU(_Layers, nn.GRU):
    """torch.nn.GRU, with codes of each layer's inputs and outputs."""


class RNN(_Layers, nn.RNN):
    """torch.nn.RNN, with codes of each layer's inputs and outputs."""


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell, with codes of its input and of the outputs and cells before the step."""


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell, with codes of its input and of the outputs before the step."""


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell, with codes of its input and of the outputs before the step."""


def _show_arguments(cls: type[_Layers], *left_out: str) -> None:
    """Give the class the signature that torch hides behind *args. `left_out` are arguments that the class does not take."""
    own = [*inspect.signature(nn.RNNBase).parameters.values()][1:]
    if cls is RNN:
        own.insert(
            3, inspect.Parameter("nonlinearity", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="tanh", annotation="str")
        )
    cls.__signature__ = inspect.Signature([*(each for each in own if each.name not in left_out), *ADDED])  # type: ignore[attr-defined]


_show_arguments(LSTM)
_show_arguments(GRU, "proj_size")
_show_arguments(RNN, "proj_size")
CLASSES = {each.__name__: each for each in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}
