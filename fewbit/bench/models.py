"""The models that `fewbit bench --model` knows by name: the layers of common networks, on a batch of working size.

They have no embeddings and no head, so that only the layers are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from fewbit.demo import Block
from fewbit.errors import InputError
from fewbit.models.arguments import LossFunction

Tensor = torch.Tensor

HEAD_WIDTH = 64


class Subject(NamedTuple):
    """What is measured: a model, a batch to call it with, as in `fewbit.models.arguments`, and a function that gives the loss.

    Without a loss function, the loss is the `loss` of the model's output. If there is none, backward begins at all outputs,
    with normal numbers as gradients.
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFunction | None = None

    @classmethod
    def of(cls, made: Any) -> Subject:
        """The subject that a factory made. InputError if that is neither (model, batch) nor (model, batch, loss_fn)."""
        if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
            kinds = ", ".join(type(each).__name__ for each in made) if isinstance(made, tuple) else type(made).__name__
            raise InputError(f"a factory must return (model, batch) or (model, batch, loss_fn), got ({kinds})")
        found = cls(*made)
        if found.loss_fn is not None and not callable(found.loss_fn):
            got = type(found.loss_fn).__name__
            raise InputError(f"a factory's loss_fn must be a function of the model and a batch, got {got}")
        return found


class LlamaAttention(nn.Module):
    """Causal attention on (batch, tokens, width), with rotary positions of queries and keys."""

    cosine: Tensor  # (tokens, HEAD_WIDTH)
    sine: Tensor  # (tokens, HEAD_WIDTH)

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        frequencies = 10000.0 ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        angles = torch.outer(torch.arange(tokens), frequencies).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(-2))

    def turned(self, x: Tensor) -> Tensor:
        """x (batch, heads, tokens, HEAD_WIDTH) with each pair of features i and i + HEAD_WIDTH / 2 turned by its angle."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat((-second, first), dim=-1) * self.sine


class LlamaMLP(nn.Module):
    """A gated product between linear layers, on (*, width)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.act, self.down = nn.SiLU(), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """A pre-norm block of Llama on (batch, tokens, width)."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention, self.mlp = LlamaAttention(width, tokens), LlamaMLP(width, 8 * width // 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ResidualBlock(nn.Module):
    """Convolution, batch norm, ReLU, convolution, batch norm, added to the input, ReLU, on (batch, channels, height, width)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))


def gpt(blocks: int = 4, width: int = 512, batch: int = 8, tokens: int = 256) -> Subject:
    """Blocks of the demo's GPT, and the input of the first block: (batch, tokens, width)."""
    layers = (Block(nn.GELU(), width, width // HEAD_WIDTH) for _ in range(blocks))
    return Subject(nn.Sequential(*layers), torch.randn(batch, tokens, width, requires_grad=True))


def llama(blocks: int = 4, width: int = 512, batch: int = 8, tokens: int = 256) -> Subject:
    """Blocks of a Llama: RMS norms, rotary positions and gated products; on (batch, tokens, width)."""
    layers = (LlamaBlock(width, tokens) for _ in range(blocks))
    return Subject(nn.Sequential(*layers), torch.randn(batch, tokens, width, requires_grad=True))


def conv(blocks: int = 2, channels: int = 64, batch: int = 8, size: int = 56) -> Subject:
    """Residual blocks of 3 x 3 convolutions, batch norm and ReLU; on (batch, channels, size, size)."""
    layers = (ResidualBlock(channels) for _ in range(blocks))
    return Subject(nn.Sequential(*layers), torch.randn(batch, channels, size, size, requires_grad=True))


BUILT_IN: dict[str, Callable[..., Subject]] = {"gpt": gpt, "llama": llama, "conv": conv}  # each takes `blocks`
