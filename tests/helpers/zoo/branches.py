"""Gates, branches and concatenations."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class SqueezeExcite(Net):
    sample_shape = (2, 3, 3)
    spaces = (6, 3)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head(x * torch.sigmoid(gate))


class SqueezeExciteLinear(Net):
    sample_shape = (2, 3, 3)
    spaces = (6, 3)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).view(len(x), 6, 1, 1)
        return self.head(x * torch.sigmoid(gate))


# Concatenation and division of channels


class DenseBlock(Net):
    sample_shape = (2, 3, 3)
    spaces = (4, 3, 5)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return self.head(F.relu(self.norm3(x)).mean((2, 3)))


class Inception(Net):
    """Branches side by side: equally wide, yet each moves on its own."""

    sample_shape = (2, 4, 4)
    spaces = (3, 3, 3, 5)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 1)
        self.left, self.right = nn.Conv2d(5, 3, 1), nn.Conv2d(5, 3, 3, padding=1)
        self.pooled = nn.Conv2d(5, 3, 1)
        self.head = nn.Linear(9 * 16, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        pooled = self.pooled(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.head(F.relu(torch.cat([self.left(x), self.right(x), pooled], 1)).flatten(1))


class ConcatSameUnits(Net):
    """One unit reaches the consumer twice, once as it is and once squashed."""

    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x, torch.tanh(x)], 1))


class ConcatSameUnitsRolled(ConcatSameUnits):
    """As before, but a unit's two places do not come in the same order for every unit."""

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x, torch.tanh(x)], 1).roll(1, 1))


class ConcatSameUnitsInterleaved(ConcatSameUnits):
    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.stack([x, torch.tanh(x)], 2).flatten(1))


class ConcatThenSum(Net):
    """Two branches are put side by side, then added: units move together, yet columns keep to their branch."""

    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head, self.other = (nn.Linear(*sizes) for sizes in ((3, 4), (3, 4), (8, 2), (4, 2)))

    def forward(self, x):
        left, right = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        both = torch.cat([left, right], 1)
        return self.other(left + right) + self.head(both)


class PatchMerging(Net):
    """Four neighbours of a picture side by side: each channel stands at four places, in the norm and its consumer."""

    sample_shape = (2, 4, 3)
    spaces = (5, 4)
    larger = ("orthogonal fixing ones",)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(3, 5), nn.LayerNorm(20)
        self.merge, self.head = nn.Linear(20, 4, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.head(F.relu(self.merge(self.norm(torch.cat(parts, -1)))).flatten(1))
