"""No matching: every model stays as it is."""

from dataclasses import dataclass
from typing import ClassVar

from isthmus.match.base import Match, MatchingProblem, identity_transforms
from isthmus.symmetry.alignment import Alignment


@dataclass(frozen=True)
class Identity(Match):
    """Leaves every model as it is: the naive average, which all methods are measured against."""

    name: ClassVar[str] = "identity"
    exact: ClassVar[bool] = True

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment that moves nothing."""
        transforms = tuple(identity_transforms(problem.symmetry) for _ in problem.models)
        return Alignment(problem.symmetry, transforms, method=self.name)
