"""Linear assignment problems (LAP)."""

import lap
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from isthmus.errors import InputError

# Below this size scipy's solver starts faster than it is overtaken.
SMALL = 64


def solve_lap(similarity: Float[np.ndarray, "slots units"]) -> Int[np.ndarray, " slots"]:
    """The permutation `indices` that maximises the sum of `similarity[i, indices[i]]`.

    If the best unit of every slot is another one, that is the optimum, and no solver is needed.

    Raises:
        InputError: The matrix is not square or holds NaN or infinity.
    """
    size = similarity.shape[0]
    if similarity.shape != (size, size) or not np.isfinite(similarity).all():
        raise InputError(
            f"similarity of shape {similarity.shape}: an assignment needs a square matrix of finite numbers"
        )
    best = similarity.argmax(axis=1)
    if len(np.unique(best)) == size:
        return best
    if size < SMALL:
        return linear_sum_assignment(similarity, maximize=True)[1]
    _, rows, columns = lap.lapjvr(-similarity)
    indices = np.empty(size, dtype=np.int64)
    indices[rows] = columns
    return indices


def solve_laps(similarities: Float[np.ndarray, "copies slots units"]) -> Int[np.ndarray, "copies slots"]:
    """`solve_lap` for each copy."""
    return np.stack([solve_lap(similarity) for similarity in similarities])


def assignment_value(similarity: Float[np.ndarray, "slots units"], indices: Int[np.ndarray, " slots"]) -> float:
    """The sum of `similarity[i, indices[i]]`, in float64."""
    return float(similarity[np.arange(len(indices)), indices].sum(dtype=np.float64))
