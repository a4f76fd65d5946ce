"""MuDSC: units are paired by what they respond to and by what they are made of, both at once."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.nested import family_of, solve_family
from isthmus.match.pairwise import Pair, all_to_one, check_reference
from isthmus.match.weight_objective import WeightObjective
from isthmus.observe.moments import Moments
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Permutation


@dataclass(frozen=True)
class MuDSC:
    """Maximises, space by space, alpha · activation similarity + (1 − alpha) · weight similarity, each standardised.

    Activation similarity is the correlation of two units; weight similarity the inner product of their weights, with
    all other spaces as they are matched now, so that the spaces are swept, in graph order, until nothing changes. Each
    matrix is shifted and scaled to mean 0 and standard deviation 1 before they are mixed.

    Attributes:
        alpha: Share of the activations, from 0 to 1.
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        reference: Three and more models: which one all others are matched to, `"first"`, `"best"` or `"medoid"`.
        max_sweeps: Sweeps before it is given up as not converged; the mixed similarity is no single objective, and a
            cycle is possible.

    Source: Xu, Yuan, et al., "Training-Free Pretrained Model Merging" (MuDSC), CVPR 2024. The paper also zips; here
        units are permuted. How it scales each similarity is not certain: to standardise is this project's reading.
    """

    alpha: float = 0.5
    at: str = "post"
    reference: str = "first"
    max_sweeps: int = 50

    name: ClassVar[str] = "mudsc"
    exact: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Batches; with targets if the reference is the best model."""
        return "labels" if self.reference == "best" else "data"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0 <= self.alpha <= 1):
            raise InputError(f"alpha={self.alpha}: give a share from 0 (weights) to 1 (activations)")
        if self.at not in ("post", "pre"):
            raise InputError(f"at={self.at!r}: activations are read at 'post' or 'pre'")
        if self.max_sweeps < 1:
            raise InputError(f"max_sweeps={self.max_sweeps}: give at least 1")
        check_reference(self.reference)

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """

        def match_pair(fixed: int, moved: int) -> Pair:
            if not len(problem.symmetry):
                return Pair({}, 0.0)
            return self._sweep(problem, problem.moments(self.at), fixed, moved)

        return all_to_one(problem, self.name, match_pair, self.reference)

    def _sweep(self, problem: MatchingProblem, moments: Moments, fixed: int, moved: int) -> Pair:
        symmetry = problem.symmetry
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
