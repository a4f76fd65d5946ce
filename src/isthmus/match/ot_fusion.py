"""OT Fusion: units are moved by optimal transport, also between layers of several widths."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import InputError, SymmetryError
from isthmus.match.assignment import solve_lap
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import improve_family
from isthmus.match.nested import family_of, roots_of, solve_family
from isthmus.match.pairwise import Pair, PairwiseDataMethod
from isthmus.match.weight_objective import WeightObjective, site_rows
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, move_site

Cost = Float[np.ndarray, "frame moved"]
Plan = Float[np.ndarray, "frame moved"]

# Iterations of Sinkhorn's algorithm, and the error of the marginals (Euclidean, of a mass of one) at which it stops.
# What is left of it does not reach the maps, whose rows are normalised.
ITERATIONS = 300
TOLERANCE = 1e-5


@dataclass(frozen=True)
class OTFusion(PairwiseDataMethod):
    """Moves every model's units onto the reference's by the cheapest transport between them.

    The units of a space are two uniform distributions of mass one; T is the plan that moves one onto the other at the
    least cost. A unit of the frame is the mean of what arrives there, and a moved unit is read back as the mean of
    where it went: `into` is diag(1/μ) T and `back` is diag(1/ν) Tᵀ, with T [frame, moved], μ the frame's and ν the
    moved model's mass of a unit. With hard coupling and equal widths T is a permutation over n, and the transform is
    returned as that permutation. Models may be of several widths: the frame has the first one's.

    By weights, spaces are treated in the order of the graph: the cost of a pair is the squared distance of all that
    produces the two units (weights, biases, gains and shifts) after the spaces before were moved; tensors that
    depend on a space that was not moved yet count from the second pass on. By activations, the cost is the mean
    squared difference on the data. Families of nested spaces get the permutation that is best by the same cost, or, by
    weights, weight matching's permutation.

    Attributes:
        by: `"activations"` or `"weights"`.
        coupling: `"hard"`, the exact plan (EMD), or `"soft"`, the entropic one (Sinkhorn).
        regularisation: Strength of the entropy as a share of the mean cost; for `"soft"`.
        passes: By weights: how often all spaces are treated.
        reference: As of every pairwise method; the medoid is the model with the smallest summed cost. Models of
            several widths are moved to the first.

    Source: Singh, Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, Algorithm 1. The paper's consumers read
        T diag(1/μ) as this project reads the text, which for equal widths is the same; for others it would scale what
        they receive by the ratio of the widths, so that a network is not recovered from one whose units were doubled.
        Uncertain: whether the paper's cost includes biases. Further passes are this project's own.
    """

    by: str = "activations"
    coupling: str = "hard"
    regularisation: float = 0.01
    passes: int = 2

    name: ClassVar[str] = "ot_fusion"
    exact: ClassVar[bool] = False
    resizes: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Nothing but the weights, or batches; with targets if the reference is the best model."""
        return super().needs if self.by == "activations" or self.reference == "best" else ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("activations", "weights"):
            raise InputError(f"by={self.by!r}: use 'activations' or 'weights'")
        if self.coupling not in ("hard", "soft"):
            raise InputError(f"coupling={self.coupling!r}: use 'hard' or 'soft'")
        if not (math.isfinite(self.regularisation) and self.regularisation > 0):
            raise InputError(f"regularisation={self.regularisation}: give a positive number, such as 0.01")
        if self.passes < 1:
            raise InputError(f"passes={self.passes}: give at least 1")

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment of every model to the reference; its objective is the negative cost of transport.

        Families of nested spaces do not count in it.

        Raises:
            DataError: By activations: no data, or data that cannot be read.
            InputError: Models of several widths and another reference than the first, or nested spaces by weights.
            SymmetryError: By activations: a space can be read nowhere in the graph.
        """
        if problem.symmetries and self.reference != "first":
            raise InputError(f"reference={self.reference!r}: models of several widths are moved to the first")
        return replace(super().__call__(problem), symmetries=tuple(problem.symmetries))

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The plans of all spaces; the objective is the negative cost of transport."""
        return (self._by_activations if self.by == "activations" else self._by_weights)(problem, fixed, moved)

    def _by_activations(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        symmetry = problem.symmetry
        result = Transport(self)
        for root in roots_of(symmetry):
            costs = {s.name: _activation_cost(problem, s, self.at, fixed, moved) for s in _leaves(symmetry, root)}
            if _stands_alone(symmetry, root):
                result.move(root, costs[root.name])
            else:
                result.permute(symmetry, root, {name: -cost for name, cost in costs.items()})
        return result.pair()

    def _by_weights(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        symmetry = problem.symmetry
        nested = [space for space in roots_of(symmetry) if not _stands_alone(symmetry, space)]
        if nested and problem.symmetries:
            raise InputError(
                f"space {nested[0].name} holds nested spaces: models of several widths with such are moved "
                "by='activations' only"
            )
        weights = ProducerWeights.of(problem, fixed, moved)
        objective = None
        if nested:
            objective = WeightObjective(symmetry, problem.states[fixed], problem.states[moved], problem.parameters)
        result = Transport(self)
        for _ in range(self.passes):
            result.restart()
            for root in roots_of(symmetry):
                if _stands_alone(symmetry, root):
                    result.move(root, weights.cost(root, result.transforms))
                elif objective is not None:
                    result.transforms |= _match_by_weights(objective, root, result.transforms)
        return result.pair()


@dataclass(eq=False)
class Transport:
    """What has been moved so far, and at what cost."""

    options: OTFusion
    transforms: dict[str, Transform] = field(default_factory=dict)
    cost: float = 0.0
    converged: bool = True

    def restart(self) -> None:
        """Forgets the costs, for another pass over all spaces."""
        self.cost, self.converged = 0.0, True

    def move(self, space: Space, cost: Cost) -> None:
        """Solves one space that stands alone."""
        if self.options.coupling == "hard":
            plan, converged = _exact_plan(cost), True
        else:
            plan, converged = _entropic_plan(cost, self.options.regularisation)
        self.transforms[space.name] = _transform_of(plan)
        self.cost += float((plan * cost).sum())
        self.converged &= converged

    def permute(self, symmetry: Symmetry, root: Space, similarities: Mapping[str, Cost]) -> None:
        """Solves a family of nested spaces."""
        solved = solve_family(symmetry, root, similarities)
        self.transforms |= {name: Permutation(indices) for name, indices in solved.items()}

    def pair(self) -> Pair:
        """The result."""
        return Pair(dict(self.transforms), -self.cost, None, self.converged, {"cost": self.cost})


def _stands_alone(symmetry: Symmetry, space: Space) -> bool:
    """Whether a space is nested in no other and holds none."""
    return space.parent is None and space.copies == 1 and not symmetry.children(space)


def _leaves(symmetry: Symmetry, root: Space) -> list[Space]:
    """The innermost spaces of a family."""
    return [space for space in family_of(symmetry, root) if not symmetry.children(space)]


def _activation_cost(problem: MatchingProblem, space: Space, at: str, fixed: int, moved: int) -> Cost:
    """Mean squared difference of every unit of one model and every unit of another."""
    if problem.symmetries:
        joint = problem.joint_moments(at)
        if space.name not in joint:
            raise SymmetryError(f"no activations stand for space {space.name}: use by='weights'")
        read = joint[space.name]
    else:
        read = problem.moments(at)[space.name]
    means = read.mean[fixed][:, None] - read.mean[moved][None, :]
    own, other = (read.between(model, model).diagonal() for model in (fixed, moved))
    squares = own[:, None] + other[None, :] - 2 * read.between(fixed, moved) + means.square()
    return squares.clamp_min(0).numpy()


def _match_by_weights(
    objective: WeightObjective, root: Space, transforms: Mapping[str, Transform]
) -> dict[str, Transform]:
    """The permutations of a family of nested spaces by weight matching; soft maps are rounded to permutations."""
    symmetry = objective.symmetry
    current = identity_transforms(symmetry)
    for name, transform in transforms.items():
        if isinstance(transform, LinearMap):
            transform = Permutation(solve_lap(transform.into[0].double().numpy()))
        current[name] = transform
    for space in roots_of(symmetry):
        objective.moved_by(space)
    improve_family(objective, root, current)
    return {space.name: current[space.name] for space in family_of(symmetry, root)}


@dataclass(frozen=True, eq=False)
class ProducerWeights:
    """What produces the units of every space, in two models.

    Attributes:
        fixed: The tensors of the model in whose frame the other is compared, by name.
        moved: The other's.
        places: For every tensor, the spaces that touch it and where, in each of the two models.
    """

    fixed: State
    moved: State
    places: Mapping[str, list[tuple[Space, Site, Site]]]

    @staticmethod
    def of(problem: MatchingProblem, fixed: int, moved: int) -> "ProducerWeights":
        """The trained tensors of two models that some space touches, in float64."""
        both = (problem.own_symmetry(fixed).sites, problem.own_symmetry(moved).sites)
        places = {
            name: [(space, a, b) for (space, a), (_, b) in zip(sites, both[1][name], strict=True)]
            for name, sites in both[0].items()
        }
        names = problem.parameters & places.keys()
        states = [{name: problem.states[index][name].double().cpu() for name in names} for index in (fixed, moved)]
        return ProducerWeights(states[0], states[1], places)

    def cost(self, space: Space, transforms: Mapping[str, Transform]) -> Cost:
        """Squared distance of what produces every unit of the fixed and of the moved model.

        Tensors that also depend on spaces that were not moved yet are left out, unless there are no others.
        """
        produced = [
            (name, number)
            for name, sites in self.places.items()
            for number, (other, site, _) in enumerate(sites)
            if name in self.fixed and other.name == space.name and site.role == "vector"
        ]
        known = [
            (name, number)
            for name, number in produced
            if all(other.name in transforms for k, (other, _, _) in enumerate(self.places[name]) if k != number)
        ]
        total: Tensor | None = None
        for name, number in known or produced:
            added = self._squares(name, number, transforms)
            total = added if total is None else total + added
        if total is None:
            raise InputError(f"no trained tensor produces space {space.name}: use by='activations'")
        return total.numpy()

    def _squares(self, name: str, number: int, transforms: Mapping[str, Transform]) -> Tensor:
        sites = self.places[name]
        tensor = self.moved[name]
        for k, (other, _, place) in enumerate(sites):
            if k != number and other.name in transforms:
                tensor = move_site(tensor, place, transforms[other.name])
        _, here, there = sites[number]
        a, b = site_rows(self.fixed[name], here), site_rows(tensor, there)
        if a.shape[1] != b.shape[1]:
            raise InputError(f"{name} depends on spaces of several widths in a circle: use by='activations'")
        squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :] - 2 * a @ b.T
        return squares.clamp_min(0)


def _exact_plan(cost: Cost) -> Plan:
    """The cheapest transport between two uniform distributions of mass one.

    The masses are given as whole numbers, in which the solver's arithmetic is exact.

    Raises:
        InputError: The solver failed, which infinite or NaN costs make it do.
    """
    import ot  # takes a second, which only those pay who transport

    frame, moved = cost.shape
    shared = math.gcd(frame, moved)
    masses = np.full(frame, moved / shared), np.full(moved, frame / shared)
    plan, told = ot.emd(*masses, np.ascontiguousarray(cost), numItermax=10_000_000, log=True)
    if told["warning"]:
        raise InputError(f"optimal transport of {frame} × {moved} units failed: {told['warning']}")
    return plan / (frame * moved / shared)


def _entropic_plan(cost: Cost, regularisation: float) -> tuple[Plan, bool]:
    """The transport of least cost minus entropy, and whether Sinkhorn's algorithm converged.

    Raises:
        InputError: The regularisation is so small that numbers underflow.
    """
    import ot  # takes a second, which only those pay who transport

    frame, moved = cost.shape
    masses = np.full(frame, 1 / frame), np.full(moved, 1 / moved)
    mean = float(cost.mean())
    if mean == 0:
        return np.outer(*masses), True
    with np.errstate(all="ignore"):  # the plan is checked below; potentials outside of the logarithm are not used
        plan, told = ot.bregman.sinkhorn_log(
            *masses, cost, regularisation * mean, numItermax=ITERATIONS, stopThr=TOLERANCE, log=True, warn=False
        )
    if not np.isfinite(plan).all() or not (plan.sum(axis=0).all() and plan.sum(axis=1).all()):
        raise InputError(f"regularisation={regularisation}: too small for these costs, give more")
    return plan, bool(told["err"] and told["err"][-1] < TOLERANCE)


def _transform_of(plan: Plan) -> Transform:
    """The barycentric maps of a plan; a permutation where it is one."""
    frame, moved = plan.shape
    if frame == moved and ((plan > 0).sum(axis=0) == 1).all() and ((plan > 0).sum(axis=1) == 1).all():
        return Permutation(plan.argmax(axis=1))
    into = plan / plan.sum(axis=1, keepdims=True)
    back = plan.T / plan.sum(axis=0)[:, None]
    return LinearMap(torch.from_numpy(into), torch.from_numpy(back))
