"""CCA Merge as the paper writes it, with matrix square roots, from two tables of activations."""

import numpy as np
from scipy.linalg import sqrtm


def canonical_map(a: np.ndarray, b: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T, its inverse and the canonical correlations; rows of `a` and `b` are samples, columns units."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    eye = np.eye(a.shape[1])
    aa, bb, ab = a.T @ a / len(a) + ridge * eye, b.T @ b / len(b) + ridge * eye, a.T @ b / len(a)
    root_a, root_b = np.real(sqrtm(aa)), np.real(sqrtm(bb))
    u, s, vt = np.linalg.svd(np.linalg.inv(root_a) @ ab @ np.linalg.inv(root_b))
    return root_a @ u @ vt @ np.linalg.inv(root_b), root_b @ vt.T @ u.T @ np.linalg.inv(root_a), s
