"""Auto: the method whose merged model does best on a held-out part of the given data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from isthmus.data.batches import is_labelled, split_batches
from isthmus.errors import InputError, IsthmusError
from isthmus.match.base import Match, MatchingProblem, identity_transforms, match_folded
from isthmus.match.coordinate_ascent import total_value
from isthmus.match.held_out import judge_by
from isthmus.match.methods import CANDIDATES
from isthmus.progress import progress
from isthmus.registry import configure
from isthmus.symmetry.alignment import Alignment


@dataclass(frozen=True)
class Auto(Match):
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
    joint: ClassVar[bool] = True

    @property
    def folds(self) -> bool:
        """No: each candidate sees the models as it needs them."""
        return False

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
        names = tuple(self.candidates or ())
        if self.candidates is None:
            names = tuple(name for name, method in CANDIDATES.items() if not method.by_gradient)
        if not names or self.name in names:
            raise InputError(f"candidates={list(names)}: name one method or more, other than {self.name!r}")
        return [configure("matching method", name, CANDIDATES) for name in names]

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment by the chosen method; its details hold every candidate's score and the reason.

        Raises:
            DataError: A single batch, which cannot be split.
            InputError: No candidate can be used on these models with this data.
        """
        if len(problem.models) == 1 or not len(problem.symmetry):
            still = tuple(identity_transforms(problem.symmetry) for _ in problem.models)
            return Alignment(problem.symmetry, still, self.name, details={"chosen": "identity", "why": "nothing moves"})
        met = {""}
        fitting, held = problem.data, None
        if problem.data is not None:
            met |= {"data", "labels"} if is_labelled(problem.data) else {"data"}
            fitting, held = split_batches(problem.data, self.held_out)
        scores: dict[str, float] = {}
        left_out: dict[str, str] = {}
        part = MatchingProblem(problem.models, problem.symmetry, fitting, problem.seed)
        if held is None:
            judge, criterion = partial(_disagreement, problem), "negative inner product of the moved weights"
        else:
            assert fitting is not None  # it was split from the data
            judge, criterion = judge_by(problem, fitting, held)
        methods = self.methods()
        for method in progress(methods, "trying methods"):
            if method.needs not in met:
                left_out[method.name] = f"needs {method.needs}"
                continue
            try:
                scores[method.name] = judge(match_folded(method, part))
            except IsthmusError as error:
                left_out[method.name] = str(error)
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        if not finite:
            raise InputError(f"no candidate can be used here: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
        chosen = min(finite, key=lambda name: finite[name])
        found = match_folded(next(method for method in methods if method.name == chosen), problem)
        ranked = dict(sorted(scores.items(), key=lambda item: item[1]))
        return replace(
            found,
            method=self.name,
            details={
                "chosen": chosen,
                "why": f"lowest {criterion}: {finite[chosen]:.4g}",
                "scores": ranked,
                "left_out": left_out,
                "options": dict(found.details),
            },
        )


def _disagreement(problem: MatchingProblem, alignment: Alignment) -> float:
    """The negative inner product of the moved weights, summed over pairs of models; infinite after linear maps."""
    if not alignment.is_exact:
        return math.inf
    return -total_value(problem, [dict(each) for each in alignment.transforms])[0]
