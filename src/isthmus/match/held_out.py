"""Judging alignments on data that they were not fitted to."""

from collections.abc import Callable

import torch
from torch import nn

from isthmus.average.mean import Mean
from isthmus.data.batches import Data, is_labelled, read_batches
from isthmus.errors import DataError, ModelError
from isthmus.match.base import MatchingProblem
from isthmus.merging.merge import merge_checked
from isthmus.merging.repair import Reset, repair_checked
from isthmus.observe.given import check_mixed
from isthmus.observe.running_statistics import normalisation_layers
from isthmus.observe.score import Ensemble, class_scores, evaluate_checked
from isthmus.symmetry.alignment import Alignment


def judge_by(problem: MatchingProblem, fitting: Data, held: Data) -> tuple[Callable[[Alignment], float], str]:
    """How an alignment is scored, lower is better, and the criterion's name.

    The models are averaged in its frame and BatchNorm statistics reset on the fitting part.

    Args:
        problem: The models.
        fitting: Batches for the statistics.
        held: Batches to judge on.
    """
    models = problem.models

    def merged_by(alignment: Alignment) -> nn.Module:
        merged = merge_checked(models, alignment, Mean())
        if normalisation_layers(merged):
            return repair_checked(merged, fitting, Reset())
        return merged

    if is_labelled(held) and _classifies(models[0], held):
        return lambda alignment: _loss_of(merged_by(alignment), held), "loss of the merged model on held-out data"
    ensemble = Ensemble(models)  # of whatever scores the models give
    return (
        lambda alignment: _distance_of_scores(merged_by(alignment), ensemble, held),
        "distance of class scores from the ensemble's on held-out data",
    )


def _classifies(model: nn.Module, data: Data) -> bool:
    """Whether the model's outputs are class scores for the data's targets."""
    try:
        evaluate_checked(model, data)
    except ModelError:
        return False
    return True


def _loss_of(merged: nn.Module, data: Data) -> float:
    """The loss of a merged model.

    Raises:
        ModelError: It holds NaN or infinite numbers.
    """
    check_mixed(merged)
    return evaluate_checked(merged, data).loss


def _distance_of_scores(model: nn.Module, ensemble: nn.Module, data: Data) -> float:
    """Mean squared distance of two models' class scores.

    Raises:
        DataError: The model gives no class scores.
    """
    total, count = 0.0, 0
    for inputs in read_batches(data, like=model.state_dict()):
        with torch.no_grad():
            found, wanted = (class_scores(each(*inputs.args, **inputs.kwargs)) for each in (model, ensemble))
        if found is None or wanted is None:
            raise DataError("the model gives no class scores to be judged by: give labelled data and name a method")
        total += float((found.double() - wanted.double()).square().sum())
        count += found.numel()
    return total / count
