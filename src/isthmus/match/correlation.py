"""Permutations by how alike units respond to data: the engine of activation matching."""

from isthmus.match.base import MatchingProblem
from isthmus.match.nested import family_of, paired_value, roots_of, solve_family
from isthmus.match.pairwise import Pair
from isthmus.symmetry.transform import Permutation, Transform


def pair_by_activations(problem: MatchingProblem, at: str, similarity: str, fixed: int, moved: int) -> Pair:
    """The permutations of one model's units whose summed similarity with another's is largest, exactly.

    Args:
        problem: The models and the data.
        at: Where activations are read.
        similarity: `"correlation"` or `"covariance"`.
        fixed: Number of the model whose frame is kept.
        moved: Number of the model that is moved into it.

    Raises:
        DataError: No data, or data that cannot be read.
        SymmetryError: A space can be read nowhere in the graph.
    """
    symmetry = problem.symmetry
    if not len(symmetry):
        return Pair({}, 0.0, 0.0)
    moments = problem.moments(at)
    found: dict[str, Transform] = {}
    objective = 0.0
    for root in roots_of(symmetry):
        similarities = {}
        for space in family_of(symmetry, root):
            # What a space's children tell is summed up from them; its own reading would count them twice.
            if not symmetry.children(space):
                read = moments[space.name]
                alike = read.correlation(fixed, moved) if similarity == "correlation" else read.between(fixed, moved)
                similarities[space.name] = alike.numpy()
        solved = solve_family(symmetry, root, similarities)
        found |= {name: Permutation(indices) for name, indices in solved.items()}
        objective += paired_value(symmetry, root, similarities, found)
    # Each space's assignment is solved exactly, and no space depends on another: the optimum is the bound.
    return Pair(found, objective, objective, details={"samples": moments.samples})
