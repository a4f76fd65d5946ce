"""Activation matching: units are paired by how alike they respond to data."""

from dataclasses import dataclass
from typing import ClassVar

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.correlation import pair_by_activations
from isthmus.match.pairwise import Pair, PairwiseDataMethod


@dataclass(frozen=True)
class ActivationMatching(PairwiseDataMethod):
    """Pairs every model's units with model 0's so that the sum of their similarities is largest, exactly.

    Similarity is the correlation of activations (as in REPAIR) or their covariance (the dot products of Git Re-Basin,
    centred). A unit that never varies is like no other.

    Attributes:
        similarity: `"correlation"` or `"covariance"`.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, §3.1; Jordan et al., REPAIR, ICLR 2023, §2;
        Li et al., Convergent Learning, ICLR 2016.
    """

    similarity: str = "correlation"

    name: ClassVar[str] = "activation_matching"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity not in ("correlation", "covariance"):
            raise InputError(f"similarity={self.similarity!r}: use 'correlation' or 'covariance'")

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The permutations of the largest summed similarity, which is the objective.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        return pair_by_activations(problem, self.at, self.similarity, fixed, moved)
