"""Transforms of spaces, and how they act on tensors.

The one convention: `indices[i] = j` puts unit j of the moved model into slot i of the common frame. Nested spaces have
`indices` of shape `[copies, size]`; the parent acts first, and row c is the copy that stands in slot c of the frame.
"""

# torch and numpy leave the types of from_numpy, linalg and all() open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import ModelError, TransformError
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import counted, told


@dataclass(frozen=True, eq=False)
class Permutation:
    """A re-labelling of units: slot i of copy c of the common frame receives unit `indices[c, i]`.

    A one-dimensional `indices` is read as one copy.

    Raises:
        TransformError: A row is not a permutation of 0 … size − 1.
    """

    indices: Int[np.ndarray, "*copies size"]

    def __post_init__(self) -> None:
        indices = np.atleast_2d(np.asarray(self.indices, dtype=np.int64))
        if not np.array_equal(np.sort(indices, axis=1), np.broadcast_to(np.arange(indices.shape[1]), indices.shape)):
            raise TransformError(
                f"indices of shape {indices.shape} are no permutation: each row must hold 0 … size-1 once"
            )
        object.__setattr__(self, "indices", indices)

    def __repr__(self) -> str:
        copies, size = self.indices.shape
        moved = int((self.indices != np.arange(size)).sum())
        units = f"{copies} × {size} units" if copies > 1 else counted(size, "unit")
        return told(self, units, f"{moved:,} of them moved" if moved else "identity")

    @staticmethod
    def identity(space: Space) -> "Permutation":
        """The permutation of `space` that moves nothing."""
        return Permutation(np.tile(np.arange(space.size), (space.copies, 1)))

    @staticmethod
    def random(space: Space, rng: np.random.Generator) -> "Permutation":
        """A uniformly random permutation of every copy of `space`."""
        return Permutation(np.stack([rng.permutation(space.size) for _ in range(space.copies)]))

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return bool((self.indices == np.arange(self.indices.shape[1])).all())


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear change of basis: `into` moves a vector into the common frame, `back` moves it back.

    Both may be rectangular. A two-dimensional matrix is read as one copy.
    """

    into: Float[Tensor, "*copies frame units"]
    back: Float[Tensor, "*copies units frame"]

    def __post_init__(self) -> None:
        into, back = (m.unsqueeze(0) if m.ndim == 2 else m for m in (self.into, self.back))
        if into.ndim != 3 or into.shape != (back.shape[0], back.shape[2], back.shape[1]):
            raise TransformError(
                f"into {tuple(into.shape)} and back {tuple(back.shape)} do not fit: "
                "they are [copies, frame, units] and [copies, units, frame]"
            )
        object.__setattr__(self, "into", into)
        object.__setattr__(self, "back", back)

    def __repr__(self) -> str:
        copies, frame, units = self.into.shape
        times = f"{copies} copies" if copies > 1 else None
        return told(self, f"{units} units into {frame} slots", times, str(self.into.dtype).removeprefix("torch."))

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, but for rounding."""
        if self.into.shape[1] != self.into.shape[2]:
            return False
        # Products of a few maps in float64; in float32 a map this near to the identity moves nothing either.
        eye = torch.eye(self.into.shape[1], dtype=self.into.dtype, device=self.into.device)
        return all(bool((matrix - eye).abs().max() <= 1e-9) for matrix in (self.into, self.back))


Transform = Permutation | LinearMap


Transforms = Mapping[str, Transform]


def as_matrix(transform: Transform, dtype: torch.dtype = torch.float64) -> LinearMap:
    """The transform as matrices; a permutation becomes its permutation matrices."""
    if isinstance(transform, LinearMap):
        return transform
    copies, size = transform.indices.shape
    into = torch.zeros(copies, size, size, dtype=dtype)
    into.scatter_(2, torch.from_numpy(transform.indices).unsqueeze(2), 1)
    return LinearMap(into, into.transpose(1, 2))


def flat_indices(transforms: Transforms, symmetry: Symmetry, space: Space) -> Int[np.ndarray, " units"]:
    """Where each unit of a space comes from, counted over all copies, with the parents' moves included.

    Raises:
        TransformError: A linear map has no indices.

    Example:
        Two heads of three units each change places, and the units of the head that comes to slot 1 are reversed:

        >>> from isthmus.symmetry.spaces import Group
        >>> heads = Space("heads", 2, Group.PERMUTATION, ())
        >>> inner = Space("heads/units", 3, Group.PERMUTATION, (), parent="heads", copies=2)
        >>> symmetry = Symmetry((heads, inner), (), {})
        >>> swapped, reversed_second = np.array([1, 0]), np.array([[0, 1, 2], [2, 1, 0]])
        >>> transforms = {"heads": Permutation(swapped), "heads/units": Permutation(reversed_second)}
        >>> flat_indices(transforms, symmetry, inner)
        array([3, 4, 5, 2, 1, 0])
    """
    transform = transforms[space.name]
    if isinstance(transform, LinearMap):
        raise TransformError(f"space {space.name}: a linear map has no indices; only permutations can hold copies")
    indices = transform.indices
    if space.parent is None:
        rows = np.arange(space.copies)
    else:
        rows = flat_indices(transforms, symmetry, symmetry[space.parent])
    return (rows[:, None] * space.size + indices).ravel()


def invert(transforms: Transforms, symmetry: Symmetry) -> dict[str, Transform]:
    """The transforms that undo `transforms`."""
    inverse: dict[str, Transform] = {}
    for space in symmetry:
        transform = transforms[space.name]
        rows = np.arange(space.copies)
        if space.parent is not None:
            rows = flat_indices(transforms, symmetry, symmetry[space.parent])
        if isinstance(transform, LinearMap):
            into, back = torch.empty_like(transform.back), torch.empty_like(transform.into)
            into[torch.from_numpy(rows)], back[torch.from_numpy(rows)] = transform.back, transform.into
            inverse[space.name] = LinearMap(into, back)
        else:
            indices = np.empty_like(transform.indices)
            indices[rows] = np.argsort(transform.indices, axis=1)
            inverse[space.name] = Permutation(indices)
    return inverse


def compose(second: Transforms, first: Transforms, symmetry: Symmetry) -> dict[str, Transform]:
    """The transforms that act as `first` and then `second`."""
    composed: dict[str, Transform] = {}
    for space in symmetry:
        outer, inner = second[space.name], first[space.name]
        rows = np.arange(space.copies)
        if space.parent is not None:
            rows = flat_indices(second, symmetry, symmetry[space.parent])
        if isinstance(outer, Permutation) and isinstance(inner, Permutation):
            composed[space.name] = Permutation(np.take_along_axis(inner.indices[rows], outer.indices, axis=1))
        else:
            b, a = as_matrix(outer), as_matrix(inner)
            where = torch.from_numpy(rows)
            composed[space.name] = LinearMap(b.into @ a.into[where], a.back[where] @ b.back)
    return composed


def site_order(site: Site, indices: Int[np.ndarray, "copies size"], length: int) -> Int[np.ndarray, " positions"]:
    """The gather along the site's flattened dimensions that performs a permutation."""
    order = np.arange(length)
    order[site.positions] = np.take_along_axis(site.positions, indices[:, :, None], axis=1)
    return order


def site_length(shape: Sequence[int], site: Site) -> int:
    """Number of positions along the site's flattened dimensions."""
    return math.prod(shape[d] for d in site.dims)


def to_front(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The tensor with `dims` flattened into one leading dimension and the rest into a second."""
    moved = tensor.movedim(tuple(dims), tuple(range(len(dims))))
    return moved.reshape(math.prod(tensor.shape[d] for d in dims), -1)


def from_front(flat: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """The inverse of `to_front` for a tensor of `shape`."""
    rest = [shape[d] for d in range(len(shape)) if d not in dims]
    moved = flat.reshape([shape[d] for d in dims] + rest)
    return moved.movedim(tuple(range(len(dims))), tuple(dims))


def move_site(tensor: Tensor, site: Site, transform: Transform) -> Tensor:
    """The tensor with one space transformed at one site; a new tensor of the same dtype.

    Raises:
        TransformError: A running variance or an uneven gain met a linear map, or the map's shape does not fit the site.

    Example:
        A layer that reads three channels of two pixels each has two columns for each channel, which move together:

        >>> weight = torch.tensor([[10, 11, 20, 21, 30, 31]])
        >>> positions = np.array([[[0, 1], [2, 3], [4, 5]]])  # one copy, three units, two places each
        >>> site = Site("head.weight", (1,), positions, "covector")
        >>> move_site(weight, site, Permutation(np.array([2, 0, 1])))  # slot 0 receives unit 2
        tensor([[30, 31, 10, 11, 20, 21]])
    """
    copies, size, repeat = site.positions.shape
    if isinstance(transform, Permutation):
        if transform.indices.shape != (copies, size):
            raise TransformError(
                f"{site.parameter}: permutation of {transform.indices.shape} for a site of {copies} × {size} units"
            )
        order = torch.from_numpy(site_order(site, transform.indices, site_length(tensor.shape, site)))
        order = order.to(tensor.device)
        if len(site.dims) == 1:
            return tensor.index_select(site.dims[0], order)
        return from_front(to_front(tensor, site.dims).index_select(0, order), tensor.shape, site.dims)
    if site.role == "variance":
        raise TransformError(
            f"{site.parameter}: a running variance is undefined under a linear map; merge the models, then call repair"
        )
    frame = transform.into.shape[1]
    if transform.into.shape[::2] != (copies, size):
        raise TransformError(
            f"{site.parameter}: linear map of shape {tuple(transform.into.shape)} for a site of {copies} × {size} units"
        )
    if site.role == "diagonal":
        gains = to_front(tensor, site.dims)[torch.from_numpy(site.positions.reshape(-1)).to(tensor.device)]
        if bool((gains == gains[0]).all()):  # a multiple of the identity commutes with every map
            return tensor if frame == size else _ones_moved(tensor, site, transform) * gains[0]
        raise TransformError(
            f"{site.parameter}: a gain of each unit does not commute with a linear map; fold it into its consumers "
            "first: models = [isthmus.fold_norm_gains(model, symmetry) for model in models]"
        )
    compute = torch.promote_types(tensor.dtype, torch.float32)
    # A vector moves by T; a covector w moves to w T⁻¹, so its transposed `back` acts from the left.
    matrix = transform.into if site.role == "vector" else transform.back.transpose(1, 2)
    matrix = matrix.to(tensor.device, compute)
    flat = to_front(tensor, site.dims).to(compute)
    where = torch.from_numpy(site.positions).to(tensor.device)
    units = flat[where.reshape(-1)].reshape(copies, size, -1)
    moved = torch.bmm(matrix, units).reshape(copies, frame, repeat, -1)
    if frame == size:
        out = flat.clone()
        out[where.reshape(-1)] = moved.reshape(copies * size * repeat, -1)
        return from_front(out, tensor.shape, site.dims).to(tensor.dtype)
    return _resize_site(tensor, site, moved)


def _ones_moved(tensor: Tensor, site: Site, transform: LinearMap) -> Tensor:
    """Ones in the shape that a linear map gives the tensor."""
    copies, size, repeat = site.positions.shape
    frame = transform.into.shape[1]
    if frame == size:
        return torch.ones_like(tensor)
    rest = tensor.numel() // site_length(tensor.shape, site)
    return _resize_site(tensor, site, tensor.new_ones(copies, frame, repeat, rest))


def _resize_site(tensor: Tensor, site: Site, moved: Float[Tensor, "copies frame repeat rest"]) -> Tensor:
    """The tensor with the units along one dimension replaced by `frame` new ones, in the old layout."""
    copies, size, repeat = site.positions.shape
    if len(site.dims) != 1 or copies != 1 or site_length(tensor.shape, site) != size * repeat:
        raise TransformError(
            f"{site.parameter}: a map that changes the width needs a space that fills one whole dimension"
        )
    positions = site.positions[0]
    if np.array_equal(positions.ravel(), np.arange(size * repeat)):  # unit-major: [unit, repeat]
        laid = moved[0].reshape(moved.shape[1] * repeat, -1)
    elif np.array_equal(positions.T.ravel(), np.arange(size * repeat)):  # repeat-major: [repeat, unit]
        laid = moved[0].transpose(0, 1).reshape(moved.shape[1] * repeat, -1)
    else:
        raise TransformError(f"{site.parameter}: units are interleaved irregularly; their number cannot change here")
    shape = list(tensor.shape)
    shape[site.dims[0]] = laid.shape[0]
    return from_front(laid, shape, site.dims).to(tensor.dtype)


def move_state(
    state: Mapping[str, Tensor], transforms: Transforms, symmetry: Symmetry, *, reset_variances: bool = False
) -> dict[str, Tensor]:
    """The state dict moved into the common frame; tensors that no space touches are the same objects.

    Args:
        state: A state dict of the traced architecture.
        transforms: One transform per space.
        symmetry: The spaces and their sites.
        reset_variances: Set a running variance under a linear map to one instead of raising; the result needs `repair`.

    Raises:
        ModelError: A touched tensor is missing or has another shape than the traced one.
        TransformError: A transform is missing or cannot act exactly.
    """
    missing = [space.name for space in symmetry if space.name not in transforms]
    if missing:
        raise TransformError(f"no transform for space {missing[0]}: an alignment holds one for every space")
    moved = dict(state)
    for name, sites in symmetry.sites.items():
        if name not in state:
            raise ModelError(f"missing key {name}: the state dict is not of the traced architecture")
        tensor = state[name]
        if tuple(tensor.shape) != tuple(symmetry.shapes[name]):
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}, traced {symmetry.shapes[name]}")
        for space, site in sites:
            transform = transforms[space.name]
            if isinstance(transform, Permutation) and transform.is_identity:
                continue
            if reset_variances and site.role == "variance" and isinstance(transform, LinearMap):
                tensor = _ones_moved(tensor, site, transform)
            else:
                tensor = move_site(tensor, site, transform)
        moved[name] = tensor
    symmetry.tie(moved)
    return moved
