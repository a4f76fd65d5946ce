"""MuDSC: units are paired by what they respond to and by what they are made of, both at once."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.nested import family_of, solve_family
from isthmus.match.pairwise import Pair, PairwiseDataMethod
from isthmus.match.weight_objective import WeightObjective
from isthmus.symmetry.transform import Permutation


@dataclass(frozen=True)
class MuDSC(PairwiseDataMethod):
    """Maximises, space by space, alpha · activation similarity + (1 − alpha) · weight similarity, each standardised.

    Activation similarity is the correlation of two units; weight similarity the inner product of their weights, with
    all other spaces as they are matched now, so that the spaces are swept, in graph order, until nothing changes. Each
    matrix is shifted and scaled to mean 0 and standard deviation 1 before they are mixed.

    Attributes:
        alpha: Share of the activations, from 0 to 1.
        max_sweeps: Sweeps before it is given up as not converged; the mixed similarity is no single objective, and a
            cycle is possible.

    Source: Xu, Yuan, et al., "Training-Free Pretrained Model Merging" (MuDSC), CVPR 2024. The paper also zips; here
        units are permuted. How it scales each similarity is not certain: to standardise is this project's reading.
    """

    alpha: float = 0.5
    max_sweeps: int = 50

    name: ClassVar[str] = "mudsc"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and 0 <= self.alpha <= 1):
            raise InputError(f"alpha={self.alpha}: give a share from 0 (weights) to 1 (activations)")
        if self.max_sweeps < 1:
            raise InputError(f"max_sweeps={self.max_sweeps}: give at least 1")

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The permutations that the sweeps end at; the objective is the inner product of the moved weights.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        symmetry, moments = problem.symmetry, problem.moments(self.at)
        objective = WeightObjective(symmetry, problem.states[fixed], problem.states[moved], problem.parameters)
        transforms = identity_transforms(symmetry)
        roots = objective.families()
        responses = {
            space.name: _standardised(moments[space.name].correlation(fixed, moved).numpy())
            for space in symmetry
            if not symmetry.children(space)  # what a space's children tell is summed up from them
        }
        for sweep in range(self.max_sweeps):
            changed = False
            for root in roots:
                mixed = {}
                for space in family_of(symmetry, root):
                    weights = _standardised(objective.similarity(space, transforms))
                    own = responses.get(space.name)
                    mixed[space.name] = (1 - self.alpha) * weights + (0.0 if own is None else self.alpha * own)
                solved = solve_family(symmetry, root, mixed)
                for name, indices in solved.items():
                    old = transforms[name]
                    assert isinstance(old, Permutation)
                    if not np.array_equal(old.indices, indices):
                        transforms[name] = Permutation(indices)
                        changed = True
                if changed:
                    objective.moved_by(root)
            if not changed:
                return Pair(transforms, objective.value(transforms), details={"sweeps": sweep + 1})
        return Pair(transforms, objective.value(transforms), converged=False, details={"sweeps": self.max_sweeps})


def _standardised(similarity: Float[np.ndarray, "units units"]) -> Float[np.ndarray, "units units"]:
    """The matrix with mean 0 and standard deviation 1; zeros if all its numbers are alike."""
    centred = np.asarray(similarity, dtype=np.float64) - similarity.mean(dtype=np.float64)
    deviation = centred.std()
    return centred / deviation if deviation > 0 else np.zeros_like(centred)
