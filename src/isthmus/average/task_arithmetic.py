"""Task arithmetic."""

from dataclasses import dataclass
from typing import ClassVar

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.task_vectors import add_to_base, check_scale, task_vectors, weighted_sum


@dataclass(frozen=True)
class TaskArithmetic(Average):
    """base + scale · Σ c_m (θ_m − base).

    The coefficients sum to one: scale 1 is the models' mean, scale N (their number) the plain sum of task vectors.

    Attributes:
        scale: Factor of the summed task vectors.

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023.
    """

    scale: float = 1.0

    name: ClassVar[str] = "task_arithmetic"

    @property
    def needs(self) -> str:
        """The models' common ancestor."""
        return "base"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The merged tensors."""
        return Averaged(add_to_base(aligned, weighted_sum(aligned, task_vectors(aligned)), self.scale))
