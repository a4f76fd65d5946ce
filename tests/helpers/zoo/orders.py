"""Groups of channels, and orders that are changed."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Chain, Net


class GroupedConv(Chain):
    """Two groups of three channels in and two out: the groups move, and the channels inside each."""

    sample_shape = (2, 3, 3)
    spaces = (2, (2, 3), (2, 2))

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
        )


class GroupedConvTranspose(Chain):
    sample_shape = (2, 3, 3)
    spaces = (2, (2, 3), (2, 2))

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
        )


class DepthwiseSeparable(Chain):
    sample_shape = (2, 3, 3)
    spaces = (4, 5)

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 1),
            nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        )


class DepthwiseMultiplier(Chain):
    """Each channel makes two: four channels move, and the two inside each."""

    sample_shape = (2, 3, 3)
    spaces = (4, (4, 2))

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)
        )


class ShuffleUnits(Net):
    """Two ShuffleNetV2 units: the shuffle sends half of each branch into either half of the next unit."""

    sample_shape = (2, 3, 3)
    # stem: the half that is carried on splits in two; the half that enters the first unit does not
    spaces = (2, 2, 4, 3, 2, 2, 3, 4)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        self.unit1 = self.branch()
        self.unit2 = self.branch()
        self.head = nn.Linear(8, 2)

    @staticmethod
    def branch():
        return nn.Sequential(
            nn.Conv2d(4, 3, 1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1, groups=3),
            nn.Conv2d(3, 4, 1),
        )

    def forward(self, x):
        x = F.relu(self.stem(x))
        for unit in (self.unit1, self.unit2):
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, F.relu(unit(changed))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class GroupedShuffle(Chain):
    """ShuffleNetV1: grouped, shuffled, grouped again. The channels between belong to a group on either side."""

    sample_shape = (2, 3, 3)
    spaces = (2, 2, (2, 3), (2, 3))

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1, groups=2),
            nn.ReLU(),
            nn.ChannelShuffle(2),
            nn.Conv2d(4, 6, 1, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 2, 1),
        )


class Repeat(Net):
    """Its consumer reads every number twice: its columns may also be swapped among themselves."""

    spaces = (4, (4, 2))

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.stem(x)).repeat(1, 2))


class RepeatInterleave(Repeat):
    def forward(self, x):
        return self.head(F.relu(self.stem(x)).repeat_interleave(2, 1))


class Roll(Net):
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.relu(self.stem(x)).roll(1, 1))


class RollAddedToItself(Roll):
    """Units in a ring: only turns keep it, and a turn is no free permutation."""

    spaces = ()

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + 2 * x.roll(1, 1))


class FlipAddedToItself(Net):
    """Opposite units belong together: three pairs move, and the two inside each."""

    spaces = (3,)
    missed = 3 * 2 + 3 * 2
    why = "two units of a pair keep their places in it, as do the two columns that read their sum"

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + x.flip(1))


class FlipThenRoll(FlipAddedToItself):
    """As before, and a second consumer reads the units in an order in which no unit of a pair is always the first."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + x.flip(1)) + self.other(x.roll(1, 1))


class Maxout(Net):
    """The largest of each two: four pairs move, and the two inside each."""

    spaces = (4, (4, 2))

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.stem(x).view(-1, 4, 2).amax(2))


# Shared weights
