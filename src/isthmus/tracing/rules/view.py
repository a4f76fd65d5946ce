"""Operations that only move, repeat or select elements: they are run, as they are, on the label arrays."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from isthmus.graph.operations import SELECTIONS
from isthmus.tracing.blocks import pin
from isthmus.tracing.execute import Rule, Tracing, freeze_names, values_in
from isthmus.tracing.labels import (
    Names,
    Value,
    compress,
    concatenate,
    lift,
    reshape,
    simplify,
    support,
    unsqueeze,
    with_rigid,
)
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.units import Labels

# A view needs memory in order, which an expanded label array does not have; a reshape does the same to any array.
STAND_INS = {
    **dict.fromkeys(
        ("aten.view", "aten._unsafe_view", "aten.view_as", "aten.reshape_as"), torch.ops.aten.reshape.default
    ),
    "aten.expand_as": torch.ops.aten.expand.default,
}


def run_on_labels(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Any:
    """The operation itself, run on every label array of its first argument."""
    x = next(iter(vars(a).values()))
    others = values_in(list(vars(a).values())[1:])
    op: Any = node.target
    stand_in = STAND_INS.get(str(op.overloadpacket))
    if isinstance(x, Value) and stand_in is not None and len(others) == 1:  # of the other only the shape matters
        a, others = SimpleNamespace(self=x, size=others[0].shape), []
    if not isinstance(x, Value) or any(value.constant is None for value in others):
        return NotImplemented
    rest: Any = map_aggregate(vars(a), lambda item: item.constant if isinstance(item, Value) else item)

    act = mover(op, rest)
    results = [act(torch.from_numpy(np.require(layer, requirements="W")).expand(x.shape)) for layer in x.layers]
    shape_only = act(torch.empty(x.shape, device="meta"))
    if isinstance(shape_only, Tensor):
        for layer, result in zip(x.layers, results if str(op.overloadpacket) in SELECTIONS else [], strict=False):
            lost = np.setdiff1d(layer, compress(result.numpy()))
            if len(lost):
                tracing.cut.setdefault(node.name, []).append(lost)
        moved = _relabelled(tracing, x, shape_only, results)
        if x.names is None:
            return moved
        told = map_aggregate(rest, lambda item: (*item.shape, item.tolist()) if isinstance(item, Tensor) else item)
        step = f"{op} {told}"
        return replace(moved, names=Names(x.names.ids, (*x.names.history, step)))
    if x.names is not None:
        freeze_names(tracing.units, x)
    return [_relabelled(tracing, x, piece, [r[i] for r in results]) for i, piece in enumerate(shape_only)]


def mover(op: Any, arguments: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    """An operation that only moves elements, to be run on other arrays in place of its first argument."""
    stand_in = STAND_INS.get(str(op.overloadpacket))

    def act(array: Tensor) -> Any:
        if stand_in is not None:
            return stand_in(array, list(arguments.values())[1])
        own = {**arguments, next(iter(arguments)): array}
        positional = [own[p.name] for p in op._schema.arguments if not p.kwarg_only]
        named = {p.name: own[p.name] for p in op._schema.arguments if p.kwarg_only and own[p.name] is not None}
        return op(*positional, **named)

    return act


def _relabelled(tracing: Tracing, x: Value, shape_only: Tensor, arrays: list[Tensor]) -> Value:
    """The value that a view left: its arrays compressed, and units that it singled out noted."""
    layers: list[Labels] = []
    for array in arrays:
        layer = compress(np.ascontiguousarray(array.numpy()))
        if support(layer):
            layers.append(layer)
        elif layer.size:
            tracing.units.occur(layer)
    return Value(tuple(shape_only.shape), simplify(tracing.units, layers), source=x.source)


def _expand_as(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """A value repeated along dimensions of size 1 to the shape of another, whose labels do not matter."""
    x: Value = vars(a)["self"]
    return Value(tuple(a.other.shape), tuple(lift(layer, len(a.other.shape)) for layer in x.layers), source=x.source)


def _as_complex(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Pairs of numbers along the last dimension, each read as one complex number: its two parts keep their places."""
    x: Value = vars(a)["self"]
    limit_value(tracing.units, x, PERMUTATION_LEVEL)
    return reshape(pin(tracing.units, x, [-1], "real and imaginary parts"), x.shape[:-1])


def _as_real(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Complex numbers as pairs along a new last dimension."""
    x: Value = vars(a)["self"]
    return with_rigid(tracing.units, unsqueeze(x, -1), (*x.shape, 2), [len(x.shape)])


def _cat(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Values one after another along a dimension."""
    values = [value for value in a.tensors if value.shape != (0,)]
    return concatenate(tracing.units, values, a.dim)


def _stack(tracing: Tracing, node: fx.Node, a: SimpleNamespace) -> Value:
    """Values side by side along a new dimension."""
    return concatenate(tracing.units, [unsqueeze(value, a.dim) for value in a.tensors], a.dim)


RUNNABLE = (  # noqa: SIM905 - a list literal would take a line for each name
    "view _unsafe_view reshape flatten unflatten permute transpose t numpy_T matrix_H mT unsqueeze squeeze expand "
    "broadcast_to slice select split split_with_sizes chunk tensor_split narrow flip roll repeat repeat_interleave "
    "tile unbind movedim moveaxis swapaxes swapdims index_select index diagonal unfold pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle rot90 view_as reshape_as take_along_dim"
).split()

VIEWS: dict[str, Rule] = {f"aten.{name}": run_on_labels for name in RUNNABLE} | {
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.expand_as": _expand_as,
    "aten.view_as_complex": _as_complex,
    "aten.view_as_real": _as_real,
}
