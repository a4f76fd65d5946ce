"""Means and covariances of activations, within and between models, and the sums that they are made from."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import DataError, SymmetryError
from isthmus.wording.short import counted, told

# Rows of one float32 product; its sum is then added in float64, so rounding does not grow with the number of samples.
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class SpaceMoments:
    """Moments of one space over all samples, read at the nodes that stand for it.

    Attributes:
        count: Samples: inputs × positions × nodes.
        mean: Mean activation of every unit of every model.
        covariance: Covariance of every unit of every model with every other, divided by `count`.
    """

    count: int
    mean: Float[Tensor, "models units"]
    covariance: Float[Tensor, "models units models units"]

    def __repr__(self) -> str:
        models, units = self.mean.shape
        return told(self, counted(models, "model"), counted(units, "unit"), counted(self.count, "sample"))

    def between(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Covariance of one model's units (rows) with another model's (columns).

        The numbers and their layout do not depend on which other models were read beside these two.
        """
        return self.covariance[first, :, second, :].contiguous()

    def correlation(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Correlation of one model's units with another model's; 0 for a unit that never varies."""
        scale = self.deviation
        product = scale[first, :, None] * scale[second, None, :]
        return torch.where(
            product > 0, self.between(first, second) / product.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        )

    def joined(self, other: "SpaceMoments") -> "SpaceMoments":
        """The moments of both sets of samples together."""
        count = self.count + other.count
        share = other.count / count
        step = (other.mean - self.mean).flatten()
        apart = share * (1 - share) * torch.outer(step, step).reshape(self.covariance.shape)
        covariance = torch.lerp(self.covariance, other.covariance, share) + apart
        return SpaceMoments(count, torch.lerp(self.mean, other.mean, share), covariance)

    @property
    def deviation(self) -> Float[Tensor, "models units"]:
        """Standard deviation of every unit of every model."""
        models, units = self.mean.shape
        flat = self.covariance.reshape(models * units, models * units)
        return flat.diagonal().clamp_min(0).sqrt().reshape(models, units)


@dataclass(frozen=True, eq=False)
class JointMoments:
    """Moments of one space that may have another number of units in each model.

    Attributes:
        count: Samples, as in `SpaceMoments`.
        mean: Mean activation of every unit, one tensor a model.
        covariance: Covariance of all units of all models, the first model's units first.
    """

    count: int
    mean: tuple[Float[Tensor, " _"], ...]
    covariance: Float[Tensor, "total total"]

    def __repr__(self) -> str:
        widths = " + ".join(str(len(mean)) for mean in self.mean)
        return told(self, counted(len(self.mean), "model"), f"{widths} units", counted(self.count, "sample"))

    def between(self, first: int, second: int) -> Float[Tensor, "rows columns"]:
        """Covariance of one model's units with another model's, as `SpaceMoments.between`."""
        starts = np.cumsum([0, *(len(mean) for mean in self.mean)])
        rows, columns = (slice(starts[model], starts[model + 1]) for model in (first, second))
        return self.covariance[rows, columns].contiguous()

    def of_one_size(self) -> SpaceMoments:
        """The same moments, where the space is of one size in all models."""
        models, units = len(self.mean), len(self.mean[0])
        return SpaceMoments(self.count, torch.stack(self.mean), self.covariance.reshape(models, units, models, units))


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of every space that can be read, by space name.

    Attributes:
        spaces: The moments; units of a nested space are counted over all its copies.
        at: Where they were read: `"post"`, what consumers of a space receive, or `"pre"`, what enters nonlinearities.
        samples: Inputs read.
    """

    spaces: Mapping[str, SpaceMoments]
    at: str
    samples: int

    def __repr__(self) -> str:
        return told(self, counted(len(self.spaces), "space"), self.at, counted(self.samples, "input"))

    def __getitem__(self, space: str) -> SpaceMoments:
        if space not in self.spaces:
            raise SymmetryError(f"no activations stand for space {space}: match it by weights")
        return self.spaces[space]

    def joined(self, other: "Moments") -> "Moments":
        """The moments of both sets of inputs together; both must be of the same models and places."""
        spaces = {name: own.joined(other[name]) for name, own in self.spaces.items()}
        return Moments(spaces, self.at, self.samples + other.samples)


class Accumulator:
    """Shifted sums of one space: numbers close to zero keep their digits whatever the units' means are.

    Every model and every pair of models is summed on its own: what is read of two models is the same, bit for bit,
    whichever other models are read beside them.
    """

    def __init__(self, units: Sequence[int], device: torch.device) -> None:
        self.units = list(units)
        self.count = 0
        self.shifts: list[Tensor] = []
        self.totals = [torch.zeros(size, dtype=torch.float64, device=device) for size in self.units]
        self.products = {
            (first, second): torch.zeros(self.units[first], self.units[second], dtype=torch.float64, device=device)
            for first, second in itertools.combinations_with_replacement(range(len(self.units)), 2)
        }

    def add(self, values: Sequence[Float[Tensor, "samples _"]]) -> None:
        """Adds the same samples of every model; the mean of the first ones becomes the shift."""
        count = len(values[0])
        # Units first: that is how convolutions leave them, so that shifting is the only copy.
        rows = [each.T.to(torch.promote_types(each.dtype, torch.float32)) for each in values]
        if not self.shifts:
            self.shifts = [each[:, :CHUNK].mean(dim=1, dtype=torch.float64).to(each.dtype) for each in rows]
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            parts = [
                torch.sub(each[:, start : start + size], shift[:, None], out=shift.new_empty(len(shift), size))
                for each, shift in zip(rows, self.shifts, strict=True)
            ]
            for total, part in zip(self.totals, parts, strict=True):
                total += part.sum(dim=1).double()
            for (first, second), product in self.products.items():
                dtype = torch.promote_types(parts[first].dtype, parts[second].dtype)
                product += (parts[first].to(dtype) @ parts[second].T.to(dtype)).double()
        self.count += count

    def finish(self) -> JointMoments:
        """The moments of all samples added."""
        assert self.shifts
        offsets = [total / self.count for total in self.totals]
        models = range(len(self.units))
        blocks = {
            (first, second): product / self.count - torch.outer(offsets[first], offsets[second])
            for (first, second), product in self.products.items()
        }
        for model in models:  # a product with its own transpose is symmetric but for rounding
            blocks[model, model] = (blocks[model, model] + blocks[model, model].T) / 2
        covariance = torch.cat(
            [torch.cat([blocks[a, b] if a <= b else blocks[b, a].T for b in models], dim=1) for a in models]
        )
        mean = [shift.double() + offset for shift, offset in zip(self.shifts, offsets, strict=True)]
        return JointMoments(self.count, tuple(each.cpu() for each in mean), covariance.cpu())


def _require_samples(moments: Moments, needed: int, why: str) -> None:
    """Refuses moments of too few samples.

    Raises:
        DataError: Fewer samples than needed.
    """
    if moments.samples < needed:
        raise DataError(f"{moments.samples} samples, {why} needs at least {needed}: give more data")
