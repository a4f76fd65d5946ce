"""Reducing labels: what remains of units along axes that an operation sums over, blocks of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from isthmus.tracing.labels import Value, compress, simplify, support
from isthmus.tracing.units import WILDCARD, Ids, Labels, UnitTable, broadcast_to_support, scramble


def reduce(units: UnitTable, value: Value, dims: Sequence[int], *, keepdim: bool = False) -> Value:
    """The value of a symmetric reduction (sum, mean, maximum, …) over `dims`.

    A sum over a whole layer leaves nothing of it. A sum over a part leaves a unit for each set of units that it summed.

    Example:
        Four channels in two groups, summed inside each group:

        >>> units = UnitTable()
        >>> channels = Value((2, 2), (units.fresh(4).reshape(2, 2),))
        >>> reduce(units, channels, [0, 1]).layers
        ()
        >>> reduce(units, channels, [1]).layers
        (array([4, 5]),)
        >>> units.relations  # the channels are inside the two groups that remain
        [(array([0, 1, 2, 3]), array([4, 4, 5, 5]))]
    """
    ndim = len(value.shape)
    gone = {d % ndim for d in dims} if ndim else set()
    kept = [d for d in range(ndim) if d not in gone]
    layers: list[Labels] = []
    for layer in value.layers:
        touched = set(support(layer))
        if touched <= gone:
            continue
        partners = _entangled(units, layer, value.layers, gone)
        if partners:
            # Rows of a table of relative positions, for example, meet fixed positions and remain at fixed ones: nothing
            # is lost. Where they remain at others, such as neighbours on a circle, some of these might move.
            fixed = {d for one in value.layers if units.is_frozen(one).all() for d in support(one)}
            left = {d for one in (layer, *partners) for d in support(one)} - gone
            fixed_partners = units.is_frozen(layer).all() or all(units.is_frozen(one).all() for one in partners)
            nothing_lost = bool(fixed_partners) and left <= fixed
            for one in (layer, *partners):
                units.freeze(one, "a reduction over units that meet others in a pattern", expected=nothing_lost)
            places = tuple(1 if d in gone else size for d, size in enumerate(layer.shape))
            layers.append(units.rigid(math.prod(places)).reshape(places))
        else:
            layers.append(_reduce_layer(units, layer, sorted(gone)) if touched & gone else layer)
    if keepdim:
        shape = tuple(1 if d in gone else size for d, size in enumerate(value.shape))
    else:
        shape = tuple(value.shape[d] for d in kept)
        layers = [layer.reshape([layer.shape[d] for d in kept]) for layer in layers]
    return Value(shape, simplify(units, [layer for layer in layers if support(layer)]))


def _entangled(units: UnitTable, layer: Labels, layers: Sequence[Labels], gone: set[int]) -> list[Labels]:
    """The layers whose units meet units of `layer` along a reduction's axes, at one place some and at another others.

    Each layer is reduced on its own. That is right only if units of one layer meet, at every place, all units of the
    other layer that they meet anywhere.
    """
    found = []
    for other in layers:
        if other is not layer and set(support(layer)) & set(support(other)) & gone:
            a, b = (units.find(x) for x in broadcast_to_support([layer, other]))
            shape = np.broadcast_shapes(layer.shape, other.shape)
            kept = [1 if d in gone else size for d, size in enumerate(shape)]
            place = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape).ravel()
            if not _meet_alike(a, b, place):
                found.append(other)
    return found


def _meet_alike(a: Ids, b: Ids, place: Ids) -> bool:
    """Whether at each place all pairs of labels occur that occur anywhere between the labels found there."""
    pairs, index = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
    a_ids, a_index = np.unique(pairs[0], return_inverse=True)
    b_ids, b_index = np.unique(pairs[1], return_inverse=True)
    nodes = len(a_ids) + len(b_ids)
    graph = coo_matrix((np.ones(pairs.shape[1]), (a_index, len(a_ids) + b_index)), shape=(nodes, nodes))
    count, member = connected_components(graph, directed=False)
    group = place * count + member[a_index[index.ravel()]]
    alone, other, both = (
        np.bincount(np.unique(np.stack([group, *x]), axis=1)[0], minlength=int(group.max()) + 1)
        for x in ((a,), (b,), (a, b))
    )
    return bool((both == alone * other).all())


def _reduce_layer(units: UnitTable, layer: Labels, dims: Sequence[int]) -> Labels:
    """The labels of the blocks that remain when a layer is reduced over some of the dimensions that it varies along."""
    kept_shape = tuple(1 if d in dims else size for d, size in enumerate(layer.shape))
    kept_index = np.broadcast_to(np.arange(int(np.prod(kept_shape))).reshape(kept_shape), layer.shape).ravel()
    label = units.find(layer.ravel())
    known = label != WILDCARD
    if units.is_frozen(label[known]).all():
        content = np.zeros(int(np.prod(kept_shape)), dtype=np.uint64)  # equal where the same labels are reduced
        with np.errstate(over="ignore"):
            np.add.at(content, kept_index, scramble(label.astype(np.uint64)))
        _, index = np.unique(content, return_inverse=True)
        return compress(units.rigid(int(index.max()) + 1)[index].reshape(kept_shape))
    pairs, times = np.unique(np.stack([label[known], kept_index[known]]), axis=1, return_counts=True)
    ids, label_index = np.unique(pairs[0], return_inverse=True)
    places, place_index = np.unique(pairs[1], return_inverse=True)
    nodes = len(ids) + len(places)
    graph = coo_matrix((np.ones(pairs.shape[1]), (label_index, len(ids) + place_index)), shape=(nodes, nodes))
    count, member = connected_components(graph, directed=False)
    labels_in = np.bincount(member[: len(ids)], minlength=count)
    places_in = np.bincount(member[len(ids) :], minlength=count)
    component = member[label_index]
    complete = np.bincount(component, minlength=count) == labels_in * places_in
    usual = np.zeros(len(ids), dtype=np.int64)
    usual[label_index] = times
    complete[component[times != usual[label_index]]] = False  # a unit counts more at one place than at another
    out = np.full(int(np.prod(kept_shape)), WILDCARD)
    place_component = member[len(ids) :]
    if not complete.all():
        broken = ids[~complete[member[: len(ids)]]]
        units.freeze(broken, "a reduction over overlapping sets of units", expected=False)
        lost = places[~complete[place_component]]
        out[lost] = units.rigid(len(out))[lost]
    if complete.all() and count == 1 and len(places) == len(out):
        return out.reshape(kept_shape)[(slice(0, 1),) * len(kept_shape)]  # every block holds the same units
    block = units.fresh(count)
    single = labels_in == 1
    owner = np.zeros(count, dtype=np.int64)
    owner[member[: len(ids)]] = ids
    block = np.where(single, owner, block)
    chosen = complete[member[: len(ids)]] & ~single[member[: len(ids)]]
    if chosen.any():
        units.relations.append((ids[chosen], block[member[: len(ids)][chosen]]))
    fine = complete[place_component]
    out[places[fine]] = block[place_component[fine]]
    return compress(out.reshape(kept_shape))


def pin(units: UnitTable, value: Value, dims: Sequence[int], text: str) -> Value:
    """The value with `dims` reduced to size 1 after fixing what lies along them."""
    gone = {d % len(value.shape) for d in dims}
    for layer in value.layers:
        along = set(support(layer))
        if along and along <= gone:
            units.freeze(layer, text)
        elif along & gone:
            shape = tuple(size if d in gone else 1 for d, size in enumerate(layer.shape))
            units.relate(layer, units.rigid(int(np.prod(shape))).reshape(shape))
    return replace(reduce(units, value, sorted(gone), keepdim=True), source=value.source)
