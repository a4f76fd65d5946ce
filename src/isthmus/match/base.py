"""What every matching method is: a configured object that turns a problem into an alignment."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from isthmus.data.batches import Data, is_labelled
from isthmus.errors import DataError
from isthmus.merging.fold import fold_norm_gains
from isthmus.observe.collect import collect_checked, collect_joint
from isthmus.observe.moments import JointMoments, Moments
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.gains import has_diagonal_sites
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, Transform
from isthmus.wording.short import told_by_fields


@dataclass(eq=False)
class MatchingProblem:
    """Models to align, and what a method may use to do it.

    Attributes:
        models: The models, of one architecture, in `eval()`.
        symmetry: Their spaces.
        data: Re-iterable batches, or None.
        seed: Seeds everything random.
        symmetries: Every model's own symmetry, where models differ and `symmetry` is the first model's; empty where all
            share it.
    """

    models: Sequence[nn.Module]
    symmetry: Symmetry
    data: Data | None = None
    seed: int = 0
    symmetries: Sequence[Symmetry] = ()
    _joint: dict[str, dict[str, JointMoments]] = field(default_factory=dict[str, dict[str, JointMoments]], repr=False)
    _moments: dict[str, Moments] = field(default_factory=dict[str, Moments], repr=False)

    __repr__ = told_by_fields

    @property
    def states(self) -> list[State]:
        """Every model's state dict."""
        return [model.state_dict() for model in self.models]

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the tensors that are trained: running statistics and other buffers are not."""
        return frozenset(name for name, _ in self.models[0].named_parameters())

    def moments(self, at: str) -> Moments:
        """Moments of the activations of all models on the data; read once for each place and kept.

        Raises:
            DataError: There is no data, or it cannot be read.
        """
        if at not in self._moments:
            if self.symmetries:
                joint, samples = collect_joint(self.models, self.symmetries, self.data, at=at)
                self._moments[at] = Moments({name: each.of_one_size() for name, each in joint.items()}, at, samples)
            else:
                self._moments[at] = collect_checked(self.models, self.symmetry, self.data, at=at)
        return self._moments[at]

    def joint_moments(self, at: str) -> dict[str, JointMoments]:
        """As `moments`, for models of several widths.

        Raises:
            DataError: There is no data, or it cannot be read.
        """
        if at not in self._joint:
            symmetries = self.symmetries or [self.symmetry] * len(self.models)
            self._joint[at], _ = collect_joint(self.models, symmetries, self.data, at=at)
        return self._joint[at]

    def own_symmetry(self, index: int) -> Symmetry:
        """A model's own symmetry."""
        return self.symmetries[index] if self.symmetries else self.symmetry

    def require(self, needs: str, who: str) -> None:
        """Refuses to go on without what a method needs.

        Raises:
            DataError: There is no data, or it has no targets where they are needed.
        """
        if needs and self.data is None:
            what = "batches (x, y) with targets" if needs == "labels" else "unlabelled batches are enough"
            raise DataError(f"{who} needs data: give data=, {what}")
        if needs == "labels" and not is_labelled(self.data):
            raise DataError(f"{who} needs labels: give batches (x, y), not x alone")


class Match(ABC):
    """A matching method: a frozen dataclass whose fields are its options.

    It should be the case that:

    - every model gets one transform a space, and the transform is of that space's group or a linear map that the
      method's docstring owns up to;
    - the first model does not move, unless an option says so: the common frame is that of the first;
    - one model alone, or a network in which nothing can move, gives the identity, and an objective of zero or none;
    - with `exact`, every transform is a permutation, and every moved model computes what it did;
    - with `exact`, and data where it `needs` some, a model is found again in a permuted copy of itself: the two moved
      models have the same weights;
    - copies of one model merge into that model;
    - going round any cycle of models is the identity;
    - the same models, data and seed give the same bytes, whatever else has drawn random numbers;
    - nothing that it was given changes: weights, modes, data, global random states;
    - unless `joint`, a model's transforms do not depend on which other models are matched beside it, or in what order;
    - models of any floating-point precision will do, and several in one call;
    - it returns a finite objective or None, never above its upper bound, and details that JSON can hold.

    `tests/laws/test_matching.py` states these as tests, and runs them for every method of the table.

    Attributes:
        name: The method's name in `METHODS`.
        exact: Whether all its transforms are permutations, so that every moved model keeps its function.
        resizes: Whether it also aligns models of several widths (`MatchingProblem.symmetries`).
        joint: Whether it looks at all models together, so that what one undergoes depends on the others.
        by_gradient: Whether it trains, which takes minutes; `auto` tries such methods only if they are named.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    resizes: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = False

    @property
    def needs(self) -> str:
        """What it needs beside the weights: `""`, `"data"` (targets are not used) or `"labels"` (with targets)."""
        return ""

    @property
    def folds(self) -> bool:
        """Whether it may use linear maps, so that norms' gains are folded first."""
        return not self.exact

    @classmethod
    def brief(cls) -> "Match":
        """The method with options that make it quick on tiny networks, and still let it move things: for the laws."""
        return cls()

    @abstractmethod
    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment of all models of the problem; `align` times it."""


def match_timed(method: Match, problem: MatchingProblem) -> Alignment:
    """The alignment by a method, and how long it took.

    Raises:
        IsthmusError: What the method raises.
    """
    start = time.perf_counter()
    found = method(problem)
    return replace(found, seconds=time.perf_counter() - start)


def match_folded(method: Match, problem: MatchingProblem) -> Alignment:
    """The alignment by a method, timed; where it may use linear maps, it sees models whose norms' gains are folded.

    A gain of each unit commutes with permutations alone. Folded, it leaves a space the group that it claims; an
    alignment that holds more than permutations notes that models have to be folded before they are moved.

    Raises:
        IsthmusError: What the method raises, or a gain that cannot be folded.
    """
    if not method.folds or not has_diagonal_sites(problem.symmetry):
        return match_timed(method, problem)
    models = [fold_norm_gains(model, problem.own_symmetry(index)) for index, model in enumerate(problem.models)]
    folded = MatchingProblem(models, problem.symmetry, problem.data, problem.seed, problem.symmetries)
    found = match_timed(method, folded)
    return found if found.is_exact else replace(found, folded=True)


def identity_transforms(symmetry: Symmetry) -> dict[str, Transform]:
    """Transforms that move nothing."""
    return {space.name: Permutation.identity(space) for space in symmetry}
