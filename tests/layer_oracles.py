"""Naive code for the coded layers: what they read instead of their input, and gradients in closed form, all in float64.

Nothing here calls what it checks, except for the tables, which are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

import fewbit


class Case(NamedTuple):
    """A layer: the name of its function in torch and in fewbit, and its arguments."""

    function: str
    x: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    keywords: Mapping[str, Any] = MappingProxyType({})

    def make(self, dtype=torch.float32):
        """The input and the parameters."""
        x = (2 * torch.randn(self.x, dtype=torch.float64) + 0.3).to(dtype)
        return x, {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in self.parameters.items()}

    def exact(self, x, parameters):
        return getattr(functional, self.function)(x, **parameters, **self.keywords)

    def coded(self, x, parameters, **code):
        return getattr(fewbit.functional, self.function)(x, **parameters, **self.keywords, **code)


class Block(torch.nn.Module):
    """A transformer block of width 32."""

    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.out = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.norm2, self.up, self.act, self.down = (
            torch.nn.LayerNorm(32),
            torch.nn.Linear(32, 64),
            torch.nn.GELU(),
            torch.nn.Linear(64, 32),
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(self.act(self.up(self.norm2(x))))


def wb(weight, bias):
    return {"weight": weight, "bias": (bias,)}


PRODUCTS = {
    "linear": Case("linear", (5, 14, 16), wb((4, 16), 4)),
    "linear, no bias": Case("linear", (33, 17), {"weight": (9, 17)}),
    "linear, one row": Case("linear", (6,), wb((4, 6), 4)),
    "linear, one output": Case("linear", (8, 3, 4, 15), wb((1, 15), 1)),
    "conv1d": Case("conv1d", (6, 8, 23), wb((5, 8, 3), 5)),
    "conv1d, unbatched": Case("conv1d", (8, 130), wb((5, 8, 3), 5), {"padding": 1}),
    "conv2d": Case("conv2d", (2, 3, 7, 9), wb((4, 3, 3, 3), 4)),
    "conv2d, no bias": Case("conv2d", (2, 3, 7, 9), {"weight": (4, 3, 3, 3)}, {"stride": 2, "padding": (1, 0)}),
    "conv2d, dilation": Case("conv2d", (2, 3, 9, 9), wb((4, 3, 3, 2), 4), {"dilation": (2, 1), "stride": (1, 2)}),
    "conv2d, groups": Case("conv2d", (2, 4, 7, 7), wb((6, 2, 3, 3), 6), {"groups": 2, "padding": 1}),
    "conv2d, depthwise": Case("conv2d", (2, 4, 7, 7), wb((4, 1, 3, 3), 4), {"groups": 4}),
    "conv2d, same": Case("conv2d", (2, 3, 7, 8), wb((4, 3, 2, 3), 4), {"padding": "same", "dilation": (3, 2)}),
    "conv2d, valid": Case("conv2d", (2, 3, 7, 8), wb((4, 3, 2, 3), 4), {"padding": "valid", "stride": 2}),
    "conv2d, unbatched": Case("conv2d", (6, 14, 15), wb((4, 6, 1, 1), 4)),
    "conv3d": Case("conv3d", (2, 2, 4, 5, 6), wb((3, 2, 2, 2, 2), 3), {"stride": 2, "padding": 1}),
    "conv_transpose1d": Case("conv_transpose1d", (6, 6, 33), wb((6, 2, 3), 2), {"stride": 2, "output_padding": 1}),
    "conv_transpose2d": Case(
        "conv_transpose2d", (4, 4, 9, 8), wb((4, 2, 3, 3), 4), {"stride": (2, 1), "padding": 1, "groups": 2, "dilation": 2}
    ),
    "conv_transpose3d": Case("conv_transpose3d", (2, 4, 5, 5, 6), wb((4, 3, 2, 2, 2), 3), {"stride": 2}),
}
NORMS = {
    "layer_norm": Case("layer_norm", (5, 7, 12), wb((12,), 12), {"normalized_shape": (12,)}),
    "layer_norm, two dims": Case("layer_norm", (35, 3, 8), {"weight": (3, 8), "bias": (3, 8)}, {"normalized_shape": (3, 8)}),
    "layer_norm, no bias": Case("layer_norm", (66, 9), {"weight": (9,)}, {"normalized_shape": [9], "eps": 0.1}),
    "layer_norm, plain": Case("layer_norm", (66, 9), {}, {"normalized_shape": (9,)}),
    "layer_norm, one row": Case("layer_norm", (9,), wb((9,), 9), {"normalized_shape": (9,)}),
    "rms_norm": Case("rms_norm", (5, 7, 12), {"weight": (12,)}, {"normalized_shape": (12,)}),
    "rms_norm, eps": Case("rms_norm", (35, 3, 8), {"weight": (3, 8)}, {"normalized_shape": (3, 8), "eps": 0.5}),
    "rms_norm, one row": Case("rms_norm", (9,), {"weight": (9,)}, {"normalized_shape": (9,)}),
    "rms_norm, plain": Case("rms_norm", (66, 8), {}, {"normalized_shape": (8,)}),
    "group_norm": Case("group_norm", (3, 6, 5, 4), wb((6,), 6), {"num_groups": 2}),
    "group_norm, instances": Case("group_norm", (3, 4, 77), wb((4,), 4), {"num_groups": 4}),
    "group_norm, no dims": Case("group_norm", (240, 16), wb((16,), 16), {"num_groups": 2}),
    "group_norm, plain": Case("group_norm", (3, 6, 45), {}, {"num_groups": 3}),
    "batch_norm": Case("batch_norm", (6, 5, 4, 3), wb((5,), 5), {"running_mean": None, "running_var": None, "training": True}),
    "batch_norm, rows": Case(
        "batch_norm", (120, 5), wb((5,), 5), {"running_mean": None, "running_var": None, "training": True}
    ),
    "batch_norm, plain": Case(
        "batch_norm", (6, 5, 24), {}, {"running_mean": None, "running_var": None, "training": True, "eps": 0.2}
    ),
}
CASES = {**PRODUCTS, **NORMS}


def leaves(x, parameters):
    return x.clone().requires_grad_(), {name: each.clone().requires_grad_() for name, each in parameters.items()}


def gradients(case, x, parameters, grad, **code):
    """The gradients of the coded layer, by name, after a check of its output."""
    x, parameters = leaves(x, parameters)
    y = case.coded(x, parameters, **code)
    assert torch.equal(y, case.exact(x, parameters))
    names = ["x", *parameters]
    return dict(zip(names, torch.autograd.grad(y, [x, *parameters.values()], grad), strict=True))


def value_table(bits):
    return fewbit.load_table("identity", bits, channels="value")


def lookup(table, x, channel=0):
    """The levels of x: float64, of x's shape."""
    return torch.from_numpy(table.levels[channel, table.encode(x.detach().double().numpy())].reshape(x.shape))


def standardized(x, rest):
    """Center and spread of x along the dimensions `rest`, in shapes that broadcast with x."""
    if not rest:
        return 0.0, torch.ones((), dtype=torch.float64)
    center = x.mean(rest, keepdim=True)
    spread = ((x - center) ** 8).mean(rest, keepdim=True).div(105) ** 0.125
    return center, spread.clamp_min(1e-19)


def standards(x, channel, table):
    """Row scale, center and spread: x is (number * spread + center) * row, with a number like a standard normal one. If a
    channel has zeros, the number is such that the code of a zero stands for 0."""
    wide = x.detach().double()
    channel %= wide.dim()
    rest = tuple(dim for dim in range(wide.dim()) if dim != channel)
    magnitude = wide.abs().mean(rest, keepdim=True).clamp_min(1e-19)
    row = (wide / magnitude).square().mean(tuple(range(channel, wide.dim())), keepdim=True).sqrt().clamp_min(1e-19)
    center, spread = standardized(wide / magnitude / row, rest)
    for place in range(wide.shape[channel]):
        own_center, own_spread = center.select(channel, place), spread.select(channel, place)  # views
        zero = -own_center.item() / own_spread.item()
        outermost = table.levels.min() if zero < 0 else table.levels.max()
        if (wide.select(channel, place) == 0).any() and zero / outermost <= 2:
            own_spread.mul_(max(1.0, zero / outermost))
            own_center.copy_(-own_spread * lookup(table, -own_center / own_spread))
    return row, center * magnitude, spread * magnitude


def of_gain_one(u, q, spread, zero=None):
    """The spread for which spread * q has gain one against u, about the means, or about 0 if zeros have the level `zero`."""
    d, e = (u - u.mean(), q - q.mean()) if zero is None else (u, q - zero)
    gain = (d.square().sum() / (d * e).sum() / spread).item()
    return spread * gain if 0.7 <= gain <= 2 else spread


def scaled_values(table, x, channel):
    """The decoded values for these standards, with the mean of each channel. A single row is kept as x itself, since codes and
    statistics would take more."""
    if x.dim() == 1:
        return x.detach().double()
    wide, (row, center, spread) = x.detach().double(), standards(x, channel, table)
    levels, values = lookup(table, (wide / row - center) / spread), torch.empty_like(wide)
    for place in range(wide.shape[channel]):
        of_x, q, found = (each.select(channel, place) for each in (wide, levels, values))  # the last, a view
        own_row, own_center, own_spread = (each.expand_as(wide).select(channel, place) for each in (row, center, spread))
        own_center, own_spread = own_center.flatten()[0], own_spread.flatten()[0]
        magnitude = of_x.abs().mean().clamp_min(1e-19)
        zero = -own_center / own_spread
        is_sparse = bool((of_x == 0).any()) and bool((zero - torch.tensor(table.levels[0])).abs().min() < 1e-9)
        own_spread = of_gain_one(of_x / own_row, q, own_spread, zero if is_sparse else None)
        if is_sparse:
            found.copy_((q - zero) * own_spread * own_row)
            true, mean = of_x.mean() / magnitude, found.mean() / magnitude
            doubt = 2.72 * 0.25**table.bits + 1 / of_x.numel()
            found.mul_((true * mean + doubt) / (mean * mean + doubt))
        else:
            found.copy_(q * own_spread * own_row)
            found.add_((of_x.mean() - found.mean()) / own_row.mean() * own_row)
    return values


def row_scaled_values(table, x):
    """The same with a single scale for each row of (rows, channels)."""
    scale = x.double().square().mean(1, keepdim=True).sqrt()
    return lookup(table, x.double() / scale) * scale


def product_gradients(case, x, parameters, grad, table):
    """The gradients: of x and the bias as torch has them at x, of the weight at the decoded values of x."""
    dims = 0 if case.function == "linear" else int(case.function[-2])
    seen = x.detach().double()
    if case.keywords.get("padding") == "same":  # the codes are of the input, with what torch adds to one side only
        sizes = zip(case.keywords["dilation"], parameters["weight"].shape[2:], strict=True)
        odd = [step * (size - 1) % 2 for step, size in sizes]
        seen = functional.pad(seen, [part for each in reversed(odd) for part in (0, each)])
        case = case._replace(
            keywords={
                **case.keywords,
                "padding": [
                    s * (k - 1) // 2 for s, k in zip(case.keywords["dilation"], parameters["weight"].shape[2:], strict=True)
                ],
            }
        )
    batch = seen.unsqueeze(0) if dims and x.dim() == dims + 1 else seen
    approximate = scaled_values(table, batch, 1 if dims else -1).reshape(seen.shape)
    wide = {name: each.detach().double() for name, each in parameters.items()}
    exact = torch_gradients(case, seen, wide, grad.double())
    exact["x"] = exact["x"][tuple(slice(size) for size in x.shape)]
    return {**exact, "weight": torch_gradients(case, approximate, wide, grad.double())["weight"]}


def torch_gradients(case, x, parameters, grad):
    """torch's own gradients, by name."""
    leaves = {"x": x.detach().clone(), **{name: each.detach().clone() for name, each in parameters.items()}}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = case.exact(leaves["x"], {name: leaf for name, leaf in leaves.items() if name != "x"})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def moves_to_thresholds(factor, offset, thresholds):
    """For each channel (shrink, shift) that puts the z with factor * z + offset = 0 on a threshold, or (1, 0) if too far."""
    moves = []
    for f, o in zip(factor.flatten().tolist(), offset.flatten().tolist(), strict=True):
        zero, outermost = (-o / f if f else math.inf), np.abs(thresholds).max()
        if abs(zero) > 2 * outermost:
            moves.append((1.0, 0.0))
        else:
            shrink = min(1.0, outermost / abs(zero)) if zero else 1.0
            moves.append((shrink, thresholds[np.abs(thresholds - shrink * zero).argmin()] - shrink * zero))
    return (torch.tensor(each, dtype=torch.float64).view(factor.shape) for each in zip(*moves, strict=True))


def norm_gradients(case, x, parameters, grad, table):
    """The gradients in closed form, at the levels of the normalized values. For a single row torch's own: codes take more."""
    if x.dim() == len(case.keywords.get("normalized_shape", ())):
        wide = {name: each.detach().double() for name, each in parameters.items()}
        return torch_gradients(case, x.detach().double(), wide, grad.double())
    x, grad = x.detach().double(), grad.double()
    weight = parameters["weight"].detach().double() if "weight" in parameters else None
    eps = case.keywords.get("eps", None if case.function == "rms_norm" else 1e-5)
    if case.function in ("layer_norm", "rms_norm"):
        dims = tuple(range(-len(case.keywords["normalized_shape"]), 0))
        grouped, rows, back = x, tuple(range(x.dim() + dims[0])), lambda t: t
    elif case.function == "batch_norm":
        dims = rows = (0, *range(2, x.dim()))
        grouped, back = x, lambda t: t
        weight = None if weight is None else weight.view(-1, *[1] * (x.dim() - 2))
    else:
        groups = case.keywords["num_groups"]
        grouped = x.reshape(x.shape[0], groups, -1)
        dims, rows, back = (2,), (0, *range(2, x.dim())), lambda t: t.reshape(x.shape)
        weight = None if weight is None else weight.view(-1, *[1] * (x.dim() - 2))
    mean = 0 if case.function == "rms_norm" else grouped.mean(dims, keepdim=True)
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    scale = 1 / ((grouped - mean).square().mean(dims, keepdim=True) + eps).sqrt()
    x_hat = back((grouped - mean) * scale)
    channel = (0, *range(2, x.dim())) if case.function in ("group_norm", "batch_norm") else rows
    center, spread = standardized(x_hat, channel)
    shrink, shift = 1.0, 0.0
    if case.function in ("group_norm", "batch_norm"):
        factor, offset = spread, center
        if weight is not None:
            factor, offset = weight * spread, weight * center + parameters["bias"].detach().double().view_as(weight)
        shrink, shift = moves_to_thresholds(factor, offset, table.thresholds)
    exact, x_hat = x_hat, lookup(table, (x_hat - center) / spread * shrink + shift)
    if channel:  # each channel has gain one, and keeps its mean
        d, e = exact - exact.mean(channel, keepdim=True), x_hat - x_hat.mean(channel, keepdim=True)
        usual = spread / shrink
        gain = d.square().sum(channel, keepdim=True) / (d * e).sum(channel, keepdim=True)
        x_hat = e * torch.where((gain > 0.7 * usual) & (gain < 2 * usual), gain, usual) + exact.mean(channel, keepdim=True)
    else:
        x_hat = (x_hat - shift) / shrink * spread + center
    inner = (grad if weight is None else grad * weight).reshape(grouped.shape)
    values = x_hat.reshape(grouped.shape)
    grad_x = inner - values * (inner * values).mean(dims, keepdim=True)
    if case.function != "rms_norm":
        grad_x = grad_x - inner.mean(dims, keepdim=True)
    found = {"x": back(grad_x * scale)}
    if weight is not None:
        found["weight"] = (grad * x_hat).sum(rows) if rows else grad * x_hat
    if "bias" in parameters:
        found["bias"] = grad.sum(rows) if rows else grad
    return found


def relative(found, exact):
    """|found - exact| / |exact|, a float."""
    found, exact = found.detach().double(), exact.detach().double()
    return ((found - exact).norm() / exact.norm().clamp_min(1e-300)).item()
