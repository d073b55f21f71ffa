"""Ten networks in plain torch. They are so small that a step takes 10 to 20 ms on one thread."""

from __future__ import annotations

import torch
from torch import nn

from fewbit import demo
from tools.studies.reviewers.data import CHARACTERS

Tensor = torch.Tensor


def waves(tokens: int, width: int) -> Tensor:
    """Sines and cosines (tokens, width) of increasing wavelength. Embeddings of positions begin with them, to learn quickly."""
    angles = torch.arange(tokens)[:, None] * 1000 ** -torch.linspace(0, 1, width // 2)
    return torch.cat((angles.sin(), angles.cos()), 1)


class Characters(nn.Module):
    """Characters (batch, tokens) to logits (batch, tokens, CHARACTERS): embeddings, what is between, and a head."""

    def __init__(self, between: nn.Module, norm: nn.Module, width: int, tokens: int):
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.position = nn.Embedding.from_pretrained(waves(tokens, width), freeze=False)
        self.between, self.norm, self.head = between, norm, nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.between(x)))


def gpt(width: int = 64, blocks: int = 3, tokens: int = 64) -> nn.Module:
    """A decoder with GELU, as the demo's."""
    between = nn.Sequential(*(demo.Block(nn.GELU(), width, heads=4) for _ in range(blocks)))
    return Characters(between, nn.LayerNorm(width), width, tokens)


def bert(width: int = 64, blocks: int = 3, tokens: int = 64) -> nn.Module:
    """An encoder of torch's own layers, norms after the sums."""
    layers = (
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True) for _ in range(blocks)
    )
    return Characters(nn.Sequential(*layers), nn.Identity(), width, tokens)


class GatedBlock(nn.Module):
    """A decoder's block with RMSNorm and SwiGLU, without biases."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def swiglu(width: int = 64, blocks: int = 3, tokens: int = 64) -> nn.Module:
    """A decoder of gated blocks."""
    between = nn.Sequential(*(GatedBlock(width, 4, hidden=176) for _ in range(blocks)))
    return Characters(between, nn.RMSNorm(width), width, tokens)


class Recurrent(nn.Module):
    """Characters (batch, tokens) to logits of the next ones: two recurrent layers, dropout between them."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int = 96):
        super().__init__()
        self.embed, self.head = nn.Embedding(CHARACTERS, width), nn.Linear(width, CHARACTERS)
        self.layers = kind(width, width, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.layers(self.embed(tokens))
        return self.head(states)


class ViT(nn.Module):
    """Pictures (n, 1, 14, 14) in patches of 2 x 2 to logits (n, 10)."""

    def __init__(self, width: int = 48, blocks: int = 3):
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, width, 2, stride=2), nn.Parameter(0.02 * torch.randn(49, width))
        self.blocks = nn.Sequential(*(demo.Block(nn.GELU(), width, heads=3) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class Mean(nn.Module):
    """The mean of each channel: (n, c, height, width) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def convolution(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3 x 3, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class BasicBlock(nn.Module):
    """The sum of the input and two convolutions. Batch norm follows each convolution, ReLU follows the sum."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.first = convolution(c_in, c_out, stride)
        self.second, self.norm = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut, self.relu = nn.Identity(), nn.ReLU()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.second(self.first(x))) + self.shortcut(x))


def resnet(width: int = 16) -> nn.Module:
    """Two stages of two blocks each."""
    first = (BasicBlock(width, width, 1), BasicBlock(width, width, 1))
    second = (BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
    return nn.Sequential(convolution(1, width), *first, *second, Mean(), nn.Linear(2 * width, 10))


def vgg(width: int = 24) -> nn.Module:
    """Convolutions with ReLU, max pooling, dropout and linear layers; no norm."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    head = (nn.Dropout(0.3), nn.Linear(2 * width * 9, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    return nn.Sequential(*layers, nn.Flatten(), *head)


class DenseLayer(nn.Module):
    """The input with `growth` more channels, made by batch norm, ReLU and a convolution."""

    def __init__(self, c_in: int, growth: int):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(c_in), nn.ReLU()
        self.conv = nn.Conv2d(c_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(self.relu(self.norm(x)))), 1)


def densenet(width: int = 16, growth: int = 8, depth: int = 4) -> nn.Module:
    """Two dense blocks with a transition that halves channels and sides."""
    wide = width + depth * growth
    half, last = wide // 2, wide // 2 + depth * growth
    transition = (nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, half, 1, bias=False), nn.AvgPool2d(2))
    first = (DenseLayer(width + i * growth, growth) for i in range(depth))
    second = (DenseLayer(half + i * growth, growth) for i in range(depth))
    head = (nn.BatchNorm2d(last), nn.ReLU(), Mean(), nn.Linear(last, 10))
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), *first, *transition, *second, *head)


def plain(width: int = 16, depth: int = 12) -> nn.Module:
    """Convolutions with batch norm and ReLU, one after another, without shortcuts."""
    layers = [convolution(1, width, 2), *(convolution(width, width) for _ in range(depth - 1))]
    return nn.Sequential(*layers, Mean(), nn.Linear(width, 10))


def _twice(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (c_in, c_out):
        layers += [nn.Conv2d(channels, c_out, 3, padding=1, bias=False), nn.GroupNorm(4, c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Noisy pictures (n, 3, side, side) to pictures without noise. The network computes the noise, which is subtracted."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.first, self.second, self.bottom = _twice(3, width), _twice(width, 2 * width), _twice(2 * width, 4 * width)
        self.down = nn.MaxPool2d(2)
        self.up2, self.up1 = (nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in (2 * width, width))
        self.after2, self.after1 = _twice(4 * width, 2 * width), _twice(2 * width, width)
        self.noise = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.down(first))
        bottom = self.bottom(self.down(second))
        y = self.after2(torch.cat((second, self.up2(bottom)), 1))
        y = self.after1(torch.cat((first, self.up1(y)), 1))
        return x - self.noise(y)
