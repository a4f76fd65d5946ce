"""Greedy soup: the mean of those models that make it better, one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from isthmus.average.base import Average, Averaged, AveragingProblem
from isthmus.average.coefficients import Coefficients
from isthmus.average.mean import weighted_mean
from isthmus.data.batches import Batch, split_batches
from isthmus.errors import InputError
from isthmus.observe.given import check_mixed
from isthmus.observe.running_statistics import normalisation_layers, reset_statistics, running_statistics
from isthmus.observe.score import evaluate_checked
from isthmus.progress import progress


@dataclass(frozen=True)
class GreedySoup(Average):
    """Starts with the best model and takes in each next best one that does not raise the loss of the mean.

    The loss is measured on held-out batches, the last of the given ones. BatchNorm statistics of every mean are
    measured on the other batches, and at the end on all. The moved models must compute what they did. A model that is
    left out counts nothing, so that the result is the best model itself where no other one fits to it.

    Attributes:
        held_out: Share of the batches on which means are judged.

    Source: Wortsman et al., "Model soups", ICML 2022; there for fine-tuned copies of one model, here for aligned ones.
    """

    held_out: float = 0.2

    name: ClassVar[str] = "greedy_soup"

    @property
    def needs(self) -> str:
        """Batches with targets."""
        return "labels"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out={self.held_out}: give a share between 0 and 1")

    def __call__(self, aligned: AveragingProblem) -> Averaged:
        """The mean of the models taken in.

        Raises:
            DataError: Data without targets, or a single batch, so that none can be held out.
            InputError: The models were moved by linear maps that change what they compute, whose means are of all.
        """
        if not aligned.is_exact:
            raise InputError(
                "greedy_soup leaves models out, and linear maps make one mean of all: align by permutations"
            )
        fitting, held = split_batches(aligned.data, self.held_out)
        alive = aligned.coefficients.counting
        losses = {index: _loss_of(_mean_of(aligned, [index]), held) for index in progress(alive, "scoring models")}
        order = sorted(alive, key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
        chosen, lowest = order[:1], losses[order[0]]
        for index in progress(order[1:], "cooking the soup"):
            tried = sorted([*chosen, index])
            if not _counts(aligned.coefficients, tried):
                continue
            loss = _loss_of(_measured(_mean_of(aligned, tried), fitting), held)
            if loss <= lowest:
                chosen, lowest = tried, loss
        model = _mean_of(aligned, chosen)
        if len(chosen) > 1:
            _measured(model, aligned.data)
        state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        return Averaged(state, frozenset(running_statistics(model)))


def _counts(coefficients: Coefficients, chosen: Sequence[int]) -> bool:
    """Whether the chosen models' weights can be scaled to sum to one everywhere."""
    return all(
        sum(weights[index] for index in chosen) for weights in (coefficients.default, *coefficients.by_prefix.values())
    )


def _restricted(coefficients: Coefficients, chosen: Sequence[int]) -> Coefficients:
    """The coefficients with all other models' set to zero, and scaled again."""

    def scaled(weights: Sequence[float]) -> tuple[float, ...]:
        total = sum(weights[index] for index in chosen)
        return tuple(weight / total if index in chosen else 0.0 for index, weight in enumerate(weights))

    by_prefix = {prefix: scaled(weights) for prefix, weights in coefficients.by_prefix.items()}
    return Coefficients(scaled(coefficients.default), by_prefix)


def _mean_of(aligned: AveragingProblem, chosen: Sequence[int]) -> nn.Module:
    """The mean of the chosen models; one model alone is itself whatever its weights."""
    if len(chosen) == 1:
        return aligned.network(aligned.states[chosen[0]])
    merged = weighted_mean(replace(aligned, coefficients=_restricted(aligned.coefficients, chosen)))
    return aligned.network({**aligned.states[0], **merged})


def _loss_of(model: nn.Module, held: Sequence[Batch]) -> float:
    """The loss of a mean on the held-out batches.

    Raises:
        ModelError: The mean holds NaN or infinite numbers.
    """
    check_mixed(model)
    return evaluate_checked(model, held).loss


def _measured(model: nn.Module, data: Sequence[Batch] | Any) -> nn.Module:
    """The model with the running statistics of its normalisation layers measured on data, in place."""
    if normalisation_layers(model):
        reset_statistics(model, data)
    return model
