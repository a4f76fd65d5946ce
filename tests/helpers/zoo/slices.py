"""Parts of values: halves that gate, slices that are written, pieces that are joined again."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class GatedLinear(Net):
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, -1)
        return self.down(value * torch.sigmoid(gate))


class GatedTwice(GatedLinear):
    """A second consumer reads values and gates side by side: which of the two a column reads still matters."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 2)

    def forward(self, x):
        x = self.up(x)
        value, gate = x.chunk(2, -1)
        return self.down(value * torch.sigmoid(gate)) + self.other(x)


class GatedShuffled(GatedLinear):
    """The gate of a unit stands before or behind it, as the shuffle has it."""

    spaces = (3,)

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(3, 2)

    def forward(self, x):
        value, gate = self.up(x).view(-1, 2, 3).transpose(1, 2).reshape(-1, 6).chunk(2, -1)
        return self.down(value * torch.sigmoid(gate))


class GatedFunctional(GatedLinear):
    """The same through torch's own operation."""

    def forward(self, x):
        return self.down(F.glu(self.up(x)))


class SlicedNonlinearities(Net):
    spaces = (3, 4)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([F.relu(x[:, :3]), torch.tanh(x[:, 3:])], 1))


class SlicedInPlace(Net):
    """As before, written into the slices themselves."""

    spaces = (3, 4)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = self.stem(x)
        x[:, :3].relu_()
        return self.head(torch.tanh(x))


class WrittenIntoZeros(Net):
    """Hidden units are written into the middle of a row of zeros."""

    spaces = (4,)
    missed = 2
    why = "columns that read zeros before and behind the units are told apart by their place"

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(6, 2)

    def forward(self, x):
        row = x.new_zeros(len(x), 6)
        row[:, 1:5] = F.relu(self.stem(x))
        return self.head(row)


class BuiltMask(Net):
    """A constant that is built by writing into a part of it."""

    spaces = (2, 3)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        mask = torch.ones(5)
        mask[2:] = 0.5
        return self.head(F.relu(self.stem(x)) * mask)


class ConcatSummaries(Net):
    """Two numbers without units side by side: the consumer's columns cannot be exchanged."""

    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(2, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))


class ConcatZeros(Net):
    """Zeros behind the units: the columns that read zeros may be exchanged among themselves."""

    spaces = (4, 2)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(torch.cat([x, x.new_zeros(len(x), 2)], 1))


class PaddedTwice(Net):
    """Ones before the units, zeros behind them: a border of ones is not a border of zeros."""

    spaces = (4, 2, 2)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.pad(F.pad(F.relu(self.stem(x)), (2, 0), value=1.0), (0, 2)))


class ClassToken(Net):
    """One more position, learned, before those of the input."""

    sample_shape = (4, 3)
    spaces = (5, 6)

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Linear(3, 5), nn.Linear(5, 6)
        self.down, self.head = nn.Linear(6, 5), nn.Linear(5, 2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.randn(1, 5, 5))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1) + self.position
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(torch.tanh(x).mean(1))


class Generator(Net):
    """A linear layer makes all pixels of all channels: a channel moves with all of its pixels."""

    sample_shape = (3,)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(3, 4 * 9), nn.BatchNorm2d(4)
        self.up, self.head = nn.ConvTranspose2d(4, 5, 2), nn.Conv2d(5, 2, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x).view(-1, 4, 3, 3)))
        return self.head(F.relu(self.up(x)))


class FlattenedConcat(Net):
    """A flattened picture and a vector side by side are read by one linear layer."""

    sample_shape = (2, 3, 3)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.conv, self.vector, self.head = nn.Conv2d(2, 4, 2), nn.Linear(18, 5), nn.Linear(21, 2)

    def forward(self, x):
        return self.head(F.relu(torch.cat([self.conv(x).flatten(1), self.vector(x.flatten(1))], 1)))


class LinearFlattened(Net):
    """No nonlinearity behind a convolution: every invertible map of the channels keeps the function."""

    sample_shape = (2, 3, 3)
    spaces = (4,)
    larger = ("invertible",)

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 2), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class LinearFlattenedLast(LinearFlattened):
    def forward(self, x):
        return self.head(self.conv(x).permute(0, 2, 3, 1).flatten(1))


class UNet(Net):
    sample_shape = (2, 4, 4)
    spaces = (3, 4, 5, 6)

    def __init__(self):
        super().__init__()
        self.encode, self.inner = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.decode = nn.ConvTranspose2d(4, 5, 2, stride=2), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        encoded = F.relu(self.encode(x))
        inner = F.relu(self.inner(F.max_pool2d(encoded, 2)))
        decoded = F.relu(self.decode(torch.cat([F.relu(self.up(inner)), encoded], 1)))
        return self.head(torch.cat([decoded, x], 1))
