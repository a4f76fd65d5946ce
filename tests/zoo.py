"""Tiny networks, one structure each, with the spaces that a hand count gives them.

`spaces` is what the tracer finds, as a multiset that knows no names: a number is a space of that many units, a pair
(copies, size) a nested one. `missed` counts the free units that exist beyond them, and `why` says what hides them; both
are empty where the tracer finds all. A count of free units adds up sizes, all copies counted.
"""

import copy
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import isthmus
from isthmus.symmetry import Symmetry


class Net(nn.Module):
    """A tiny network; subclasses say what is known about it.

    Attributes:
        sample_shape: Shape of one sample.
        spaces: The spaces that trace finds.
        missed: Free units that exist beyond these.
        why: What hides them.
        frozen_by: Operations that are expected to be listed in `Symmetry.frozen` as having lost symmetry.
        no_ops: Tensors that a space touches and the outputs do not depend on.
        untouched: Tensors that the forward pass never reads.
        larger: The groups beyond permutations that spaces have, one entry for each such space.
    """

    sample_shape: tuple[int, ...] = (3,)
    spaces: ClassVar[tuple[int | tuple[int, int], ...]] = ()
    missed: int = 0
    why: str = ""
    frozen_by: ClassVar[tuple[str, ...]] = ()
    no_ops: ClassVar[tuple[str, ...]] = ()
    untouched: ClassVar[tuple[str, ...]] = ()
    larger: ClassVar[tuple[str, ...]] = ()

    def inputs(self, samples: int = 2, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs of a batch."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(samples, *self.sample_shape, generator=generator),), {}


class Chain(Net):
    """A network that is one `nn.Sequential`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


# Plain chains


class PlainMLP(Chain):
    spaces = (5, 4)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


class EqualWidths(Chain):
    """Batch, inputs, hidden units and outputs all number two, so that no axis is told by its length."""

    sample_shape = (2,)
    spaces = (2, 2)

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class WidthOne(Chain):
    """A single unit has nothing to be exchanged with."""

    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))


class NothingToMove(Chain):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.ReLU())


class DeepLinear(Chain):
    """No nonlinearity: every invertible map keeps the function."""

    spaces = (5, 4)
    larger = ("invertible", "invertible")

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))


class Dropout(Chain):
    spaces = (5,)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2))


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


class WindowedAttention(Net):
    """Swin's block: shifted windows, a bias for each relative position and head, patches merged by concatenation."""

    sample_shape = (4, 4, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")
    no_ops = ()

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.qkv, self.proj = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(9, 2))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("index", 3 * apart[0] + apart[1])
        self.merge = nn.Linear(16, 2)

    def windows(self, x):
        return x.view(-1, 2, 2, 2, 2, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])

    def mask(self, x):
        region = torch.zeros(1, 4, 4, 1, dtype=x.dtype)
        for number, (rows, columns) in enumerate([(slice(0, 3), slice(3, 4)), (slice(3, 4), slice(0, 4))]):
            region[:, rows, columns] = number + 1
        region = self.windows(region).squeeze(-1)
        return torch.where(region[:, None, :] == region[:, :, None], 0.0, -100.0).to(x.dtype)

    def forward(self, x):
        x = self.stem(x)
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        q, k, v = self.qkv(self.windows(y)).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        scores = (scores.view(len(x), 4, 2, 4, 4) + self.mask(x)[:, None]).view(-1, 2, 4, 4)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 4))
        y = y.view(-1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4)
        x = torch.tanh(x + torch.roll(y, (1, 1), (1, 2)))
        return self.merge(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1))


class SkewedPositions(Net):
    """Heads beside the batch on one axis, and relative positions laid out by padding and cutting (BoTNet)."""

    sample_shape = (3, 3)
    spaces = (4, 2, 2, (2, 2))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        q, k, v = self.qkv(torch.tanh(self.stem(x))).chunk(3, -1)
        q, k, v = (y.view(-1, 3, 2, 2).transpose(1, 2).reshape(-1, 3, 2) for y in (q, k, v))
        skewed = F.pad(q @ self.table.T, (0, 1)).flatten(1)
        skewed = F.pad(skewed, (0, 2)).view(-1, 4, 5)[:, :3, 2:]
        y = (q @ k.transpose(1, 2) + skewed).softmax(-1) @ v
        return self.head(y.view(-1, 2, 3, 2).transpose(1, 2).reshape(-1, 3, 4))


class EinsumAttention(Net):
    sample_shape = (3, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")
    no_ops = ()

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.qkv = nn.ParameterList([nn.Parameter(torch.randn(4, 2, 2)) for _ in range(3)])
        self.out = nn.Parameter(torch.randn(2, 2, 4))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in self.qkv)
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        return self.head(torch.tanh(x + torch.einsum("bthd,hdc->btc", y, self.out)))


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


class Functional(Net):
    spaces = (4, 5, 6)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 5))
        self.c, self.d = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 2))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.relu(x @ self.a + self.bias)
        x = torch.tanh(torch.matmul(x, self.b))
        x = torch.sigmoid(torch.einsum("ni,oi->no", x, self.c))
        return torch.addmm(torch.zeros(2), x, self.d)


class Experts(Net):
    """Every expert's layers in one tensor; all are used and added up."""

    spaces = (15,)  # since no gate tells experts apart, all their hidden units are one layer's

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 3)), nn.Parameter(torch.randn(3, 2, 5))

    def forward(self, x):
        hidden = torch.relu(torch.einsum("ni,ehi->neh", x, self.up))
        return torch.einsum("neh,eoh->no", hidden, self.down)


class ScaledWeight(Net):
    """A deep linear network whose second weight is used at half its size."""

    spaces = (5,)
    larger = ("orthogonal",)  # that a half weight moves by T⁻¹ is not followed

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        return F.linear(F.linear(x, self.first), 0.5 * self.second)


class FactorisedWeight(Net):
    """A weight that is a product of two: the rank's units move, in one factor by T and in the other by T⁻¹."""

    spaces = (4, 5)
    larger = ("orthogonal",)  # which factor moves by T⁻¹ is not followed

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 3))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.left @ self.right)))


class LowRankUpdate(Net):
    """A weight plus a product of two small ones."""

    spaces = (2, 5)
    larger = ("invertible",)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.down, self.up = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.head(F.relu(self.layer(x) + 0.5 * (x @ self.down.T) @ self.up.T))


class Gram(Net):
    """Inner products of hidden vectors: kept by rotations, not by every invertible map."""

    sample_shape = (4, 3)
    spaces = (5,)
    larger = ("orthogonal",)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x):
        x = self.layer(x)
        return x @ x.transpose(1, 2)


# Reductions and order


class MeanOverChannels(Net):
    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(1, 2)

    def forward(self, x):
        return self.head(F.relu(self.layer(x)).mean(1, keepdim=True))


class MaxOverChannels(MeanOverChannels):
    def forward(self, x):
        return self.head(self.layer(x).max(1, keepdim=True).values)


class ArgmaxOverChannels(MeanOverChannels):
    """The number of a unit is an output: no unit may move."""

    spaces = ()

    def forward(self, x):
        x = self.layer(x)
        return self.head(x.mean(1, keepdim=True)) + x.argmax(1, keepdim=True)


class LargerOfTwo(Net):
    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.max(self.left(x), self.right(x)))


class CastInside(Net):
    """A norm that computes in float32, whatever the network's type: in the proof it must not."""

    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.gain = nn.Linear(3, 5), nn.Linear(5, 2), nn.Parameter(torch.ones(5))

    def forward(self, x):
        x = self.stem(x)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head(F.softmax(self.gain * wide.type_as(x), -1, dtype=torch.float32).to(x.dtype))


class Softmax(Chain):
    spaces = (5,)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Softmax(-1), nn.Linear(5, 2))


class Bilinear(Net):
    missed = 4 + 5
    why = "torch.bilinear has no rule"
    frozen_by = ("aten.bilinear",)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Bilinear(4, 5, 2)

    def forward(self, x):
        return self.head(F.relu(self.left(x)), F.relu(self.right(x)))


class CircularConvolution(Net):
    """Each unit is multiplied with a fixed number and added to its neighbours' shares: only turns keep that."""

    frozen_by = ("aten.sum",)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("kernel", torch.tensor([1.0, 2.0, 3.0, 5.0]), persistent=False)

    def forward(self, x):
        x = F.relu(self.stem(x))
        turned = torch.stack([x.roll(shift, 1) for shift in range(4)], 2)
        return self.head((turned * self.kernel).sum(2))


class LearnedCircularConvolution(CircularConvolution):
    """As before with a learned kernel: its numbers cannot be exchanged either."""

    def __init__(self):
        super().__init__()
        del self.kernel
        self.kernel = nn.Parameter(torch.randn(4))


class Sort(Chain):
    """No rule knows that sorting forgets the order."""

    missed = 5
    why = "torch.sort has no rule, so all that reaches it is fixed"
    frozen_by = ("aten.sort",)
    spaces = (4,)

    def __init__(self):
        super().__init__(
            nn.Linear(3, 5), Apply(lambda x: x.sort(-1).values), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
        )


class CumulativeSum(Chain):
    """Sums in the order of the units, each of which has its place."""

    spaces = (4,)

    def __init__(self):
        super().__init__(nn.Linear(3, 5), Apply(lambda x: x.cumsum(-1)), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


class Fourier(Chain):
    frozen_by = ("aten.fft_rfft",)
    spaces = (4,)

    def __init__(self):
        super().__init__(
            nn.Linear(3, 5), Apply(lambda x: torch.fft.rfft(x).abs()), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)
        )


class ConstantMask(Net):
    """A constant that differs from unit to unit fixes them, though units with the same value could move."""

    missed = 5
    why = "each place of a constant is fixed, even where it repeats a value"

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5]), persistent=False)

    def forward(self, x):
        return self.head(F.relu(self.layer(x) * self.mask))


class StoredMask(ConstantMask):
    """A mask in the state dict moves with its units."""

    spaces = (5,)
    missed = 0
    why = ""

    def __init__(self):
        super().__init__()
        del self.mask
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5]))


# What goes in and out


class UnusedHead(Net):
    spaces = (5,)
    untouched = ("auxiliary.weight", "auxiliary.bias")

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.body(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class TwoInputs(Net):
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 5), nn.Linear(9, 2)

    def inputs(self, samples=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(samples, size, generator=generator) for size in (3, 2))
        return (left,), {"right": right}

    def forward(self, left, right):
        return self.head(F.relu(torch.cat([self.left(left), self.right(right)], 1)))


class DictOutput(Net):
    """What is put out cannot move: the features are fixed, what lies before them is not."""

    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.body, self.features, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        features = F.relu(self.features(F.relu(self.body(x))))
        return {"features": features, "logits": self.head(features)}


class TwoOutputs(Net):
    spaces = (5,)

    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.body(x))
        return self.left(x), self.right(x)


# Sequences


class Attention(Net):
    """Written out, two heads of three: heads move, and in each the units of queries and keys, and those of values."""

    sample_shape = (4, 3)
    spaces = (5, 2, (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")
    no_ops = ("key.bias",)  # it adds the same to all scores of a query

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.query, self.key, self.value = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 3).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = F.softmax(q @ k.transpose(2, 3) / 3**0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, t, 6))
        return self.head(torch.tanh(x))


class FusedAttention(Net):
    """Queries, keys and values from one layer; heads are put apart and joined by einsum."""

    sample_shape = (4, 3)
    spaces = (5, 2, (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.qkv, self.out = nn.Linear(5, 18, bias=False), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 3).unbind(2)
        scores = F.softmax(torch.einsum("nqhd,nkhd->nhqk", q, k), -1)
        x = x + self.out(torch.einsum("nhqk,nkhd->nqhd", scores, v).flatten(2))
        return self.head(torch.tanh(x))


class SingleHead(Net):
    """One head: queries and keys are only multiplied with one another, values only summed."""

    sample_shape = (4, 3)
    spaces = (3, 4)
    larger = ("invertible", "orthogonal")  # invertible both, but which of queries and keys moves by T⁻¹ is not followed

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.value, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        scores = F.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return self.head(scores @ self.value(x))


class GroupedQueries(Net):
    """Four query heads, two of keys and values: a key head carries its two query heads along."""

    sample_shape = (4, 3)
    # key heads; query heads in each; units of queries and keys; units of values
    spaces = (2, (2, 2), (2, 3), (2, 3))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, size, bias=False) for size in (12, 6, 6))
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.query(x).view(n, t, 4, 3).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, 1) for f in (self.key, self.value))
        scores = F.softmax(q @ k.transpose(2, 3), -1)
        return self.head((scores @ v).transpose(1, 2).reshape(n, t, 12))


class MultiheadModule(Net):
    sample_shape = (4, 3)
    spaces = (4, 2, (2, 2), (2, 2))
    larger = ("invertible", "orthogonal")

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.tanh(x + self.attention(x, x, x, need_weights=False)[0]))


class LSTM(Net):
    sample_shape = (3, 2)
    spaces = (4, 5)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, batch_first=True)
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(F.relu(self.layer(self.rnn(x)[0])))


class LSTMDeepBothWays(LSTM):
    spaces = (4, 4, 4, 4, 5)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, num_layers=2, bidirectional=True)
        self.layer = nn.Linear(8, 5)


class LSTMLastState(LSTM):
    def forward(self, x):
        _, (hidden, cell) = self.rnn(x)
        return self.head(F.relu(self.layer(hidden[-1] + cell[-1])))


class LSTMStart(LSTM):
    """The first state is learned: its units move with the layer's."""

    def __init__(self):
        super().__init__()
        self.start = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2)])

    def forward(self, x):
        start = tuple(value.expand(1, len(x), 4) for value in self.start)
        return self.head(F.relu(self.layer(self.rnn(x, start)[0])))


class LSTMProjected(LSTM):
    spaces = (5,)
    missed = 7
    why = "aten.lstm has no rule for projected hidden states"
    frozen_by = ("aten.lstm",)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, batch_first=True, proj_size=3)
        self.layer = nn.Linear(3, 5)


class GRU(LSTM):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 4, batch_first=True, bias=False)


class RNN(LSTM):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 4, nonlinearity="relu")


class LSTMCell(Net):
    """Written out: the four gates are quarters of one layer, and a unit stands in each."""

    sample_shape = (3, 2)
    spaces = (4,)

    def __init__(self):
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(2, 16), nn.Linear(4, 16, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = c = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (self.input(step) + self.hidden(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


ZOO: dict[str, type[Net]] = {
    net.__name__: net
    for net in list(globals().values())
    if isinstance(net, type) and issubclass(net, Net) and net not in (Net, Chain)
}


@cache
def built(name: str) -> Net:
    """A network of the zoo with seeded weights, in training mode as it comes; to be left as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ZOO[name]()


@cache
def traced(name: str) -> Symmetry:
    """The symmetry of `built(name)`."""
    args, kwargs = built(name).inputs()
    return isthmus.trace(built(name), *args, kwargs=kwargs)


def double(model: nn.Module) -> nn.Module:
    """A float64 copy of the model in `eval()`."""
    return copy.deepcopy(model).double().eval()
