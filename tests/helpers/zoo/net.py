"""Tiny networks, one structure each, with the spaces that a hand count gives them.

`spaces` is what the tracer finds, as a multiset that knows no names: a number is a space of that many units, a pair
(copies, size) a nested one. `missed` counts the free units that exist beyond them, and `why` says what hides them; both
are empty where the tracer finds all. A count of free units adds up sizes, all copies counted.
"""

from typing import Any, ClassVar

import torch
from torch import nn


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
