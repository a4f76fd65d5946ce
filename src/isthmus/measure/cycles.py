"""Whether matchings of several models fit together: what is lost around triangles, and lines between moved models."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from isthmus.data.batches import Data, check_data
from isthmus.errors import InputError, check_kind, check_seed
from isthmus.match.aligning import configured_method
from isthmus.match.base import Match, MatchingProblem, match_folded
from isthmus.measure.connect import Curve, check_points, check_reset, connect_checked
from isthmus.observe.given import ModelLike, as_modules, check_mixed, check_models, check_symmetry, symmetry_of
from isthmus.progress import progress
from isthmus.registry import spell
from isthmus.symmetry.alignment import Alignment, apply
from isthmus.symmetry.spaces import Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, Transforms, as_matrix, compose, flat_indices
from isthmus.wording.short import counted, figure, shortened, told

Triangle = tuple[int, int, int]


@dataclass(frozen=True)
class CycleError:
    """How far from the identity pairwise matchings end when they are composed around every triangle of models.

    Attributes:
        method: Name of the matching method.
        triangles: Three models in the order in which they are walked, a → b → c → a: every three of them, both ways
            round. From another corner on, the same share is lost.
        lost: Per space and triangle, the share of units, over all copies, that do not come back to their place, where
            all maps are permutations.
        distances: Per space and triangle, ‖T − I‖_F / √n of the composed map T over the n units of all copies; for
            permutations that is √2 times the root of the share lost.
    """

    method: str
    triangles: tuple[Triangle, ...]
    lost: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    distances: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        triangles = counted(len(self.triangles), "triangle")
        lost, distance = f"share lost {figure(self.share_lost)}", f"distance {figure(self.distance)}"
        return told(self, shortened(self.method), triangles, lost, distance)

    @property
    def share_lost(self) -> float:
        """The mean share of units lost, over triangles and spaces; NaN where nothing is a permutation."""
        return _mean_of(self.lost)

    @property
    def distance(self) -> float:
        """The mean distance from the identity, over triangles and spaces; NaN where nothing can move."""
        return _mean_of(self.distances)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values; what was not measured is None."""
        means = {"share_lost": self.share_lost, "distance": self.distance}
        return {
            "method": self.method,
            "triangles": [list(triangle) for triangle in self.triangles],
            "lost": {name: list(values) for name, values in self.lost.items()},
            "distances": {name: list(values) for name, values in self.distances.items()},
            **{name: None if math.isnan(value) else value for name, value in means.items()},
        }


def _mean_of(values: Mapping[str, Sequence[float]]) -> float:
    """The mean of all values; NaN if there are none."""
    every = list(itertools.chain.from_iterable(values.values()))
    return math.fsum(every) / len(every) if every else float("nan")


def cycle_error(
    models: Sequence[ModelLike],
    symmetry: Symmetry,
    method: str | Match = "weight_matching",
    data: Data | None = None,
    seed: int = 0,
    *,
    module: nn.Module | None = None,
) -> CycleError:
    """Matches all ordered pairs of models on their own and composes the maps around every triangle.

    The map from a to b and that from b to a are found independently too, and each triangle is walked both ways round.
    Matching all models at once, into one frame, leaves no error by construction; this tells how much of the pairwise
    matchings such a frame has to contradict.

    Args:
        models: Three or more modules or state dicts of one architecture.
        symmetry: What `trace` returned for it.
        method: A name in `METHODS`, or a configured method.
        data: Re-iterable batches, for methods that need them.
        seed: Seeds every matching.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: The method needs data and got none it can use.
        InputError: Fewer than three models, an unknown method, or an argument of the wrong kind.
        ModelError: The models are not of one architecture, hold NaN or infinite weights, or have a norm whose gain
            cannot be folded, which a method that uses linear maps needs.
        SymmetryError: The symmetry is of another architecture.
    """
    check_models(models)
    if len(models) < 3:
        raise InputError(f"{len(models)} models: a cycle needs three at least")
    configured = configured_method(method)
    check_seed(seed)
    if data is not None:
        check_data(data)
    modules = as_modules(models, module)
    MatchingProblem(modules, Symmetry((), (), {}), data, seed).require(configured.needs, configured.name)
    symmetry = symmetry_of(modules[0], symmetry, None, data)
    name = method if isinstance(method, str) else spell(method)
    # found[a, b] moves model a into the own frame of model b.
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for a, b in progress(list(itertools.permutations(range(len(modules)), 2)), f"{name}, all ordered pairs"):
        pair = MatchingProblem([modules[b], modules[a]], symmetry, data, seed)
        found[a, b] = match_folded(configured, pair).between(0, 1)
    lost: dict[str, list[float]] = {}
    distances: dict[str, list[float]] = {}
    threes = itertools.combinations(range(len(modules)), 3)
    triangles = tuple(walk for a, b, c in threes for walk in ((a, b, c), (a, c, b)))
    for a, b, c in triangles:
        around = compose(found[c, a], compose(found[b, c], found[a, b], symmetry), symmetry)
        for space in symmetry:
            if isinstance(around[space.name], Permutation):
                share = _share_lost(around, symmetry, space)
                lost.setdefault(space.name, []).append(share)
                distances.setdefault(space.name, []).append(math.sqrt(2 * share))
            else:
                distances.setdefault(space.name, []).append(_distance_from_identity(around, symmetry, space))
    return CycleError(
        name,
        triangles,
        {space: tuple(values) for space, values in lost.items()},
        {space: tuple(values) for space, values in distances.items()},
    )


def _share_lost(transforms: Transforms, symmetry: Symmetry, space: Space) -> float:
    """The share of a space's units, over all copies, that a permutation does not leave in their place."""
    where = flat_indices(transforms, symmetry, space)
    return float(np.mean(where != np.arange(len(where))))


def _distance_from_identity(transforms: Transforms, symmetry: Symmetry, space: Space) -> float:
    """‖T − I‖_F / √n of a space's linear map, over the units of all copies, with its parents' moves included."""
    into = as_matrix(transforms[space.name]).into.double()
    copies, _, units = into.shape
    rows = np.arange(copies)
    if space.parent is not None:
        rows = flat_indices(transforms, symmetry, symmetry[space.parent])
    same = torch.from_numpy(rows == np.arange(copies)).to(into.device)
    # A copy that stands in another one's slot overlaps with the identity nowhere.
    inside = (into - torch.eye(units, dtype=into.dtype, device=into.device)).square().sum(dim=(1, 2))
    outside = into.square().sum(dim=(1, 2)) + units
    return math.sqrt(float(torch.where(same, inside, outside).sum()) / (copies * units))


def pairwise_barriers(
    models: Sequence[ModelLike],
    alignment: Alignment,
    data: Data | None = None,
    calibration: Data | None = None,
    points: int = 11,
    *,
    repair: str | None = "reset",
    module: nn.Module | None = None,
) -> dict[tuple[int, int], Curve]:
    """The line between every two of the moved models, by their numbers.

    Matching B and C to A brings each near A; whether B and C, moved, are near each other too was not asked for. If they
    are, all three lie in one basin.

    Args:
        models: The aligned models, in order.
        alignment: What `align` returned for them.
        data: Labelled batches to score on.
        calibration: Training data for BatchNorm statistics, never the data that is scored on.
        points: How many λ along each line.
        repair: As in `connect`.
        module: The architecture, where all models are state dicts.

    Returns:
        A `Curve` for every pair of numbers a < b; `.barrier` is its barrier.

    Raises:
        DataError: Data that cannot be used, or no `calibration` for a network with BatchNorm.
        InputError: Fewer than two models, not as many as were aligned, or an argument of the wrong kind.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights; or a moved model, or a mix
            of two, does.
        SymmetryError: The alignment is of another architecture.
        TransformError: A transform cannot act exactly (a running variance under a linear map).

    Source: Ito, Yamada, Kumagai, Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching, ICLR 2025,
        whose test on three models this is.
    """
    check_models(models)
    check_kind(alignment, Alignment, "alignment", "give what isthmus.align returned for these models")
    if len(models) < 2 or len(models) != len(alignment):
        raise InputError(
            f"{len(models)} models, and an alignment of {len(alignment)}: give the aligned models, two at least"
        )
    check_points(points, "a line needs its two ends at least")
    check_data(data)
    modules = as_modules(models, module)
    check_symmetry(alignment.symmetry, modules[0])
    resets = check_reset(modules[0], repair, calibration)
    moved = [apply(alignment, model, index) for index, model in enumerate(modules)]
    for model in moved:
        check_mixed(model)
    pairs = list(itertools.combinations(range(len(moved)), 2))
    return {
        (a, b): connect_checked(moved[a], moved[b], data, points, calibration if resets else None)
        for a, b in progress(pairs, "walking all lines")
    }
