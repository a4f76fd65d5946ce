"""Procrustes: the rotation that brings one model's activations nearest to another's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.base import Problem
from isthmus.match.linear_maps import map_spaces
from isthmus.match.many import Pair, all_to_one, check_reference
from isthmus.transform import Alignment, LinearMap

# Share of a matrix's norm that is added to it before it is decomposed, so that its null space has a basis.
STEADY = 1e-9

# Units whose variance is below this share of the largest never vary.
DEAD = 1e-12


@dataclass(frozen=True)
class Procrustes:
    """T = U Vᵀ from the singular value decomposition of the covariance between A's and B's units.

    Nested spaces are permuted, by correlation. The maps are orthogonal, but a nonlinearity does not commute with them:
    a moved model does not compute what it did.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        reference: Three and more models: which one all others are carried to, `"first"`, `"best"` or `"medoid"`.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966; as a way to
        merge, the limit of Horoi et al., CCA Merge, ICML 2024, at a large ridge.
    """

    at: str = "post"
    reference: str = "first"

    name: ClassVar[str] = "procrustes"
    exact: ClassVar[bool] = False

    @property
    def needs(self) -> str:
        """Batches; with targets if the reference is the best model."""
        return "labels" if self.reference == "best" else "data"

    def __post_init__(self) -> None:
        if self.at not in ("post", "pre"):
            raise InputError(f"at={self.at!r}: activations are read at 'post' or 'pre'")
        check_reference(self.reference)

    def __call__(self, problem: Problem) -> Alignment:
        """The alignment; its objective is the summed singular values, the covariance that the rotations reach.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """

        def match_pair(fixed: int, moved: int) -> Pair:
            if not len(problem.symmetry):
                return Pair({}, 0.0)
            return map_spaces(problem, problem.moments(self.at), fixed, moved, rotation)

        return all_to_one(problem, self.name, match_pair, self.reference)


def rotation(
    own: Float[Tensor, "units units"], other: Float[Tensor, "units units"], between: Float[Tensor, "units units"]
) -> tuple[LinearMap, float]:
    """The orthogonal map of Procrustes' problem, and the sum of the singular values."""
    into, values = polar_factor(between, own.diagonal(), other.diagonal())
    return LinearMap(into, into.T.contiguous()), float(values.sum())


def polar_factor(
    matrix: Float[Tensor, "rows rows"], own: Float[Tensor, " rows"], other: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, " rows"]]:
    """U Vᵀ and the singular values; a singular matrix is completed so that dead units face dead units, one by one.

    The mean of two units that never fire never fires either; a rotation among such units would wake them.

    Args:
        matrix: From the second model's units (columns) to the first's (rows).
        own: Variances of the first model's units.
        other: Variances of the second model's units.
    """
    orders = [torch.argsort((v <= DEAD * v.max()).int(), stable=True) for v in (own, other)]
    facing = torch.zeros_like(matrix)
    facing[orders[0], orders[1]] = 1
    left, values, right = torch.linalg.svd(matrix + STEADY * torch.linalg.matrix_norm(matrix, ord="fro") * facing)
    return left @ right, values
