"""Models written out as in research code: functional calls, and norms and gates of elementary operations. Their only layers
from torch are linear ones and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tools.studies.zoo.entry import BATCH, CLASSES, VOCABULARY, WIDTH, Entry, WithLoss, cross_entropy, images, tokens
from tools.studies.zoo.written_sequences import (
    HEADS,
    Experts,
    FunctionalGPT,
    LinearAttention,
    Llama,
    StateSpace,
    SwiGLU,
    WrittenSwiGLU,
)

Tensor = torch.Tensor
FAMILY = "written"


class SqueezeExcitation(nn.Module):
    """Convolutions whose channels are weighted by their means."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.norm(self.conv(x)))
        weights = self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + y * weights


class LayerScale(nn.Module):
    """A block of ConvNeXt: scaled by a parameter, and skipped at random for some samples."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down, self.scale = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Parameter(torch.ones(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.scale * self.down(functional.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return x + y * (torch.rand(len(x), 1, 1, 1) < 0.9) / 0.9 if self.training else x + y


class AdaptiveNorm(nn.Module):
    """A block of DiT: shifts, scales and gates are computed from a condition."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.condition(condition)[:, None].chunk(6, -1)
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in self.read(self.norms[0](x) * (1 + scale) + shift).chunk(3, -1)
        )
        x = x + gate * self.write(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)


class Diffusion(nn.Module):
    """Two such blocks on patches of images, with sines as the embedding of time."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = (
            nn.Conv2d(3, WIDTH, 4, 4),
            nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)),
        )
        self.blocks, self.head = nn.ModuleList(AdaptiveNorm() for _ in range(2)), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.linspace(0, 3, 16).exp()
        condition, y = self.time(torch.cat([angles.sin(), angles.cos()], -1)), self.patches(x).flatten(2).mT
        for block in self.blocks:
            y = block(y, condition)
        return functional.pixel_shuffle(self.head(y).mT.unflatten(-1, (8, 8)), 4)


class Graph(nn.Module):
    """Messages along edges: read from nodes, and summed in other nodes."""

    def __init__(self, width: int = WIDTH, layers: int = 2):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.message, self.update = (nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers)) for _ in range(2))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = functional.relu(self.first(nodes))
        for message, update in zip(self.message, self.update, strict=True):
            sent = functional.leaky_relu(message(torch.cat([x[edges[0]], x[edges[1]]], -1)))
            got = torch.zeros_like(x).index_add(0, edges[1], sent)
            x = functional.relu(update(torch.cat([x, got], -1)))
        return self.head(x)


class GraphAttention(nn.Module):
    """Weights of edges: a softmax over all edges that lead to the same node."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.value, self.score, self.head = nn.Linear(8, width), nn.Linear(2 * width, 1), nn.Linear(width, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.value(nodes)
        score = functional.leaky_relu(self.score(torch.cat([x[edges[0]], x[edges[1]]], -1)), 0.2).exp()
        total = torch.zeros(len(x), 1).index_add(0, edges[1], score)
        weights = functional.dropout(score / (total[edges[1]] + 1e-6), 0.1, self.training)
        return self.head(functional.elu(torch.zeros_like(x).index_add(0, edges[1], weights * x[edges[0]])))


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 for each output."""

    def forward(self, input: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (deviation + 1e-5), self.bias)


class Discriminator(nn.Module):
    """Spectrally normalized convolutions with a hinge loss."""

    def __init__(self, width: int = 16):
        super().__init__()
        spectral = parametrizations.spectral_norm
        self.convs = nn.ModuleList(spectral(nn.Conv2d(a, b, 4, 2, 1)) for a, b in ((3, width), (width, 2 * width)))
        self.head = spectral(nn.Linear(2 * width * 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), 0.2)
        return self.head(x.flatten(1))


class GAN(nn.Module):
    """A generator with nearest-neighbour upsampling, and the discriminator's output for it."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first, self.discriminator = nn.Linear(32, 4 * width * 16), Discriminator()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((64, 32), (32, 16), (16, 3)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(each) for each in (32, 16))

    def forward(self, noise: Tensor) -> Tensor:
        x = self.first(noise).unflatten(-1, (64, 4, 4))
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = functional.relu(norm(conv(functional.interpolate(x, scale_factor=2))))
        return self.discriminator(torch.tanh(self.convs[-1](functional.interpolate(x, scale_factor=2))))


class VariationalAutoencoder(nn.Module):
    """Draws its code from a normal distribution. The output also has its divergence."""

    def __init__(self, width: int = 128, code: int = 16):
        super().__init__()
        self.read, self.code = nn.Linear(3 * 32 * 32, width), nn.Linear(width, 2 * code)
        self.open, self.write = nn.Linear(code, width), nn.Linear(width, 3 * 32 * 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.code(torch.tanh(self.read(x.flatten(1)))).chunk(2, -1)
        drawn = mean + (spread / 2).exp() * torch.randn_like(mean)
        image = torch.sigmoid(self.write(torch.tanh(self.open(drawn)))).view_as(x)
        return image, (mean**2 + spread.exp() - 1 - spread).sum(-1).mean() / 2


class Coordinates(nn.Module):
    """A network of sines (SIREN), from places to colours."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(n, width) for n in (2, width, width)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.head(x)


class Coupling(nn.Module):
    """A normalizing flow of two affine couplings. The output is the negative log likelihood of each sample."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        (left, right), volume = x.chunk(2, -1), torch.zeros(len(x))
        for net in self.nets:
            shift, scale = net(left).chunk(2, -1)
            scale = torch.tanh(scale)
            left, right = right * scale.exp() + shift, left
            volume = volume + scale.sum(-1)
        return (left**2 + right**2).sum(-1) / 2 - volume


def on_sequences(*blocks: nn.Module) -> nn.Module:
    """Blocks between an embedding and a head."""
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))


def on_images(*blocks: nn.Module) -> nn.Module:
    """Blocks between a convolution and a head."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def standardized() -> nn.Module:
    """Standardized convolutions with group norms."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [StandardizedConv(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
    return on_images(*layers)


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, edges with their ends, and classes of the nodes."""
    return torch.randn(64, 8), torch.randint(64, (2, 256)), torch.randint(CLASSES, (64,))


def elbo(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The loss of a variational autoencoder."""
    return functional.mse_loss(output[0], target) + 1e-3 * output[1]


def _noisy_images() -> tuple[Tensor, Tensor, Tensor]:
    return images()[0], torch.rand(BATCH), images()[0]


def entries() -> Iterator[Entry]:
    """All entries of this file."""
    pairs = lambda: (images()[0], images()[0].sigmoid())  # noqa: E731
    mean_square, hinge = functional.mse_loss, lambda output, target: functional.relu(target - output).mean()
    made: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], tuple]]] = {
        "GPT, functional": (FunctionalGPT, cross_entropy, tokens),
        "Llama, written out": (lambda: Llama(SwiGLU), cross_entropy, tokens),
        "Llama, x * sigmoid(x)": (lambda: Llama(WrittenSwiGLU), cross_entropy, tokens),
        "squeeze-and-excitation": (lambda: on_images(SqueezeExcitation(), SqueezeExcitation()), cross_entropy, images),
        "LayerScale": (lambda: on_images(LayerScale(), LayerScale()), cross_entropy, images),
        "adaLN": (Diffusion, mean_square, _noisy_images),
        "experts": (lambda: on_sequences(Experts(), Experts()), cross_entropy, tokens),
        "graph": (Graph, cross_entropy, graph),
        "graph attention": (GraphAttention, cross_entropy, graph),
        "state space": (lambda: on_sequences(StateSpace()), cross_entropy, tokens),
        "linear attention": (lambda: on_sequences(LinearAttention(), LinearAttention()), cross_entropy, tokens),
        "standardized weights": (standardized, cross_entropy, images),
        "spectral norm GAN": (GAN, hinge, lambda: (torch.randn(BATCH, 32), torch.ones(BATCH, 1))),
        "VAE": (VariationalAutoencoder, elbo, pairs),
        "SIREN": (Coordinates, mean_square, lambda: (torch.rand(256, 2), torch.rand(256, 3))),
        "flow": (Coupling, lambda output, _: output.mean(), lambda: (torch.randn(64, 16), torch.empty(0))),
    }
    for name, (make, loss, batch) in made.items():
        yield Entry(name, FAMILY, lambda make=make, loss=loss: WithLoss(make(), loss), batch)
