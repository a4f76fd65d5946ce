"""Convolutions, pooling and pointwise layers behind them."""

import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Chain, Net


class ConvChannelsFirst(Chain):
    sample_shape = (2, 4, 4)
    spaces = (4, 5)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2))


class ConvChannelsLast(Net):
    sample_shape = (2, 4, 4)
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).permute(0, 2, 3, 1).reshape(len(x), -1))


class Conv1d(Chain):
    sample_shape = (2, 7)
    spaces = (4, 5)

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(10, 2)
        )


class Conv3d(Chain):
    sample_shape = (2, 3, 3, 3)
    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(4, 2))


class ConvTranspose(Chain):
    sample_shape = (2, 3, 3)
    spaces = (4, 5)

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2, stride=2), nn.ReLU(), nn.Conv2d(5, 2, 1)
        )


class AveragePool(Chain):
    sample_shape = (2, 5, 5)
    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


class GlobalPool(Chain):
    sample_shape = (2, 5, 5)
    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 2))


class Upsample(Chain):
    sample_shape = (2, 3, 3)
    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3))


class PixelShuffle(Chain):
    """Four channels become the four pixels of one: the channels of the picture move, each with its four."""

    sample_shape = (2, 3, 3)
    spaces = (3,)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 3))


class PReLU(Chain):
    sample_shape = (2, 3, 3)
    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1))


# Normalisation
