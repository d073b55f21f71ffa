"""Random networks, drawn from a seed. They are composed of pieces of a few lines each.

A piece is drawn for the tensor that it will read, but need not fit. `Draw.chain` runs each piece at once, and draws another one
if torch refuses it. So no piece needs to know the rules of the others, and networks arise that nobody would write.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

Tensor = torch.Tensor
Piece = Callable[["Draw", Tensor], nn.Module]


def _texts(text: str) -> list[str]:
    """The entries in the lines. Two spaces separate them."""
    return [each for line in text.strip().splitlines() for each in line.split("  ")]


# without RReLU: if it is checkpointed, torch's own gradient of it is uninitialized memory
MODULES = _texts("""
ReLU  GELU  SiLU  Sigmoid  Tanh  ELU  SELU  CELU  Softplus  Mish  Hardswish  Hardsigmoid  Hardtanh  ReLU6  LeakyReLU  LogSigmoid
Softsign  Tanhshrink  Hardshrink  Softshrink  Softmax  PReLU  Softmin  Identity
""")
FUNCTIONS = _texts("""
F.gelu(x)  F.gelu(x, approximate="tanh")  F.silu(x)  F.silu(x, inplace=True)  F.relu(x)  F.relu_(x)  F.elu(x, 0.5)  F.glu(x)
F.leaky_relu(x, 0.2)  F.softplus(x, beta=2)  F.hardswish(x)  F.hardtanh(x, -2, 2)  F.threshold(x, 0.1, 0)
F.celu(x, inplace=True)  F.layer_norm(x, x.shape[-1:])  F.rms_norm(x, x.shape[-1:])  F.normalize(x)  F.group_norm(x, 1)
F.batch_norm(x, None, None, training=True)  F.instance_norm(x)  x.relu()  x.relu_()  x.sigmoid()  x.sigmoid_()  x.tanh()
torch.relu(x)  torch.sigmoid(x)  torch.tanh(x)  torch.selu(x)  torch.special.expit(x)  torch.relu_(x)  x.softmax(-1)  x.tanh_()
x.sin()  x.abs()  x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()  x * (x > 0.5)  x / (1 + x.abs())
F.scaled_dot_product_attention(x, x, x)  x @ x.transpose(-1, -2)
""")
DROPOUTS = _texts("""
F.dropout(x, 0.5)  F.dropout(x, 0.1)  F.dropout(x, 0.9)  F.dropout(x, 0.5, inplace=True)  F.alpha_dropout(x, 0.2)
F.dropout1d(x)  F.dropout2d(x)  F.feature_alpha_dropout(x)
""")
SHAPES = _texts("""
x.flatten(1)  x.flatten()  x.unflatten(-1, (2, -1))  x.unflatten(1, (2, -1))  x.transpose(0, -1)  x.transpose(1, 2)  x.t()
x.permute(0, 2, 3, 1)  x.permute(0, 3, 1, 2)  x[1:]  x[..., ::2]  x[:, 0]  x[None]  x.flip(0)  x.unsqueeze(1)  x.squeeze()
x.mean(1)  x.sum(-1, keepdim=True)  x.chunk(2, -1)[1]  x.chunk(2, 1)[0]  x.expand(2, *x.shape)  torch.cat([x, x])
x.clone()  x.contiguous()  x.contiguous(memory_format=torch.channels_last)  x.contiguous(memory_format=torch.channels_last_3d)
x.view(-1)  x.reshape(-1, x.shape[-1])  x.view(*x.shape[:2], -1)  F.pad(x, (1, 0))  F.pad(x, (0, -1))  F.max_pool1d(x, 2)
F.max_pool2d(x, 2)  F.avg_pool2d(x, 2)  F.interpolate(x, scale_factor=2)  F.adaptive_avg_pool2d(x, 1)  torch.cat([x, x], -1)
torch.stack([x, -x], 1)  x + x.detach()  F.pixel_unshuffle(x, 2)  x[x.shape[0]:]  x[..., :1]
""")
IN_PLACE = _texts("""
operator.iadd(x, 1)  operator.imul(x, 0.5)  x.add_(1)  x.mul_(0.5)  x.masked_fill_(x < 0, 0)  x.clamp_(-1, 1)  x.neg_()
(x[:1].zero_(), x)[1]  (operator.setitem(x, (..., 0), 0), x)[1]  x.view(-1).mul_(2).view_as(x)  x.transpose(0, -1).add_(1)
x.detach().mul_(2) + x  x.unsqueeze_(0)  x.t_()
""")
GATES = _texts("""
F.silu(a) * b  F.gelu(a) * b  b * F.gelu(a, approximate="tanh")  a.sigmoid() * b  F.relu(a) * b  a * b  a + b  a.mul_(b)
torch.cat([a, b], -1)  a @ b.transpose(-1, -2)  torch.tanh(a).mul(b)  a.detach() * b  torch.where(a > b, a, b)
""")
DTYPES = (torch.float32,) * 3 + (torch.float64, torch.bfloat16, torch.float16)
SCALES = {"small": (1, 2, 2, 3, 4, 6), "large": (4, 8, 12, 16, 32)}
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    ArithmeticError,
    AssertionError,
)  # what torch raises for pieces that do not fit


class Function(nn.Module):
    """An expression of x."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.function = text, eval(f"lambda x: {text}", {"torch": torch, "F": functional, "operator": operator})

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.text


class Chain(nn.Sequential):
    pass


class Residual(nn.Module):
    def __init__(self, body: nn.Module, inplace: bool):
        super().__init__()
        self.body, self.inplace = body, inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y.add_(x) if self.inplace else x + y

    def extra_repr(self) -> str:
        return "inplace" if self.inplace else ""


class Gate(nn.Module):
    """Two chains that read x, and an expression of their outputs `a` and `b`."""

    def __init__(self, one: nn.Module, other: nn.Module, text: str):
        super().__init__()
        self.one, self.other, self.text = one, other, text
        self.function = eval(f"lambda a, b: {text}", {"torch": torch, "F": functional})

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.one(x), self.other(x))

    def extra_repr(self) -> str:
        return self.text


class Tied(nn.Module):
    """A linear layer, and one back with the same weight, as in autoencoders and language models."""

    def __init__(self, linear: nn.Linear, between: nn.Module):
        super().__init__()
        self.linear, self.between = linear, between

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.between(self.linear(x)), self.linear.weight.t())


class Checkpoint(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.active = body, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.body(x)
        return checkpoint.checkpoint(self.body, x, use_reentrant=False)  # type: ignore[return-value]


class Autocast(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x)


class Draw(random.Random):
    """Random decisions from a seed, and earlier pieces, to be used again."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.sizes = SCALES[self.choice(["small", "large"])]
        self.odd = self.chance(0.15)  # whether sizes may be 0 and 1, and a piece that torch refuses may stay
        self.made: list[nn.Module] = []
        self.left = 300  # pieces to try; without a limit, pieces that consist of others might never end

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self) -> int:
        """The size of a dimension."""
        return self.choice((0, 1, 1, 2)) if self.odd and self.chance(0.2) else self.choice(self.sizes)

    def chain(self, x: Tensor, longest: int = 3) -> tuple[Chain, Tensor]:
        """Pieces that fit one after the other, and their output for x."""
        found, goal, tries = Chain(), self.randint(1, longest), 0
        while len(found) < goal and tries < 8 * goal and self.left:
            tries, self.left = tries + 1, self.left - 1
            try:
                module = self.piece(x).to(x.dtype)
            except REFUSALS:
                continue
            try:
                with torch.no_grad():
                    y = module(x.clone())
            except REFUSALS:
                if self.odd and self.chance(0.02):
                    found.append(module)  # although torch refuses it
                    break
                continue
            if y.numel() <= 1 << 15 and y.dim() <= 5 and y.is_floating_point() and (y.numel() or self.odd):
                found.append(module)
                self.made.append(module)
                x = y
        return found, x

    def piece(self, x: Tensor) -> nn.Module:
        if self.made and self.chance(0.06):
            return self.choice(self.made)
        (piece,) = self.choices(list(PIECES), list(PIECES.values()))
        return piece(self, x)


def linear(draw: Draw, x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[-1], draw.size(), bias=draw.chance(0.7))


def convolution(draw: Draw, x: Tensor) -> nn.Module:
    dims = min(max(x.dim() - (1 if draw.chance(0.1) else 2), 1), 3)
    channels, transposed = x.shape[-dims - 1], draw.chance(0.25)
    groups = draw.choice([1, 1, 1, 2, max(channels, 1)])
    options: dict[str, Any] = {"stride": draw.choice([1, 1, 2]), "padding": draw.choice([0, 1, 1, 2]), "bias": draw.chance(0.7)}
    options |= {
        "dilation": draw.choice([1, 1, 1, 2]),
        "padding_mode": "zeros" if transposed or draw.chance(0.8) else "circular",
    }
    if not transposed and options["stride"] == 1 and draw.chance(0.2):
        options["padding"] = draw.choice(["same", "valid"])
    maker = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    return maker(channels, groups * draw.size(), draw.choice([1, 2, 3, 3]), groups=groups, **options)


def norm(draw: Draw, x: Tensor) -> nn.Module:
    affine, eps, last = draw.chance(0.7), draw.choice([1e-5, 1e-5, 1e-3, 0.1]), draw.choice([1, 1, 1, 2])
    dims = draw.choice([1, 2, 3])
    return draw.choice(
        [
            lambda: nn.LayerNorm(x.shape[-last:], eps, affine, bias=draw.chance(0.8)),
            lambda: nn.RMSNorm(x.shape[-last:], draw.choice([None, eps]), affine),
            lambda: nn.GroupNorm(draw.choice([1, 2, x.shape[1]]), x.shape[1], eps, affine),
            lambda: getattr(nn, f"InstanceNorm{dims}d")(x.shape[1], eps, affine=affine),
            lambda: getattr(nn, f"BatchNorm{dims}d")(x.shape[1], eps, draw.choice([0.1, None]), affine, draw.chance(0.8)),
            lambda: getattr(nn, f"BatchNorm{min(max(x.dim() - 2, 1), 3)}d")(x.shape[1], affine=affine),
        ]
    )()


def double_norm(draw: Draw, x: Tensor) -> nn.Module:
    return Chain(norm(draw, x), norm(draw, x))


def activation(draw: Draw, x: Tensor) -> nn.Module:
    maker = getattr(nn, draw.choice(MODULES))
    return maker(inplace=True) if "inplace" in maker.__init__.__code__.co_varnames and draw.chance(0.4) else maker()


def function(texts: list[str]) -> Piece:
    return lambda draw, x: Function(draw.choice(texts))


def dropout(draw: Draw, x: Tensor) -> nn.Module:
    maker = draw.choice([nn.Dropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout])
    return maker(draw.choice([0.0, 0.1, 0.5, 0.9]), inplace=draw.chance(0.3))


def residual(draw: Draw, x: Tensor) -> nn.Module:
    body, y = draw.chain(x)
    return Residual(body if y.shape == x.shape else Chain(body, nn.Linear(y.shape[-1], x.shape[-1])), draw.chance(0.2))


def gate(draw: Draw, x: Tensor) -> nn.Module:
    text = draw.choice(GATES)
    if draw.chance(0.5):
        width, bias = draw.size(), draw.chance(0.5)
        return Gate(nn.Linear(x.shape[-1], width, bias), nn.Linear(x.shape[-1], width, bias), text)
    return Gate(draw.chain(x, 2)[0], draw.choice([lambda: nn.Identity(), lambda: draw.chain(x, 2)[0]])(), text)


def split_gate(draw: Draw, x: Tensor) -> nn.Module:
    if draw.chance(0.5):
        return nn.GLU(draw.choice([-1, 1, 0]))
    return Gate(Function("x.chunk(2, -1)[0]"), Function("x.chunk(2, -1)[1]"), draw.choice(["F.silu(a) * b", "F.gelu(b) * a"]))


def tied(draw: Draw, x: Tensor) -> nn.Module:
    layer = nn.Linear(x.shape[-1], draw.size(), bias=draw.chance(0.5))
    return Tied(layer, activation(draw, x))


def attention(draw: Draw, x: Tensor) -> nn.Module:
    layer = nn.TransformerEncoderLayer(x.shape[-1], draw.choice([1, 2]), draw.size(), draw.choice([0.0, 0.1]), batch_first=True)
    layer.activation = draw.choice([functional.gelu, functional.relu])
    return layer


PIECES: dict[Piece, float] = {
    linear: 20,
    convolution: 16,
    norm: 16,
    activation: 10,
    function(FUNCTIONS): 10,
    function(SHAPES): 14,
    function(IN_PLACE): 5,
    function(DROPOUTS): 2,
    dropout: 3,
    residual: 5,
    gate: 5,
    split_gate: 3,
    double_norm: 2,
    tied: 2,
    attention: 1,
    lambda draw, x: Checkpoint(draw.chain(x)[0]): 2,
    lambda draw, x: Autocast(draw.chain(x)[0]): 2,
}
INPUTS = {  # of standard normal numbers
    "normal": lambda x: x,
    "large": lambda x: x * 30,
    "tiny": lambda x: x * 1e-3,
    "offset": lambda x: x + 3,
    "zero rows": lambda x: x * (torch.arange(x.shape[0]) % 3 > 0).view(-1, *[1] * (x.dim() - 1)),
    "sparse": lambda x: x * (x > 1),
    "constant": lambda x: torch.ones_like(x),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@dataclass
class Network:
    """A random network, and a batch for it."""

    seed: int
    module: nn.Module
    x: Tensor
    needs: bool  # whether x requires a gradient
    values: str  # one of INPUTS

    def on(self, device: str) -> Network:
        """The same network on a device."""
        return replace(self, module=self.module.to(device), x=self.x.to(device))

    def __str__(self) -> str:
        """The network on one line, as short as possible."""
        words = " ".join(repr(self.module).split()).replace("( ", "(").replace(" )", ")")
        mode = "" if self.module.training else ", eval"
        return f"{str(self.x.dtype)[6:]} {list(self.x.shape)} {self.values}{', needed' * self.needs}{mode}: {words}"


def network(seed: int, longest: int = 6) -> Network:
    """The network of a seed."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    dtype, values = draw.choice(DTYPES), draw.choice([*["normal"] * 6, *INPUTS])
    rank = draw.choice([1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5])
    shape = [draw.size() for _ in range(rank)]
    shape[0] *= draw.choice([1, 4, 16])  # small tensors are not coded
    while torch.Size(shape).numel() > 1 << 13:
        shape[draw.randrange(rank)] //= 2
    x = INPUTS[values](torch.randn(shape)).to(dtype)
    module, _ = draw.chain(x, longest)
    _unsettle(draw, module)
    return Network(seed, module, x, draw.chance(0.5), values)


def _unsettle(draw: Draw, module: nn.Module) -> None:
    """Choose the mode, freeze parts, tie weights, and change parameters and statistics as training does."""
    module.train(draw.chance(0.8))
    for each in module.modules():
        if draw.chance(0.04):
            each.requires_grad_(False)
        if draw.chance(0.04):
            each.train(draw.chance(0.5))
    for name, each in [*module.named_parameters(), *module.named_buffers()]:
        if each.dim() == 1 and each.is_floating_point():
            with torch.no_grad():
                each.copy_(torch.rand(each.shape) + 0.5 if "weight" in name or "var" in name else torch.randn(each.shape) / 2)
        if draw.chance(0.04):
            each.requires_grad_(False)
    owners = [each for each in module.modules() if isinstance(getattr(each, "weight", None), nn.Parameter)]
    for one in owners:
        other = draw.choice(owners)
        if draw.chance(0.05) and one.weight.shape == other.weight.shape:
            one.weight = other.weight
