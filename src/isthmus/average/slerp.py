"""Spherical linear interpolation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.errors import InputError

# Directions whose cosine is above this are so near that the arc is a line.
PARALLEL = 0.9995


@dataclass(frozen=True)
class Slerp(Average):
    """Moves from the first model to the second along an arc, tensor by tensor; the second's weight is the share.

    Tensors of the same direction (cosine above 0.9995, or below −0.9995, where no arc is defined), and those that are
    zero, are interpolated linearly; so are running statistics.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; as a way to merge, common practice.
    """

    name: ClassVar[str] = "slerp"
    joins_two: ClassVar[bool] = True

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The interpolated tensors.

        Raises:
            InputError: More than two models.
        """
        alive = aligned.coefficients.counting
        if len(alive) > 2:
            raise InputError(f"slerp joins two models, {len(alive)} were given: use average='mean'")
        start, end = aligned.states[alive[0]], aligned.states[alive[-1]]
        trained = {name for name, _ in aligned.module.named_parameters(remove_duplicate=False)}
        merged: dict[str, Tensor] = {}
        for name, first in start.items():
            if not first.is_floating_point():
                continue
            last = end[name].double()
            share = aligned.weights(name)[alive[-1]]
            mixed = (
                _along_arc(first.double(), last, share) if name in trained else torch.lerp(first.double(), last, share)
            )
            merged[name] = mixed.to(first.dtype)
        return Averaged(merged)


def _along_arc(first: Float[Tensor, "*shape"], last: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """The tensor at a share of the angle from `first` to `last`; lengths are interpolated with the same weights."""
    norms = first.norm() * last.norm()
    cosine = (first * last).sum() / norms if norms > 0 else torch.ones(())
    if not abs(float(cosine)) < PARALLEL:
        return torch.lerp(first, last, share)
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last) / torch.sin(angle)
