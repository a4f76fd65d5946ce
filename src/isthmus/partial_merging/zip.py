"""Zipping: one trunk for several models, and every model's own layers above it, also for different outputs."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from isthmus.data.batches import Data
from isthmus.errors import DataError, InputError, SymmetryError, check_seed
from isthmus.match.aligning import configured_method
from isthmus.match.base import Match, MatchingProblem, match_timed
from isthmus.match.nested import family_of, roots_of
from isthmus.merging.fold import fold_norm_gains
from isthmus.merging.merge import variances_met
from isthmus.observe.given import Inputs, ModelLike, as_own_modules, symmetry_of
from isthmus.partial_merging.cut import Cut, cut_all, restrict, shared_tensors
from isthmus.partial_merging.module import Part, PartialZip, ReadBack, Tensors
from isthmus.state import upcast
from isthmus.symmetry.alignment import Alignment
from isthmus.symmetry.gains import has_diagonal_sites
from isthmus.symmetry.spaces import Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import Permutation, Transform, invert, move_state, site_order


def partial_zip(
    models: Sequence[ModelLike],
    data: Data | None = None,
    stop: str | None = None,
    *,
    method: str | Match = "zipit",
    inputs: Inputs | None = None,
    seed: int = 0,
) -> "PartialZip":
    """One module of several models: a merged trunk up to a space, and every model's own layers from there on.

    The models may differ above the trunk, in their number of classes for instance. BatchNorms of the trunk whose
    statistics linear maps left undefined are measured on the data; the heads' stay as they were, and
    `PartialZip.reset` measures them too.

    Args:
        models: Modules whose spaces below `stop` are the same; state dicts are refused, having no architecture.
        data: Re-iterable batches that every model takes; inputs of all models' tasks are best.
        stop: Name of the first space, in the order of the first model's symmetry, that is not merged any more. None
            merges all spaces: only what lies in no space, such as the last layer's outputs, is every model's own.
        method: A name in `METHODS` or a configured method.
        inputs: Example inputs for tracing, `(x,)` or `x`; by default the first batch.
        seed: Seeds methods that draw random numbers.

    Raises:
        DataError: The method needs data and got none, or statistics are undefined and there is none to measure them on.
        InputError: No models, state dicts, a nested space to stop at, no way to find the symmetry, or an argument of
            the wrong kind.
        ModelError: A model holds NaN or infinite weights.
        SymmetryError: No such space, or a space below it that is another one in some model.
        TraceError: An operation in place writes over what is read across the border of the trunk.

    Source: Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman, ZipIt!, ICLR 2024 (partial zip).
    """
    modules = as_own_modules(models)
    configured = configured_method(method)
    check_seed(seed)
    MatchingProblem(modules, Symmetry((), (), {}), data, seed).require(configured.needs, configured.name)
    symmetries = [symmetry_of(model, None, inputs, data) for model in modules]
    names = _spaces_before(symmetries, stop)
    shared = shared_tensors(symmetries, names)
    cuts = cut_all(symmetries, shared)
    trunks = [restrict(symmetry, names, shared, cut) for symmetry, cut in zip(symmetries, cuts, strict=True)]
    if configured.folds and any(has_diagonal_sites(trunk) for trunk in trunks):
        modules = [fold_norm_gains(model, symmetry) for model, symmetry in zip(modules, symmetries, strict=True)]
    alignment = match_timed(configured, MatchingProblem(modules, trunks[0], data, seed, trunks))
    merged, undefined = _merge_trunk(modules, trunks, alignment)
    parts = [
        Part(symmetry.traced.program, cut, symmetry.traced.batch_norms, _read_back(symmetry, cut, trunk, transforms))
        for symmetry, cut, trunk, transforms in zip(symmetries, cuts, trunks, alignment.transforms, strict=True)
    ]
    heads = [Tensors(model, cut.head_tensors) for model, cut in zip(modules, cuts, strict=True)]
    zipped = PartialZip(parts, Tensors(modules[0], cuts[0].trunk_tensors, merged), heads, alignment)
    if not undefined & cuts[0].trunk_tensors:
        return zipped
    if data is None:
        raise DataError("the trunk's running statistics are undefined after linear maps: give data=")
    return zipped.reset(data)


def _spaces_before(symmetries: Sequence[Symmetry], stop: str | None) -> list[str]:
    """Names of the spaces that are listed before `stop`, with all that is nested in them.

    Raises:
        InputError: `stop` is nested in another space.
        SymmetryError: No such space, or one before it that is another one in some model.
    """
    first = symmetries[0]
    roots = [space.name for space in roots_of(first)]
    if stop is not None:
        space = first[stop]
        if space.name not in roots:
            raise InputError(f"stop={stop!r} is nested in {space.parent}: stop at a space that is nested in none")
        roots = roots[: roots.index(stop)]
    names = {space.name for root in roots for space in family_of(first, first[root])}
    for index, symmetry in enumerate(symmetries[1:], start=1):
        own = {space.name: space for space in symmetry}
        for name in names:
            if name not in own or _measures(own[name]) != _measures(first[name]):
                raise SymmetryError(
                    f"model {index} has no space {name} of {first[name].copies} × {first[name].size} units as the "
                    "first model has: stop at it, or before"
                )
    return [space.name for space in first if space.name in names]


def _measures(space: Space) -> tuple[int, int, str | None]:
    """Size, copies and parent."""
    return space.size, space.copies, space.parent


def _merge_trunk(
    models: Sequence[nn.Module], trunks: Sequence[Symmetry], alignment: Alignment
) -> tuple[dict[str, Tensor], set[str]]:
    """The mean of the shared tensors in the common frame, and the names of the running variances left undefined."""
    merged: dict[str, Tensor] = {}
    undefined = {name for t in alignment.transforms for name in variances_met(t, trunks[0])}
    for model, symmetry, transforms in zip(models, trunks, alignment.transforms, strict=True):
        state = upcast({name: tensor for name, tensor in model.state_dict().items() if name in symmetry.shapes})
        for name, tensor in move_state(state, transforms, symmetry, reset_variances=True).items():
            share = tensor.double() / len(models)
            merged[name] = merged[name] + share if name in merged else share
    for name in undefined:
        merged[name] = torch.ones_like(merged[name])
    return merged, undefined


def _read_back(
    symmetry: Symmetry, parts: Cut, trunk: Symmetry, transforms: Mapping[str, Transform]
) -> dict[str, list[ReadBack]]:
    """How a model reads its units at every node of the border, parents before what is nested in them."""
    inverse = invert(transforms, trunk)
    rank = {space.name: index for index, space in enumerate(trunk)}
    nodes = {node.name: node for node in symmetry.traced.program.graph.nodes}
    found: dict[str, list[ReadBack]] = {}
    for name, places in parts.border.items():
        shape = nodes[name].meta["val"].shape
        found[name] = []
        for space, site in sorted(places, key=lambda place: rank[place[0]]):
            transform = inverse[space]
            indices = _chosen_units(transform)
            length = int(np.prod([shape[d] for d in site.dims]))
            order = None if indices is None else torch.from_numpy(site_order(site, indices, length))
            found[name].append(ReadBack(site, length, order, transform))
    return found


def _chosen_units(transform: Transform) -> Int[np.ndarray, "copies units"] | None:
    """The one merged unit that each own unit reads; None where some read several, or a share."""
    if isinstance(transform, Permutation):
        return transform.indices
    into = transform.into
    single = ((into == 0) | (into == 1)).all() and (into.sum(dim=2) == 1).all()
    return into.argmax(dim=2).numpy() if single and into.shape[1] == into.shape[2] else None
