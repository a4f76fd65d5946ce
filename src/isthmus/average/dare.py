"""DARE: drop and rescale."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.task_vectors import add_to_base, check_scale, disjoint_mean, task_vectors, weighted_sum
from isthmus.errors import InputError


@dataclass(frozen=True)
class Dare(Average):
    """Drops a random share of every task vector's numbers, scales the rest up to make good, then merges.

    Attributes:
        drop: Share of numbers that is dropped; the rest is divided by 1 − drop.
        then: `"sum"`, the weighted sum of task arithmetic, or `"ties"`, the sign election of TIES (without its trim).
        scale: Factor of the merged task vector.

    Source: Yu et al., "Language models are super Mario", ICML 2024.
    """

    drop: float = 0.5
    then: str = "sum"
    scale: float = 1.0

    name: ClassVar[str] = "dare"

    @property
    def needs(self) -> str:
        """The models' common ancestor."""
        return "base"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise InputError(f"drop={self.drop}: give a share from 0 and below 1")
        if self.then not in ("sum", "ties"):
            raise InputError(f"then={self.then!r}: use 'sum' or 'ties'")
        check_scale(self.scale)

    @classmethod
    def whole(cls) -> "Dare":
        """Nothing is dropped."""
        return cls(drop=0.0)

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The merged tensors."""
        generator = torch.Generator().manual_seed(aligned.seed)
        thinned = []
        for vector in task_vectors(aligned):
            kept = {name: torch.rand(step.shape, generator=generator) >= self.drop for name, step in vector.items()}
            thinned.append({name: step * kept[name].to(step.device) / (1 - self.drop) for name, step in vector.items()})
        join = weighted_sum if self.then == "sum" else disjoint_mean
        return Averaged(add_to_base(aligned, join(aligned, thinned), self.scale))
