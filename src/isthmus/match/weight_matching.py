"""Weight matching: permutations that bring one model's weights as near as possible to another's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.assignment import solve_laps
from isthmus.errors import InputError
from isthmus.match.base import Problem, State, identity_transforms
from isthmus.match.families import family_of, paired_value, solve_family
from isthmus.match.many import Pair, all_to_one, check_reference
from isthmus.match.weight_objective import Spectra, WeightObjective, ascend
from isthmus.symmetry import Space, Symmetry
from isthmus.transform import Alignment, Permutation, Transform, compose, move_state

# A step counts as progress if it raises the objective by more than this share of it; less is float32 rounding.
GAIN = 1e-6


@dataclass(frozen=True)
class WeightMatching:
    """Maximises Σ_W ⟨W^A, π(W^B)⟩ by coordinate descent: one assignment problem a space, until nothing improves.

    Each restart starts elsewhere: the first where the models are, the second by matching space after space from the
    input on, trusting only what is matched already; all later ones at random permutations. The best one is kept. Spaces
    whose neighbours did not move since they were solved are not solved again.

    Attributes:
        restarts: How many starts to try.
        many: Three and more models: `"merge_many"` matches each in turn to the mean of the others until nothing
            improves, `"all_to_one"` matches each on its own to one reference.
        max_sweeps: Sweeps over all spaces before a start is given up as not converged.
        reference: With `"all_to_one"`, which model that is: `"first"`, `"best"` (the lowest loss on the data, which
            needs labels) or `"medoid"` (the largest summed objective with all others, which matches all pairs).

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, Algorithms 1 and 3. The restarts and the upper bound
        are this project's own.
    """

    restarts: int = 3
    many: str = "merge_many"
    max_sweeps: int = 100
    reference: str = "first"

    name: ClassVar[str] = "weight_matching"
    exact: ClassVar[bool] = True

    @property
    def needs(self) -> str:
        """Nothing but the weights; labels if the reference is the best model."""
        return "labels" if self.reference == "best" else ""

    def __post_init__(self) -> None:
        check_reference(self.reference)
        if self.restarts < 1 or self.max_sweeps < 1:
            raise InputError(f"restarts={self.restarts}, max_sweeps={self.max_sweeps}: both must be at least 1")
        if self.many not in ("merge_many", "all_to_one"):
            raise InputError(f"many={self.many!r}: use 'merge_many' or 'all_to_one'")
        if self.many == "merge_many" and self.reference != "first":
            raise InputError(f"reference={self.reference!r}: merge_many has none; use many='all_to_one' with it")

    def __call__(self, problem: Problem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights, summed over pairs of models."""
        start = time.perf_counter()
        symmetry, states = problem.symmetry, problem.states

        def match_pair(fixed: int, moved: int) -> Pair:
            objective = WeightObjective(symmetry, states[fixed], states[moved], problem.parameters)
            seed = problem.seed + (moved - 1 if moved > fixed else moved)  # its own for each model that moves
            best, done, values = best_of_starts(objective, self.restarts, self.max_sweeps, seed)
            return Pair(best, max(values), converged=done, details={"restarts": values})

        matched = all_to_one(problem, self.name, match_pair, self.reference)
        transforms, converged = [dict(each) for each in matched.transforms], matched.converged
        pairs: Any = matched.details["pairs"]
        rounds = 0
        if self.many == "merge_many" and len(states) > 2:
            transforms, rounds, done = merge_many(problem, transforms, self.max_sweeps)
            converged &= done
        value, bound = total_value(problem, transforms)
        alignment = Alignment(
            symmetry,
            tuple(transforms),
            method=self.name,
            objective=value,
            upper_bound=bound,
            converged=converged,
            details={
                "reference": matched.details["reference"],
                "restarts": [pair["restarts"] for pair in pairs],
                "rounds": rounds,
            },
        )
        alignment = alignment.rebased(0) if rounds else alignment
        return Alignment(**{**vars(alignment), "seconds": time.perf_counter() - start})


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
            start = forward_start(objective)
        else:
            start = random_start(objective.symmetry, rng)
        transforms, converged = descend(objective, start, max_sweeps, rng)
        found.append((objective.value(transforms), transforms, converged))
    best = max(found, key=lambda item: item[0])
    return best[1], best[2], [value for value, _, _ in found]


def random_start(symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Transform]:
    """A random permutation for every space."""
    return {space.name: Permutation.random(space, rng) for space in symmetry}


def forward_start(objective: WeightObjective) -> dict[str, Transform]:
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


def descend(
    objective: WeightObjective, start: dict[str, Transform], max_sweeps: int, rng: np.random.Generator
) -> tuple[dict[str, Transform], bool]:
    """Coordinate descent from a start, families in random order; the permutations, and whether it ended by itself."""
    return ascend(objective, start, max_sweeps, rng, improve_family)


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
        accepted = after - before > GAIN * max(abs(before), abs(after))
        if accepted:
            transforms |= proposed
        return accepted
    return improve_coupled(objective, root, transforms, proposed)


def improve_coupled(
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
    if value - before > GAIN * max(abs(before), abs(value)):
        transforms.update(best)
        return True
    return False


def merge_many(
    problem: Problem, transforms: Sequence[dict[str, Transform]], max_rounds: int
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
            mean = mean_of([state for other, state in enumerate(moved) if other != index], parameters)
            objective = WeightObjective(symmetry, mean, moved[index], parameters)
            start = identity_transforms(symmetry)
            step, _ = descend(objective, start, max_rounds, rng)
            before, after = objective.value(start), objective.value(step)
            if after - before > GAIN * max(abs(before), abs(after)):
                transforms[index] = compose(step, transforms[index], symmetry)
                moved[index] = move_state(problem.states[index], transforms[index], symmetry)
                improved = True
        if not improved:
            return transforms, rounds, True
    return transforms, max_rounds, False


def mean_of(states: Sequence[State], parameters: frozenset[str]) -> State:
    """The mean of the trained tensors of several states."""
    return {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in parameters}


def total_value(problem: Problem, transforms: Sequence[dict[str, Transform]]) -> tuple[float, float]:
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
