"""Sequence models written out: blocks of language models as in research code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from tools.studies.zoo.entry import TOKENS, VOCABULARY, WIDTH

Tensor = torch.Tensor
HEADS = 4


class FunctionalGPT(nn.Module):
    """Two blocks whose activation, attention, dropout and norms are calls of functions."""

    def __init__(self, width: int = WIDTH, layers: int = 2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(TOKENS, width) * 0.02)
        self.read, self.write, self.up, self.down = (
            nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(layers))
            for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        )

    def forward(self, numbers: Tensor) -> Tensor:
        x = functional.dropout(self.tokens(numbers) + self.places, 0.1, self.training)
        for read, write, up, down in zip(self.read, self.write, self.up, self.down, strict=True):
            q, k, v = (self._heads(each) for each in read(functional.layer_norm(x, x.shape[-1:])).chunk(3, -1))
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + functional.dropout(write(attended.transpose(1, 2).flatten(2)), 0.1, self.training)
            x = x + functional.dropout(down(functional.gelu(up(functional.layer_norm(x, x.shape[-1:])))), 0.1, self.training)
        return functional.layer_norm(x, x.shape[-1:]) @ self.tokens.weight.T

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class WrittenRMSNorm(nn.Module):
    """x over its root mean square, computed with elementary operations."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in [(width, hidden)] * 2 + [(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class WrittenSwiGLU(SwiGLU):
    """The same, with the sigmoid written out."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class WrittenAttention(nn.Module):
    """Attention with rotated queries and keys, and a softmax of elementary operations."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        angles = torch.arange(TOKENS)[:, None] * 0.1 ** torch.linspace(0, 3, width // HEADS // 2)
        self.angles = nn.Buffer(torch.cat([angles, angles], -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        q, k = (each * self.angles.cos() + self._turned(each) * self.angles.sin() for each in (q, k))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        ahead = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        weights = functional.dropout(scores.masked_fill(ahead, float("-inf")).softmax(-1), 0.1, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([-right, left], -1)


class Llama(nn.Module):
    """Blocks of WrittenAttention and a gated MLP, after written-out RMSNorms."""

    def __init__(self, gated: Callable[[int, int], nn.Module], layers: int = 2):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(WrittenRMSNorm(WIDTH) for _ in range(2 * layers + 1))
        self.attention = nn.ModuleList(WrittenAttention(WIDTH) for _ in range(layers))
        self.mlp = nn.ModuleList(gated(WIDTH, 3 * WIDTH) for _ in range(layers))

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embedding(numbers)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


class Experts(nn.Module):
    """A mixture of experts with stacked weights. Each token goes to two experts, chosen by a softmax."""

    def __init__(self, experts: int = 4, width: int = WIDTH):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / (2 * width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros(*x.shape[:-1], len(self.up)).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
        hidden = functional.gelu(torch.einsum("btc,ech->beth", x, self.up))
        return x + torch.einsum("beth,ehc,bte->btc", hidden, self.down, gates)


class StateSpace(nn.Module):
    """A selective scan, step by step, as Mamba's is written without kernels."""

    def __init__(self, width: int = WIDTH, states: int = 8):
        super().__init__()
        self.read, self.write = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.select, self.step = nn.Linear(width, 2 * states), nn.Linear(width, width)
        self.decay, self.skip = nn.Parameter(torch.rand(width, states)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.read(x).chunk(2, -1)
        u = functional.silu(self.conv(u.mT)[..., : u.shape[1]].mT)
        step, (into, out) = functional.softplus(self.step(u)), self.select(u).chunk(2, -1)
        kept, added = torch.exp(-step[..., None] * self.decay.exp()), (step * u)[..., None] * into[..., None, :]
        state, results = torch.zeros_like(added[:, 0]), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + added[:, t]
            results.append((state * out[:, t, None]).sum(-1))
        return x + self.write((torch.stack(results, 1) + self.skip * u) * functional.silu(gate))


class LinearAttention(nn.Module):
    """Attention by cumulative sums of products of keys and values, with ELU + 1 for the kernel."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)) for each in self.read(x).chunk(3, -1))
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        memory, total = torch.einsum("bthc,bthd->bthcd", k, v).cumsum(1), k.cumsum(1)
        y = torch.einsum("bthc,bthcd->bthd", q, memory) / (torch.einsum("bthc,bthc->bth", q, total)[..., None] + 1e-6)
        return x + self.write(y.flatten(2))
