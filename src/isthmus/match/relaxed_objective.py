"""The objective of weight matching between any number of models, with permutations relaxed to their averages.

A relaxed point holds, for every moving model and space, a doubly stochastic matrix [slots, units] over the units of all
copies: an average of permutation matrices. Every tensor moves linearly with each such matrix, so the objective
Σ_{p<q} Σ_W ⟨W_p moved, W_q moved⟩ is a polynomial along every straight line of relaxed points, and equals the objective
of weight matching wherever all matrices are permutations.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.match.nested import family_of, roots_of, solve_family
from isthmus.match.weight_objective import ancestors, overlap, site_rows
from isthmus.state import State
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, flat_indices, move_site

# For every space, a doubly stochastic matrix over the units of all its copies.
Point = dict[str, Float[Tensor, "slots units"]]
# For every space, the unit that each slot receives, over all its copies: a point that is a permutation.
Vertex = dict[str, Int[np.ndarray, " slots"]]
Gradient = dict[str, Float[np.ndarray, "slots units"]]


@dataclass(frozen=True, eq=False)
class Action:
    """One place where a space moves a tensor, its copies laid side by side: positions are `[1, units, repeat]`."""

    space: str
    site: Site


@dataclass(frozen=True, eq=False)
class Moved:
    """One tensor of one model at a relaxed point.

    Attributes:
        whole: With all actions applied.
        partial: For each action, with all others applied.
    """

    whole: Tensor
    partial: list[Tensor]


@dataclass(eq=False)
class RelaxedObjective:
    """Σ_{p<q} Σ_W ⟨W_p, W_q⟩ over all trained tensors that some space touches, as a function of relaxed points.

    A family of nested spaces is relaxed as a whole: the matrices of its spaces are averages of the same permutations,
    each over the units of all copies. Where places of nested spaces in a tensor interlock in a way that one matrix a
    space cannot express, the family is `held`: it stays at the permutations in `transforms`.

    Args:
        symmetry: All spaces.
        states: Every model's state.
        parameters: Names of the trained tensors.
        transforms: Permutations of every model; models that do not move and families that are held stay at these.
        moving: Numbers of the models that move.
    """

    symmetry: Symmetry
    states: Sequence[State]
    parameters: frozenset[str]
    transforms: Sequence[Transforms]
    moving: Sequence[int]
    relaxed: list[Space] = field(init=False)
    held: list[Space] = field(init=False)
    actions: dict[str, list[Action]] = field(init=False)
    degrees: dict[str, int] = field(init=False)
    tensors: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        sites = {
            name: sites
            for name, sites in self.symmetry.sites.items()
            if name in self.parameters and all(site.role != "variance" for _, site in sites)
        }
        split = {name: _separate(self.symmetry, name, found) for name, found in sites.items()}
        root = {s.name: each.name for each in roots_of(self.symmetry) for s in family_of(self.symmetry, each)}
        interlocked = {root[space] for _, spaces in split.values() for space in spaces}
        self.held = [each for each in roots_of(self.symmetry) if each.name in interlocked]
        self.relaxed = [each for each in roots_of(self.symmetry) if each.name not in interlocked]
        self.actions, self.degrees, self.tensors = {}, {}, {}
        dtype = torch.float32
        for name in sites:
            for state in self.states:
                dtype = torch.promote_types(dtype, state[name].dtype)
        for name, found in sites.items():
            actions = [action for action in split[name][0] if root[action.space] not in interlocked]
            if not actions:
                continue  # constant
            self.actions[name] = actions
            self.degrees[name] = _degree_of(actions)
            self.tensors[name] = []
            for index, state in enumerate(self.states):
                tensor = state[name].to(dtype)
                for space, site in found:
                    if index not in self.moving or root[space.name] in interlocked:
                        tensor = move_site(tensor, site, self.transforms[index][space.name])
                self.tensors[name].append(tensor)

    def pair(self, first: int, second: int) -> "RelaxedObjective":
        """The objective of two of the models; the second moves."""
        states = [self.states[first], self.states[second]]
        transforms = [self.transforms[first], self.transforms[second]]
        return RelaxedObjective(self.symmetry, states, self.parameters, transforms, [1])

    @property
    def spaces(self) -> list[Space]:
        """The relaxed spaces, families one after the other, parents first."""
        return [space for root in self.relaxed for space in family_of(self.symmetry, root)]

    @property
    def evaluations(self) -> int:
        """How often all tensors are moved for one exact line search: at both ends, and between them for degrees > 2."""
        return max([2, *self.degrees.values()]) if self.degrees else 0

    def vertex(self, transforms: Transforms) -> Vertex:
        """Permutations of the relaxed spaces as a vertex."""
        return {space.name: flat_indices(transforms, self.symmetry, space) for space in self.spaces}

    def point(self, vertex: Vertex) -> Point:
        """A vertex as matrices."""
        found = {}
        for name, indices in vertex.items():
            found[name] = torch.zeros(len(indices), len(indices), dtype=torch.float64)
            found[name][torch.arange(len(indices)), torch.from_numpy(indices)] = 1.0
        return found

    def at(self, points: Sequence[Point]) -> dict[str, list[Moved]]:
        """All tensors of all models at relaxed points, one a model; points of models that do not move are not used."""
        found: dict[str, list[Moved]] = {}
        for name, actions in self.actions.items():
            found[name] = []
            for index, tensor in enumerate(self.tensors[name]):
                if index not in self.moving:
                    found[name].append(Moved(tensor, []))
                    continue
                point, partial = points[index], []
                for action in actions:
                    others = tensor
                    for other in actions:
                        if other is not action:
                            others = _act(others, other, point[other.space])
                    partial.append(others)
                found[name].append(Moved(_act(partial[0], actions[0], point[actions[0].space]), partial))
        return found

    def value(self, moved: Mapping[str, Sequence[Moved]]) -> float:
        """The objective, without tensors that no relaxed space touches."""
        return sum((_products([], [model.whole for model in models])[2] for models in moved.values()), 0.0)

    def gradient(self, moved: Mapping[str, Sequence[Moved]]) -> list[Gradient]:
        """The derivative by every matrix of every model; empty for models that do not move."""
        sizes = {space.name: space.copies * space.size for space in self.spaces}
        found: list[Gradient] = [
            {name: np.zeros((units, units)) for name, units in sizes.items()} if index in self.moving else {}
            for index in range(len(self.states))
        ]
        for name, models in moved.items():
            total = _summed([model.whole for model in models])
            for index in self.moving:
                rest = total - models[index].whole
                for action, partial in zip(self.actions[name], models[index].partial, strict=True):
                    product = site_rows(rest, action.site) @ site_rows(partial, action.site).T
                    found[index][action.space] += product.double().cpu().numpy()
        return found

    def oracle(self, gradient: Gradient) -> dict[str, Transform]:
        """The permutations of one model's relaxed spaces that maximise a linear function of its matrices."""
        found: dict[str, Transform] = {}
        for root in self.relaxed:
            solved = solve_family(self.symmetry, root, gradient)
            found |= {name: Permutation(indices) for name, indices in solved.items()}
        return found

    def along(
        self, moved: Mapping[str, Sequence[Moved]], points: Sequence[Point], vertices: Sequence[Vertex]
    ) -> Float[np.ndarray, " coefficients"]:
        """Coefficients, lowest first, of the objective at (1 − t) · points + t · vertices as a polynomial of t.

        A tensor that d actions move one after the other is a polynomial of degree d in t. Its value and its derivative
        at 0, its value at 1, and d − 2 values between determine it; their inner products give the models'.

        Args:
            moved: The tensors at `points`.
            points: One a model.
            vertices: One a model.
        """
        found = np.zeros(1 + 2 * max(self.degrees.values(), default=0))
        for name, models in moved.items():
            degree = self.degrees[name]
            known = [self._known(name, index, models[index], points[index], vertices[index]) for index in self.moving]
            fixed = [model.whole for index, model in enumerate(models) if index not in self.moving]
            solve = np.linalg.inv(_conditions(degree))
            between, beside, constant = _products(known, fixed)
            between = solve @ between @ solve.T
            for power in range(degree + 1):
                found[power : power + degree + 1] += between[power]
            found[: degree + 1] += solve @ beside
            found[0] += constant
        return found

    def _known(self, name: str, index: int, model: Moved, point: Point, vertex: Vertex) -> list[Tensor]:
        """What determines a moving tensor on the line from a point to a vertex, in the order of `_conditions`."""
        tensor, actions, degree = self.tensors[name][index], self.actions[name], self.degrees[name]
        known = [model.whole]
        if degree > 1:
            ends = [_act(p, action, vertex[action.space]) for action, p in zip(actions, model.partial, strict=True)]
            known.append(_summed(ends) - len(ends) * model.whole)
        for t in _inner_nodes(degree):
            mixed = tensor
            for action in actions:
                mixed = _act(mixed, action, mix(point[action.space], vertex[action.space], t))
            known.append(mixed)
        end = tensor
        for action in actions:
            end = _act(end, action, vertex[action.space])
        return [*known, end]


def _separate(symmetry: Symmetry, name: str, sites: Sequence[tuple[Space, Site]]) -> tuple[list[Action], list[str]]:
    """How a tensor's spaces act on it, each place moved by the innermost space alone; and spaces that interlock.

    The flat permutation of a nested space holds the moves of its parents. So at places where an inner space's units are
    parts of an outer one's, the inner one acts alone; the outer one acts where none of its places is the inner one's.
    """
    actions, interlocked = [], []
    for space, site in sites:
        positions = site.positions.reshape(space.copies * space.size, -1)
        free = np.ones(positions.shape[1], dtype=bool)
        for other, place in sites:
            if place is site or not overlap(site, place, symmetry.shapes[name]):
                continue
            if space.name in ancestors(symmetry, other):
                columns = _columns_of(symmetry, space, other, positions, place) if place.dims == site.dims else None
                if columns is None:
                    interlocked.append(space.name)
                else:
                    free[columns] = False
            elif other.name not in ancestors(symmetry, space) and _is_kin(symmetry, space, other):
                interlocked.append(space.name)
        if free.any():
            places = np.ascontiguousarray(positions[None, :, free])
            actions.append(Action(space.name, Site(name, site.dims, places, "vector")))
    return actions, interlocked


def _is_kin(symmetry: Symmetry, first: Space, second: Space) -> bool:
    """Whether two spaces are of one family."""
    above = [ancestors(symmetry, space) | {space.name} for space in (first, second)]
    return bool(above[0] & above[1])


def _columns_of(
    symmetry: Symmetry, outer: Space, inner: Space, positions: Int[np.ndarray, "units places"], place: Site
) -> Int[np.ndarray, " columns"] | None:
    """Which of an outer unit's places belong to units nested in it, the same for every outer unit; None if they differ.

    Args:
        symmetry: All spaces.
        outer: The outer space.
        inner: A space nested in it, at any depth.
        positions: The outer space's places.
        place: The inner space's places along the same dimensions.
    """
    held = place.positions.reshape(outer.copies * outer.size, -1)
    columns = np.empty_like(held)
    for unit, (row, own) in enumerate(zip(held, positions, strict=True)):
        order = np.argsort(own)
        found = np.searchsorted(own[order], row)
        if (found == len(own)).any() or not np.array_equal(own[order][np.minimum(found, len(own) - 1)], row):
            return None
        columns[unit] = order[found]
    return columns[0] if (columns == columns[0]).all() else None


def _degree_of(actions: Sequence[Action]) -> int:
    """How many actions at most move one number of a tensor: actions at other places along the same axis count once."""
    layers: list[tuple[tuple[int, ...], set[int]]] = []
    for action in actions:
        own = set(action.site.positions.ravel().tolist())
        for dims, taken in layers:
            if dims == action.site.dims and not taken & own:
                taken |= own
                break
        else:
            layers.append((action.site.dims, own))
    return len(layers)


def _act(tensor: Tensor, action: Action, move: Tensor | np.ndarray) -> Tensor:
    """The tensor with one space moved at one place, by a matrix or by a vertex's indices."""
    transform = LinearMap(move, move.T) if isinstance(move, Tensor) else Permutation(move)
    # A gain is permuted as a vector is; between permutations, it is averaged as one.
    site = replace(action.site, role="vector") if action.site.role == "diagonal" else action.site
    return move_site(tensor, site, transform)


def mix(
    matrix: Float[Tensor, "slots units"], indices: Int[np.ndarray, " slots"], t: float
) -> Float[Tensor, "slots units"]:
    """(1 − t) of a matrix and t of a permutation."""
    mixed = (1 - t) * matrix
    mixed[torch.arange(len(indices)), torch.from_numpy(indices)] += t
    return mixed


def _inner_nodes(degree: int) -> list[float]:
    """Where between 0 and 1 a tensor of that degree has to be known beside what its ends tell."""
    return [index / (degree - 1) for index in range(1, degree - 1)]


def _conditions(degree: int) -> Float[np.ndarray, "known coefficients"]:
    """What the known tensors are in terms of a polynomial's coefficients."""
    powers = np.arange(degree + 1)
    value = [0.0**powers, *([(powers == 1).astype(float)] if degree > 1 else [])]
    return np.stack([*value, *(t**powers for t in _inner_nodes(degree)), np.ones(degree + 1)])


def _products(
    moving: Sequence[Sequence[Tensor]], fixed: Sequence[Tensor]
) -> tuple[Float[np.ndarray, "terms terms"], Float[np.ndarray, " terms"], float]:
    """Inner products, summed over pairs of models, of what tensors are made of.

    Args:
        moving: For every moving model, terms that its tensor is a sum of.
        fixed: The tensors of all other models.

    Returns:
        Of terms of two moving models, symmetrised; of terms of a moving model with a fixed one; of two fixed ones.
    """
    terms = len(moving[0]) if moving else 0
    sums = [_summed(each) for each in zip(*moving, strict=True)]
    between = np.zeros((terms, terms))
    if len(moving) > 1:
        for i in range(terms):
            for j in range(i, terms):
                own = sum(_inner(model[i], model[j]) for model in moving)
                between[i, j] = between[j, i] = (_inner(sums[i], sums[j]) - own) / 2
    beside = np.array([_inner(_summed(fixed), term) for term in sums]) if fixed else np.zeros(terms)
    constant = sum((_inner(a, b) for index, a in enumerate(fixed) for b in fixed[:index]), 0.0)
    return between, beside, constant


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return functools.reduce(torch.add, tensors)


def _inner(a: Tensor, b: Tensor) -> float:
    """The inner product, its terms added in float64."""
    return float((a * b).sum(dtype=torch.float64))
