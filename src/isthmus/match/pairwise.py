"""Methods that match two models at a time, and three and more by it: all to one reference."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from isthmus.errors import InputError
from isthmus.match.base import Match, MatchingProblem, identity_transforms
from isthmus.observe.score import evaluate_checked
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Transforms

REFERENCES = ("first", "best", "medoid")
PLACES = ("post", "pre")


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
    details: Mapping[str, object] = field(default_factory=dict)


def check_reference(reference: str) -> None:
    """Refuses an unknown way of choosing the reference.

    Raises:
        InputError: It is none of `REFERENCES`.
    """
    if reference not in REFERENCES:
        raise InputError(f"reference={reference!r}: use one of {', '.join(REFERENCES)}")


def check_place(at: str) -> None:
    """Refuses an unknown place to read activations at.

    Raises:
        InputError: It is none of `PLACES`.
    """
    if at not in PLACES:
        raise InputError(f"at={at!r}: activations are read at 'post' or 'pre'")


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
    count = len(problem.models)
    centre, found = 0, {}
    if reference == "best" and count > 1:
        problem.require("labels", f"{name} with reference='best'")
        losses = [evaluate_checked(model, problem.data).loss for model in problem.models]
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
        details={"reference": centre, "pairs": [dict(pair.details) for pair in pairs]},
    )


@dataclass(frozen=True, kw_only=True)
class PairwiseMethod(Match):
    """A method that matches two models at a time; of three and more, all to one reference.

    It should be the case that `match_pair` of a model and itself is the identity on all units that can be told apart,
    and that it draws random numbers from generators seeded with `problem.seed` alone.

    Attributes:
        reference: Three and more models: which one all others are moved to, `"first"`, `"best"` (the lowest loss on
            the data, which needs labels) or `"medoid"` (the largest summed objective with all others, which matches all
            pairs).
    """

    reference: str = "first"

    @property
    def needs(self) -> str:
        """Nothing but the weights; batches with targets if the reference is the best model."""
        return "labels" if self.reference == "best" else ""

    def __post_init__(self) -> None:
        check_reference(self.reference)

    @abstractmethod
    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """What moves one model (its number) into the frame of another; there is a space in which something moves."""

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment of every model to the reference; objectives and bounds are summed over the pairs.

        Raises:
            IsthmusError: What `match_pair` raises; labels are missing for the reference; data cannot be read.
        """
        if not len(problem.symmetry):
            return all_to_one(problem, self.name, lambda fixed, moved: Pair({}, 0.0))
        return all_to_one(problem, self.name, partial(self.match_pair, problem), self.reference)


@dataclass(frozen=True, kw_only=True)
class PairwiseDataMethod(PairwiseMethod):
    """A pairwise method that reads activations: `problem.moments(self.at)`.

    Attributes:
        at: Read activations where consumers receive them (`"post"`) or where they enter a nonlinearity (`"pre"`).
    """

    at: str = "post"

    @property
    def needs(self) -> str:
        """Batches; with targets if the reference is the best model."""
        return super().needs or "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place(self.at)
