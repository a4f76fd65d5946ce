"""Task vectors: what training moved a model by, from an ancestor that all models share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.average.base import AveragingProblem
from isthmus.average.mean import weighted_mean
from isthmus.errors import InputError

TaskVector = dict[str, Tensor]


def check_scale(scale: float) -> None:
    """Refuses a scale that is no number.

    Raises:
        InputError: NaN or infinite.
    """
    if not math.isfinite(scale):
        raise InputError(f"scale={scale}: give a finite number, such as 1.0")


def task_vectors(aligned: AveragingProblem) -> list[TaskVector]:
    """For every model, its trained tensors minus the base's, in float64.

    Raises:
        InputError: There is no base, or it lacks a tensor.
    """
    if aligned.base is None:
        raise InputError("no base: task vectors are differences from the models' common ancestor; give base=")
    names = [name for name, _ in aligned.module.named_parameters(remove_duplicate=False)]
    missing = [name for name in names if name not in aligned.base]
    if missing:
        raise InputError(f"the base has no tensor {missing[0]}: give the models' common ancestor")
    base = aligned.base
    return [{name: state[name].double() - base[name].double() for name in names} for state in aligned.states]


def add_to_base(aligned: AveragingProblem, moved: TaskVector, scale: float) -> dict[str, Tensor]:
    """The base plus `scale` times a task vector; running statistics and other buffers are plain means."""
    assert aligned.base is not None
    merged = weighted_mean(aligned)
    for name, step in moved.items():
        merged[name] = (aligned.base[name].double() + scale * step).to(merged[name].dtype)
    return merged


def weighted_sum(aligned: AveragingProblem, vectors: Sequence[TaskVector]) -> TaskVector:
    """Σ c_m τ_m."""
    return {
        name: torch.stack([c * vector[name] for c, vector in zip(aligned.weights(name), vectors, strict=True)]).sum(
            dim=0
        )
        for name in vectors[0]
    }


def disjoint_mean(aligned: AveragingProblem, vectors: Sequence[TaskVector]) -> TaskVector:
    """Per number, the weighted mean over the models that move it in the direction of the weighted sum."""
    found: TaskVector = {}
    for name in vectors[0]:
        weights = torch.tensor(list(aligned.weights(name)), dtype=torch.float64)
        weights = weights.view(-1, *[1] * vectors[0][name].ndim)
        steps = torch.stack([vector[name] for vector in vectors])
        elected = (weights * steps).sum(dim=0).sign()
        agree = weights * ((steps.sign() == elected) & (steps != 0))
        total = agree.sum(dim=0)
        found[name] = torch.where(total != 0, (agree * steps).sum(dim=0) / torch.where(total != 0, total, 1.0), 0.0)
    return found
