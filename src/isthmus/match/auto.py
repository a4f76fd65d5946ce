"""Auto: the method whose merged model does best on a held-out part of the given data."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from isthmus.batches import Batch, is_labelled, read_batches
from isthmus.errors import DataError, InputError, IsthmusError, ModelError
from isthmus.match.base import Match, Problem
from isthmus.match.identity import Identity
from isthmus.match.weight_matching import total_value
from isthmus.merge import merge
from isthmus.progress import progress
from isthmus.registry import configure
from isthmus.repair import normalisation_layers, repair
from isthmus.score import Ensemble, class_scores, evaluate
from isthmus.trace.reader import first_float
from isthmus.transform import Alignment

# Methods that train by gradients take minutes; they are tried if they are named.
BY_GRADIENT = ("ste", "sinkhorn", "learned")


@dataclass(frozen=True)
class Auto:
    """Tries every method that the data allows on one part of it, keeps the best on the other, and says why.

    A method is judged by the plain mean of the models that it aligned, BatchNorm statistics reset on the fitting part:
    with targets by its loss on the held-out part, without targets by the mean squared distance of its class scores from
    the mean of the models' own. Without data, by the inner product of the moved weights. The chosen method is then run
    again on all data.

    Attributes:
        candidates: Names of the methods to try, in a sequence or separated by commas; by default all but those that
            train by gradients.
        held_out: Share of the batches that is held out, the last ones.

    Source: this project.
    """

    candidates: str | Sequence[str] | None = None
    held_out: float = 0.2

    name: ClassVar[str] = "auto"
    exact: ClassVar[bool] = False

    @property
    def needs(self) -> str:
        """Nothing but the weights; data lets it try more."""
        return ""

    def __post_init__(self) -> None:
        if isinstance(self.candidates, str):
            object.__setattr__(self, "candidates", tuple(name.strip() for name in self.candidates.split(",")))
        elif self.candidates is not None:
            object.__setattr__(self, "candidates", tuple(self.candidates))
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out={self.held_out}: give a share between 0 and 1")
        if self.candidates is not None:
            self.methods()

    def methods(self) -> list[Match]:
        """The configured candidates.

        Raises:
            InputError: An unknown method among them, or none.
        """
        from isthmus.match import METHODS  # the table holds this method too

        names = tuple(self.candidates or ())
        if self.candidates is None:
            names = tuple(name for name in METHODS if name != self.name and name not in BY_GRADIENT)
        if not names or self.name in names:
            raise InputError(f"candidates={list(names)}: name one method or more, other than {self.name!r}")
        return [configure("matching method", name, METHODS) for name in names]

    def __call__(self, problem: Problem) -> Alignment:
        """The alignment by the chosen method; its details hold every candidate's score and the reason.

        Raises:
            DataError: A single batch, which cannot be split.
            InputError: No candidate can be used on these models with this data.
        """
        start = time.perf_counter()
        if len(problem.models) == 1 or not len(problem.symmetry):
            return replace(
                Identity()(problem), method=self.name, details={"chosen": "identity", "why": "nothing moves"}
            )
        met = {""}
        fitting, held = problem.data, None
        if problem.data is not None:
            met |= {"data", "labels"} if is_labelled(problem.data) else {"data"}
            fitting, held = split_batches(problem.data, self.held_out)
        scores: dict[str, float] = {}
        left_out: dict[str, str] = {}
        part = Problem(problem.models, problem.symmetry, fitting, problem.seed)
        judge, criterion = judge_by(problem, part, held)
        methods = self.methods()
        for method in progress(methods, "trying methods"):
            if method.needs not in met:
                left_out[method.name] = f"needs {method.needs}"
                continue
            try:
                scores[method.name] = judge(method(part))
            except IsthmusError as error:
                left_out[method.name] = str(error)
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        if not finite:
            raise InputError(f"no candidate can be used here: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
        chosen = min(finite, key=lambda name: finite[name])
        found = next(method for method in methods if method.name == chosen)(problem)
        ranked = dict(sorted(scores.items(), key=lambda item: item[1]))
        return replace(
            found,
            method=self.name,
            seconds=time.perf_counter() - start,
            details={
                "chosen": chosen,
                "why": f"lowest {criterion}: {finite[chosen]:.4g}",
                "scores": ranked,
                "left_out": left_out,
                "options": dict(found.details),
            },
        )


def split_batches(data: Any, held_out: float) -> tuple[list[Batch], list[Batch]]:
    """The first batches for fitting and the last ones to hold out, read once: data that shuffles cannot mix them.

    Raises:
        DataError: Fewer than two batches.
    """
    batches = list(read_batches(data))
    if len(batches) < 2:
        raise DataError(
            "one batch cannot be split into a fitting and a held-out part: give two or more, or smaller ones"
        )
    held = min(len(batches) - 1, max(1, round(held_out * len(batches))))
    return batches[:-held], batches[-held:]


def judge_by(problem: Problem, part: Problem, held: Any) -> tuple[Any, str]:
    """How an alignment is scored, lower is better, and the criterion's name."""
    models = problem.models

    def merged_by(alignment: Alignment) -> nn.Module:
        merged = merge(models, alignment)
        if normalisation_layers(merged):
            return repair(merged, part.data)
        return merged

    if held is None:
        return lambda alignment: -weight_agreement(problem, alignment), "negative inner product of the moved weights"
    if is_labelled(held) and classifies(models[0], held):
        return lambda alignment: evaluate(merged_by(alignment), held).loss, "loss of the merged model on held-out data"
    ensemble = Ensemble(models)  # of whatever scores the models give
    return (
        lambda alignment: distance_of_scores(merged_by(alignment), ensemble, held),
        "distance of class scores from the ensemble's on held-out data",
    )


def classifies(model: nn.Module, data: Any) -> bool:
    """Whether the model's outputs are class scores for the data's targets."""
    try:
        evaluate(model, data)
    except ModelError:
        return False
    return True


def weight_agreement(problem: Problem, alignment: Alignment) -> float:
    """The inner product of the moved weights, summed over pairs of models; minus infinity after linear maps."""
    if not alignment.is_exact:
        return -math.inf
    return total_value(problem, [dict(each) for each in alignment.transforms])[0]


def distance_of_scores(model: nn.Module, ensemble: nn.Module, data: Any) -> float:
    """Mean squared distance of two models' class scores.

    Raises:
        DataError: The model gives no class scores.
    """
    total, count = 0.0, 0
    reference = first_float(model.state_dict())
    for batch in read_batches(data):
        inputs: Batch = batch.to(reference.device, reference.dtype).clone()
        with torch.no_grad():
            found, wanted = (class_scores(each(*inputs.args, **inputs.kwargs)) for each in (model, ensemble))
        if found is None or wanted is None:
            raise DataError("the model gives no class scores to be judged by: give labelled data and name a method")
        total += float((found.double() - wanted.double()).square().sum())
        count += found.numel()
    return total / count
