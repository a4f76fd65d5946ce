"""Operations along positions: pooling, resizing and padding. Positions stay where they are; channels pass through."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import fx

from isthmus.tracing.blocks import pin
from isthmus.tracing.execute import Rule, Tracing, output_shapes
from isthmus.tracing.labels import Value, canonical, rigid_layers, simplify, support, with_rigid
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.units import SCALE, WILDCARD

LINEAR = ("avg_pool", "upsample")


def _along_positions(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Pooling and resizing: each output position is made from input positions of its own channel."""
    units = tracing.units
    name = str(getattr(node.target, "overloadpacket", node.target))
    x: Value = next(value for value in vars(a).values() if isinstance(value, Value))
    dims = range(-_dimensionality(name), 0)
    shapes = output_shapes(node)
    pinned = pin(units, x, dims, "lies along positions that are pooled or resized")
    if not any(word in name for word in LINEAR):
        limit_value(units, x, PERMUTATION_LEVEL, SCALE if "max_pool" in name else 0)
    if isinstance(shapes, list):  # values and indices; the indices name positions inside one channel
        grown = with_rigid(units, pinned, shapes[0], [d % len(x.shape) for d in dims])
        return [grown] * len(shapes)
    assert isinstance(shapes, tuple)
    return with_rigid(units, pinned, shapes, [d % len(x.shape) for d in dims])


def _dimensionality(name: str) -> int:
    """The number of position dimensions that an operation's name states (`max_pool2d` has two)."""
    return int(next(letter for letter, after in pairwise(name) if letter.isdigit() and after == "d"))


def _pad(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Padding: fixed positions are counted anew, movable units keep their labels and the border has none."""
    x: Value = vars(a)["self"]
    mode = getattr(a, "mode", "constant")
    shape = output_shapes(node)
    assert isinstance(shape, tuple)
    amounts = [(0, 0)] * len(x.shape)
    for index in range(len(a.pad) // 2):
        amounts[len(x.shape) - 1 - index] = (a.pad[2 * index], a.pad[2 * index + 1])
    padded = {d for d, amount in enumerate(amounts) if amount != (0, 0)}
    is_border = mode == "constant" and all(low >= 0 and high >= 0 for low, high in amounts)
    units = tracing.units
    layers = []
    renewed: set[int] = set()
    bordered: set[int] = set()
    for layer in x.layers:
        touched = set(support(layer)) & padded
        if not touched:
            layers.append(layer)
        elif units.is_frozen(layer).all() and len(support(layer)) > 1 and is_border:
            grown = [amounts[d] if d in support(layer) else (0, 0) for d in range(layer.ndim)]
            inside = canonical(units, layer)
            border = units.rigid(int(np.unique(inside).size) + 1)[-1]  # none of those inside
            layers.append(np.pad(inside, grown, constant_values=border))
        elif units.is_frozen(layer).all():
            renewed |= touched
            layers += rigid_layers(units, x.shape, sorted(set(support(layer)) - touched))
        elif is_border:
            grown = [amounts[d] if d in support(layer) else (0, 0) for d in range(layer.ndim)]
            layers.append(np.pad(layer, grown, constant_values=WILDCARD))
            bordered |= touched
        else:
            return NotImplemented
    if mode == "constant" and a.value:
        limit_value(units, x, PERMUTATION_LEVEL)
    for d in sorted(bordered):  # a border differs from what is inside, and from other borders without labels
        low, high = amounts[d]
        inside, border = units.rigid(2)
        layout = [-1 if i == d else 1 for i in range(len(shape))]
        layers.append(np.repeat([border, inside, border], [low, x.shape[d], high]).reshape(layout))
    layers += rigid_layers(units, shape, sorted(renewed | (padded - {d for x in layers for d in support(x)})))
    return Value(shape, simplify(units, layers))


SPATIAL: dict[str, Rule] = {
    **{
        f"aten.{kind}_pool{n}d": _along_positions
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    },
    **{f"aten.max_pool{n}d_with_indices": _along_positions for n in (1, 2, 3)},
    **{f"aten.upsample_nearest{n}d": _along_positions for n in (1, 2, 3)},
    "aten.upsample_bilinear2d": _along_positions,
    "aten.upsample_bicubic2d": _along_positions,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
}
