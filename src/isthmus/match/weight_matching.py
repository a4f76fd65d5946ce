"""Weight matching: permutations that bring one model's weights as near as possible to another's."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem
from isthmus.match.coordinate_ascent import best_of_starts, merge_many, total_value
from isthmus.match.pairwise import Pair, all_to_one, check_reference
from isthmus.match.weight_objective import WeightObjective
from isthmus.symmetry.alignment import Alignment


@dataclass(frozen=True)
class WeightMatching:
    """Maximises Σ_W ⟨W^A, π(W^B)⟩ by coordinate descent: one assignment problem a space, until nothing improves.

    Each restart starts elsewhere: the first where the models are, the second by matching space after space from the
    input on, trusting only what is matched already; all later ones at random permutations. The best one is kept. Spaces
    whose neighbours did not move since they were solved are not solved again.

    Attributes:
        restarts: How many starts to try.
        many: Three and more models: `"merge_many"` matches each in turn to the mean of the others until nothing
            improves, `"all_to_one"` matches each on its own to one reference.
        max_sweeps: Sweeps over all spaces before a start is given up as not converged.
        reference: With `"all_to_one"`, which model that is: `"first"`, `"best"` (the lowest loss on the data, which
            needs labels) or `"medoid"` (the largest summed objective with all others, which matches all pairs).

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Algorithms 1 and 3. The restarts and the upper bound
        are this project's own.
    """

    restarts: int = 3
    many: str = "merge_many"
    max_sweeps: int = 100
    reference: str = "first"

    name: ClassVar[str] = "weight_matching"
    exact: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Nothing but the weights; labels if the reference is the best model."""
        return "labels" if self.reference == "best" else ""

    def __post_init__(self) -> None:
        check_reference(self.reference)
        if self.restarts < 1 or self.max_sweeps < 1:
            raise InputError(f"restarts={self.restarts}, max_sweeps={self.max_sweeps}: both must be at least 1")
        if self.many not in ("merge_many", "all_to_one"):
            raise InputError(f"many={self.many!r}: use 'merge_many' or 'all_to_one'")
        if self.many == "merge_many" and self.reference != "first":
            raise InputError(f"reference={self.reference!r}: merge_many has none; use many='all_to_one' with it")

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights, summed over pairs of models."""
        start = time.perf_counter()
        symmetry, states = problem.symmetry, problem.states

        def match_pair(fixed: int, moved: int) -> Pair:
            objective = WeightObjective(symmetry, states[fixed], states[moved], problem.parameters)
            seed = problem.seed + (moved - 1 if moved > fixed else moved)  # its own for each model that moves
            best, done, values = best_of_starts(objective, self.restarts, self.max_sweeps, seed)
            return Pair(best, max(values), converged=done, details={"restarts": values})

        matched = all_to_one(problem, self.name, match_pair, self.reference)
        transforms, converged = [dict(each) for each in matched.transforms], matched.converged
        pairs: Any = matched.details["pairs"]
        rounds = 0
        if self.many == "merge_many" and len(states) > 2:
            transforms, rounds, done = merge_many(problem, transforms, self.max_sweeps)
            converged &= done
        value, bound = total_value(problem, transforms)
        alignment = Alignment(
            symmetry,
            tuple(transforms),
            method=self.name,
            objective=value,
            upper_bound=bound,
            converged=converged,
            details={
                "reference": matched.details["reference"],
                "restarts": [pair["restarts"] for pair in pairs],
                "rounds": rounds,
            },
        )
        alignment = alignment.rebased(0) if rounds else alignment
        return Alignment(**{**vars(alignment), "seconds": time.perf_counter() - start})
