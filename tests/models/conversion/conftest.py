import pytest
from torch import nn


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's library, which takes seconds to load."""
    import transformers

    return transformers


class Own(nn.Linear):
    """A subclass that overrides nothing that fewbit replaces."""

    def forward(self, input):
        return super().forward(input)


class Block(nn.Module):
    """A model with some modules of every kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(nn.ConvTranspose2d(8, 8, 2), nn.GroupNorm(2, 8), nn.SiLU())
        self.norm, self.scale = nn.LayerNorm(8), nn.RMSNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GLU(), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, 8))
        self.own, self.frozen = Own(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.leaky = nn.LeakyReLU(0.25)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.mix(self.stem(x)).mean((2, 3))
        x = x + self.mlp(self.norm(x))
        return self.head(self.leaky(self.frozen(self.own(self.scale(x)))))


@pytest.fixture
def model():
    return Block()
