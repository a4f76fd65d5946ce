"""Rotary positions: which pairs of query and key units can be turned together without changing any score.

Queries and keys that are turned by their positions, pair of units by pair, meet in products q·k alone. A turn of a pair
commutes with those by position, so the same turn of a pair of queries and of keys, and a scale of one with its inverse
of the other, keep every product. That is not read from names: every number that enters such a product is followed back
to the units of a linear layer that it is a sum of, and with which factors.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from isthmus.graph.capture import Program
from isthmus.symmetry.spaces import Gauge, Site
from isthmus.symmetry.traced_graph import Contraction
from isthmus.tracing.execute import Tracing, bind, unused_nodes
from isthmus.tracing.labels import Value
from isthmus.tracing.rules import RULES
from isthmus.tracing.rules.pointwise import unchanged
from isthmus.tracing.rules.view import mover, run_on_labels

# A number that is a sum of more units than this is not followed further.
MOST_TERMS = 4

# No unit: a number that is a sum of fewer units than others of its tensor.
NONE = -1

# Products of two activations: which arguments meet, and along which of their dimensions.
PRODUCTS = {
    "aten.matmul": ((0, -1), (1, -2)),
    "aten.bmm": ((0, -1), (1, -2)),
    "aten.scaled_dot_product_attention": ((0, -1), (1, -1)),
}


@dataclass(frozen=True, eq=False)
class Terms:
    """A tensor whose every number is a sum of units of one linear layer, each times a constant.

    Attributes:
        units: For each term, the place in the layer's output; NONE where a number has fewer terms.
        factors: What it is multiplied by.
    """

    units: Int[Tensor, "terms *shape"]
    factors: Float[Tensor, "terms *shape"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a layer's units that are turned by position, as one operand of a product holds them.

    Attributes:
        layer: The linear layer.
        places: Where along the operand's summed dimension each pair lies.
        units: The layer's units of each pair, by head of the product, in the order in which the turn is positive.
    """

    layer: Contraction
    places: Int[np.ndarray, "pairs 2"]
    units: Int[np.ndarray, "heads pairs 2"]


def find_rotations(tracing: Tracing, program: Program) -> list[Gauge]:
    """The gauges of queries and keys that are turned by their positions, one for each product of them."""
    found: list[Gauge] = []
    layers = {contraction.node: contraction for contraction in tracing.contractions}
    unused = unused_nodes(program.graph)
    for node in program.graph.nodes:
        sides = PRODUCTS.get(str(getattr(node.target, "overloadpacket", "")))
        if sides is None or node in unused:
            continue
        operands = [node.args[index] for index, _ in sides]
        if not all(isinstance(operand, fx.Node) for operand in operands) or operands[0] is operands[1]:
            continue
        pairs = [
            _turned_pairs(tracing, program, layers, unused, node, operand, dim)
            for operand, (_, dim) in zip(operands, sides, strict=True)
        ]
        if pairs[0] is not None and pairs[1] is not None:
            gauge = _gauge_of(tracing, pairs[0], pairs[1])
            found += [] if gauge is None else [gauge]
    return found


def _turned_pairs(
    tracing: Tracing,
    program: Program,
    layers: dict[str, Contraction],
    unused: set[fx.Node],
    product: fx.Node,
    operand: fx.Node,
    dim: int,
) -> Pairs | None:
    """The pairs of units that positions turn in an operand of a product, if nothing else reads them; else None.

    Args:
        tracing: What was learnt from the graph.
        program: The graph.
        layers: All products with parameters, by node.
        unused: Nodes whose results nothing reads.
        product: The product of two activations.
        operand: One of them.
        dim: The dimension that the product sums over.
    """
    past = _linear_past(tracing, layers, operand)
    if past is None:
        return None
    source, nodes = past
    layer = layers[source.name]
    shape = source.meta["val"].shape
    if layer.channel != len(shape) - 1 or not _read_once(tracing, program, source, layer):
        return None
    places = torch.arange(shape.numel()).reshape(1, *shape)
    values: dict[fx.Node, Any] = {source: Terms(places, torch.ones(places.shape, dtype=torch.float64))}
    for node in (n for n in program.graph.nodes if n in nodes):
        values[node] = _follow(tracing, node, values)
        if values[node] is None:
            return None
    pairs = _pairs_of(layer, values[operand], dim, shape[-1])
    if pairs is None:
        return None
    for node in [source, *nodes]:
        for user in node.users:
            if user in nodes or user in unused or (user is product and node is operand):
                continue
            if _holds(_follow(tracing, user, values), pairs.units, shape[-1]):
                return None
    return pairs


def _linear_past(
    tracing: Tracing, layers: dict[str, Contraction], operand: fx.Node
) -> tuple[fx.Node, set[fx.Node]] | None:
    """The one linear layer that a value was made from, and the operations since; None where there are others."""
    sources: set[fx.Node] = set()
    nodes: set[fx.Node] = set()
    open_nodes = [operand]
    while open_nodes:
        node = open_nodes.pop()
        value = tracing.values.get(node.name)
        if node in nodes or (isinstance(value, Value) and value.constant is not None):
            continue
        if node.name in layers:
            sources.add(node)
        elif node.op != "call_function":
            return None
        else:
            nodes.add(node)
            open_nodes += node.all_input_nodes
    return (sources.pop(), nodes) if len(sources) == 1 else None


def _read_once(tracing: Tracing, program: Program, source: fx.Node, layer: Contraction) -> bool:
    """Whether a layer's weight and bias are all that it reads beside its input, and nothing else reads them."""
    names = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    parameters = [node for node in source.all_input_nodes if node.name != layer.source]
    known = sorted(program.parameters.get(node.name, "") for node in parameters) == sorted(names)
    readers = [n for n, name in program.parameters.items() if name in names and tracing.values.get(n) is not None]
    return known and len(readers) == len(names) and all(len(node.users) == 1 for node in parameters)


def _follow(tracing: Tracing, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What an operation makes of sums of units: such sums again, several of them, or None where it cannot be told."""
    if node.op != "call_function":
        return None
    if not isinstance(node.target, OpOverload):
        container, index, *_ = (*node.args, None, None)
        taken = values.get(container) if node.target is operator.getitem and isinstance(container, fx.Node) else None
        return taken[index] if isinstance(taken, list) and isinstance(index, int) else None
    op = node.target
    if op._schema.is_mutable:
        return None

    def read(item: Any) -> Any:
        if item in values:
            return values[item]
        value = tracing.values.get(item.name)
        return value.constant.double() if isinstance(value, Value) and value.constant is not None else value

    arguments = bind(op, map_arg(node.args, read), map_arg(node.kwargs, read))
    first, *rest = vars(arguments).values()
    name, rule = str(op.overloadpacket), RULES.rule_for(op)
    if rule is unchanged and isinstance(first, Terms):
        return first
    if name == "aten.neg" and isinstance(first, Terms):
        return Terms(first.units, -first.factors)
    if name in ("aten.mul", "aten.div"):
        return _scaled(name, first, rest[0])
    if name in ("aten.add", "aten.sub") and isinstance(first, Terms) and isinstance(rest[0], Terms):
        factor = getattr(arguments, "alpha", 1) * (1 if name == "aten.add" else -1)
        return _added(first, Terms(rest[0].units, factor * rest[0].factors))
    if name in ("aten.cat", "aten.stack") and isinstance(first, list | tuple):
        parts = [each for each in first if isinstance(each, Terms)]
        return _beside(op, parts, rest[0]) if len(parts) == len(first) else None
    if rule is run_on_labels and isinstance(first, Terms) and not any(isinstance(each, Terms | Value) for each in rest):
        return _moved(op, first, vars(arguments))
    return None


def _scaled(name: str, first: Any, second: Any) -> Terms | None:
    """A product or quotient of sums of units and constants."""
    if name == "aten.mul" and isinstance(second, Terms):
        first, second = second, first
    if not isinstance(first, Terms) or not isinstance(second, Tensor | int | float):
        return None
    factor = second if name == "aten.mul" else 1 / second
    factors = torch.stack([each * factor for each in first.factors])
    return Terms(first.units.expand(factors.shape) if factors.ndim == first.units.ndim else first.units, factors)


def _added(first: Terms, second: Terms) -> Terms | None:
    """The sum of two, each unit once."""
    if first.units.shape[1:] != second.units.shape[1:]:
        return None
    units, factors = list(first.units), list(first.factors)
    for unit, factor in zip(second.units, second.factors, strict=True):
        left = torch.ones_like(unit, dtype=torch.bool)
        for index, own in enumerate(units):
            same = left & (own == unit)
            factors[index] = torch.where(same, factors[index] + factor, factors[index])
            left = left & ~same
        if left.any():
            units.append(torch.where(left, unit, NONE))
            factors.append(torch.where(left, factor, 0.0))
    return None if len(units) > MOST_TERMS else Terms(torch.stack(units), torch.stack(factors))


def _beside(op: OpOverload, parts: Sequence[Terms], dim: int) -> Terms:
    """Several side by side, along a dimension that is there or along a new one."""
    most = max(len(part.units) for part in parts)
    padded = [
        (
            torch.cat([p.units, p.units.new_full((most - len(p.units), *p.units.shape[1:]), NONE)]),
            torch.cat([p.factors, p.factors.new_zeros((most - len(p.units), *p.units.shape[1:]))]),
        )
        for p in parts
    ]
    units, factors = (torch.stack([op([p[i][k] for p in padded], dim) for k in range(most)]) for i in (0, 1))
    return Terms(units, factors)


def _moved(op: OpOverload, x: Terms, arguments: dict[str, Any]) -> Any:
    """An operation that only moves elements, run on both arrays."""
    act = mover(op, arguments)
    units, factors = [act(each) for each in x.units], [act(each) for each in x.factors]
    if isinstance(units[0], Tensor):
        return Terms(torch.stack(units), torch.stack(factors))
    return [
        Terms(torch.stack([u[i] for u in units]), torch.stack([f[i] for f in factors])) for i in range(len(units[0]))
    ]


def _holds(found: Any, units: Int[np.ndarray, "heads pairs 2"], width: int) -> bool:
    """Whether sums hold one of the units of a layer; also where what they hold cannot be told."""
    if isinstance(found, list):
        return False  # what is taken out of the list is looked at by itself
    if not isinstance(found, Terms):
        return True
    there = found.units[found.units != NONE].numpy() % width
    return bool(np.isin(there, units).any())


def _pairs_of(layer: Contraction, terms: Terms, dim: int, width: int) -> Pairs | None:
    """The pairs of units that an operand holds turned, in every head and at every position; None where it holds none.

    Args:
        layer: Where the units are from.
        terms: The operand, [terms, …, heads, positions, units], or units before positions.
        dim: Its dimension of units, −1 or −2.
        width: Units of the layer.
    """
    if terms.units.ndim < 4 or len(terms.units) < 2:
        return None
    order = torch.where(terms.units == NONE, torch.iinfo(torch.int64).max, terms.units).argsort(dim=0, stable=True)
    units = terms.units.gather(0, order).movedim(dim, -1).flatten(1, -3).numpy()  # [terms, heads, positions, units]
    factors = terms.factors.gather(0, order).movedim(dim, -1).flatten(1, -3).numpy()
    token = np.where(units == NONE, NONE, units // width)
    if (np.where(token == NONE, token.max(axis=(0, 3), keepdims=True), token) != token[:1, :, :, :1]).any():
        return None  # a position's numbers are made from several positions
    features = np.where(units == NONE, NONE, units % width)
    if (features != features[:, :, :1]).any() or (features[2:] != NONE).any():
        return None
    first, second = features[:2, :, 0]  # [heads, units]
    turned = second != NONE
    if not turned.any() or (turned != turned[:1]).any():
        return None
    places = np.flatnonzero(turned[0])
    partner: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place in places.tolist():
        partner[(*first[:, place].tolist(), *second[:, place].tolist())].append(place)
    if any(len(each) != 2 for each in partner.values()):
        return None
    where = np.array(sorted(partner.values()))
    # How the two units of a pair enter its two places: [pairs, place, unit, heads, positions]
    turn = np.stack([np.stack([factors[k][:, :, where[:, p]] for k in (0, 1)]) for p in (0, 1)]).transpose(
        4, 0, 1, 2, 3
    )
    scale = np.abs(turn).max(axis=(1, 2, 3, 4), initial=0.0)
    if (scale == 0).any():
        return None
    ahead, back = (
        np.maximum(np.abs(turn[:, 0, 0] - s * turn[:, 1, 1]), np.abs(turn[:, 0, 1] + s * turn[:, 1, 0])).max(
            axis=(1, 2)
        )
        for s in (1, -1)
    )
    exact = 1e-12 * scale  # cosines and sines of a pair are the same numbers
    if not ((ahead <= exact) | (back <= exact)).all():
        return None
    held = np.stack([first[:, where[:, 0]], second[:, where[:, 0]]], axis=-1)  # [heads, pairs, 2]
    held = np.where((ahead <= exact)[None, :, None], held, held[:, :, ::-1])
    return Pairs(layer, where, held)


def _gauge_of(tracing: Tracing, queries: Pairs, keys: Pairs) -> Gauge | None:
    """The gauge of queries and keys that meet; None where they do not meet pair by pair.

    Several heads of queries may meet one of keys, and then turn together.
    """
    if not np.array_equal(queries.places, keys.places) or len(queries.units) % len(keys.units):
        return None
    own = keys.units.repeat(len(queries.units) // len(keys.units), axis=0)
    heads: dict[bytes, list[int]] = defaultdict(list)
    for head, units in enumerate(own):
        heads[units.tobytes()].append(head)
    met = [np.unique(queries.units[each], axis=0) for each in heads.values()]
    if len({len(each) for each in met}) != 1:
        return None
    key_units = np.stack([own[each[0]] for each in heads.values()])  # [heads, pairs, 2]
    query_units = np.stack(met).transpose(0, 2, 1, 3).reshape(*key_units.shape[:2], -1)  # [heads, pairs, 2 · queries]
    everything = [(queries.layer.weight, query_units), (keys.layer.weight, key_units)]
    for name in {weight for weight, _ in everything}:
        flat = np.concatenate([units.ravel() for weight, units in everything if weight == name])
        if len(np.unique(flat)) < len(flat):
            return None
    sites = tuple(
        site
        for pairs, units, role in ((queries, query_units, "vector"), (keys, key_units, "covector"))
        for site in _sites_of(pairs.layer, units, role)
    )
    return Gauge(f"{queries.layer.weight.rpartition('.')[0] or queries.layer.weight}/turns", "rotation", sites)


def _sites_of(layer: Contraction, units: Int[np.ndarray, "heads pairs repeat"], role: str) -> Iterator[Site]:
    """Where a layer's weight and bias hold units that it produces."""
    yield Site(layer.weight, (layer.output,), units, role)
    if layer.bias is not None:
        yield Site(layer.bias, (0,), units, role)
