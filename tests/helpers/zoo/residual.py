"""Residual streams."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class ResidualIdentity(Net):
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        return self.head(F.relu(x))


class ResidualInPlace(ResidualIdentity):
    """The same, written over itself."""

    def forward(self, x):
        x = self.stem(x)
        x += self.down(self.up(x).relu_())
        F.relu_(x)
        return self.head(x)


class ResidualOnInput(Net):
    """A stream that begins with the input is fixed; what hangs on it is not."""

    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x + self.down(F.relu(self.up(x))))


class Projection(Net):
    sample_shape = (2, 4, 4)
    spaces = (3, 5, 6)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1, stride=2), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(y + self.shortcut(x)).mean((2, 3)))


class ZeroPadded(Net):
    """Shortcut option A: four channels go into the middle of eight; the four around them are a space of their own."""

    sample_shape = (2, 4, 4)
    spaces = (4, 4, 5)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Conv2d(5, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.norm(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class LayerScale(Net):
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.scale * self.down(F.relu(self.up(x)))))


class PositionalBias(Net):
    """A table of positions moves along its units, not along its positions."""

    sample_shape = (4, 3)
    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(20, 2)
        self.position = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.head(F.relu(self.stem(x) + self.position).flatten(1))
