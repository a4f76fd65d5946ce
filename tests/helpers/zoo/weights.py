"""Weights and biases that are computed, masked or shared by all units."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Chain, Net


class ZeroedBias(Net):
    """A part of a bias that is always zero, whatever the parameter holds (Swin's second version)."""

    spaces = (4, 4)

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        bias = self.stem.bias.clone()
        bias[4:].zero_()
        left, right = F.linear(x, self.stem.weight, bias).chunk(2, -1)
        return self.left(torch.tanh(left)) + self.right(torch.sigmoid(right))


class ParametrizedWeightNorm(Chain):
    """`torch.nn.utils.parametrizations.weight_norm`: the parameters are a size and a direction."""

    spaces = (4,)

    def __init__(self):
        first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        super().__init__(first, nn.Tanh(), nn.Linear(4, 2))


class SpectralNorm(Chain):
    """`torch.nn.utils.parametrizations.spectral_norm`: stored singular vectors move with the units."""

    spaces = (4,)

    def __init__(self):
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        super().__init__(first, nn.Tanh(), nn.Linear(4, 2))


class SmallGains(Net):
    """ConvNeXt's residual block, whose gains of shape [n, 1, 1] start at a millionth."""

    sample_shape = (3, 4, 4)
    spaces = (4, 6)

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.back = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.gain, self.head = nn.Parameter(torch.full((4, 1, 1), 1e-6)), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = torch.tanh(x + self.gain * self.back(torch.tanh(self.wide(x))))
        return self.head(x.mean((-2, -1)))


class FadingSignal(Net):
    """Depth without residuals, every layer gated by its own mean: with statistics at random little comes through."""

    sample_shape = (3, 4, 4)
    spaces = (4,) * 24

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 if depth else 3, 4, 1, bias=False) for depth in range(24))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in self.layers)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(0.1 * layer(x))
            x = F.silu(x) * torch.sigmoid(x.mean((-2, -1), keepdim=True))
        return self.head(x.mean((-2, -1)))


class AddedToAWholeSlice(Net):
    """A sum written into a slice that happens to be all of a concatenation (GhostNet)."""

    spaces = (2, 2, 4)

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.wide, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        skip = torch.tanh(self.stem(x))
        x = torch.cat([self.left(skip), self.right(skip)], 1)[:, :4]
        x += skip
        return self.head(torch.tanh(self.wide(torch.tanh(x))))


class StandardisedWeight(Net):
    """Weights standardised by a batch normalisation that takes units for channels (NFNet)."""

    sample_shape = (3, 4, 4)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        weight = self.body.weight
        flat = F.batch_norm(weight.reshape(1, 5, -1), None, None, weight=self.gain, training=True, momentum=0.0)
        x = torch.tanh(F.conv2d(x, flat.reshape_as(weight), self.body.bias))
        return self.head(x.mean((-2, -1)))


class DistanceBias(Net):
    """A bias for each distance between two places: pair by pair it meets all of them, yet it cannot be exchanged."""

    sample_shape = (3, 3)
    spaces = (4, 3)

    def __init__(self):
        super().__init__()
        self.stem, self.value, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.table = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("index", (torch.arange(3)[:, None] - torch.arange(3)) % 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        weights = (x @ x.transpose(1, 2))[:, None] + self.table[:, self.index]
        value = self.value(x).transpose(1, 2)[..., None]
        return self.head((weights.softmax(-1) @ value).squeeze(-1).transpose(1, 2))
