"""Groups that act: random elements, the element nearest to a matrix, and whether a transform belongs."""

# torch and numpy leave the types of from_numpy, linalg and all() open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Group, Space
from isthmus.symmetry.transform import LinearMap, Permutation, Transform

# Singular values of random invertible maps lie between 1 / SPREAD and SPREAD: well-conditioned, and no rotations.
SPREAD = 2**0.5

# How far a map may be from its group: float64 rounding of products of a few maps of up to 10⁴ units; a map that is kept
# in float32 is that precise only if it is exact.
MEMBERSHIP = 1e-9


def random_element(space: Space, rng: np.random.Generator) -> Transform:
    """A random element of a space's group, one a copy: uniform, but for invertible maps, which are well-conditioned."""
    if space.group is Group.PERMUTATION:
        return Permutation.random(space, rng)
    maps = [_random_matrix(space.group, space.size, rng) for _ in range(space.copies)]
    into = torch.from_numpy(np.stack(maps))
    if space.group is Group.INVERTIBLE:
        return LinearMap(into, torch.linalg.inv(into))
    return LinearMap(into, into.transpose(1, 2).contiguous())


def _random_matrix(group: Group, size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """A random matrix of a group of linear maps."""
    if group is Group.ORTHOGONAL_FIXING_ONES:
        basis = _complement_of_ones(size)
        return basis @ _random_rotation(size - 1, rng) @ basis.T + 1 / size
    if group is Group.INVERTIBLE:
        stretch = np.exp(rng.uniform(-np.log(SPREAD), np.log(SPREAD), size))
        return _random_rotation(size, rng) * stretch @ _random_rotation(size, rng)
    return _random_rotation(size, rng)


def _random_rotation(size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """A uniformly random orthogonal matrix, reflections among them.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 2007.
    """
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(r.diagonal())


def _complement_of_ones(size: int) -> Float[np.ndarray, "size rest"]:
    """An orthonormal basis of the vectors whose entries sum to zero (Helmert's)."""
    columns = np.triu(np.ones((size, size - 1)))
    columns[np.arange(1, size), np.arange(size - 1)] = -np.arange(1, size)
    return columns / np.linalg.norm(columns, axis=0)


def nearest_element(
    matrix: Float[Tensor, "*copies size size"], group: Group
) -> tuple[Float[Tensor, "*copies size size"], Float[Tensor, " *copies"]]:
    """The orthogonal map T of a group that maximises ⟨T, matrix⟩, and that value: Procrustes' problem, in float64.

    Maps that keep the ones vector are found in its complement. For invertible maps the orthogonal one is returned:
    without a bound on the map's size the inner product has no maximum.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    matrix = matrix.double()
    size = matrix.shape[-1]
    target = matrix
    if group is Group.ORTHOGONAL_FIXING_ONES:
        target = matrix - matrix.mean(dim=-1, keepdim=True)
        target = target - target.mean(dim=-2, keepdim=True)
        # Ones are now sent to zero by either side; with a singular value of their own they are sent to themselves.
        scale = torch.linalg.matrix_norm(target).clamp_min(torch.finfo(torch.float64).tiny)
        target = target + (scale / size)[..., None, None]
    left, _, right = torch.linalg.svd(target)
    nearest = left @ right
    return nearest, (nearest * matrix).sum(dim=(-2, -1))


def _belongs(transform: Transform, group: Group) -> bool:
    """Whether a transform is an element of a group, up to rounding."""
    if isinstance(transform, Permutation):
        return True
    into, back = transform.into.double(), transform.back.double()
    if group is Group.PERMUTATION or into.shape[1] != into.shape[2]:
        return False
    eye = torch.eye(into.shape[1], dtype=torch.float64)
    size = max(1.0, float(into.abs().max()) * float(back.abs().max()))
    if not (into @ back - eye).abs().max() <= MEMBERSHIP * size:
        return False
    if group is Group.INVERTIBLE:
        return True
    if not (back - into.transpose(1, 2)).abs().max() <= MEMBERSHIP:
        return False
    return group is Group.ORTHOGONAL or bool((into.sum(dim=2) - 1).abs().max() <= MEMBERSHIP)


def keeps_function(alignment: Alignment) -> bool:
    """Whether every transform belongs to its space's group, so that each moved model computes what it did."""
    spaces = list(alignment.symmetry)
    return all(_belongs(moves[space.name], space.group) for moves in alignment.transforms for space in spaces)
