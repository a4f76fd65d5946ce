"""OT Fusion transcribed plainly: a linear program for exact plans, plain Sinkhorn for entropic ones, full matrices."""

import numpy as np
from scipy.optimize import linprog


def exact_plan(cost: np.ndarray) -> np.ndarray:
    """The cheapest transport between two uniform distributions, as a linear program."""
    frame, moved = cost.shape
    rows, columns = np.zeros((frame, frame, moved)), np.zeros((moved, frame, moved))
    for i in range(frame):
        rows[i, i] = 1
    for j in range(moved):
        columns[j, :, j] = 1
    constraints = np.concatenate([rows, columns]).reshape(frame + moved, -1)
    masses = np.concatenate([np.full(frame, 1 / frame), np.full(moved, 1 / moved)])
    return linprog(cost.ravel(), A_eq=constraints, b_eq=masses, method="highs").x.reshape(frame, moved)


def entropic_plan(cost: np.ndarray, regularisation: float, iterations: int = 20_000) -> np.ndarray:
    """Sinkhorn's algorithm as it is written in papers."""
    frame, moved = cost.shape
    kernel = np.exp(-cost / (regularisation * cost.mean()))
    v = np.ones(moved)
    for _ in range(iterations):
        u = 1 / frame / (kernel @ v)
        v = 1 / moved / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between every row of one matrix and every row of another."""
    return np.array([[np.sum((x - y) ** 2) for y in b] for x in a])


def maps(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The barycentric maps: the frame's units from the moved ones, and back."""
    into, back = np.zeros_like(plan), np.zeros_like(plan.T)
    for i in range(plan.shape[0]):
        into[i] = plan[i] / plan[i].sum()
    for j in range(plan.shape[1]):
        back[j] = plan[:, j] / plan[:, j].sum()
    return into, back


def fuse_mlp(
    fixed: list[tuple[np.ndarray, np.ndarray]], moved: list[tuple[np.ndarray, np.ndarray]], plan_of
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A moved multilayer perceptron in the frame of another, layer by layer, costs from the weights and biases."""
    back = None
    found = []
    for layer, ((W, b), (V, c)) in enumerate(zip(fixed, moved, strict=True)):
        if back is not None:
            V = V @ back
        if layer < len(fixed) - 1:
            into, back = maps(plan_of(squared_distances(np.c_[W, b], np.c_[V, c])))
            V, c = into @ V, into @ c
        found.append((V, c))
    return found
