"""Procrustes: the rotation that brings one model's activations nearest to another's."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.linear_maps import map_spaces
from isthmus.match.pairwise import Pair, all_to_one, check_reference
from isthmus.match.polar import polar_factor
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import LinearMap


@dataclass(frozen=True)
class Procrustes:
    """T = U Vᵀ from the singular value decomposition of the covariance between A's and B's units.

    Nested spaces are permuted, by correlation. The maps are orthogonal, but a nonlinearity does not commute with them:
    a moved model does not compute what it did.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        reference: Three and more models: which one all others are moved to, `"first"`, `"best"` or `"medoid"`.

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

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the summed singular values, the covariance that the rotations reach.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """

        def match_pair(fixed: int, moved: int) -> Pair:
            if not len(problem.symmetry):
                return Pair({}, 0.0)
            return map_spaces(problem, problem.moments(self.at), fixed, moved, _rotation)

        return all_to_one(problem, self.name, match_pair, self.reference)


def _rotation(
    own: Float[Tensor, "units units"], other: Float[Tensor, "units units"], between: Float[Tensor, "units units"]
) -> tuple[LinearMap, float]:
    """The orthogonal map of Procrustes' problem, and the sum of the singular values."""
    into, values = polar_factor(between, own.diagonal(), other.diagonal())
    return LinearMap(into, into.T.contiguous()), float(values.sum())
