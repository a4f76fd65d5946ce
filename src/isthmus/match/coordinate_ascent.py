"""Coordinate ascent on the inner product of weights: one family of spaces at a time, until nothing improves.

The engine of weight matching, and of the methods that start or end with it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from isthmus.match.assignment import solve_laps
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.nested import family_of, paired_value, solve_family
from isthmus.match.pairwise import Pair, all_to_one
from isthmus.match.weight_objective import Spectra, WeightObjective
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, Transform, compose, move_state

# A step counts as progress if it raises the objective by more than this share of it; less is float32 rounding.
LEAST_RISE = 1e-6


def coordinate_ascent(
    objective: WeightObjective,
    start: Mapping[str, Transform],
    max_sweeps: int,
    rng: np.random.Generator,
    improve: Callable[[WeightObjective, Space, dict[str, Transform]], bool] | None = None,
) -> tuple[dict[str, Transform], bool]:
    """Coordinate ascent from a start, families in random order; the transforms, and whether it ended by itself.

    Args:
        objective: What is to rise.
        start: Where to start.
        max_sweeps: How often to go through all families at most.
        rng: Draws their order.
        improve: One step in a family of nested spaces, given its root; changes the transforms and returns True if the
            objective rose. `improve_family`, which permutes, if left out.
    """
    improve = improve or improve_family
    transforms = dict(start)
    roots = objective.families()
    for root in roots:
        objective.moved_by(root)
    stamps: dict[str, tuple[int, ...]] = {}
    for _ in range(max_sweeps):
        improved = False
        for index in rng.permutation(len(roots)):
            root = roots[index]
            stamp = objective.stamp(root)
            if stamps.get(root.name) == stamp:
                continue
            stamps[root.name] = stamp
            if improve(objective, root, transforms):
                objective.moved_by(root)
                improved = True
        if not improved:
            return transforms, True
    return transforms, False


def best_of_starts(
    objective: WeightObjective, restarts: int, max_sweeps: int, seed: int
) -> tuple[dict[str, Transform], bool, list[float]]:
    """The best permutations over several starts, whether that start converged, and the objective of each."""
    found: list[tuple[float, dict[str, Transform], bool]] = []
    for restart in range(restarts):
        rng = np.random.default_rng([seed, restart])
        if restart == 0:
            start = identity_transforms(objective.symmetry)
        elif restart == 1:
            start = _forward_start(objective)
        else:
            start = _random_start(objective.symmetry, rng)
        transforms, converged = coordinate_ascent(objective, start, max_sweeps, rng)
        found.append((objective.value(transforms), transforms, converged))
    best = max(found, key=lambda item: item[0])
    return best[1], best[2], [value for value, _, _ in found]


def _random_start(symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Transform]:
    """A random permutation for every space."""
    return {space.name: Permutation.random(space, rng) for space in symmetry}


def _forward_start(objective: WeightObjective) -> dict[str, Transform]:
    """Permutations from one pass in graph order, in which only tensors between solved spaces are trusted."""
    transforms = identity_transforms(objective.symmetry)
    solved: frozenset[str] = frozenset()
    for root in objective.families():
        family = family_of(objective.symmetry, root)
        similarities = {space.name: objective.similarity(space, transforms, solved) for space in family}
        indices = solve_family(objective.symmetry, root, similarities)
        transforms |= {name: Permutation(rows) for name, rows in indices.items()}
        objective.moved_by(root)
        solved |= {root.name}
    return transforms


def improve_family(objective: WeightObjective, root: Space, transforms: dict[str, Transform]) -> bool:
    """One step in a family of nested spaces; changes `transforms` and returns True if the objective rose."""
    symmetry = objective.symmetry
    family = family_of(symmetry, root)
    similarities = {space.name: objective.similarity(space, transforms) for space in family}
    indices = solve_family(symmetry, root, similarities)
    proposed = dict(transforms) | {name: Permutation(rows) for name, rows in indices.items()}
    if not objective.is_coupled(root):
        before = paired_value(symmetry, root, similarities, transforms)
        after = paired_value(symmetry, root, similarities, proposed)
        accepted = after - before > LEAST_RISE * max(abs(before), abs(after))
        if accepted:
            transforms |= proposed
        return accepted
    return _improve_coupled(objective, root, transforms, proposed)


def _improve_coupled(
    objective: WeightObjective, root: Space, transforms: dict[str, Transform], proposed: dict[str, Transform]
) -> bool:
    """As `improve_family` where the objective is not linear in the family: steps are taken only if it truly rises."""
    before = objective.value(transforms, root)
    best, value = transforms, before
    for candidate in (proposed, dict(transforms)):
        for space in family_of(objective.symmetry, root):
            inner = solve_laps(objective.inner_similarity(space, candidate))
            trial = {**candidate, space.name: Permutation(inner)}
            if objective.value(trial, root) > objective.value(candidate, root):
                candidate = trial
        reached = objective.value(candidate, root)
        if reached > value:
            best, value = candidate, reached
    if value - before > LEAST_RISE * max(abs(before), abs(value)):
        transforms.update(best)
        return True
    return False


def pair_by_weights(problem: MatchingProblem, fixed: int, moved: int, restarts: int = 3, max_sweeps: int = 100) -> Pair:
    """The permutations that move one model (its number) into the frame of another, the best of several starts."""
    objective = WeightObjective(problem.symmetry, problem.states[fixed], problem.states[moved], problem.parameters)
    seed = seed_of_pair(problem, fixed, moved)
    best, converged, values = best_of_starts(objective, restarts, max_sweeps, seed)
    return Pair(best, max(values), converged=converged, details={"restarts": values})


def seed_of_pair(problem: MatchingProblem, fixed: int, moved: int) -> int:
    """A seed of its own for each model that moves."""
    return problem.seed + (moved - 1 if moved > fixed else moved)


def match_by_weights(
    problem: MatchingProblem,
    restarts: int = 3,
    max_sweeps: int = 100,
    many: str = "merge_many",
    reference: str = "first",
) -> Alignment:
    """Weight matching of all models; the objective is the inner product of the moved weights, summed over all pairs.

    Args:
        problem: The models.
        restarts: How many starts each pair gets.
        max_sweeps: Sweeps over all spaces, and rounds over all models, before it is given up as not converged.
        many: Three and more models: `"merge_many"` goes on, once each is matched to the first, by matching each in
            turn to the mean of the others; `"all_to_one"` does not.
        reference: What all are matched to, as in `all_to_one`.

    Raises:
        DataError: The best model is the reference, and there is no labelled data.
    """
    symmetry = problem.symmetry
    match_pair = partial(pair_by_weights, problem, restarts=restarts, max_sweeps=max_sweeps)
    matched = all_to_one(problem, "weight_matching", match_pair, reference)
    transforms, converged = [dict(each) for each in matched.transforms], matched.converged
    pairs: Any = matched.details["pairs"]
    rounds = 0
    if many == "merge_many" and len(transforms) > 2:
        transforms, rounds, done = merge_many(problem, transforms, max_sweeps)
        converged &= done
    value, bound = total_value(problem, transforms)
    details = {
        "reference": matched.details["reference"],
        "restarts": [pair["restarts"] for pair in pairs],
        "rounds": rounds,
    }
    found = Alignment(symmetry, tuple(transforms), matched.method, value, bound, converged, details=details)
    return found.rebased(0) if rounds else found


def merge_many(
    problem: MatchingProblem, transforms: Sequence[dict[str, Transform]], max_rounds: int
) -> tuple[list[dict[str, Transform]], int, bool]:
    """Matches each model in turn to the mean of the others, until the summed inner product stops rising.

    Returns:
        The transforms, the number of rounds, and whether it converged.
    """
    symmetry, parameters = problem.symmetry, problem.parameters
    rng = np.random.default_rng([problem.seed, len(transforms)])
    transforms = list(transforms)
    moved = [move_state(state, t, symmetry) for state, t in zip(problem.states, transforms, strict=True)]
    for rounds in range(1, max_rounds + 1):
        improved = False
        for index in rng.permutation(len(moved)):
            mean = _mean_of([state for other, state in enumerate(moved) if other != index], parameters)
            objective = WeightObjective(symmetry, mean, moved[index], parameters)
            start = identity_transforms(symmetry)
            step, _ = coordinate_ascent(objective, start, max_rounds, rng)
            before, after = objective.value(start), objective.value(step)
            if after - before > LEAST_RISE * max(abs(before), abs(after)):
                transforms[index] = compose(step, transforms[index], symmetry)
                moved[index] = move_state(problem.states[index], transforms[index], symmetry)
                improved = True
        if not improved:
            return transforms, rounds, True
    return transforms, max_rounds, False


def _mean_of(states: Sequence[State], parameters: frozenset[str]) -> State:
    """The mean of the trained tensors of several states."""
    return {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in parameters}


def total_value(problem: MatchingProblem, transforms: Sequence[dict[str, Transform]]) -> tuple[float, float]:
    """The objective and its upper bound, summed over all pairs of models."""
    value = bound = 0.0
    states = problem.states
    spectra: dict[int, Spectra] = {}
    for first in range(len(states)):
        fixed = move_state(states[first], transforms[first], problem.symmetry)
        for second in range(first + 1, len(states)):
            objective = WeightObjective(problem.symmetry, fixed, states[second], problem.parameters)
            for index in (first, second):
                if index not in spectra:
                    spectra[index] = objective.spectra(states[index])
            value += objective.value(transforms[second])
            bound += objective.upper_bound(spectra[first], spectra[second])
    return value, bound
