"""Weight matching: permutations that bring one model's weights as near as possible to another's."""

from dataclasses import dataclass, replace
from typing import ClassVar

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.coordinate_ascent import match_by_weights, pair_by_weights
from isthmus.match.pairwise import Pair, PairwiseMethod
from isthmus.symmetry.alignment import Alignment


@dataclass(frozen=True)
class WeightMatching(PairwiseMethod):
    """Maximises Σ_W ⟨W^A, π(W^B)⟩ by coordinate ascent: one assignment problem a space, until nothing improves.

    Each restart starts elsewhere: the first where the models are, the second by matching space after space from the
    input on, trusting only what is matched already; all later ones at random permutations. The best one is kept. Spaces
    whose neighbours did not move since they were solved are not solved again.

    Attributes:
        restarts: How many starts to try.
        many: Three and more models: `"merge_many"` matches each in turn to the mean of the others until nothing
            improves, and has no reference; `"all_to_one"` matches each on its own to the reference.
        max_sweeps: Sweeps over all spaces before a start is given up as not converged.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Algorithms 1 and 3. The restarts and the upper bound
        are this project's own.
    """

    restarts: int = 3
    many: str = "merge_many"
    max_sweeps: int = 100

    name: ClassVar[str] = "weight_matching"
    exact: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1 or self.max_sweeps < 1:
            raise InputError(f"restarts={self.restarts}, max_sweeps={self.max_sweeps}: both must be at least 1")
        if self.many not in ("merge_many", "all_to_one"):
            raise InputError(f"many={self.many!r}: use 'merge_many' or 'all_to_one'")
        if self.many == "merge_many" and self.reference != "first":
            raise InputError(f"reference={self.reference!r}: merge_many has none; use many='all_to_one' with it")

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The permutations of the best start; the objective is the inner product of the moved weights."""
        return pair_by_weights(problem, fixed, moved, self.restarts, self.max_sweeps)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights, summed over pairs of models."""
        found = match_by_weights(problem, self.restarts, self.max_sweeps, self.many, self.reference)
        return replace(found, method=self.name)
