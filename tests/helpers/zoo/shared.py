"""Parameters that serve in several places."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class TiedAutoencoder(Net):
    spaces = (5, 4)

    def __init__(self):
        super().__init__()
        self.outer, self.inner = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 5))
        self.up, self.down = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        code = torch.tanh(F.linear(torch.tanh(F.linear(x, self.outer)), self.inner))
        return F.linear(torch.tanh(F.linear(code, self.inner.T, self.up)), self.outer.T, self.down)


class TiedEmbedding(Net):
    sample_shape = (3,)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4)

    def inputs(self, samples=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(7, (samples, *self.sample_shape), generator=generator),), {}

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(torch.tanh(x + self.down(F.relu(self.up(x)))))


class SharedLayer(Net):
    """One layer used twice: what goes in, what comes out and what comes out of that are the same units."""

    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.shared(x))
        return self.head(x)


class RecurrentCell(Net):
    sample_shape = (3, 2)
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(2, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = torch.tanh(self.input(step) + self.hidden(h))
        return self.head(h)


class Siamese(Net):
    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def inputs(self, samples=2, seed=0):
        (x,), _ = super().inputs(2 * samples, seed)
        return (x[:samples], x[samples:]), {}

    def forward(self, a, b):
        return self.head((F.relu(self.body(a)) - F.relu(self.body(b))).abs())


# Functional code
