"""Operations that write in place: their result belongs to every value that shares the memory."""

from typing import Any

import numpy as np
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate

from isthmus.graph.operations import WHOLE_VIEWS
from isthmus.tracing.execute import Tracing, bind, freeze_value, origin, values_in
from isthmus.tracing.labels import (
    Value,
    compress,
    contains,
    identifies,
    parts_layer,
    rigid_value,
    simplify,
    support,
    unsqueeze,
)
from isthmus.tracing.units import WILDCARD, Labels, UnitTable


def mutate(tracing: Tracing, node: fx.Node, result: Any) -> None:
    """Gives an operation's result to the node that it overwrites in place, and to all that shares its memory."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or not isinstance(result, Value):
        return
    before = tracing.values[target.name]
    alike = (
        isinstance(before, Value)
        and before.constant is None
        and len(before.layers) == len(result.layers)
        and all(contains(tracing.units, before.layers, layer) for layer in result.layers)
    )
    _note_lost(tracing, target, before, result)
    tracing.values[target.name] = result
    whole = tracing.values[origin(target).name]
    if alike and isinstance(whole, Value) and (whole.shape == result.shape or identifies(tracing.units, whole)):
        return
    family = [name for name in _sharing_memory(tracing, target) if name != target.name]
    if not family or _rebuild(tracing, node, target, result):
        return
    # Which part of the others was written over is not followed.
    freeze_value(tracing.units, result, "written into a part of a tensor", expected=False)
    for name in family:
        for value in values_in(tracing.values[name]):
            freeze_value(tracing.units, value, "a part of it is written over", expected=False)
        held: Any = tracing.values[name]
        tracing.values[name] = map_aggregate(held, lambda item: _rigidified(tracing.units, item))


def _rebuild(tracing: Tracing, node: fx.Node, target: fx.Node, result: Value) -> bool:
    """Writes a part's new value into all that it is a part of; False where that cannot be followed."""
    chain: list[fx.Node] = []
    whole = target
    while whole is not origin(target):
        if not _part_of(tracing, whole)[2]:
            return False
        chain.append(whole)
        whole = whole.all_input_nodes[0]
    names = {other.name: other for other in node.graph.nodes}
    order = {other: place for place, other in enumerate(names.values())}
    for other in map(names.__getitem__, _sharing_memory(tracing, target)):
        if other not in (*chain, whole) and any(order[user] > order[node] for user in other.users):
            return False  # another view, which is read after it has changed
    for view in chain:
        dim, start, _ = _part_of(tracing, view)
        outer = view.all_input_nodes[0]
        value = tracing.values[outer.name]
        assert isinstance(value, Value)  # `_part_of` tells only of what is a part of one tensor
        if len(result.shape) < len(value.shape):
            result = unsqueeze(result, dim)
        result = _overwrite(tracing.units, value, result, dim, start)
        _note_lost(tracing, outer, value, result)
        tracing.values[outer.name] = result
    return True


def _note_lost(tracing: Tracing, node: fx.Node, before: Any, after: Value) -> None:
    """Notes the units that were written over: their node does not hold them any more, and yet has not read them."""
    old = [tracing.units.find(layer.ravel()) for value in values_in(before) for layer in value.layers]
    if old:
        new = [tracing.units.find(layer.ravel()) for layer in after.layers]
        lost = np.setdiff1d(np.concatenate(old), np.concatenate([np.empty(0, dtype=np.int64), *new]))
        if len(lost):
            tracing.cut.setdefault(node.name, []).append(lost)


def _overwrite(units: UnitTable, whole: Value, part: Value, dim: int, start: int) -> Value:
    """The whole with a slice along `dim` replaced by another value.

    Labels of the slice go into a layer of the whole that has the same shape but for `dim`, and says nothing else about
    the slice.
    """
    ndim, end = len(whole.shape), start + part.shape[dim]
    cut = tuple(slice(start, end) if d == dim else slice(None) for d in range(ndim))
    layers: list[Labels] = []
    for layer in whole.layers:
        grown = np.repeat(layer, whole.shape[dim], axis=dim) if layer.shape[dim] == 1 else layer.copy()
        grown[cut] = WILDCARD
        layers.append(grown)
    for layer in part.layers:
        shape = (*layer.shape[:dim], whole.shape[dim], *layer.shape[dim + 1 :])
        home = next((x for x in layers if x.shape == shape and (x[cut] == WILDCARD).all()), None)
        if home is None:
            home = np.full(shape, WILDCARD)
            layers.append(home)
        home[cut] = layer
    layers = [compress(units.find(layer)) for layer in layers]
    lengths = [length for length in (start, end - start, whole.shape[dim] - end) if length]
    if len(lengths) > 1:
        layers.append(parts_layer(units, lengths, dim, ndim))
    return Value(whole.shape, simplify(units, [layer for layer in layers if support(layer)]))


def _part_of(tracing: Tracing, view: fx.Node) -> tuple[int, int, int]:
    """Dimension, start and length of the part of its input that a view is; length 0 where it is no such part."""
    outer = tracing.values.get(view.args[0].name) if view.args and isinstance(view.args[0], fx.Node) else None
    op = view.target
    if not isinstance(op, OpOverload) or not isinstance(outer, Value):
        return 0, 0, 0
    if str(op.overloadpacket) in WHOLE_VIEWS and outer.shape:
        return 0, 0, outer.shape[0]
    a = bind(op, view.args, dict(view.kwargs))
    if str(op.overloadpacket) == "aten.select":
        dim = a.dim % len(outer.shape)
        return dim, a.index % outer.shape[dim], 1
    if str(op.overloadpacket) == "aten.slice" and a.step == 1:
        dim = a.dim % len(outer.shape)
        start, end, _ = slice(a.start, a.end).indices(outer.shape[dim])
        return dim, start, max(end - start, 0)
    return 0, 0, 0


def _rigidified(units: UnitTable, item: Any) -> Any:
    """A value with every position fixed; anything else as it is."""
    return rigid_value(units, item.shape) if isinstance(item, Value) else item


def _sharing_memory(tracing: Tracing, node: fx.Node) -> list[str]:
    """Names of all traced nodes that are views of the tensor that a node is a view of."""
    return [other.name for other in node.graph.nodes if other.name in tracing.values and origin(other) is origin(node)]
