"""Cycle-consistent multi-model matching: all models and spaces at once, by Frank-Wolfe on averages of permutations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from isthmus.errors import InputError
from isthmus.match.base import Match, MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import coordinate_ascent, match_by_weights, merge_many, total_value
from isthmus.match.nested import family_of
from isthmus.match.relaxed_objective import Point, RelaxedObjective, mix
from isthmus.match.weight_objective import WeightObjective
from isthmus.progress import progress
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.transform import Transform

# Steps of Frank-Wolfe from one start, at a budget of 1; as many again for each model that is matched to model 0 first.
STEPS = 50
# Frank-Wolfe has converged when no point can promise, to first order, a rise by more than this share of the objective.
GAP = 1e-4
# Sweeps of one coordinate ascent, and rounds over all models, as in weight matching.
SWEEPS = 100

FRAMES = ("first", "universe")


@dataclass(frozen=True)
class C2M3(Match):
    """Maximises Σ_{p<q} Σ_W ⟨π_p(W_p), π_q(W_q)⟩ over one permutation a model and space into a common universe.

    Going round any cycle of models is the identity by construction. Permutations are relaxed to doubly stochastic
    matrices, and all of them move at once: the gradient of every model and space is a linear assignment problem, whose
    solutions are the corner that a step heads for. Along a step the objective is a polynomial whose maximum is found
    exactly. At the end each matrix is projected to the permutation nearest to it. Nested spaces are relaxed as whole
    families; a family whose places interlock, as in grouped convolutions in a row, is held where weight matching puts
    it, until the polish.

    Each restart starts elsewhere: the first where the models are, the second at the mean of all permutations, all later
    ones halfway between that mean and random permutations. Of three and more models, each is first matched to model 0
    in the same way, as a pair, and the search over all goes on from there. The best restart is kept.

    Attributes:
        restarts: How many starts to try.
        budget: Multiplies the number of steps that a start may take.
        pinned: Hold model 0 still while the others move. Whatever moves all models alike changes nothing, so no optimum
            is lost. False moves all models from the start on, as the paper does; none are matched as pairs first.
        polish: Go on from the projected permutations by the coordinate ascent of weight matching, and keep weight
            matching's own result, from where the models are, if it is better.
        frame: The common frame: `"first"`, model 0's own, or `"universe"`, where the search ended.

    Source: Crisostomi, Fumero, Baieri, Bernard, Rodolà, C²M³: Cycle-Consistent Multi-Model Merging, NeurIPS 2024. The
        pinned model, the pairs first, the polish, the stopping rule and the treatment of nested spaces are this
        project's own; in the authors' code all models move from one common start, and the step size is searched
        numerically, with up to 20 evaluations.
    """

    restarts: int = 2
    budget: float = 1.0
    pinned: bool = True
    polish: bool = True
    frame: str = "first"

    name: ClassVar[str] = "c2m3"
    exact: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InputError(f"restarts={self.restarts}: give at least 1")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise InputError(f"budget={self.budget}: give a positive number; 1 is the default number of steps")
        if self.frame not in FRAMES:
            raise InputError(f"frame={self.frame!r}: use one of {', '.join(FRAMES)}")

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights, summed over pairs of models."""
        symmetry, count = problem.symmetry, len(problem.models)
        best = [identity_transforms(symmetry) for _ in range(count)]
        if count < 2 or not len(symmetry):
            value, bound = total_value(problem, best)
            return Alignment(symmetry, tuple(best), self.name, value, bound, details={"starts": []})
        moving = range(1 if self.pinned else 0, count)
        relaxed = RelaxedObjective(symmetry, problem.states, problem.parameters, best, moving)
        rival = None
        if self.polish or relaxed.held:
            rival = match_by_weights(problem, restarts=1, max_sweeps=SWEEPS)
        if relaxed.held and rival is not None:
            held = [space.name for root in relaxed.held for space in family_of(symmetry, root)]
            best = [own | {name: t[name] for name in held} for own, t in zip(best, rival.transforms, strict=True)]
            relaxed = RelaxedObjective(symmetry, problem.states, problem.parameters, best, moving)
        tried: list[dict[str, Any]] = []
        found: list[tuple[float, list[dict[str, Transform]], bool]] = []
        for restart in progress(range(self.restarts), "c2m3"):
            transforms, told = self.search(relaxed, problem.seed, restart)
            converged = told["converged"]
            told["projected"] = value = total_value(problem, transforms)[0]
            if self.polish:
                transforms, done = _polish(problem, transforms, restart)
                converged &= done
                told["polished"] = value = total_value(problem, transforms)[0]
            tried.append(told)
            found.append((value, transforms, converged))
        if self.polish and rival is not None and rival.objective is not None:
            tried.append({"start": "weight matching", "polished": rival.objective})
            found.append((rival.objective, [dict(each) for each in rival.transforms], rival.converged))
        values = [value for value, _, _ in found]
        _, best, converged = found[values.index(max(values))]
        value, bound = total_value(problem, best)
        alignment = Alignment(
            symmetry,
            tuple(best),
            method=self.name,
            objective=value,
            upper_bound=bound,
            converged=converged,
            details={
                "starts": tried,
                "best_start": values.index(max(values)),
                "evaluations_per_step": relaxed.evaluations,
                "gap": bound - value,
                "held": [space.name for space in relaxed.held],
            },
        )
        return alignment.rebased(0) if self.frame == "first" else alignment

    def search(
        self, relaxed: RelaxedObjective, seed: int, restart: int
    ) -> tuple[list[dict[str, Transform]], dict[str, Any]]:
        """Frank-Wolfe from one start: the projected permutations of every model, and what happened on the way."""
        points, start = _starting_points(relaxed, seed, restart)
        limit = max(1, round(STEPS * self.budget))
        pair_steps = []
        if self.pinned and len(points) > 2:
            for index in relaxed.moving:
                pair = relaxed.pair(0, index)
                (_, points[index]), taken, _, _ = _frank_wolfe(pair, [points[0], points[index]], limit)
                pair_steps.append(taken)
        points, steps, value, gap = _frank_wolfe(relaxed, points, limit)
        transforms = []
        for index, own in enumerate(relaxed.transforms):
            nearest = relaxed.oracle({name: m.numpy() for name, m in points[index].items()})
            transforms.append(dict(own) | (nearest if index in relaxed.moving else {}))
        return transforms, {
            "start": start,
            "pair_steps": pair_steps,
            "steps": steps,
            "relaxed": value,
            "relaxed_gap": gap,
            "converged": gap <= GAP * abs(value),
        }


def _starting_points(relaxed: RelaxedObjective, seed: int, restart: int) -> tuple[list[Point], str]:
    """One point a model, and what the start is called; models that do not move are at the identity."""
    points = [relaxed.point(relaxed.vertex(transforms)) for transforms in relaxed.transforms]
    if restart == 0:
        return points, "identity"
    rng = np.random.default_rng([seed, restart])
    # If every model started at the mean, all gradients would be alike: model 0 stays where it is.
    for point in points[1:]:
        draw = _random_point(relaxed, rng) if restart > 1 else None
        for name, matrix in point.items():
            mean = torch.full_like(matrix, 1 / len(matrix))
            point[name] = mean if draw is None else (mean + draw[name]) / 2
    return points, "mean" if restart == 1 else "random"


def _random_point(relaxed: RelaxedObjective, rng: np.random.Generator) -> Point:
    """A random permutation of every relaxed family."""
    noise = {space.name: rng.standard_normal((space.copies * space.size,) * 2) for space in relaxed.spaces}
    return relaxed.point(relaxed.vertex(relaxed.oracle(noise)))


def _frank_wolfe(
    relaxed: RelaxedObjective, points: Sequence[Point], steps: int
) -> tuple[list[Point], int, float, float]:
    """Climbs from relaxed points; the objective never falls.

    Returns:
        The points reached, the number of steps taken, and at these points the objective and the Frank-Wolfe gap
        max_V ⟨∇F, V − X⟩, which is 0 at a stationary point.
    """
    points = list(points)
    for step in range(steps + 1):
        moved = relaxed.at(points)
        gradients = relaxed.gradient(moved)
        vertices = [relaxed.vertex(relaxed.oracle(g)) if i in relaxed.moving else {} for i, g in enumerate(gradients)]
        coefficients = relaxed.along(moved, points, vertices)
        value, gap = float(coefficients[0]), float(coefficients[1]) if len(coefficients) > 1 else 0.0
        t = _highest(coefficients)
        if gap <= GAP * abs(value) or t == 0 or step == steps:
            return points, step, value, max(gap, 0.0)
        for index in relaxed.moving:
            points[index] = {name: mix(m, vertices[index][name], t) for name, m in points[index].items()}
    raise AssertionError("unreachable")


def _highest(coefficients: Float[np.ndarray, " coefficients"]) -> float:
    """Where in [0, 1] a polynomial, its coefficients lowest first, is largest; the first such place."""
    polynomial = np.polynomial.Polynomial(coefficients)
    slope = polynomial.deriv().trim(float(np.abs(coefficients).max()) * 1e-14)  # roots divide by the last coefficient
    inside = [float(root.real) for root in slope.roots() if 0 < root.real < 1]
    places = np.array([0.0, *sorted(inside), 1.0])
    return float(places[np.argmax(polynomial(places))])


def _polish(
    problem: MatchingProblem, transforms: Sequence[dict[str, Transform]], restart: int
) -> tuple[list[dict[str, Transform]], bool]:
    """Coordinate ascent from permutations of every model, and whether it ended by itself."""
    if len(transforms) > 2:
        polished, _, converged = merge_many(problem, transforms, SWEEPS)
        return polished, converged
    own = Alignment(problem.symmetry, tuple(transforms)).rebased(0).transforms[1]
    objective = WeightObjective(problem.symmetry, problem.states[0], problem.states[1], problem.parameters)
    rng = np.random.default_rng([problem.seed, restart])
    moved, converged = coordinate_ascent(objective, own, SWEEPS, rng)
    return [identity_transforms(problem.symmetry), moved], converged
