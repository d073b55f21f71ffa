"""Layers with a forward of their own, as in Hugging Face's models: RMS norms, and GPT-2's linear layer of a transposed weight.

They are recognized by the bytecode of their methods, as gated MLPs are. Codes stand for what fewbit keeps of torch's layers;
the forward pass rounds as the class's own does.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbit.functional import layers
from fewbit.models.conversion.bytecode import Names, names_in
from fewbit.nn.layers import CodedLayer

_ROLES = ("eps",)  # attributes that may have any name; the templates read them under these


class _OwnForward(CodedLayer):
    """Base of the classes made for such layers."""

    _names: Names


class OwnRMSNorm(_OwnForward):
    """A class's own RMS norm, with codes of the normalized input."""

    coded_kind = layers.rms_norm.kind
    _way = "cast first"

    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, self._names["eps"])
        if self.weight.shape != x.shape[-1:] or not isinstance(eps, float):  # it broadcasts otherwise, or eps is a tensor
            return super().forward(x)
        return layers.own_rms_norm(self.code, self._way, x, self._gain(), eps)

    def _gain(self: Any) -> Tensor:
        return self.weight


class _CastLast(OwnRMSNorm):
    _way = "cast last"


class _CastToWeight(OwnRMSNorm):
    _way = "cast to weight"


class _InTwoMethods(OwnRMSNorm):
    def _norm(self: Any, x: Tensor) -> Tensor:  # here, so that a subclass with another one stays as it is
        return super()._norm(x)  # type: ignore[misc]


class _Centered(_InTwoMethods):
    """Whose weight is counted from 1."""

    _way = "cast last"

    def _gain(self: Any) -> Tensor:
        return 1.0 + self.weight.float()


class Conv1D(_OwnForward):
    """Hugging Face's Conv1D; the weight's gradient is made from codes of the input."""

    coded_kind = layers.linear.kind

    def forward(self: Any, x: Tensor) -> Tensor:
        return layers.transposed_linear(self.code, x, self.weight, self.bias)


def own_forward_class(own: type[nn.Module]) -> type[CodedLayer] | None:
    """The class, to be put before it, that codes such a layer; None for any other class."""
    if "forward" not in vars(own):
        return None
    for template in TEMPLATES:
        names = _names_in(own, template.methods)
        if names is not None:
            return _made(template.coded, tuple(names.items()))
    return None


@cache
def _made(base: type[_OwnForward], names: tuple[tuple[str, str], ...]) -> type[_OwnForward]:
    return type(base.__name__, (base,), {"__module__": __name__, "_names": dict(names)})


def _names_in(own: type[nn.Module], methods: tuple[Any, ...]) -> Names | None:
    """The names for the roles in all of the methods."""
    names: Names = {}
    for method in methods:
        found = names_in(inspect.getattr_static(own, method.__name__, None), method, _ROLES)
        if found is None or {**found, **names} != {**names, **found}:
            return None
        names.update(found)
    return names


# How they are written: to be compared, never called. The models named are some of those that write them so.


class _Llama:  # Mistral, Qwen, Phi-3
    def forward(self: Any, x: Any) -> Any:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class _OLMo:  # GPT-OSS
    def forward(self: Any, x: Any) -> Any:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return (self.weight * x).to(dtype)


class _Gemma:  # Qwen3-Next
    def _norm(self: Any, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class _Llama4:
    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class _T5:
    def forward(self: Any, x: Any) -> Any:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


class _GPT2:
    def forward(self: Any, x: Any) -> Any:
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005  as it is written
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        x = x.view(size_out)
        return x


class Template(NamedTuple):
    """Methods as they are written, and the base of the class that codes."""

    methods: tuple[Any, ...]
    coded: type[_OwnForward]


TEMPLATES = (
    Template((_Llama.forward,), OwnRMSNorm),
    Template((_OLMo.forward,), _CastLast),
    Template((_Gemma.forward, _Gemma._norm), _Centered),
    Template((_Llama4.forward, _Gemma._norm), _InTwoMethods),
    Template((_T5.forward,), _CastToWeight),
    Template((_GPT2.forward,), Conv1D),
)
