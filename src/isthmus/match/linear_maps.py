"""Linear maps between the spaces of two models, from the moments of their activations."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from isthmus.match.base import MatchingProblem
from isthmus.match.nested import family_of, roots_of, solve_family
from isthmus.match.pairwise import Pair
from isthmus.observe.moments import Moments, SpaceMoments
from isthmus.symmetry.transform import LinearMap, Permutation, Transform

# From covariances of A's units, of B's, and between both, in float64: the map that moves B's units into A's frame,
# and the summed correlation that it reaches.
Solver = Callable[
    [Float[Tensor, "units units"], Float[Tensor, "units units"], Float[Tensor, "units units"]],
    tuple[LinearMap, float],
]


def map_spaces(problem: MatchingProblem, moments: Moments, fixed: int, moved: int, solve: Solver) -> Pair:
    """A linear map for every space that stands alone; permutations, by correlation, for nested families.

    Where units hold other units, or a space is held in copies, no single basis is there for a linear map to act in.

    Raises:
        SymmetryError: A space can be read nowhere in the graph.
    """
    found: dict[str, Transform] = {}
    total = 0.0
    for root in roots_of(problem.symmetry):
        family = family_of(problem.symmetry, root)
        if len(family) > 1 or root.copies > 1:
            leaves = [space for space in family if not problem.symmetry.children(space)]
            similar = {space.name: moments[space.name].correlation(fixed, moved).numpy() for space in leaves}
            solved = solve_family(problem.symmetry, root, similar)
            found |= {name: Permutation(indices) for name, indices in solved.items()}
            continue
        read: SpaceMoments = moments[root.name]
        found[root.name], value = solve(
            read.between(fixed, fixed).double(),
            read.between(moved, moved).double(),
            read.between(fixed, moved).double(),
        )
        total += value
    return Pair(found, total)
