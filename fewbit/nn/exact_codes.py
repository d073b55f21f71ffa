"""Modules with exact codes: torch's classes and constructors. They keep less for backward, and gradients stay exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit.constants import EXACT
from fewbit.functional.exact_codes import FUNCTIONS
from fewbit.nn.base import Coded

Tensor = torch.Tensor


class ExactlyCoded(Coded):
    """Base of all these modules."""

    coded_kind = EXACT


class Dropout(ExactlyCoded, nn.Dropout):
    """torch.nn.Dropout, which keeps one bit per element."""

    def forward(self, input: Tensor) -> Tensor:
        return FUNCTIONS["dropout"].quietly(input, self.p, self.training, self.inplace)


class _MaxPool(ExactlyCoded):
    def forward(self: Any, input: Tensor) -> Any:
        options = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        return FUNCTIONS[self._function].quietly(input, *options)


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """torch.nn.MaxPool1d, which keeps the place of each maximum in its window."""

    _function = "max_pool1d"


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """torch.nn.MaxPool2d, which keeps the place of each maximum in its window."""

    _function = "max_pool2d"


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """torch.nn.MaxPool3d, which keeps the place of each maximum in its window."""

    _function = "max_pool3d"


class _AdaptiveMaxPool(ExactlyCoded):
    def forward(self: Any, input: Tensor) -> Any:
        return FUNCTIONS[self._function].quietly(input, self.output_size, self.return_indices)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """torch.nn.AdaptiveMaxPool1d, which keeps the place of each maximum in its window."""

    _function = "adaptive_max_pool1d"


class AdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d, which keeps the place of each maximum in its window."""

    _function = "adaptive_max_pool2d"


class AdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """torch.nn.AdaptiveMaxPool3d, which keeps the place of each maximum in its window."""

    _function = "adaptive_max_pool3d"


class AvgPool1d(ExactlyCoded, nn.AvgPool1d):
    """torch.nn.AvgPool1d, which keeps nothing."""

    def forward(self, input: Tensor) -> Tensor:
        options = self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        return FUNCTIONS["avg_pool1d"].quietly(input, *options)


class _AvgPool(ExactlyCoded):
    def forward(self: Any, input: Tensor) -> Tensor:
        options = self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override
        return FUNCTIONS[self._function].quietly(input, *options)


class AvgPool2d(_AvgPool, nn.AvgPool2d):
    """torch.nn.AvgPool2d, which keeps nothing."""

    _function = "avg_pool2d"


class AvgPool3d(_AvgPool, nn.AvgPool3d):
    """torch.nn.AvgPool3d, which keeps nothing."""

    _function = "avg_pool3d"


class _AdaptiveAvgPool(ExactlyCoded):
    def forward(self: Any, input: Tensor) -> Tensor:
        return FUNCTIONS[self._function].quietly(input, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """torch.nn.AdaptiveAvgPool1d, which keeps nothing."""

    _function = "adaptive_avg_pool1d"


class AdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d, which keeps nothing."""

    _function = "adaptive_avg_pool2d"


class AdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """torch.nn.AdaptiveAvgPool3d, which keeps nothing."""

    _function = "adaptive_avg_pool3d"


class _Padding(ExactlyCoded):
    def forward(self: Any, input: Tensor) -> Tensor:
        return FUNCTIONS["pad"].quietly(input, self.padding, self._mode)


class _ReflectionPad(_Padding):
    _mode = "reflect"


class _ReplicationPad(_Padding):
    _mode = "replicate"


class ReflectionPad1d(_ReflectionPad, nn.ReflectionPad1d):
    """torch.nn.ReflectionPad1d, which keeps nothing."""


class ReflectionPad2d(_ReflectionPad, nn.ReflectionPad2d):
    """torch.nn.ReflectionPad2d, which keeps nothing."""


class ReflectionPad3d(_ReflectionPad, nn.ReflectionPad3d):
    """torch.nn.ReflectionPad3d, which keeps nothing."""


class ReplicationPad1d(_ReplicationPad, nn.ReplicationPad1d):
    """torch.nn.ReplicationPad1d, which keeps nothing."""


class ReplicationPad2d(_ReplicationPad, nn.ReplicationPad2d):
    """torch.nn.ReplicationPad2d, which keeps nothing."""


class ReplicationPad3d(_ReplicationPad, nn.ReplicationPad3d):
    """torch.nn.ReplicationPad3d, which keeps nothing."""


CLASSES = {
    each.__name__: each
    for each in vars().copy().values()
    if isinstance(each, type) and issubclass(each, ExactlyCoded) and each.__bases__[-1].__module__.startswith("torch.nn")
}
