"""Orthogonal weight matching: weight matching in which every space undergoes what its group allows."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import InputError
from isthmus.match.assignment import assignment_value, solve_lap, solve_laps
from isthmus.match.base import MatchingProblem, identity_transforms
from isthmus.match.coordinate_ascent import best_of_starts, coordinate_ascent, match_by_weights, seed_of_pair
from isthmus.match.nested import Similarity, as_blocks, assignment_values, family_of, roots_of
from isthmus.match.pairwise import Pair, PairwiseMethod, all_to_one
from isthmus.match.weight_objective import WeightObjective, site_rows
from isthmus.state import State
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.groups import nearest_element
from isthmus.symmetry.spaces import Group, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, compose, flat_indices, move_state

# A step counts as progress if it raises the objective by more than this share of it; less is float64 rounding of sums
# over 10⁸ weights.
LEAST_RISE = 1e-9

# Directions in which a model's weights are smaller than this share of the largest are not stretched any further.
FLATTEST = 1e-6

STARTS = ("weights", "activations")


@dataclass(frozen=True)
class OrthogonalMatching(PairwiseMethod):
    """Maximises Σ_W ⟨W^A, T(W^B)⟩ by coordinate ascent, each space's map taken from the group that it allows.

    A space that allows permutations only is an assignment problem, as in weight matching; rotations are Procrustes'
    problem, U Vᵀ of the similarity's singular value decomposition; rotations that keep the ones vector the same in the
    vectors that sum to zero. Attention heads are permuted by the value of the best rotation of what each holds. The
    ascent starts at weight matching's permutations, and once more from the input on, trusting only what is matched
    already; the better end is kept, and is at least as high as weight matching's. With `start="activations"` it starts
    where the activations' covariances put every space, each in its group, and there alone; with `max_sweeps=0` it stays
    there. Norms' gains are folded into their consumers first, so that every moved model keeps its function. Where no
    space allows more than permutations, the result from weights is weight matching's.

    Spaces that allow any invertible map are rotated too: under such maps the inner product has no maximum. With
    `invertible`, every model's basis of such a space is first made the one of smallest weights, in which what writes
    into the space and what reads from it have the same second moments; this leaves a rotation to be matched.

    Attributes:
        start: `"weights"`, or `"activations"`, as consumers receive them, which needs data.
        restarts: How many starts weight matching tries.
        max_sweeps: Sweeps over all spaces before a start is given up as not converged; 0 stays at the activations'
            maps.
        invertible: Whether to balance the bases of spaces that allow invertible maps, for which all models move.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, for the descent; Schönemann, Psychometrika 1966, for
        a rotation; Ashkboos et al., SliceGPT, ICLR 2024, for the rotations that a residual stream allows. Joined as
        here, they are this project's own.
    """

    start: str = "weights"
    restarts: int = 3
    max_sweeps: int = 100
    invertible: bool = False

    name: ClassVar[str] = "orthogonal_matching"
    exact: ClassVar[bool] = False
    joint: ClassVar[bool] = True  # where all spaces are permuted, it is weight matching

    @property
    def needs(self) -> str:
        """Nothing but the weights; batches for a start at activations; labels if the reference is the best model."""
        return super().needs or ("data" if self.start == "activations" else "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise InputError(f"start={self.start!r}: use 'weights' or 'activations'")
        if self.restarts < 1 or self.max_sweeps < (0 if self.start == "activations" else 1):
            raise InputError(
                f"restarts={self.restarts}, max_sweeps={self.max_sweeps}: both must be at least 1; "
                "max_sweeps=0 is for start='activations'"
            )

    def __call__(self, problem: MatchingProblem) -> Alignment:
        """The alignment; its objective is the inner product of the moved weights, summed over models and reference.

        Raises:
            DataError: A start at activations without data, or with data that cannot be read.
            SymmetryError: A start at activations, and a space that can be read nowhere.
        """
        symmetry = problem.symmetry
        if self.start == "weights" and all(space.group is Group.PERMUTATION for space in symmetry):
            many = "merge_many" if self.reference == "first" else "all_to_one"
            found = match_by_weights(problem, self.restarts, self.max_sweeps, many, self.reference)
            return replace(found, method=self.name)
        if not self.invertible or all(space.group is not Group.INVERTIBLE for space in symmetry):
            return super().__call__(problem)
        states, parameters = problem.states, problem.parameters
        bases: list[Transforms] = [_balancing(state, symmetry, parameters) for state in states]
        models = [
            _holding(model, move_state(state, basis, symmetry))
            for model, state, basis in zip(problem.models, states, bases, strict=True)
        ]
        balanced = MatchingProblem(models, symmetry, problem.data, problem.seed)
        found = all_to_one(problem, self.name, partial(self.match_pair, balanced), self.reference)
        moves = zip(found.transforms, bases, strict=True)
        return replace(found, transforms=tuple(compose(match, basis, symmetry) for match, basis in moves))

    def match_pair(self, problem: MatchingProblem, fixed: int, moved: int) -> Pair:
        """The maps of one model; the objective is the inner product of the moved weights.

        Raises:
            DataError: A start at activations without data, or with data that cannot be read.
            SymmetryError: A start at activations, and a space that can be read nowhere.
        """
        names = problem.parameters - _gains_of(problem.symmetry)
        objective = WeightObjective(
            problem.symmetry, problem.states[fixed], problem.states[moved], names, torch.float64
        )
        seed = seed_of_pair(problem, fixed, moved)
        if self.start == "weights":
            return self._match(objective, seed)
        begin = _activation_start(problem, fixed, moved)
        # Each space's map from activations is the best of its group: without sweeps nothing is left to be done.
        transforms, converged = begin, True
        if self.max_sweeps:
            rng = np.random.default_rng(seed)
            transforms, converged = coordinate_ascent(objective, begin, self.max_sweeps, rng, _improve_family)
        starts = {"starts": [objective.value(transforms)], "activations": objective.value(begin)}
        return Pair(transforms, objective.value(transforms), converged=converged, details=starts)

    def _match(self, objective: WeightObjective, seed: int) -> Pair:
        """The maps that move the objective's moved model onto the fixed one."""
        permutations, _, values = best_of_starts(objective, self.restarts, self.max_sweeps, seed)
        ends: list[tuple[float, dict[str, Transform], bool]] = []
        for number, begin in enumerate((permutations, _forward_start(objective))):
            rng = np.random.default_rng([seed, self.restarts + number])
            transforms, converged = coordinate_ascent(objective, begin, self.max_sweeps, rng, _improve_family)
            ends.append((objective.value(transforms), transforms, converged))
        value, transforms, converged = max(ends, key=lambda end: end[0])
        details: dict[str, Any] = {"permutations": max(values), "starts": [end[0] for end in ends]}
        return Pair(transforms, value, converged=converged, details=details)


def _gains_of(symmetry: Symmetry) -> set[str]:
    """Names of the gains that are folded: they are all ones, and say nothing."""
    return {site.parameter for space in symmetry for site in space.sites if site.role == "diagonal"}


def _is_linear(space: Space) -> bool:
    """Whether a space allows more than permutations."""
    return space.group is not Group.PERMUTATION


def _forward_start(objective: WeightObjective) -> dict[str, Transform]:
    """Maps from one pass in graph order, in which only tensors between solved spaces are trusted."""
    transforms = identity_transforms(objective.symmetry)
    solved: frozenset[str] = frozenset()
    for root in objective.families():
        family = family_of(objective.symmetry, root)
        similarities = {space.name: objective.similarity(space, transforms, solved) for space in family}
        transforms |= _solve_family(objective.symmetry, root, similarities)
        solved |= {root.name}
        if objective.is_coupled(root) and _met_by(objective, root) <= solved:
            transforms |= _climb(objective, root, transforms)[1]
        objective.moved_by(root)
    return transforms


def _activation_start(problem: MatchingProblem, fixed: int, moved: int) -> dict[str, Transform]:
    """Of every space the map of its group that brings one model's activations nearest to another's, in least squares.

    Raises:
        DataError: There is no data, or it cannot be read.
        SymmetryError: A space can be read nowhere in the graph.
    """
    symmetry = problem.symmetry
    problem.require("data", "a start at activations")
    moments, transforms = problem.moments("post"), identity_transforms(symmetry)
    for root in roots_of(symmetry):
        similarities: dict[str, Similarity] = {}
        for space in family_of(symmetry, root):
            units = space.copies * space.size
            # What holds other units is as alike as they are; its own reading would count them twice.
            told = np.zeros((units, units)) if symmetry.children(space) else moments[space.name].between(fixed, moved)
            similarities[space.name] = np.asarray(told, dtype=np.float64)
        transforms |= _solve_family(symmetry, root, similarities)
    return transforms


def _holding(model: nn.Module, state: State) -> nn.Module:
    """A copy of the model with this state."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(dict(state))
    return copied


def _met_by(objective: WeightObjective, root: Space) -> set[str]:
    """Names of the root spaces that a family's similarities depend on."""
    return {
        objective.root[other.name]
        for space in family_of(objective.symmetry, root)
        for term in objective.terms[space.name]
        for other, _ in term.others
    }


def _improve_family(objective: WeightObjective, root: Space, transforms: dict[str, Transform]) -> bool:
    """One step in a family of nested spaces; changes `transforms` and returns True if the objective rose."""
    symmetry = objective.symmetry
    similarities = {space.name: objective.similarity(space, transforms) for space in family_of(symmetry, root)}
    proposed = {**transforms, **_solve_family(symmetry, root, similarities)}
    if objective.is_coupled(root):
        before = objective.value(transforms, root)
        reached, best = max(
            (_climb(objective, root, candidate) for candidate in (proposed, transforms)), key=lambda end: end[0]
        )
    else:
        before = _family_value(symmetry, root, similarities, transforms)
        reached, best = _family_value(symmetry, root, similarities, proposed), proposed
    if reached - before > LEAST_RISE * max(abs(before), abs(reached)):
        transforms.update(best)
        return True
    return False


def _climb(
    objective: WeightObjective, root: Space, start: Mapping[str, Transform]
) -> tuple[float, dict[str, Transform]]:
    """Steps of single spaces, where the objective is not linear in the family: each is taken only if it rises.

    From the outermost space inwards, and the other way round: a space that is solved early may fit to what is not
    solved yet. The higher end is kept.
    """
    family = family_of(objective.symmetry, root)
    ends = [_climb_along(objective, root, start, order) for order in (family, family[::-1])]
    return max(ends, key=lambda end: end[0])


def _climb_along(
    objective: WeightObjective, root: Space, start: Mapping[str, Transform], order: Sequence[Space]
) -> tuple[float, dict[str, Transform]]:
    """As `_climb`, in one order of the spaces."""
    candidate = dict(start)
    reached = objective.value(candidate, root)
    for space in order:
        inner = objective.inner_similarity(space, candidate)
        if _is_linear(space):
            step: Transform = _rotation(nearest_element(torch.from_numpy(inner), space.group)[0])
        else:
            step = Permutation(solve_laps(inner))
        trial = {**candidate, space.name: step}
        value = objective.value(trial, root)
        if value > reached:
            candidate, reached = trial, value
    return reached, candidate


def _rotation(into: Float[Tensor, "copies size size"]) -> LinearMap:
    """The orthogonal map with these matrices."""
    return LinearMap(into.contiguous(), into.transpose(1, 2).contiguous())


def _solve_family(symmetry: Symmetry, root: Space, similarities: Mapping[str, Similarity]) -> dict[str, Transform]:
    """The maps of a root space and of all spaces nested in it that maximise the total similarity, each in its group.

    Args:
        symmetry: All spaces.
        root: A space without a parent.
        similarities: For each space of the family, the similarity of its units in slots of the frame (rows) with units
            of the moved model (columns), over all copies.
    """
    family = family_of(symmetry, root)
    totals: dict[str, Similarity] = {}
    for space in reversed(family):
        totals[space.name] = np.array(similarities[space.name], dtype=np.float64)
        for child in symmetry.children(space):
            totals[space.name] += _block_values(totals[child.name], child)
    found: dict[str, Transform] = {}
    rows = {root.name: np.arange(root.copies)}
    for space in family:
        blocks = as_blocks(totals[space.name], space)
        facing = np.stack([blocks[copy, row] for copy, row in enumerate(rows[space.name])])
        if _is_linear(space):
            found[space.name] = _rotation(nearest_element(torch.from_numpy(facing), space.group)[0])
            continue
        indices = np.stack([solve_lap(block) for block in facing])
        found[space.name] = Permutation(indices)
        flat = (rows[space.name][:, None] * space.size + indices).ravel()
        rows |= {child.name: flat for child in symmetry.children(space)}
    return found


def _block_values(similarity: Similarity, space: Space) -> Float[np.ndarray, "copies copies"]:
    """The value of the best map between each pair of copies."""
    if not _is_linear(space):
        return assignment_values(similarity, space)
    blocks = torch.from_numpy(np.ascontiguousarray(as_blocks(similarity, space)))
    return nearest_element(blocks, space.group)[1].numpy()


def _family_value(
    symmetry: Symmetry, root: Space, similarities: Mapping[str, Similarity], transforms: Transforms
) -> float:
    """The objective's part that a family has, from its similarities: linear in each space's map."""
    total = 0.0
    for space in family_of(symmetry, root):
        transform, similarity = transforms[space.name], similarities[space.name]
        if isinstance(transform, Permutation):
            total += assignment_value(similarity, flat_indices(transforms, symmetry, space))
            continue
        rows = np.arange(space.copies)
        if space.parent is not None:
            rows = flat_indices(transforms, symmetry, symmetry[space.parent])
        facing = as_blocks(similarity, space)[np.arange(space.copies), rows]
        total += float((transform.into.numpy() * facing).sum())
    return total


def _balancing(state: State, symmetry: Symmetry, parameters: frozenset[str]) -> dict[str, Transform]:
    """For spaces that allow invertible maps, the basis in which a model's weights are smallest; nothing else moves.

    With second moments V of what moves by T and C of what moves by T⁻¹, that is T = G^½ with G V G = C, the geometric
    mean of V⁻¹ and C: both become T V T.

    Source: Pusz, Woronowicz, "Functional calculus for sesquilinear forms", Rep. Math. Phys. 1975 (the geometric mean).
    """
    found = identity_transforms(symmetry)
    for space in symmetry:
        if space.group is not Group.INVERTIBLE:
            continue
        moments = {role: torch.zeros(space.copies, space.size, space.size).double() for role in ("vector", "covector")}
        for site in space.sites:
            if site.parameter in parameters and site.role in moments:
                rows = site_rows(state[site.parameter].double().cpu(), site).reshape(space.copies, space.size, -1)
                moments[site.role] += rows @ rows.transpose(1, 2)
        root, inverse_root = _powers(moments["vector"])
        inner, _ = _powers(root @ moments["covector"] @ root)
        into, back = _powers(inverse_root @ inner @ inverse_root)
        found[space.name] = LinearMap(into, back)
    return found


def _powers(
    matrix: Float[Tensor, "copies size size"],
) -> tuple[Float[Tensor, "copies size size"], Float[Tensor, "copies size size"]]:
    """Square root and inverse square root of positive matrices, the smallest eigenvalues raised to `FLATTEST`."""
    values, vectors = torch.linalg.eigh((matrix + matrix.transpose(1, 2)) / 2)
    floor = FLATTEST * values[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    roots = torch.maximum(values, floor).sqrt()
    turned = vectors.transpose(1, 2)
    return vectors * roots[:, None] @ turned, vectors / roots[:, None] @ turned
