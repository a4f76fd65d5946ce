"""C²M³ transcribed with dense matrices: Frank-Wolfe over one doubly stochastic matrix a model and space.

`points[p][space]` is [slots, units]. The line search fits the objective along a step from plain evaluations.

Source: Crisostomi, Fumero, Baieri, Bernard, Rodolà, C²M³: Cycle-Consistent Multi-Model Merging, NeurIPS 2024. Written
    from its description; the stopping rule is the library's.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from oracles.git_rebasin import Permutations, Spec, State, sizes_of

Point = dict[str, np.ndarray]


def identities(spec: Spec, state: State) -> Point:
    """The point where nothing moves."""
    return {space: np.eye(size) for space, size in sizes_of(spec, state).items()}


def moved(spec: Spec, point: Point, state: State, name: str, skip: tuple[str, int] | None = None) -> np.ndarray:
    """A tensor multiplied along every axis that a space touches, but for the axis `skip` = (space, axis)."""
    tensor = state[name]
    for space, places in spec.items():
        for parameter, axis in places:
            if parameter == name and (space, axis) != skip:
                tensor = np.moveaxis(np.tensordot(point[space], tensor, axes=(1, axis)), 0, axis)
    return tensor


def touched(spec: Spec) -> list[str]:
    """Every tensor that some space touches, once."""
    return list(dict.fromkeys(name for places in spec.values() for name, _ in places))


def objective(spec: Spec, points: Sequence[Point], states: Sequence[State]) -> float:
    """The inner products of the moved tensors, summed over all pairs of models."""
    total = 0.0
    for name in touched(spec):
        tensors = [moved(spec, point, state, name) for point, state in zip(points, states, strict=True)]
        for q in range(len(tensors)):
            for p in range(q):
                total += float(np.sum(tensors[p] * tensors[q]))
    return total


def gradient(spec: Spec, points: Sequence[Point], states: Sequence[State], p: int, space: str) -> np.ndarray:
    """The derivative of the objective by one matrix."""
    total = np.zeros_like(points[p][space])
    for name, axis in spec[space]:
        own = moved(spec, points[p], states[p], name, skip=(space, axis))
        own = np.moveaxis(own, axis, 0).reshape(own.shape[axis], -1)
        for q in range(len(states)):
            if q != p:
                other = moved(spec, points[q], states[q], name)
                total += np.moveaxis(other, axis, 0).reshape(other.shape[axis], -1) @ own.T
    return total


def nearest(matrix: np.ndarray) -> np.ndarray:
    """The permutation matrix with the largest inner product."""
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    found = np.zeros_like(matrix)
    found[rows, columns] = 1.0
    return found


def frank_wolfe(
    spec: Spec, states: Sequence[State], starts: Sequence[Point], moving: Sequence[int], gap: float, steps: int = 100
) -> tuple[list[Permutations], list[float], int]:
    """Projected permutations, the objective at every point on the way, and the most evaluations a line search took."""
    points, values, evaluations = list(starts), [], 0
    for _ in range(steps):
        slopes = {(p, space): gradient(spec, points, states, p, space) for p in moving for space in spec}
        corners = {key: nearest(slope) for key, slope in slopes.items()}
        rise = sum(np.sum(slopes[p, s] * (corners[p, s] - points[p][s])) for p, s in slopes)

        def at(t: float, here=points, corners=corners) -> list[Point]:
            return [
                {s: (1 - t) * m + t * corners[p, s] for s, m in point.items()} if p in moving else point
                for p, point in enumerate(here)
            ]

        # Two axes of a tensor move, and two models of a pair: degree 4, or 2 where one model of each pair is still.
        nodes = np.linspace(0, 1, 3 if len(moving) == 1 else 5)
        known = [objective(spec, at(t), states) for t in nodes]
        evaluations = max(evaluations, len(known))
        values.append(known[0])
        if rise <= gap * abs(known[0]):
            break
        fitted = np.polyfit(nodes, known, len(nodes) - 1)
        candidates = [0.0, 1.0, *(r.real for r in np.roots(np.polyder(fitted)) if 0 < r.real < 1)]
        t = max(candidates, key=lambda t: np.polyval(fitted, t))
        if t == 0:
            break
        points = at(t)
    permutations = [{s: nearest(m).argmax(axis=1) for s, m in point.items()} for point in points]
    return permutations, values, evaluations


def pairwise(spec: Spec, a: State, b: State, gap: float, steps: int = 100) -> Point:
    """Where Frank-Wolfe for two models ends: max over P of Σ ⟨W_A, P W_B Qᵀ⟩, a parabola along each step."""
    point = identities(spec, a)
    for _ in range(steps):
        slope = {space: gradient(spec, [identities(spec, a), point], [a, b], 1, space) for space in spec}
        corner = {space: nearest(matrix) for space, matrix in slope.items()}

        def value(t: float, here=point, corner=corner) -> float:
            mixed = {space: (1 - t) * matrix + t * corner[space] for space, matrix in here.items()}
            return sum(float(np.sum(a[name] * moved(spec, mixed, b, name))) for name in touched(spec))

        low, middle, high = value(0.0), value(0.5), value(1.0)
        if sum(np.sum(slope[s] * (corner[s] - point[s])) for s in spec) <= gap * abs(low):
            break
        bend = 2 * (low - 2 * middle + high)
        rise = high - low - bend
        t = 1.0 if bend >= 0 or -rise / (2 * bend) >= 1 else -rise / (2 * bend)
        point = {space: (1 - t) * matrix + t * corner[space] for space, matrix in point.items()}
    return point
