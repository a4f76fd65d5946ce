"""The alignment that moves every model into one common frame, and how it is applied and kept."""

# torch and numpy leave the types of from_numpy, linalg and all() open.
# pyright: reportUnknownMemberType=false

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.checkpoint.reading import load_state, read_metadata
from isthmus.checkpoint.writing import save_state
from isthmus.errors import InputError, TransformError, check_kind, check_whole
from isthmus.symmetry.gains import fold_state
from isthmus.symmetry.symmetry import Symmetry, check_counterpart
from isthmus.symmetry.transform import LinearMap, Permutation, Transform, Transforms, compose, invert, move_state
from isthmus.wording.short import counted, figure, told


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
    details: Mapping[str, object] = field(default_factory=dict[str, object])
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

    def __repr__(self) -> str:
        return told(
            self,
            self.method,
            counted(len(self), "model"),
            counted(len(self.symmetry), "space"),
            None if self.objective is None else f"objective {figure(self.objective)}",
            "converged" if self.converged else "not converged",
        )

    def __len__(self) -> int:
        return len(self.transforms)

    @property
    def is_exact(self) -> bool:
        """Whether every transform is a permutation, which keeps each model's function."""
        return all(isinstance(t, Permutation) for transforms in self.transforms for t in transforms.values())

    def folded_state(self, state: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
        """The state of a model as the transforms expect it: its norms' gains folded, if the alignment says so.

        Raises:
            ModelError: A gain cannot be folded.
        """
        return fold_state(state, self.own_symmetry(index)) if self.folded else state

    def own_symmetry(self, index: int) -> Symmetry:
        """The symmetry of a model as it was given; it differs from the common frame's in sizes of spaces only."""
        return self.symmetries[index] if self.symmetries else self.symmetry

    @property
    def frame_model(self) -> int:
        """Number of the first model that is of the common frame's widths."""
        return next((i for i, own in enumerate(self.symmetries) if own.shapes == self.symmetry.shapes), 0)

    def between(self, target: int, source: int) -> dict[str, Transform]:
        """The transforms that move model `source` into the own frame of model `target`."""
        back = invert(self.transforms[target], self.symmetry)
        return compose(back, self.transforms[source], self.symmetry)

    def rebased(self, reference: int = 0) -> "Alignment":
        """The same alignment with the common frame moved to model `reference`, which then does not move."""
        moved = tuple(self.between(reference, index) for index in range(len(self)))
        return replace(self, transforms=moved, symmetry=self.own_symmetry(reference))

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
    """A new module: `model`, which is number `index` of the alignment, moved into the common frame.

    Args:
        alignment: What `align` returned.
        model: The model.
        index: Its number.
        module: A model of the common frame's widths, where `model` has others.

    Raises:
        InputError: The alignment has no model of that number, the model is of other widths than the common frame and
            no `module` was given, or an argument is of the wrong kind.
        ModelError: The model is not of the aligned architecture, or a gain cannot be folded.
        TransformError: A transform cannot act exactly (a running variance under a linear map); `merge` can.
    """
    check_kind(alignment, Alignment, "alignment", "apply(alignment, model, index) takes what isthmus.align returned")
    check_kind(model, nn.Module, "model", "apply(alignment, model, index) takes a module")
    check_whole(index, "index")
    if module is not None:
        check_kind(module, nn.Module, "module", "give a model of the common frame's widths")
    if not 0 <= index < len(alignment):
        raise InputError(f"index {index}: the alignment holds models 0 … {len(alignment) - 1}")
    own = alignment.own_symmetry(index)
    if module is None and own.shapes != alignment.symmetry.shapes:
        raise InputError(f"model {index} has other widths than the common frame: give module=, a model of those widths")
    moved = copy.deepcopy(model if module is None else module)
    state = alignment.folded_state(model.state_dict(), index)
    moved.load_state_dict(move_state(state, alignment.transforms[index], own))
    return moved
