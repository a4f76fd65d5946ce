"""Means and covariances of activations, within and between models, and the sums that they are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import DataError, SymmetryError

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

    def between(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Covariance of the units of one model with those of another."""
        return self.covariance[first, :, second, :]

    def correlation(self, first: int, second: int) -> Float[Tensor, "units units"]:
        """Correlation of the units of one model with those of another; 0 for a unit that never varies."""
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
        covariance: Covariance of all units of all models, those of the first model first.
    """

    count: int
    mean: tuple[Float[Tensor, " _"], ...]
    covariance: Float[Tensor, "total total"]

    def between(self, first: int, second: int) -> Float[Tensor, "rows columns"]:
        """Covariance of the units of one model with those of another."""
        starts = np.cumsum([0, *(len(mean) for mean in self.mean)])
        rows, columns = (slice(starts[model], starts[model + 1]) for model in (first, second))
        return self.covariance[rows, columns]

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

    def __getitem__(self, space: str) -> SpaceMoments:
        if space not in self.spaces:
            raise SymmetryError(f"no activations stand for space {space}: match it by weights")
        return self.spaces[space]

    def joined(self, other: "Moments") -> "Moments":
        """The moments of both sets of inputs together; both must be of the same models and places."""
        spaces = {name: own.joined(other[name]) for name, own in self.spaces.items()}
        return Moments(spaces, self.at, self.samples + other.samples)


class Accumulator:
    """Shifted sums of one space: numbers close to zero keep their digits whatever the units' means are."""

    def __init__(self, units: Sequence[int], device: torch.device) -> None:
        self.units = list(units)
        total = sum(units)
        self.count = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(total, dtype=torch.float64, device=device)
        self.products = torch.zeros(total, total, dtype=torch.float64, device=device)

    def add(self, values: Sequence[Float[Tensor, "samples _"]]) -> None:
        """Adds the same samples of every model; the mean of the first ones becomes the shift."""
        count = len(values[0])
        # Units first: that is how convolutions leave them, so that shifting is the only copy.
        dtype = torch.float64 if any(each.dtype == torch.float64 for each in values) else torch.float32
        rows = [each.T.to(dtype) for each in values]
        if self.shift is None:
            first = [each[:, :CHUNK].mean(dim=1, dtype=torch.float64).to(dtype) for each in rows]
            self.shift = torch.cat(first)
        shifts = self.shift.split(self.units)
        chunk = self.shift.new_empty(len(self.shift), min(count, CHUNK))
        for start in range(0, count, CHUNK):
            part = chunk[:, : min(CHUNK, count - start)]
            for here, each, shift in zip(part.split(self.units), rows, shifts, strict=True):
                torch.sub(each[:, start : start + CHUNK], shift[:, None], out=here)
            self.total += part.sum(dim=1).double()
            self.products += (part @ part.T).double()
        self.count += count

    def finish(self) -> JointMoments:
        """The moments of all samples added."""
        assert self.shift is not None
        offset = self.total / self.count
        covariance = self.products / self.count - torch.outer(offset, offset)
        covariance = (covariance + covariance.T) / 2
        mean = self.shift.double() + offset
        return JointMoments(self.count, mean.cpu().split(self.units), covariance.cpu())


def _require_samples(moments: Moments, needed: int, why: str) -> None:
    """Refuses moments of too few samples.

    Raises:
        DataError: Fewer samples than needed.
    """
    if moments.samples < needed:
        raise DataError(f"{moments.samples} samples, {why} needs at least {needed}: give more data")
