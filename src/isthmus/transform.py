"""Transforms of spaces, and the alignment that carries every model into one common frame.

The one convention: `indices[i] = j` puts unit j of the moved model into slot i of the common frame. Nested spaces have
`indices` of shape `[copies, size]`; the parent acts first, and row c is the copy that stands in slot c of the frame.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.checkpoint import load_state, read_metadata, save_state
from isthmus.errors import InputError, ModelError, TransformError
from isthmus.gains import fold_state
from isthmus.symmetry import Site, Space, Symmetry, check_counterpart


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
    """A linear change of basis: `into` carries a vector into the common frame, `back` carries it back.

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
    """Where each unit of a space comes from, counted over all copies, with the parents' moves included."""
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
            return tensor if frame == size else ones_moved(tensor, site, transform) * gains[0]
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
    return resize_site(tensor, site, moved)


def ones_moved(tensor: Tensor, site: Site, transform: LinearMap) -> Tensor:
    """Ones in the shape that a linear map gives the tensor."""
    copies, size, repeat = site.positions.shape
    frame = transform.into.shape[1]
    if frame == size:
        return torch.ones_like(tensor)
    rest = tensor.numel() // site_length(tensor.shape, site)
    return resize_site(tensor, site, tensor.new_ones(copies, frame, repeat, rest))


def resize_site(tensor: Tensor, site: Site, moved: Float[Tensor, "copies frame repeat rest"]) -> Tensor:
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
    """The state dict carried into the common frame; tensors that no space touches are the same objects.

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
                tensor = ones_moved(tensor, site, transform)
            else:
                tensor = move_site(tensor, site, transform)
        moved[name] = tensor
    symmetry.tie(moved)
    return moved


@dataclass(frozen=True, eq=False)
class Alignment:
    """One transform per space and model, into a common frame.

    Attributes:
        symmetry: The spaces that the transforms belong to.
        transforms: For every model, a transform per space name.
        method: Name of the method that found it.
        objective: What the method maximised, or None.
        upper_bound: A proven upper bound of the objective, or None.
        converged: Whether the method stopped because nothing improved any more.
        seconds: Wall time of the matching.
        details: What else the method reports, as plain JSON values.
        symmetries: Every model's own symmetry, where widths differ and `symmetry` is the common frame's; empty where
            all models share it.
        folded: Whether the norms' gains of every model are folded into their consumers before it is moved, since linear
            maps act on what a gain multiplies; `apply` and `merge` do so by themselves.
    """

    symmetry: Symmetry
    transforms: tuple[Transforms, ...]
    method: str = "identity"
    objective: float | None = None
    upper_bound: float | None = None
    converged: bool = True
    seconds: float = 0.0
    details: Mapping[str, object] = field(default_factory=dict)
    symmetries: tuple[Symmetry, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        if self.symmetries and len(self.symmetries) != len(self.transforms):
            raise TransformError(
                f"{len(self.symmetries)} symmetries for {len(self.transforms)} models: give each model's own, or none"
            )
        for index, transforms in enumerate(self.transforms):
            if self.symmetries:
                check_counterpart(self.symmetry, self.symmetries[index], f"model {index}")
            for space in self.symmetry:
                transform = transforms.get(space.name)
                own = self.own_symmetry(index)[space.name]
                if isinstance(transform, Permutation) and (
                    transform.indices.shape != (space.copies, space.size) or own.size != space.size
                ):
                    raise TransformError(
                        f"model {index}, space {space.name}: indices {transform.indices.shape}, "
                        f"expected {(space.copies, space.size)}"
                    )
                if self.symmetries and isinstance(transform, LinearMap):
                    expected = (space.copies, space.size, own.size)
                    if tuple(transform.into.shape) != expected:
                        raise TransformError(
                            f"model {index}, space {space.name}: a linear map of shape {tuple(transform.into.shape)}, "
                            f"expected {expected}"
                        )
                if transform is None:
                    raise TransformError(f"model {index} has no transform for space {space.name}: give one per space")

    def __len__(self) -> int:
        return len(self.transforms)

    @property
    def is_exact(self) -> bool:
        """Whether every transform is a permutation, which keeps each model's function."""
        return all(isinstance(t, Permutation) for transforms in self.transforms for t in transforms.values())

    def prepared(self, state: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
        """The state of a model as the transforms expect it: its norms' gains folded, if the alignment says so.

        Raises:
            ModelError: A gain cannot be folded.
        """
        return fold_state(state, self.own_symmetry(index)) if self.folded else state

    def own_symmetry(self, index: int) -> Symmetry:
        """The symmetry of a model as it was given: that of the common frame, but for the sizes of spaces."""
        return self.symmetries[index] if self.symmetries else self.symmetry

    @property
    def frame(self) -> int:
        """Number of the first model that is of the common frame's widths."""
        return next((i for i, own in enumerate(self.symmetries) if own.shapes == self.symmetry.shapes), 0)

    def between(self, target: int, source: int) -> dict[str, Transform]:
        """The transforms that carry model `source` into the own frame of model `target`."""
        back = invert(self.transforms[target], self.symmetry)
        return compose(back, self.transforms[source], self.symmetry)

    def rebased(self, reference: int = 0) -> "Alignment":
        """The same alignment with the common frame moved to model `reference`, which then does not move."""
        moved = tuple(self.between(reference, index) for index in range(len(self)))
        return Alignment(**{**vars(self), "transforms": moved, "symmetry": self.own_symmetry(reference)})

    def save(self, path: str | Path) -> None:
        """Writes the alignment as safetensors, its facts as JSON in the header.

        Raises:
            CheckpointError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for index, transforms in enumerate(self.transforms):
            for name, transform in transforms.items():
                if isinstance(transform, Permutation):
                    tensors[f"{index}/{name}/indices"] = torch.from_numpy(transform.indices)
                else:
                    tensors[f"{index}/{name}/into"], tensors[f"{index}/{name}/back"] = transform.into, transform.back
        facts = {
            "models": len(self),
            "method": self.method,
            "objective": self.objective,
            "upper_bound": self.upper_bound,
            "converged": self.converged,
            "seconds": self.seconds,
            "details": dict(self.details),
            "folded": self.folded,
            "symmetry_hash": self.symmetry.hash,
        }
        if not tensors:  # nothing can move: the format still wants one tensor
            tensors["no spaces"] = torch.zeros(1)
        metadata = {"isthmus_alignment": json.dumps(facts), "isthmus_symmetry": self.symmetry.to_json()}
        if self.symmetries:
            metadata["isthmus_symmetries"] = json.dumps([own.to_json() for own in self.symmetries])
        save_state(tensors, path, metadata=metadata)

    @staticmethod
    def load(path: str | Path, symmetry: Symmetry | None = None) -> "Alignment":
        """The alignment written by `save`.

        Args:
            path: The file.
            symmetry: The symmetry it must belong to; by default the one stored beside the transforms.

        Raises:
            CheckpointError: The file cannot be read.
            TransformError: The file holds no alignment, or one of another symmetry.
        """
        tensors, metadata = load_state(path), read_metadata(path)
        if "isthmus_alignment" not in metadata:
            raise TransformError(f"{path} holds no alignment: give the alignment.safetensors of a run folder")
        facts = json.loads(metadata["isthmus_alignment"])
        stored = Symmetry.from_json(metadata["isthmus_symmetry"]) if symmetry is None else symmetry
        if facts["symmetry_hash"] != stored.hash:
            raise TransformError(f"{path} belongs to another symmetry: align these models again")
        transforms: list[dict[str, Transform]] = []
        for index in range(facts["models"]):
            found: dict[str, Transform] = {}
            for space in stored:
                key = f"{index}/{space.name}"
                if f"{key}/indices" in tensors:
                    found[space.name] = Permutation(tensors[f"{key}/indices"].numpy())
                elif f"{key}/into" in tensors:
                    found[space.name] = LinearMap(tensors[f"{key}/into"], tensors[f"{key}/back"])
            transforms.append(found)
        return Alignment(
            symmetry=stored,
            transforms=tuple(transforms),
            method=facts["method"],
            objective=facts["objective"],
            upper_bound=facts["upper_bound"],
            converged=facts["converged"],
            seconds=facts["seconds"],
            details=facts["details"],
            symmetries=tuple(map(Symmetry.from_json, json.loads(metadata.get("isthmus_symmetries", "[]")))),
            folded=facts.get("folded", False),
        )


def apply(alignment: Alignment, model: nn.Module, index: int, module: nn.Module | None = None) -> nn.Module:
    """A new module: `model`, which is number `index` of the alignment, carried into the common frame.

    Args:
        alignment: What `align` returned.
        model: The model.
        index: Its number.
        module: A model of the common frame's widths, where those of `model` are others.

    Raises:
        InputError: The alignment has no model of that number, or the model is of other widths than the common frame and
            no `module` was given.
        ModelError: The model is not of the aligned architecture, or a gain cannot be folded.
        TransformError: A transform cannot act exactly (a running variance under a linear map); `merge` can.
    """
    if not 0 <= index < len(alignment):
        raise InputError(f"index {index}: the alignment holds models 0 … {len(alignment) - 1}")
    own = alignment.own_symmetry(index)
    if module is None and own.shapes != alignment.symmetry.shapes:
        raise InputError(f"model {index} has other widths than the common frame: give module=, a model of those widths")
    moved = copy.deepcopy(model if module is None else module)
    state = alignment.prepared(model.state_dict(), index)
    moved.load_state_dict(move_state(state, alignment.transforms[index], own))
    return moved
