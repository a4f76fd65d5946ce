"""Values whose parts are chosen by data: a token's expert is one of several, and nobody knows which.

A `Choice` holds a value for every alternative. Operations that treat each slot by itself are executed for every
alternative; what follows from all of them holds whichever is chosen. Before an operation that mixes slots, or chooses
otherwise, the alternatives are settled: their labels are related, as they may stand in one another's place.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import fx
from torch.fx.node import map_aggregate

from isthmus.graph.operations import SLOTWISE_PRODUCTS, operation_name
from isthmus.tracing.execute import Rule, Tracing, freeze_value
from isthmus.tracing.labels import Choice, Names, Value, simplify, support
from isthmus.tracing.units import UnitTable


def choose(tracing: Tracing, x: Value, dim: int, names: Names, places: tuple[int, ...]) -> Choice | None:
    """Rows along a dimension, chosen by what `topk` found; None where its units cannot be the units of the rows.

    Args:
        tracing: What has been learnt so far.
        x: The value that rows are taken from.
        dim: Its dimension.
        names: The units that the indices name.
        places: Shape of the tensor of indices.
    """
    own = [layer for layer in x.layers if support(layer) == (dim,)]
    if not own or own[0].size != len(names.ids) or len(np.unique(own[0])) != own[0].size:
        return None
    tracing.units.unite(names.ids, own[0].ravel())
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    shape = (*before, *places, *after)
    values = []
    for row in range(x.shape[dim]):
        layers = []
        for layer in x.layers:
            if layer is not own[0]:
                cut = layer.take(row if layer.shape[dim] > 1 else 0, axis=dim)
                layers.append(cut.reshape((*cut.shape[:dim], *[1] * len(places), *cut.shape[dim:])))
        values.append(Value(shape, tuple(layer for layer in layers if support(layer)), source=x.source))
    count = int(np.prod(places))
    key = (names.history, places)
    if key not in tracing.slots:
        tracing.slots[key] = tracing.units.fresh(count)
    slots = tracing.slots[key].reshape((*[1] * len(before), *places, *[1] * len(after)))
    return Choice(tuple(values), Value(shape, (slots,) if count > 1 else ()), names.history)


def apply_to_alternatives(
    tracing: Tracing, node: fx.Node, arguments: SimpleNamespace, rule: Rule, slotwise: bool
) -> Any:
    """An operation on choices: executed for every alternative, or once after they have been settled."""
    choices: list[Choice] = []
    map_aggregate(vars(arguments), lambda x: choices.append(x) if isinstance(x, Choice) else None)
    same = all(c.history == choices[0].history for c in choices)
    slotwise = slotwise or operation_name(node).removesuffix("_") in SLOTWISE_PRODUCTS
    where = _follow(tracing, node, arguments, rule, choices) if same and slotwise else None
    if where is None:
        return rule(tracing, node, _replaced(arguments, lambda c: _relate_alternatives(tracing.units, c)))
    units = tracing.units
    before = units.occurrences, units.relations
    outcomes, occurred, related = [], [], []
    units.made_stand_ins = []
    for index in range(len(choices[0].values)):
        units.occurrences, units.relations = [], []
        units.expected_stand_ins = units.made_stand_ins[:] if index else []
        outcomes.append(rule(tracing, node, _replaced(arguments, lambda c, k=index: c.values[k])))
        occurred.append(units.occurrences)
        related.append(units.relations)
    units.occurrences, units.relations = before
    units.expected_stand_ins = []
    # What was noted in every alternative is one note, lest they be told apart by it.
    if len({len(notes) for notes in occurred}) == 1:
        units.occurrences += [np.concatenate([x.ravel() for x in notes]) for notes in zip(*occurred, strict=True)]
    else:
        units.occurrences += [x for notes in occurred for x in notes]
    if len({len(notes) for notes in related}) == 1:
        units.relations += [
            (np.concatenate([c for c, _ in notes]), np.concatenate([p for _, p in notes]))
            for notes in zip(*related, strict=True)
        ]
    else:
        units.relations += [x for notes in related for x in notes]
    if isinstance(outcomes[0], Value):
        return Choice(tuple(outcomes), where[0], choices[0].history)
    return [
        Choice(tuple(pieces), place, choices[0].history)
        for *pieces, place in zip(*outcomes, where, strict=True)  # one entry for each of several results
    ]


def _replaced(arguments: SimpleNamespace, function: Callable[[Choice], Value]) -> SimpleNamespace:
    """The arguments with a value in place of each choice."""
    act: Any = lambda x: function(x) if isinstance(x, Choice) else x  # noqa: E731
    mapped: Any = map_aggregate(vars(arguments), act)
    return SimpleNamespace(**mapped)


def _follow(
    tracing: Tracing, node: fx.Node, arguments: SimpleNamespace, rule: Rule, choices: list[Choice]
) -> list[Value] | None:
    """Where each slot stands in the operation's results; None where slots are mixed, or stand side by side."""
    units, found = tracing.units, []
    for followed in {id(choice): choice for choice in choices}.values():

        def plain(item: Any, followed: Choice = followed) -> Any:
            if isinstance(item, Choice):
                return followed.where if item is followed else Value(item.where.shape)
            return replace(item, layers=(), source=None, names=None) if isinstance(item, Value) else item

        before = len(units.relations), len(tracing.nonlinear)
        mapped: Any = map_aggregate(vars(arguments), plain)
        result = rule(tracing, node, SimpleNamespace(**mapped))
        pieces = [result] if isinstance(result, Value) else result
        del tracing.nonlinear[before[1] :]
        if not isinstance(pieces, list) or len(units.relations) > before[0]:
            return None
        slots = followed.where.layers[0] if followed.where.layers else np.empty(0, dtype=np.int64)
        for piece in pieces:
            layers = piece.layers
            if len(layers) != bool(slots.size) or (slots.size and not np.isin(layers[0], slots).all()):
                return None
        found.append(pieces)
    for pieces in found[1:]:
        for one, other in zip(found[0], pieces, strict=True):
            if any(not np.array_equal(a, b) for a, b in zip(one.layers, other.layers, strict=True)):
                return None
    return found[0]


def _relate_alternatives(units: UnitTable, choice: Choice) -> Value:
    """One value that stands for whichever alternative was chosen in each slot."""
    first, *others = choice.values
    for other in others:
        partners = list(other.layers)
        for layer in first.layers:
            partner = next((x for x in partners if x.shape == layer.shape), None)
            if partner is None or sum(x.shape == layer.shape for x in first.layers) > 1:
                for value in choice.values:
                    freeze_value(units, value, "a choice between values of different kinds", expected=False)
                break
            units.relate(layer, partner)
    layers = list(first.layers)
    if choice.where.layers:
        slots = choice.where.layers[0]
        _, index = np.unique(slots, return_inverse=True)
        layers.append(units.rigid(int(index.max()) + 1)[index].reshape(slots.shape))
    return Value(first.shape, simplify(units, layers))
