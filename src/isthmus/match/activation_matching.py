"""Activation matching: units are paired by how alike they respond to data."""

from dataclasses import dataclass
from typing import ClassVar

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.nested import family_of, paired_value, roots_of, solve_family
from isthmus.match.pairwise import Pair, all_to_one, check_reference
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Permutation, Transform


@dataclass(frozen=True)
class ActivationMatching:
    """Pairs every model's units with model 0's so that the sum of their similarities is largest, exactly.

    Similarity is the correlation of activations (as in REPAIR) or their covariance (the dot products of Git Re-Basin,
    centred). A unit that never varies is like no other.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        similarity: `"correlation"` or `"covariance"`.
        reference: Three and more models: which one all others are matched to, `"first"`, `"best"` (the lowest loss on
            the data, which needs labels) or `"medoid"` (the largest summed objective with all others).

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, §3.1; Jordan et al., REPAIR, ICLR 2023, §2;
        Li et al., Convergent Learning, ICLR 2016.
    """

    at: str = "post"
    similarity: str = "correlation"
    reference: str = "first"

    name: ClassVar[str] = "activation_matching"
    exact: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; with targets if the reference is the best model."""
        return "labels" if self.reference == "best" else "data"

    def __post_init__(self) -> None:
        if self.at not in ("post", "pre"):
            raise InputError(f"at={self.at!r}: activations are read at 'post' or 'pre'")
        if self.similarity not in ("correlation", "covariance"):
            raise InputError(f"similarity={self.similarity!r}: use 'correlation' or 'covariance'")
        check_reference(self.reference)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment of every model to the reference; the objective is the summed similarity of all pairs.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        symmetry = problem.symmetry

        def match_pair(fixed: int, moved: int) -> Pair:
            moments = problem.moments(self.at) if len(symmetry) else None
            found: dict[str, Transform] = {}
            objective = 0.0
            for root in roots_of(symmetry):
                assert moments is not None
                similarities = {}
                for space in family_of(symmetry, root):
                    # What a space's children tell is summed up from them; its own reading would count them twice.
                    if not symmetry.children(space):
                        read = moments[space.name]
                        correlate = self.similarity == "correlation"
                        pair = read.correlation(fixed, moved) if correlate else read.between(fixed, moved)
                        similarities[space.name] = pair.numpy()
                solved = solve_family(symmetry, root, similarities)
                found |= {name: Permutation(indices) for name, indices in solved.items()}
                objective += paired_value(symmetry, root, similarities, found)
            # Each space's assignment is solved exactly, and no space depends on another: the optimum is the bound.
            return Pair(found, objective, objective, details={"samples": moments.samples if moments else 0})

        return all_to_one(problem, self.name, match_pair, self.reference)
