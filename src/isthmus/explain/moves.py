"""How the units of a space are moved into the common frame, and their correlations there."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.observe.moments import SpaceMoments
from isthmus.symmetry.spaces import Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Transforms, as_matrix, flat_indices
from isthmus.wording.short import told_by_fields


@dataclass(frozen=True, eq=False)
class SlotMap:
    """How one model's units of a space are moved into the common frame: by an order, or by a matrix.

    Attributes:
        order: The unit that stands in each slot; None for a matrix.
        matrix: The map, slots × units; None for an order.
    """

    order: Int[Tensor, " units"] | None
    matrix: Float[Tensor, "units units"] | None

    __repr__ = told_by_fields

    @classmethod
    def of(cls, transforms: Transforms, symmetry: Symmetry, space: Space) -> "SlotMap":
        """The move of one space, over all its copies, with its parents' moves included."""
        transform = transforms[space.name]
        if not isinstance(transform, LinearMap):
            return cls(torch.from_numpy(flat_indices(transforms, symmetry, space)), None)
        rows = np.arange(space.copies)
        if space.parent is not None:
            rows = flat_indices(transforms, symmetry, symmetry[space.parent])
        into = as_matrix(transform).into.double()
        matrix = torch.zeros(space.copies, space.size, space.copies, space.size, dtype=torch.float64)
        matrix[torch.arange(space.copies), :, torch.from_numpy(rows), :] = into
        return cls(None, matrix.reshape(space.copies * space.size, -1))

    @property
    def sources(self) -> Int[Tensor, " units"]:
        """The unit that stands in each slot, or that counts most there; −1 where none does."""
        if self.matrix is not None:
            most = self.matrix.abs().max(dim=1)
            return torch.where(most.values > 0, most.indices, -1)
        assert self.order is not None
        return self.order

    def of_rows(self, values: Float[Tensor, "units columns"]) -> Float[Tensor, "units columns"]:
        """Values with one row a unit, moved into the frame."""
        return values[self.order] if self.matrix is None else self.matrix @ values

    def of_columns(self, values: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units"]:
        """Values with one column a unit, moved into the frame."""
        return self.of_rows(values.T).T

    def undone(self, values: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units"]:
        """Values with one column a slot, moved back."""
        if self.matrix is not None:
            return torch.linalg.lstsq(self.matrix, values.T).solution.T
        assert self.order is not None
        return values[:, self.order.argsort()]

    def then(self, order: Int[Tensor, " units"]) -> "SlotMap":
        """This move, and then another order of the slots."""
        if self.matrix is not None:
            return SlotMap(None, self.matrix[order])
        assert self.order is not None
        return SlotMap(self.order[order], None)


def largest_shares(matrix: Float[Tensor, "slots units"]) -> Float[Tensor, " slots"]:
    """For each slot, the largest share that one unit has in its squared weights; 1 where no unit stands."""
    squares = matrix.square()
    total = squares.sum(dim=1)
    return torch.where(total > 0, squares.max(dim=1).values / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)


def deviations(moments: SpaceMoments, model: int, move: SlotMap) -> Float[Tensor, " units"]:
    """Standard deviations of a model's units in the frame."""
    covariance = moments.between(model, model)
    if move.matrix is None:
        return moments.deviation[model][move.order]
    return ((move.matrix @ covariance) * move.matrix).sum(dim=1).clamp_min(0).sqrt()


def correlate(moments: SpaceMoments, a: int, move_a: SlotMap, b: int, move_b: SlotMap) -> Float[Tensor, " units"]:
    """Correlation, slot by slot, of two networks' units in the frame; units that never vary agree if they are equal."""
    across = move_a.of_rows(moments.between(a, b))
    if move_b.matrix is None:
        assert move_b.order is not None
        shared = across.gather(1, move_b.order[:, None]).squeeze(1)
    else:
        shared = (across * move_b.matrix).sum(dim=1)
    scales = deviations(moments, a, move_a), deviations(moments, b, move_b)
    product = scales[0] * scales[1]
    means = [move.of_rows(moments.mean[index][:, None]).squeeze(1) for index, move in ((a, move_a), (b, move_b))]
    silent = (scales[0] == 0) & (scales[1] == 0) & (means[0] == means[1])
    correlation = torch.where(product > 0, shared / product.clamp_min(torch.finfo(product.dtype).tiny), 0.0)
    return torch.where(silent, 1.0, correlation.clamp(-1, 1))


def matched_correlation(
    moments: SpaceMoments, first: int, move_first: SlotMap, second: int, move_second: SlotMap
) -> Float[Tensor, "slots slots"]:
    """Correlations of two models' units in the common frame, the first model's in rows; 0 where nothing varies."""
    across = move_second.of_columns(move_first.of_rows(moments.between(first, second)))
    scale = torch.outer(deviations(moments, first, move_first), deviations(moments, second, move_second))
    correlation = across / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return torch.where(scale > 0, correlation, 0.0).clamp(-1, 1)
