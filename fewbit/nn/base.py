"""What the modules of activations and of layers have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewbit.errors import InputError


class Coded(nn.Module):
    """Base of all modules that keep codes."""

    def __prepare_scriptable__(self) -> Any:
        """Raise InputError: torch.jit.script calls this first for each module."""
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__} of fewbit, which makes codes in Python; script the model "
            "after fewbit.revert(model), or use torch.jit.trace, which takes torch's own operations"
        )
