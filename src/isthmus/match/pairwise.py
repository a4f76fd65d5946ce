"""Three and more models by a method for two: all to one reference."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.errors import InputError
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.observe.score import evaluate
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Transforms

REFERENCES = ("first", "best", "medoid")


@dataclass(frozen=True, eq=False)
class Pair:
    """What a method found for two models.

    Attributes:
        transforms: Move the second model into the frame of the first.
        objective: What the method maximised, or None.
        upper_bound: A proven upper bound of it, or None.
        converged: Whether the method stopped because nothing improved any more.
        details: What else it reports, as plain JSON values.
    """

    transforms: Transforms
    objective: float | None = None
    upper_bound: float | None = None
    converged: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


def check_reference(reference: str) -> None:
    """Refuses an unknown way of choosing the reference.

    Raises:
        InputError: It is none of `REFERENCES`.
    """
    if reference not in REFERENCES:
        raise InputError(f"reference={reference!r}: use one of {', '.join(REFERENCES)}")


def all_to_one(
    problem: MatchingProblem, name: str, match_pair: Callable[[int, int], Pair], reference: str = "first"
) -> Alignment:
    """Every model matched on its own to one reference, whose frame is the common one.

    Args:
        problem: The models.
        name: The method's name.
        match_pair: Finds the transforms that move the second model (its number) into the frame of the first.
        reference: `"first"`; `"best"`, the model with the lowest loss on the problem's data, which needs labels;
            or `"medoid"`, the model whose summed objective with all others is largest, which matches all pairs.

    Raises:
        DataError: `"best"` without labelled data.
        InputError: An unknown reference.
    """
    check_reference(reference)
    start = time.perf_counter()
    count = len(problem.models)
    centre, found = 0, {}
    if reference == "best" and count > 1:
        problem.require("labels", f"{name} with reference='best'")
        losses = [evaluate(model, problem.data).loss for model in problem.models]
        centre = losses.index(min(losses))
    if reference == "medoid" and count > 2:
        for first in progress(range(count), f"{name}, all pairs"):
            for second in range(count):
                if first != second:
                    found[first, second] = match_pair(first, second)
        sums = [sum(pair.objective or 0.0 for (a, _), pair in found.items() if a == index) for index in range(count)]
        centre = sums.index(max(sums))
    transforms: list[Transforms] = []
    pairs: list[Pair] = []
    for index in progress(range(count), name.replace("_", " ")):
        if index == centre:
            transforms.append(identity_transforms(problem.symmetry))
            continue
        pair = found.get((centre, index)) or match_pair(centre, index)
        pairs.append(pair)
        transforms.append(pair.transforms)
    objectives = [pair.objective for pair in pairs if pair.objective is not None]
    bounds = [pair.upper_bound for pair in pairs if pair.upper_bound is not None]
    return Alignment(
        problem.symmetry,
        tuple(transforms),
        method=name,
        objective=sum(objectives, 0.0) if len(objectives) == len(pairs) else None,
        upper_bound=sum(bounds, 0.0) if len(bounds) == len(pairs) else None,
        converged=all(pair.converged for pair in pairs),
        seconds=time.perf_counter() - start,
        details={"reference": centre, "pairs": [dict(pair.details) for pair in pairs]},
    )
