"""Procrustes: the rotation that brings one model's activations nearest to another's."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from isthmus.match.base import MatchingProblem
from isthmus.match.linear_maps import map_spaces
from isthmus.match.pairwise import Pair, PairwiseDataMethod
from isthmus.match.polar import polar_factor
from isthmus.symmetry.transform import LinearMap


@dataclass(frozen=True)
class Procrustes(PairwiseDataMethod):
    """T = U Vᵀ from the singular value decomposition of the covariance between A's and B's units.

    Nested spaces are permuted, by correlation. The maps are orthogonal, but a nonlinearity does not commute with them:
    a moved model does not compute what it did.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966; as a way to
        merge, the limit of Horoi et al., CCA Merge, ICML 2024, at a large ridge.
    """

    name: ClassVar[str] = "procrustes"
    exact: ClassVar[bool] = False

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The rotations; the objective is the summed singular values, the covariance that they reach.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        return map_spaces(problem, problem.moments(self.at), fixed, moved, _rotation)


def _rotation(
    own: Float[Tensor, "units units"], other: Float[Tensor, "units units"], between: Float[Tensor, "units units"]
) -> tuple[LinearMap, float]:
    """The orthogonal map of Procrustes' problem, and the sum of the singular values."""
    into, values = polar_factor(between, own.diagonal(), other.diagonal())
    return LinearMap(into, into.T.contiguous()), float(values.sum())
