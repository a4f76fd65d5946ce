"""Normalisations."""

import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Chain, Net


class BatchNorm(Chain):
    sample_shape = (2, 4, 4)
    spaces = (4, 5)

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 2),
        )


class InstanceNorm(Chain):
    sample_shape = (2, 4, 4)
    spaces = (4,)
    no_ops = ("layers.0.bias",)  # a constant of a channel is what its mean takes away

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 3))


class GroupNorm(Chain):
    """Three groups of two: the groups move, and the channels in each."""

    sample_shape = (2, 3, 3)
    spaces = (3, (3, 2))

    def __init__(self):
        super().__init__(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))


class GroupNormResidual(Net):
    sample_shape = (2, 3, 3)
    spaces = (3, (3, 2), 2, (2, 2))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.norm1, self.conv1 = nn.GroupNorm(3, 6), nn.Conv2d(6, 4, 1)
        self.norm2, self.conv2 = nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1)
        self.norm3, self.head = nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x)))


class GroupNormsAtOdds(Net):
    """Six channels in groups of three and again in groups of two: ab|c and d|ef, which swap, and a–b, e–f."""

    sample_shape = (2, 3, 3)
    spaces = (2, 2)
    missed = 2
    why = "the two partitions of one axis overlap without nesting: the swap of the halves is not seen"

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.norm1(x)) * F.relu(self.norm2(x)))


class LayerNormBefore(Net):
    spaces = (5, 6)
    larger = ("orthogonal fixing ones",)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.norm, self.last = nn.LayerNorm(5), nn.LayerNorm(5)
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last(x))


class LayerNormAfter(LayerNormBefore):
    larger = ()  # what is added to the stream has a gain of each unit

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.last(x + self.down(F.gelu(self.up(x))))
        return self.head(x)


class RMSNorm(Chain):
    spaces = (5,)
    larger = ("orthogonal",)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.RMSNorm(5), nn.Linear(5, 2))


class WeightNorm(Chain):
    spaces = (5, 4)

    def __init__(self):
        norm = nn.utils.parametrizations.weight_norm
        super().__init__(norm(nn.Linear(3, 5)), nn.ReLU(), norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2))


# Residual streams
