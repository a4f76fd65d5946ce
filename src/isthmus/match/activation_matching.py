"""Activation matching: units are paired by how alike they respond to data."""

import time
from dataclasses import dataclass
from typing import ClassVar

from isthmus.errors import InputError
from isthmus.match.base import Problem, identity_transforms
from isthmus.match.families import family_of, paired_value, roots_of, solve_family
from isthmus.transform import Alignment, Permutation, Transform


@dataclass(frozen=True)
class ActivationMatching:
    """Pairs units of every model with those of model 0 so that the sum of their similarities is largest, exactly.

    Similarity is the correlation of activations (as in REPAIR) or their covariance (the dot products of Git Re-Basin,
    centred). A unit that never varies is like no other.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
        similarity: `"correlation"` or `"covariance"`.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, §3.1; Jordan et al., REPAIR, ICLR 2023, §2;
        Li et al., Convergent Learning, ICLR 2016.
    """

    at: str = "post"
    similarity: str = "correlation"

    name: ClassVar[str] = "activation_matching"
    needs: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        if self.at not in ("post", "pre"):
            raise InputError(f"at={self.at!r}: activations are read at 'post' or 'pre'")
        if self.similarity not in ("correlation", "covariance"):
            raise InputError(f"similarity={self.similarity!r}: use 'correlation' or 'covariance'")

    def __call__(self, problem: Problem) -> Alignment:
        """The alignment of every model to model 0; the objective is the summed similarity of all pairs.

        Raises:
            DataError: No data, or data that cannot be read.
            SymmetryError: A space can be read nowhere in the graph.
        """
        start = time.perf_counter()
        symmetry = problem.symmetry
        moments = problem.moments(self.at) if len(problem.models) > 1 and len(symmetry) else None
        transforms: list[dict[str, Transform]] = [identity_transforms(symmetry)]
        objective = 0.0
        for index in range(1, len(problem.models)):
            found: dict[str, Transform] = {}
            for root in roots_of(symmetry):
                assert moments is not None
                similarities = {}
                for space in family_of(symmetry, root):
                    # What a space's children tell is summed up from them; its own reading would count them twice.
                    if not symmetry.children(space):
                        read = moments[space.name]
                        correlate = self.similarity == "correlation"
                        pair = read.correlation(0, index) if correlate else read.between(0, index)
                        similarities[space.name] = pair.numpy()
                solved = solve_family(symmetry, root, similarities)
                found |= {name: Permutation(indices) for name, indices in solved.items()}
                objective += paired_value(symmetry, root, similarities, found)
            transforms.append(found)
        return Alignment(
            symmetry,
            tuple(transforms),
            method=self.name,
            objective=objective,
            upper_bound=objective,  # each space's assignment is solved exactly, and no space depends on another
            seconds=time.perf_counter() - start,
            details={"at": self.at, "similarity": self.similarity, "samples": moments.samples if moments else 0},
        )
