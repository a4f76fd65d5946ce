"""Operations that choose positions by numbers, or treat them in order: the axis that they choose from is fixed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import fx

from isthmus.tracing.blocks import pin, reduce
from isthmus.tracing.choices import choose
from isthmus.tracing.execute import Rule, Tracing, freeze_names, freeze_value, output_shapes, values_in
from isthmus.tracing.labels import Names, Value, combine, reshape, rigid_layers, rigid_value, support, with_rigid
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.rules.view import run_on_labels
from isthmus.tracing.units import WILDCARD


def index(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`x[i, j, …]` with tensors of numbers: run where they are known, else along fixed rows."""
    x: Value = vars(a)["self"]
    if all(value.constant is not None for value in values_in(a.indices)):
        return run_on_labels(tracing, node, a)
    examples = [i.meta.get("val") for i in node.all_input_nodes[1:]]
    if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in examples):
        return NotImplemented  # a mask: how many are chosen depends on the data
    freeze_names(tracing.units, x)
    dims = [d for d, i in enumerate(a.indices) if i is not None]
    if len(dims) == 1 and (names := a.indices[dims[0]].names) is not None:
        choice = choose(tracing, x, dims[0], names, a.indices[dims[0]].shape)
        if choice is not None:
            return choice
    for value in values_in(a.indices):
        freeze_names(tracing.units, value)
    for chosen in values_in(a.indices):
        freeze_value(tracing.units, chosen, "indices into a tensor")
    pinned = pin(tracing.units, x, dims, "rows that are chosen by an index")
    rest = [d for d in range(len(x.shape)) if d not in dims]
    places = np.broadcast_shapes(*(i.shape for i in values_in(a.indices)))
    start = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    before, after = [x.shape[d] for d in rest[:start]], [x.shape[d] for d in rest[start:]]
    out = reshape(pinned, (*before, *[1] * len(places), *after))
    return with_rigid(tracing.units, out, (*before, *places, *after), range(start, start + len(places)))


def _gather(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Elements chosen along one dimension by a tensor of numbers."""
    x: Value = vars(a)["self"]
    shape = tuple(a.index.shape)
    dim = a.dim % max(len(shape), 1)
    if not shape or any(shape[d] != x.shape[d] for d in range(len(shape)) if d != dim):
        return NotImplemented
    pinned = pin(tracing.units, x, [dim], "positions that are chosen by an index")
    out = combine(tracing.units, [pinned, Value(shape, a.index.layers), Value(shape, _fixed(tracing, shape, dim))])
    return Value(out.shape, out.layers)


def _fixed(tracing: Tracing, shape: tuple[int, ...], dim: int) -> Any:
    """Fixed positions along one dimension."""
    return rigid_layers(tracing.units, shape, [dim])


def _in_order(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """Cumulative sums and the like: positions along their dimension are taken one after another."""
    x: Value = vars(a)["self"]
    shape = output_shapes(node)
    if not isinstance(shape, tuple) or not shape:
        return NotImplemented
    dim = a.dim % len(shape)
    pinned = pin(tracing.units, x, [dim], "positions that are taken in order")
    return Value(shape, (*pinned.layers, *_fixed(tracing, shape, dim)))


def _largest(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """`topk`: the largest elements along a dimension by size, and the indices, which name the units found there."""
    x: Value = vars(a)["self"]
    if not x.shape:
        return NotImplemented
    units, dim = tracing.units, a.dim % len(x.shape)
    along = [layer for layer in x.layers if dim in support(layer)]
    named = len(along) == 1 and support(along[0]) == (dim,) and len(np.unique(units.find(along[0]))) == x.shape[dim]
    if not named or WILDCARD in along[0]:
        return NotImplemented
    limit_value(units, x, PERMUTATION_LEVEL)
    shape = (*x.shape[:dim], a.k, *x.shape[dim + 1 :])
    values = with_rigid(units, reduce(units, x, [dim], keepdim=True), shape, [dim])
    return [values, replace(rigid_value(units, shape), names=Names(along[0].ravel(), (node.name,)))]


LOOKUPS: dict[str, Rule] = {
    "aten.index": index,
    "aten.gather": _gather,
    "aten.cumsum": _in_order,
    "aten.topk": _largest,
}
