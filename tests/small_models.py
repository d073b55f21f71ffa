"""Models that several tests look at."""

from torch import nn


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), and a linear layer that reads it."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))
