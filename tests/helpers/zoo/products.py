"""Products of activations."""

import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Net


class OuterProduct(Net):
    """Every pair of a unit of one branch and a unit of the other is a feature."""

    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(20, 2)

    def forward(self, x):
        return self.head((F.relu(self.left(x))[:, :, None] * F.relu(self.right(x))[:, None, :]).flatten(1))


class PairwiseDifferences(Net):
    """A feature is the difference of two units of one space, one way and the other."""

    missed = 3 + 3
    why = "a site moves along a dimension by one permutation, not twice; columns on the diagonal read zeros"
    frozen_by = ("",)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 3), nn.Linear(9, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x[:, :, None] - x[:, None, :]).flatten(1))


class SelfOuterProduct(Net):
    """A feature is a pair of units of one space: it moves by that space's permutation twice."""

    missed = 4 + 6 * 2
    why = "a site moves along a dimension by one permutation, not twice; columns ij and ji read the same"
    frozen_by = ("",)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(16, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x[:, :, None] * x[:, None, :]).flatten(1))


# Grouped convolutions and shuffles
