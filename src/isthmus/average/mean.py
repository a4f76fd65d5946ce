"""The weighted mean."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.average.base import Average, Averaged, AveragingProblem


@dataclass(frozen=True)
class Mean(Average):
    """Σ c_m θ_m, tensor by tensor; sums are float64."""

    name: ClassVar[str] = "mean"

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The weighted mean of every floating-point tensor."""
        return Averaged(weighted_mean(aligned))


def weighted_mean(aligned: AveragingProblem) -> dict[str, Tensor]:
    """The weighted mean of every floating-point tensor, summed in float64."""
    merged: dict[str, Tensor] = {}
    for name, first in aligned.states[0].items():
        if first.is_floating_point():
            total = torch.zeros_like(first, dtype=torch.float64)
            for coefficient, state in zip(aligned.weights(name), aligned.states, strict=True):
                total += coefficient * state[name].double()
            merged[name] = total.to(first.dtype)
    return merged
