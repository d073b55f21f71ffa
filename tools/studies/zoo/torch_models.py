"""Models of torch.nn's own layers, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from tools.studies.zoo.entry import (
    BATCH,
    CLASSES,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Entry,
    WithLoss,
    cross_entropy,
    images,
    sequences,
    tokens,
)

Tensor = torch.Tensor
FAMILY, HEADS = "torch.nn", 4


class Tagger(nn.Module):
    """A recurrent network that predicts the next token."""

    def __init__(self, recurrent: Callable[..., nn.Module], **options: object):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(VOCABULARY, WIDTH), nn.Dropout(0.1)
        self.recurrent = recurrent(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True, **options)
        self.head = nn.LazyLinear(VOCABULARY)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.dropout(self.recurrent(self.embedding(numbers))[0]))


class SelfAttention(nn.Module):
    """A MultiheadAttention of a sequence with itself, added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y)[0]


class Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class DenseBlock(nn.Module):
    """A dense block: each layer reads the outputs of all layers before it."""

    def __init__(self, width: int, growth: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + growth * i),
                nn.ReLU(),
                nn.Conv2d(width + growth * i, growth, 3, padding=1),
                nn.Dropout(0.2),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class UNet(nn.Module):
    """Down by max-pooling, up by transposed convolutions, with shortcuts across."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first, self.second = self._pair(3, width), self._pair(width, 2 * width)
        self.bottom, self.pool = self._pair(2 * width, 4 * width), nn.MaxPool2d(2)
        self.up_second, self.up_first = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
            nn.ConvTranspose2d(2 * width, width, 2, 2),
        )
        self.right_second, self.right_first = self._pair(4 * width, 2 * width), self._pair(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Module:
        layers = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.pool(first))
        y = self.up_second(self.bottom(self.pool(second)))
        y = self.up_first(self.right_second(torch.cat([second, y], 1)))
        return self.head(self.right_first(torch.cat([first, y], 1)))


class Mixer(nn.Module):
    """A block of an MLP-Mixer: an MLP over tokens, and one over channels."""

    def __init__(self, places: int = TOKENS, width: int = WIDTH):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens, self.channels = (
            nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * n, n)) for n in (places, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class Autoencoder(nn.Module):
    """Convolutions with strides, and transposed ones back; leaky ReLU, ELU and a sigmoid at the end."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, 2, 1)),
            *(nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)),
        )
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ELU()),
            *(nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def plain_convolutions() -> nn.Module:
    """A network built like AlexNet and VGG."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    hidden = (nn.Linear(32 * 64, 128), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), *hidden)


def residual_network() -> nn.Module:
    """Two blocks, and a mean over places."""
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def dense_network() -> nn.Module:
    """A dense block, a transition and a head."""
    parts = (nn.Conv2d(3, 16, 3, padding=1), DenseBlock(16, 8, 4), nn.BatchNorm2d(48), nn.ReLU(), nn.AvgPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES))


def separable_convolutions() -> nn.Module:
    """A network built like MobileNet: convolutions by channel, then by place."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    for stride in (1, 2):
        layers += [nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def volumes() -> nn.Module:
    """Convolutions in three dimensions."""
    layers = (nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.PReLU(8), nn.MaxPool3d(2))
    return nn.Sequential(*layers, nn.Conv3d(8, 8, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.LazyLinear(CLASSES))


def waves() -> nn.Module:
    """Dilated convolutions in one dimension."""
    layers: list[nn.Module] = []
    for inputs, dilation in ((1, 1), (32, 2), (32, 4)):
        layers += [nn.Conv1d(inputs, 64, 3, padding=dilation, dilation=dilation), nn.GLU(dim=1), nn.Dropout1d(0.1)]
    return nn.Sequential(*layers, nn.AvgPool1d(4), nn.Flatten(), nn.Linear(32 * 64, CLASSES))


def perceptron() -> nn.Module:
    """Layers with several activations and norms."""
    layers: list[nn.Module] = []
    for activation in (nn.GELU(), nn.Tanh(), nn.Mish(), nn.SELU()):
        layers += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), activation, nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))


def encoder(**options: object) -> nn.Module:
    """Two layers of a TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True, **options)  # type: ignore[arg-type]
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder(**options: object) -> nn.Module:
    """Two layers of a TransformerDecoder."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True, **options)  # type: ignore[arg-type]
    return nn.TransformerDecoder(layer, 2)


def initialized(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model after a call, which gives its lazy layers their shapes."""
    with torch.no_grad():
        model(*inputs)
    return model


def entries() -> Iterator[Entry]:
    """All of them."""
    mean_square, three = functional.mse_loss, lambda: (*sequences()[:1], *sequences())
    recurrent = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
    for name, kind in recurrent.items():
        yield _entry(name, lambda kind=kind: initialized(Tagger(kind), tokens()[0]), cross_entropy, tokens)
    both = lambda: initialized(Tagger(nn.LSTM, bidirectional=True), tokens()[0])  # noqa: E731
    yield _entry("LSTM, both ways", both, cross_entropy, tokens)
    yield _entry("encoder, ReLU", encoder, mean_square, sequences)
    yield _entry("encoder, GELU, norm first", lambda: encoder(activation="gelu", norm_first=True), mean_square, sequences)
    yield _entry("decoder, ReLU", decoder, mean_square, three)
    yield _entry("decoder, GELU", lambda: decoder(activation="gelu"), mean_square, three)
    yield _entry("Transformer", lambda: nn.Transformer(WIDTH, HEADS, 1, 1, 128, batch_first=True), mean_square, three)
    yield _entry("attention", lambda: nn.Sequential(SelfAttention(), SelfAttention()), mean_square, sequences)
    yield _entry("MLP-Mixer", lambda: nn.Sequential(Mixer(), Mixer()), mean_square, sequences)
    yield _entry("MLP", perceptron, mean_square, sequences)
    yield _entry("CNN, pooling", plain_convolutions, cross_entropy, images)
    yield _entry("CNN, residual", residual_network, cross_entropy, images)
    yield _entry("CNN, dense", dense_network, cross_entropy, images)
    yield _entry("CNN, separable", separable_convolutions, cross_entropy, images)
    yield _entry("CNN, 1-D", waves, cross_entropy, lambda: (torch.randn(BATCH, 1, 256), images()[1]))
    some_volumes = lambda: (torch.randn(BATCH, 1, 8, 8, 8), images()[1])  # noqa: E731
    yield _entry("CNN, 3-D", lambda: initialized(volumes(), some_volumes()[0]), cross_entropy, some_volumes)
    yield _entry("U-Net", UNet, mean_square, lambda: (images()[0], images()[0]))
    yield _entry("autoencoder", Autoencoder, mean_square, lambda: (images()[0], images()[0].sigmoid()))


def _entry(name: str, make: Callable[[], nn.Module], loss: Callable[..., Tensor], batch: Callable[[], tuple]) -> Entry:
    return Entry(name, FAMILY, lambda: WithLoss(make(), loss), batch)
