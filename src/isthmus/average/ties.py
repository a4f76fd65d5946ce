"""TIES: trim, elect sign, merge what agrees."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.task_vectors import TaskVector, add_to_base, check_scale, disjoint_mean, task_vectors
from isthmus.errors import InputError


@dataclass(frozen=True)
class Ties(Average):
    """Keeps each task vector's largest numbers, elects a sign for every number, and averages the models that agree.

    Attributes:
        density: Share of each task vector's numbers that is kept, the largest over all tensors together.
        scale: Factor of the merged task vector.

    Source: Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging", NeurIPS 2023.
    """

    density: float = 0.2
    scale: float = 1.0

    name: ClassVar[str] = "ties"

    @property
    def needs(self) -> str:
        """The models' common ancestor."""
        return "base"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"density={self.density}: give a share above 0 and up to 1")
        check_scale(self.scale)

    @classmethod
    def whole(cls) -> "Ties":
        """Nothing is trimmed."""
        return cls(density=1.0)

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The merged tensors."""
        trimmed = [_trim(vector, self.density) for vector in task_vectors(aligned)]
        return Averaged(add_to_base(aligned, disjoint_mean(aligned, trimmed), self.scale))


def _trim(vector: TaskVector, density: float) -> TaskVector:
    """The task vector with all but its largest numbers set to zero; ties at the edge are all kept."""
    sizes = torch.cat([step.abs().flatten() for step in vector.values()])
    kept = max(1, round(density * len(sizes)))
    edge = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: torch.where(step.abs() >= edge, step, 0.0) for name, step in vector.items()}
