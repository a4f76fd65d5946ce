"""What became of each unit: does the merged network still hold A's feature, B's, both, or neither?

Scores are correlations over all positions of images, and the overlap of the images that excite units most. They are
measured on other images than those that chose the matching, and each stands beside two floors: the average of the
models as they are, and units that were shuffled.

Suffixes: N models, U units of a space with all its copies, K top images.
"""

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.data.batches import Batch, first_batch
from isthmus.errors import DataError, InputError
from isthmus.explain.moves import SlotMap, correlate, deviations, largest_shares
from isthmus.graph.reader import observe, program_for
from isthmus.merging.fold import fold_norm_gains
from isthmus.observe.collect import check_at, collect
from isthmus.observe.given import as_modules, symmetry_of
from isthmus.observe.moments import Moments, SpaceMoments
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.spaces import Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import LinearMap
from isthmus.wording.short import counted, shortened, told

# Correlation from which a merged unit counts as a model's feature. The mean of two unrelated units has 1/√2 = .71 with
# each of them: a threshold below that would call such a mixture the feature of both.
THRESHOLD = 0.75
SHARED, LOST = "shared", "lost"
# Share of a slot's squared weights from which on one unit counts for most of it.
DOMINANT_SHARE = 0.5
# What the merged network and the naive average are called among the networks that are read.
MERGED, NAIVE = "merged", "naive"


@dataclass(frozen=True, eq=False)
class SpaceFates:
    """The units of one space, in the order of the common frame.

    Attributes:
        space: Its name.
        names: One letter a model.
        threshold: Correlation from which a merged unit counts as a model's feature.
        sources: The unit of each model that stands in each slot. A linear map mixes units: then it is the unit that
            counts most there, and −1 where no unit of the model stands there at all.
        before: Mean correlation, over pairs of models, of units with the same index, as before matching.
        matched: Mean correlation, over pairs of models, of matched units.
        merged: Correlation of the merged unit with each model's.
        naive: Correlation of the naive average's unit with each model's unit of the same index; None where there is no
            naive average.
        shuffled: Correlation of the merged unit with another unit of each model, drawn at random.
        norm_ratio: Standard deviation of the merged unit over the mean of its models'.
        top: For every network, the images that excite each unit most, most first; empty where images mix.
        overlap: Share of those images, of both together, that the merged unit has in common with each model's.
        naive_overlap: The share of images that the naive average's unit has in common with each model's.
        shuffled_overlap: The share that the merged unit has in common with another unit of each model.
        responses: For every network, each unit's mean over positions in every image, in the common frame (the naive
            average in its own).
        moves: How each model's units are moved into the common frame.
    """

    space: str
    names: tuple[str, ...]
    threshold: float
    sources: Int[np.ndarray, "models units"]
    before: Float[Tensor, " units"]
    matched: Float[Tensor, " units"]
    merged: Float[Tensor, "models units"]
    naive: Float[Tensor, "models units"] | None
    shuffled: Float[Tensor, "models units"]
    norm_ratio: Float[Tensor, " units"]
    top: Mapping[str, Int[Tensor, "units top"]] = field(default_factory=dict)
    overlap: Float[Tensor, "models units"] | None = None
    naive_overlap: Float[Tensor, "models units"] | None = None
    shuffled_overlap: Float[Tensor, "models units"] | None = None
    responses: Mapping[str, Float[Tensor, "images units"]] = field(default_factory=dict)
    moves: tuple[SlotMap, ...] = ()

    def __repr__(self) -> str:
        labels = Counter(self.labels)
        kinds = ", ".join(f"{count} {label}" for label, count in labels.most_common())
        return told(self, shortened(self.space), counted(len(self.before), "unit"), kinds or None)

    @property
    def mixes(self) -> bool:
        """Whether linear maps mix the units so that no unit of some model counts for most of a slot, in the median."""
        return any(
            move.matrix is not None and float(largest_shares(move.matrix).median()) < DOMINANT_SHARE
            for move in self.moves
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """For each unit: `"shared"` by all models, those whose it is (`"A's"`, `"A's and C's"`), or `"lost"`."""
        return _label(self.merged, self.names, self.threshold)

    @property
    def naive_labels(self) -> tuple[str, ...]:
        """The same for the naive average; empty without it."""
        return () if self.naive is None else _label(self.naive, self.names, self.threshold)


def _label(correlations: Float[Tensor, "models units"], names: Sequence[str], threshold: float) -> tuple[str, ...]:
    """Whose feature each unit is: every model's with which its correlation reaches the threshold."""
    told = []
    for column in (correlations >= threshold).T.tolist():
        whose = [f"{name}'s" for name, holds in zip(names, column, strict=True) if holds]
        told.append(SHARED if len(whose) == len(names) else " and ".join(whose) or LOST)
    return tuple(told)


@dataclass(frozen=True, eq=False)
class UnitFates:
    """The units of all spaces.

    Attributes:
        spaces: By name, in the order of the symmetry.
        skipped: Why a space has none.
        moments: What was measured, of all models as they are, then the merged network, then the naive average.
        images: How many images were read.
    """

    spaces: Mapping[str, SpaceFates]
    skipped: Mapping[str, str]
    moments: Moments
    images: int

    def __repr__(self) -> str:
        skipped = f"{len(self.skipped)} skipped" if self.skipped else None
        return told(self, counted(len(self.spaces), "space"), counted(self.images, "image"), skipped)


def measure_units(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    alignment: Alignment,
    merged: nn.Module,
    data: Any,
    *,
    naive: nn.Module | None = None,
    at: str = "pre",
    threshold: float = THRESHOLD,
    top: int = 9,
    seed: int = 0,
    module: nn.Module | None = None,
) -> UnitFates:
    """What became of every unit that was matched, on data that should not have chosen the matching.

    Args:
        models: The models that were merged.
        alignment: What `align` returned for them.
        merged: The merged network, in the common frame; repaired, if it needs it.
        data: Re-iterable batches to score on; targets are not used.
        naive: The average of the models as they are, repaired as `merged` was: a floor for every score.
        at: `"pre"` reads units before their nonlinearity, where silent units tell too; `"post"` what consumers receive.
        threshold: Correlation from which a merged unit counts as a model's feature.
        top: How many top images are compared.
        seed: Draws the other units of the shuffled floor.
        module: The architecture, where all models are state dicts.

    Raises:
        DataError: No data, empty data, or data that can be read only once; fewer images than `top`.
        InputError: The alignment is of another number of models, or of models of several widths; a threshold that is no
            correlation, or `top` below 1.
        ModelError: The models are not of one architecture, or hold NaN or infinite weights.

    Source: the questions are those of Zou et al., UniReps 2024 (feature visualisations of merged networks); scores and
        thresholds are this project's own.
    """
    check_at(at)
    if not 0 < threshold < 1 or top < 1:
        raise InputError(f"threshold={threshold}, top={top}: give a correlation between 0 and 1, and 1 image or more")
    modules = as_modules(models, module)
    if len(alignment) != len(modules):
        raise InputError(f"{len(modules)} models, but the alignment holds {len(alignment)}: give the aligned models")
    if alignment.symmetries:
        raise InputError("models of several widths have no unit for every unit: compare them by cka")
    if len(modules) > len(string.ascii_uppercase):
        raise InputError(f"{len(modules)} models: units can be told for {len(string.ascii_uppercase)} at most")
    symmetry = symmetry_of(modules[0], alignment.symmetry, None, data)
    networks = [*modules, merged, *([] if naive is None else [naive])]
    if alignment.folded:  # the frame is the folded models': gains would tell in how far units vary
        networks = [fold_norm_gains(network, symmetry) for network in networks]
        modules = networks[: len(modules)]
    moments = collect(networks, symmetry, data, at=at)
    if top > moments.samples:
        raise DataError(f"top={top} of {moments.samples} images: give more data")
    names = tuple(string.ascii_uppercase[: len(modules)])
    called = [*names, MERGED, *([] if naive is None else [NAIVE])]
    answers = {
        name: _respond_everywhere(network, symmetry, data, at) for name, network in zip(called, networks, strict=True)
    }
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, SpaceFates] = {}
    skipped: dict[str, str] = {}
    for space in symmetry:
        if space.name not in moments.spaces:
            skipped[space.name] = "no activations stand for it"
            continue
        held = [child.name for child in symmetry.children(space)]
        if any(isinstance(transforms[name], LinearMap) for transforms in alignment.transforms for name in held):
            skipped[space.name] = "what stands for its units is a sum of units that a linear map mixes"
            continue
        moves = [SlotMap.of(transforms, symmetry, space) for transforms in alignment.transforms]
        responses = {name: each[space.name].double() for name, each in answers.items() if space.name in each}
        for name, move in zip(names, moves, strict=True):
            if name in responses:
                responses[name] = move.of_columns(responses[name])
        found[space.name] = _measure_space(
            space, moments[space.name], moves, names, responses, naive is not None, threshold, top, generator
        )
    return UnitFates(found, skipped, moments, moments.samples)


def _measure_space(
    space: Space,
    moments: SpaceMoments,
    moves: Sequence[SlotMap],
    names: tuple[str, ...],
    responses: Mapping[str, Float[Tensor, "images units"]],
    has_naive: bool,
    threshold: float,
    top: int,
    generator: torch.Generator,
) -> SpaceFates:
    """The scores of one space's units."""
    count, units = len(names), space.copies * space.size
    still = SlotMap(torch.arange(units), None)
    other = _derangement(units, generator)
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    one = torch.ones(units, dtype=torch.float64)
    before = [correlate(moments, a, still, b, still) for a, b in pairs] or [one]
    matched = [correlate(moments, a, moves[a], b, moves[b]) for a, b in pairs] or [one]
    merged = [correlate(moments, index, move, count, still) for index, move in enumerate(moves)]
    shuffled = [correlate(moments, index, move.then(other), count, still) for index, move in enumerate(moves)]
    naive = [correlate(moments, index, still, count + 1, still) for index in range(count)] if has_naive else []
    own = moments.deviation[count]
    theirs = torch.stack([deviations(moments, index, move) for index, move in enumerate(moves)]).mean(dim=0)
    known = SpaceFates(
        space=space.name,
        names=names,
        threshold=threshold,
        sources=np.stack([move.sources.numpy() for move in moves]),
        before=torch.stack(before).mean(dim=0),
        matched=torch.stack(matched).mean(dim=0),
        merged=torch.stack(merged),
        naive=torch.stack(naive) if has_naive else None,
        shuffled=torch.stack(shuffled),
        norm_ratio=torch.where(
            theirs > 0, own / theirs.clamp_min(torch.finfo(theirs.dtype).tiny), torch.ones_like(own)
        ),
        moves=tuple(moves),
    )
    if MERGED not in responses:
        return known
    best = {name: answer.topk(top, dim=0).indices.T for name, answer in responses.items()}
    bare = {name: moves[index].undone(responses[name]).topk(top, dim=0).indices.T for index, name in enumerate(names)}
    parts = {
        "overlap": torch.stack([_overlap(best[MERGED], best[name]) for name in names]),
        "shuffled_overlap": torch.stack([_overlap(best[MERGED], best[name][other]) for name in names]),
    }
    if has_naive:
        parts["naive_overlap"] = torch.stack([_overlap(best[NAIVE], bare[name]) for name in names])
    return SpaceFates(**{**vars(known), **parts, "top": best, "responses": responses})


def _derangement(units: int, generator: torch.Generator) -> Int[Tensor, " units"]:
    """A random order in which no unit keeps its place, where there are two or more: a walk around one random circle."""
    circle = torch.randperm(units, generator=generator)
    order = torch.empty_like(circle)
    order[circle] = circle.roll(1)
    return order


def _overlap(first: Int[Tensor, "units top"], second: Int[Tensor, "units top"]) -> Float[Tensor, " units"]:
    """The size of the intersection of two sets of images over the size of their union, unit by unit."""
    common = (first[:, :, None] == second[:, None, :]).any(dim=2).sum(dim=1).double()
    return common / (2 * first.shape[1] - common)


def _respond_everywhere(
    model: nn.Module, symmetry: Symmetry, data: Any, at: str
) -> dict[str, Float[Tensor, "images units"]]:
    """Every space's units on every image, as their mean over positions, in one pass.

    A space that is read at several nodes, such as a residual stream, is read at the last. Spaces at whose node the
    images of a batch lie along no dimension of their own are left out.
    """
    graph = symmetry.traced
    first, second = (graph.pre, graph.post) if at == "pre" else (graph.post, graph.pre)
    order = {node.name: index for index, node in enumerate(graph.program.graph.nodes)}
    nodes = {
        space.name: max(first.get(space.name) or second.get(space.name) or (), key=order.__getitem__, default=None)
        for space in symmetry
    }
    dims = _image_dimensions(symmetry, {node for node in nodes.values() if node is not None}, first_batch(data))
    places: dict[str, list[tuple[str, list[Site]]]] = {}
    for space in symmetry:
        node = nodes[space.name]
        if node in dims:
            sites = [site for name, site in graph.activations[node] if name == space.name]
            places.setdefault(node, []).append((space.name, sites))
    answers: dict[str, list[Tensor]] = {}

    def keep(node: str, value: Tensor) -> None:
        for name, sites in places[node]:
            answers.setdefault(name, []).append(means_of_units(value, sites, dims[node]).cpu())

    observers = {node: partial(keep, node) for node in places}
    observe(graph.program, dict(model.state_dict()), data, observers, "reading units")
    return {name: torch.cat(parts) for name, parts in answers.items()}


def _image_dimensions(symmetry: Symmetry, nodes: set[str], batch: Batch) -> dict[str, int]:
    """The dimension of each node's value along which the inputs of a batch lie, where there is just one."""
    if batch.size < 2:
        return {}
    sizes = (batch.size, batch.size - 1) if batch.size > 2 else (2, 1)
    shapes = []
    for size in sizes:
        program = program_for(symmetry.traced.program, batch.head(size))
        shapes.append({n.name: tuple(n.meta["val"].shape) for n in program.graph.nodes if n.name in nodes})
    found = {}
    for node in nodes:
        a, b = shapes[0][node], shapes[1][node]
        changed = [dim for dim in range(len(a)) if len(a) == len(b) and a[dim] != b[dim]]
        if len(changed) == 1 and (a[changed[0]], b[changed[0]]) == sizes:
            found[node] = changed[0]
    return found


def means_of_units(value: Tensor, sites: Sequence[Site], batch_dim: int) -> Float[Tensor, "images units"]:
    """Every unit's mean over its positions, in every image."""
    answers = []
    for site in sites:
        rest = [dim for dim in range(value.ndim) if dim != batch_dim and dim not in site.dims]
        rows = value.permute(batch_dim, *rest, *site.dims)
        places = int(np.prod([value.shape[dim] for dim in site.dims]))
        rows = rows.reshape(value.shape[batch_dim], -1, places).mean(dim=1)
        copies, size, repeat = site.positions.shape
        positions = torch.from_numpy(site.positions.reshape(copies * size, repeat)).to(rows.device)
        answers.append(rows[:, positions].mean(dim=2))
    return torch.stack(answers).mean(dim=0)
