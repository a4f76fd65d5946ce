"""Labels: which unit sits at each position of a traced value, and what combining two values says about units.

Every index of every parameter dimension is a *unit* with an integer id. A value has *layers*: integer arrays
of unit ids, broadcastable to its shape. Together the layers identify a position: two positions with the same labels
hold the same number. A symmetry moves units, and with them the positions that they label; so wherever two labels meet
on one axis, the pairs that occur there must move to pairs that occur there. `UnitTable.relate` draws the conclusions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from isthmus.tracing.units import WILDCARD, Ids, Labels, UnitTable, broadcast_to_support


@dataclass(frozen=True, eq=False)
class Names:
    """What the numbers in a tensor of indices mean.

    Attributes:
        ids: Number k names unit `ids[k]`.
        history: Which indices they are: tensors of one history are equal.
    """

    ids: Ids
    history: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A traced tensor.

    Attributes:
        shape: Its concrete shape.
        layers: Label arrays with as many dimensions as the value, each of size 1 where the labels do not vary.
        constant: Its numbers, where they do not depend on parameters or inputs.
        source: The parameter that it is a view of, if it is one.
        names: The units that its numbers name, where it holds indices of units.
    """

    shape: tuple[int, ...]
    layers: tuple[Labels, ...] = ()
    constant: Tensor | None = None
    source: str | None = None
    names: Names | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """A tensor whose slots each hold one of several alternatives, and data choose which.

    Attributes:
        values: The tensor, were the same alternative chosen everywhere.
        where: A value of the same shape whose one layer numbers the slots.
        history: Which choice it is: choices of one history choose alike in each slot.
    """

    values: tuple[Value, ...]
    where: Value
    history: tuple[str, ...]


def support(layer: Labels) -> tuple[int, ...]:
    """The dimensions along which a layer varies."""
    return tuple(d for d, size in enumerate(layer.shape) if size > 1)


def compress(layer: Labels) -> Labels:
    """The layer with every dimension along which it is constant reduced to size 1."""
    for d, size in enumerate(layer.shape):
        if size > 1:
            first = layer.take([0], axis=d)
            if (layer == first).all():
                layer = first
    return np.ascontiguousarray(layer)


def lift(layer: Labels, ndim: int) -> Labels:
    """The layer with leading dimensions of size 1 added until it has `ndim`."""
    return layer.reshape((1,) * (ndim - layer.ndim) + layer.shape)


def simplify(units: UnitTable, layers: Sequence[Labels], *, related: bool = False) -> tuple[Labels, ...]:
    """The layers without those that another layer determines.

    What follows from two layers on one axis is drawn before one of them goes, unless that was done (`related`).
    """
    dims = [d for layer in layers for d in support(layer)]
    if len(dims) == len(set(dims)) and all(map(support, layers)):
        return tuple(layers)  # none says anything about another's dimensions
    layers = _without_joint(units, _join_fixed(units, list(layers)), related=related)
    if len(layers) < 2:
        return tuple(layers)
    roots = [units.find(layer) for layer in layers]
    supports = [set(support(layer)) for layer in layers]
    wild = [int((layer == WILDCARD).sum()) for layer in layers]
    distinct = [len(np.unique(root)) for root in roots]
    # Coarse layers and those with wildcards are tried for removal first, so that the telling ones stay.
    order = sorted(range(len(layers)), key=lambda k: (wild[k] == 0, distinct[k], -k))
    alive = set(range(len(layers)))
    for k in order:
        for other in sorted(alive - {k}):
            if supports[k] <= supports[other] and _determines(roots[other], roots[k], distinct[other], units.size):
                if not related:
                    units.relate(layers[other], layers[k])
                alive.remove(k)
                break
    return tuple(layers[k] for k in sorted(alive))


def _without_joint(units: UnitTable, layers: list[Labels], *, related: bool) -> list[Labels]:
    """The layers without those that a layer of units and a layer of fixed positions determine together.

    A layer over units and positions whose every unit is inside of one unit of another layer, itself told apart on
    axes of its own, says only which part of the fixed positions each of its units stands for. That is known of the
    units once they are related; the array, which is as large as both axes together, is not needed any more.
    """
    for joint in [layer for layer in layers if len(support(layer)) > 1]:
        dims = set(support(joint))
        others = [x for x in layers if x is not joint and support(x) and set(support(x)) < dims]
        fixed = [x for x in others if units.is_frozen(x).all() and _tells_apart(units, x)]
        for whole in others:
            rest = dims - set(support(whole))
            place = next((x for x in fixed if set(support(x)) == rest), None)
            if place is None or not _tells_apart(units, whole):
                continue
            root = units.find(joint)
            if _determines(root, units.find(whole), len(np.unique(root)), units.size):
                if not related:
                    units.relate(joint, whole)
                    units.relate(joint, place)
                layers = [x for x in layers if x is not joint]
                break
    return layers


def _tells_apart(units: UnitTable, layer: Labels) -> bool:
    """Whether no two positions of a layer have the same label."""
    root = units.find(layer)
    return len(np.unique(root)) == root.size and not (root == WILDCARD).any()


def _join_fixed(units: UnitTable, layers: list[Labels]) -> list[Labels]:
    """The layers, with layers of fixed positions that overlap joined into one."""
    fixed = [layer for layer in layers if units.is_frozen(layer).all()]
    others = [layer for layer in layers if not any(layer is x for x in fixed)]
    while fixed:
        one = fixed.pop(0)
        partner = next((x for x in fixed if set(support(x)) & set(support(one))), None)
        if partner is None:
            others.append(one)
        else:
            fixed = [x for x in fixed if x is not partner]
            fixed.append(_join(units, [one, partner]))
    return others


def _determines(fine: Labels, coarse: Labels, distinct: int, size: int) -> bool:
    """Whether each label of `fine` occurs with one label of `coarse` only."""
    if fine.shape == coarse.shape and np.array_equal(fine, coarse):
        return True
    a, b = broadcast_to_support([fine, coarse])
    return len(np.unique((a + 1) * (size + 1) + (b + 1))) == distinct


def one_to_one(units: UnitTable, left: Labels, right: Labels) -> bool:
    """Whether two layers tell the same positions apart, all of them."""
    if left.shape != right.shape:
        return False
    a, b = units.find(left).ravel(), units.find(right).ravel()
    pairs = np.unique(np.stack([a, b]), axis=1)
    return bool((pairs != WILDCARD).all()) and pairs.shape[1] == len(np.unique(a)) == len(np.unique(b))


def combine(units: UnitTable, values: Sequence[Value]) -> Value:
    """The value of an elementwise operation: shapes broadcast, layers that meet are related.

    Example:
        Two samples of three channels, and a bias that is added to them:

        >>> units = UnitTable()
        >>> channels = Value((2, 3), (units.fresh(3).reshape(1, 3),))
        >>> bias = as_parameter(units, "bias", (3,))
        >>> bias.layers
        (array([3, 4, 5]),)
        >>> out = combine(units, [channels, bias])
        >>> out.shape, out.layers
        ((2, 3), (array([[0, 1, 2]]),))
        >>> units.find(bias.layers[0])  # each entry of the bias is now the channel that it is added to
        array([0, 1, 2])
    """
    shape = tuple(np.broadcast_shapes(*(value.shape for value in values)))
    merged: list[Labels] = []
    for value in values:
        incoming = [lift(layer, len(shape)) for layer in value.layers]
        for new in incoming:
            for old in merged:
                if set(support(new)) & set(support(old)):
                    units.relate(old, new)
        merged += incoming
    for layer in merged:
        if len(support(layer)) > 1 and not units.is_frozen(layer).all():
            _relate_jointly(units, layer, [x for x in merged if x is not layer])
    return Value(shape, simplify(units, merged, related=True))


def _relate_jointly(units: UnitTable, layer: Labels, others: Sequence[Labels]) -> None:
    """Draws what follows from a layer and several others that lie along different axes of it, taken together.

    A bias for each distance between two positions meets every first and every second position: pair by pair nothing
    follows, and yet each unit belongs to certain pairs of positions.
    """
    inner = [x for x in others if support(x) and set(support(x)) < set(support(layer))]
    fixed = [x for x in inner if units.is_frozen(x).all()]
    if len(fixed) > 1:
        places = _join(units, fixed)
        if units.is_news(np.concatenate([units.find(x).ravel() for x in (layer, places)])):
            units.relate(layer, places)
    free = [x for x in inner if not units.is_frozen(x).all()]
    axes = [d for x in (*free, *fixed) for d in support(x)]
    if not free or len(free) + len(fixed) < 2 or len(set(axes)) < len(axes):
        return
    roots = [units.find(x) for x in (layer, *free, *fixed)]
    if units.is_news(np.concatenate([root.ravel() for root in roots])) and not _is_rectangular(roots):
        text = "units of several axes meet in a pattern that no permutation of one of them keeps"
        units.freeze(np.concatenate([root.ravel() for root in roots]), text, expected=False)


def _is_rectangular(roots: Sequence[Labels]) -> bool:
    """Whether each label of the first layer meets all combinations of those labels of the others that it meets."""
    first, *others = broadcast_to_support(roots)
    ids, label = np.unique(first, return_inverse=True)
    expected = np.ones(len(ids), dtype=np.int64)
    cell = np.zeros(len(first), dtype=np.int64)
    for other in others:
        found, index = np.unique(other, return_inverse=True)
        pairs = np.unique(label * len(found) + index)
        expected *= np.bincount(pairs // len(found), minlength=len(ids))
        _, cell = np.unique(cell * len(found) + index, return_inverse=True)
    cells = int(cell.max(initial=0)) + 1
    met = np.bincount(np.unique(label * cells + cell) // cells, minlength=len(ids))
    return bool((met == expected)[ids != WILDCARD].all())


def rigid_value(units: UnitTable, shape: Sequence[int]) -> Value:
    """A value whose every position is fixed."""
    return Value(tuple(shape), rigid_layers(units, shape, range(len(shape))))


def rigid_layers(units: UnitTable, shape: Sequence[int], dims: Sequence[int]) -> tuple[Labels, ...]:
    """One layer of fixed positions for each of `dims`."""
    layers = []
    for d in dims:
        if shape[d] > 1:
            layout = [1] * len(shape)
            layout[d] = shape[d]
            layers.append(units.rigid(shape[d]).reshape(layout))
    return tuple(layers)


def constant_value(units: UnitTable, tensor: Tensor) -> Value:
    """The value of numbers that depend on no parameter or input: fixed along each dimension in which they vary."""
    varying = [
        d
        for d in range(tensor.ndim)
        if tensor.shape[d] > 1 and not torch.equal(tensor, tensor.narrow(d, 0, 1).expand_as(tensor))
    ]
    layers = rigid_layers(units, tuple(tensor.shape), varying)
    return Value(tuple(tensor.shape), layers, constant=tensor)


def with_rigid(units: UnitTable, value: Value, shape: Sequence[int], dims: Sequence[int]) -> Value:
    """The value grown to `shape` with fresh fixed positions along `dims`, where it had size 1."""
    return Value(tuple(shape), (*value.layers, *rigid_layers(units, shape, dims)))


def _join(units: UnitTable, layers: Sequence[Labels]) -> Labels:
    """One layer that stands for several: a unit for each combination that occurs, inside each of its parts."""
    arrays = np.broadcast_arrays(*layers)
    roots = [units.find(array.ravel()) for array in arrays]
    combos, index = np.unique(np.stack(roots), axis=1, return_inverse=True)
    frozen = np.stack([units.is_frozen(row) for row in combos]).all(axis=0)
    ids = np.where(frozen, units.rigid(combos.shape[1]), 0)
    movable = np.flatnonzero(~frozen)
    ids[movable] = units.fresh(len(movable))
    for row in combos:
        known = movable[row[movable] != WILDCARD]
        if len(known):
            units.relations.append((ids[known], row[known]))
    return compress(ids[index.ravel()].reshape(arrays[0].shape))


def concatenate(units: UnitTable, values: Sequence[Value], dim: int) -> Value:
    """The value of joining values along `dim`."""
    dim %= len(values[0].shape)
    shape = list(values[0].shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    per_value = [[canonical(units, layer) for layer in value.layers] for value in values]
    shared = [
        layer
        for layer in per_value[0]
        if layer.shape[dim] == 1 and all(contains(units, others, layer) for others in per_value[1:])
    ]
    for layer in (layer for own in per_value for layer in own):
        # Fixed positions across the joint may distinguish more than there is to distinguish: it does no harm.
        if layer.shape[dim] == 1 and units.is_frozen(layer).all() and not contains(units, shared, layer):
            shared.append(layer)
    layers: list[Labels] = list(shared)
    lengths = [value.shape[dim] for value in values]
    for along in (True, False):
        parts = []
        for own in per_value:
            rest = [x for x in own if (x.shape[dim] > 1) == along and not contains(units, shared, x)]
            parts.append(_join(units, rest) if len(rest) > 1 else rest[0] if rest else None)
        if any(part is not None for part in parts):
            layers += _concatenate_layers(units, parts, lengths, dim, len(shape))
    if len(layers) == len(shared):  # equal labels on different numbers: only their place tells them apart
        layers.append(parts_layer(units, lengths, dim, len(shape)))
    return Value(tuple(shape), simplify(units, [x for x in (compress(layer) for layer in layers) if support(x)]))


def _concatenate_layers(
    units: UnitTable, parts: Sequence[Labels | None], lengths: Sequence[int], dim: int, ndim: int
) -> list[Labels]:
    """Layers joined along `dim`, and a layer that names the part where labels alone would not tell."""
    blank = np.full((1,) * ndim, WILDCARD)
    arrays = [blank if part is None else part for part in parts]
    told = [part for part in parts if part is not None]
    if all(units.is_frozen(part).all() for part in told):
        # A single place beside fixed ones is fixed as well, and is none of them.
        taken = max(part.size for part in told)
        for index, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            if part is None and length == 1:
                taken += 1
                arrays[index] = units.rigid(taken)[-1:].reshape((1,) * ndim)
    common = list(np.broadcast_shapes(*((*array.shape[:dim], 1, *array.shape[dim + 1 :]) for array in arrays)))
    grown = []
    for array, length in zip(arrays, lengths, strict=True):
        common[dim] = length
        grown.append(np.broadcast_to(array, common))
    joined = np.concatenate(grown, axis=dim)
    seen = [np.unique(units.find(array.ravel())) for array in arrays]
    if sum(len(ids) for ids in seen) == len(np.unique(np.concatenate(seen))):
        units.tell_apart(joined.ravel())
        return [joined]
    return [joined, parts_layer(units, lengths, dim, ndim)]


def parts_layer(units: UnitTable, lengths: Sequence[int], dim: int, ndim: int) -> Labels:
    """A layer that says which of several parts, side by side along `dim`, a position belongs to."""
    layout = [1] * ndim
    layout[dim] = sum(lengths)
    return np.repeat(units.rigid(len(lengths)), lengths).reshape(layout)


def canonical(units: UnitTable, layer: Labels) -> Labels:
    """A layer of fixed units re-labelled by rank, so that fixed axes of different origin compare equal."""
    if not units.is_frozen(layer).all():
        return layer
    _, index = np.unique(units.find(layer.ravel()), return_inverse=True)
    return units.rigid(int(index.max()) + 1)[index].reshape(layer.shape)


def contains(units: UnitTable, layers: Sequence[Labels], wanted: Labels) -> bool:
    """Whether `wanted` is among `layers`, up to units known to be the same."""
    return any(
        layer.shape == wanted.shape and np.array_equal(units.find(layer), units.find(wanted)) for layer in layers
    )


def identifies(units: UnitTable, value: Value) -> bool:
    """Whether no two positions of a value have the same labels; may say no where it is hard to tell."""
    along = [d for layer in value.layers for d in support(layer)]
    every = [d for d, size in enumerate(value.shape) if size > 1]
    return sorted(along) == every and all(len(np.unique(units.find(x))) == x.size for x in value.layers)


def as_parameter(
    units: UnitTable, name: str, shape: Sequence[int], groups: Sequence[tuple[int, ...]] | None = None
) -> Value:
    """A parameter's value: fresh units along each of its dimensions, or along several of them together.

    Args:
        units: All units so far.
        name: The parameter's name.
        shape: Its shape.
        groups: For each layer of labels, the dimensions that it varies along; by default each dimension alone.
    """
    layers: list[Labels] = []
    groups = groups if groups is not None else [(d,) for d in range(len(shape))]
    for group in groups:
        sizes = [shape[d] for d in group]
        if math.prod(sizes) > 1:
            # Units of two parts of a stack may turn out to be the same: each part is an axis of its own.
            parts = math.prod(size for d, size in zip(group, sizes, strict=True) if (d,) in groups and group != (d,))
            ids = np.concatenate([units.fresh(math.prod(sizes) // parts) for _ in range(parts)])
            layers.append(ids.reshape([size if d in group else 1 for d, size in enumerate(shape)]))
    return Value(tuple(shape), tuple(layers), source=name)


def relate_parts(units: UnitTable, value: Value) -> None:
    """Says of a stack's units in which part they are, once it is known which of them are the same in all parts."""
    for part in value.layers:
        for layer in value.layers:
            if set(support(part)) < set(support(layer)):
                units.relate(part, layer)


def unsqueeze(value: Value, dim: int) -> Value:
    """The value with a dimension of size 1 put in at `dim`."""
    dim %= len(value.shape) + 1
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    return replace(value, shape=shape, layers=tuple(np.expand_dims(x, dim) for x in value.layers), constant=None)


def narrow(units: UnitTable, value: Value, dim: int, start: int, length: int) -> Value:
    """A slice of a value."""
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    cut = [x.take(range(start, start + length), axis=dim) if x.shape[dim] > 1 else x for x in value.layers]
    layers = [compress(layer) for layer in cut]
    for layer in layers:
        units.occur(layer)
    return Value(shape, tuple(layer for layer in layers if support(layer)), source=value.source)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    """The value under another shape of the same number of elements."""
    shape = tuple(shape)
    layers = (compress(np.broadcast_to(layer, value.shape).reshape(shape)) for layer in value.layers)
    return replace(value, shape=shape, layers=tuple(x for x in layers if support(x)), constant=None)
