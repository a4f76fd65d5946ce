"""Single operations: reductions, selections, transforms, several inputs and outputs."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo.net import Apply, Chain, Net


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
