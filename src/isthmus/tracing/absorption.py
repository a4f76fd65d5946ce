"""Absorption: which norm gains and squares leave a space its rotations, decided once the whole graph has run.

A gain multiplies units one by one, which no rotation keeps. If all that reads the product are sums with parameters that
nothing else reads, the gain is the same function written into those parameters, and rotations remain.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch._ops import OpOverload

from isthmus.graph.capture import Program, module_path
from isthmus.graph.operations import (
    ADDITIONS,
    CONVOLUTIONS,
    LINEAR_LAYERS,
    LINEAR_REDUCTIONS,
    MATRIX_PRODUCTS,
    PICKS,
    RESHAPES,
    SLICES,
    SPLITS,
    SQUEEZES,
    TRANSPOSES,
    UNCHANGED,
    operation_name,
)
from isthmus.symmetry.spaces import Consumer, Gain
from isthmus.tracing.execute import GainUse, Tracing
from isthmus.tracing.labels import support
from isthmus.tracing.rules.contraction import argument
from isthmus.tracing.rules.pointwise import PERMUTATION_LEVEL, limit_value
from isthmus.tracing.rules.reduction import dimensions_of
from isthmus.tracing.units import ORTHOGONAL_LEVEL


@dataclass(eq=False)
class Readers:
    """What reads a product with a gain, gathered on a walk forward.

    Attributes:
        consumers: Sums with parameters, each with whether a shift was added before.
        bias: The shift that was added on the way.
        obstacle: The first reader that can take in no gain, in words; empty where there is none.
    """

    consumers: list[tuple[Consumer, bool]] = field(default_factory=list)
    bias: str | None = None
    obstacle: str = ""


def absorb_gains(tracing: Tracing, program: Program) -> list[Gain]:
    """The gains of the graph; records evidence against rotations where one cannot be taken in, or a square is used."""
    uses: dict[str, list[GainUse]] = defaultdict(list)
    for use in tracing.gain_uses:
        uses[use.parameter].append(use)
    readers = _parameter_readers(tracing, program)
    gains = [_absorb(tracing, name, found, readers) for name, found in uses.items()]
    for gain in gains:
        if gain.obstacle:
            for use in uses[gain.parameter]:
                for value in use.values:
                    limit_value(tracing.units, value, PERMUTATION_LEVEL)
    absorbed = {gain.parameter for gain in gains if not gain.obstacle}
    for parameter, _, value in tracing.offsets.values():
        if parameter not in absorbed:
            limit_value(tracing.units, value, PERMUTATION_LEVEL)
    _settle_squares(tracing, program)
    return gains


def _settle_squares(tracing: Tracing, program: Program) -> None:
    """A square that is only summed over all units is a squared norm; any other use takes units one by one."""
    nodes = {node.name: node for node in program.graph.nodes}
    for name, value in tracing.squares.items():
        sums = [_sum_over(node) for node in _readers_of(nodes[name])]
        for layer in value.layers:
            whole = all(dims is not None and set(support(layer)) <= dims for dims in sums)
            tracing.units.limit(layer.ravel(), ORTHOGONAL_LEVEL if whole else PERMUTATION_LEVEL)


def _users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, but for assertions about it."""
    return [user for user in node.users if not isinstance(user.target, OpOverload) or user.target._schema.returns]


def _readers_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, seen through copies and casts."""
    found = []
    for user in _users_of(node):
        found += _readers_of(user) if operation_name(user) in UNCHANGED else [user]
    return found


def _sum_over(node: fx.Node) -> set[int] | None:
    """The dimensions that a node sums or averages over; None where it does something else."""
    if operation_name(node) not in LINEAR_REDUCTIONS:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    ndim = source.meta["val"].ndim
    return {d % ndim for d in dimensions_of(argument(node, 1), ndim)}


def _parameter_readers(tracing: Tracing, program: Program) -> dict[str, list[fx.Node]]:
    """For every parameter, the nodes that read it or a transposed copy of it, under all its names."""
    found: dict[str, list[fx.Node]] = defaultdict(list)

    def follow(name: str, node: fx.Node) -> None:
        for user in _users_of(node):
            if operation_name(user) in UNCHANGED | TRANSPOSES or user.name in tracing.offsets:
                follow(name, user)
            else:
                found[name].append(user)

    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.parameters:
            follow(program.parameters[node.name], node)
    return found


def _absorb(tracing: Tracing, parameter: str, uses: list[GainUse], readers: Mapping[str, list[fx.Node]]) -> Gain:
    """One gain with all that can take it in, or with what stands in the way."""
    offset, nodes = uses[0].offset, {use.node for use in uses}
    found = Readers(bias=uses[0].bias)
    if any(node not in nodes for node in readers[parameter]):
        found.obstacle = "the tensor is read elsewhere too"
    if any((use.offset, use.bias) != (offset, found.bias) for use in uses):
        found.obstacle = "its uses differ in offset or shift"
    for use in uses:
        _walk(tracing, use, readers, found)
    if found.bias is not None and not found.obstacle:
        # A node of the walk adds the shift; no other may read it.
        if len(readers[found.bias]) != len(uses):
            found.obstacle = f"{found.bias} is read elsewhere too"
        elif len({shifted for _, shifted in found.consumers}) > 1:
            found.obstacle = f"not all that reads it reads {found.bias} with it"
    if not found.obstacle and not found.consumers:
        found.obstacle = "nothing reads it"
    weights = [consumer.weight for consumer, _ in found.consumers]
    if not found.obstacle and len(set(weights)) < len(weights):
        found.obstacle = f"{next(w for w in weights if weights.count(w) > 1)} reads it twice"
    if found.obstacle:
        return Gain(parameter, offset, found.bias, obstacle=found.obstacle)
    return Gain(parameter, offset, found.bias, tuple(consumer for consumer, _ in found.consumers))


def _walk(tracing: Tracing, use: GainUse, readers: Mapping[str, list[fx.Node]], found: Readers) -> None:
    """Follows a product forward through views to all that reads it; writes into `found`."""
    ways = [(use.node, use.axis, use.bias is not None)]
    while ways and not found.obstacle:
        node, axis, shifted = ways.pop()
        for user in _users_of(node):
            moved = _moved_axis(node, user, axis)
            if moved is not None:
                ways.append((user, moved, shifted))
                continue
            shift = _shift_added(tracing, node, user, axis)
            if shift is not None and not shifted and found.bias in (None, shift):
                found.bias = shift
                ways.append((user, axis, True))
                continue
            consumer = _consumer_at(tracing, node, user, axis, readers)
            if isinstance(consumer, str):
                found.obstacle = consumer
                return
            found.consumers.append((consumer, shifted))


def _moved_axis(node: fx.Node, user: fx.Node, axis: int) -> int | None:
    """Where an axis lies behind an operation that leaves all numbers along it in place; None for any other."""
    name = operation_name(user)
    before, after = node.meta["val"], user.meta.get("val")
    if name == "getitem":
        return axis
    if not isinstance(before, Tensor) or user.args[:1] != (node,):
        return None
    ndim = before.ndim
    if name in UNCHANGED:
        return axis
    if name in RESHAPES | SQUEEZES:
        assert isinstance(after, Tensor)
        last = axis == ndim - 1 and after.ndim > 0 and after.shape[-1] == before.shape[-1]
        return after.ndim - 1 if last else None
    if name == "aten.permute":
        order = [int(d) % ndim for d in user.args[1]]  # type: ignore[union-attr]
        return order.index(axis)
    if name == "aten.transpose":
        first, second = (int(d) % ndim for d in user.args[1:3])  # type: ignore[arg-type]
        return {first: second, second: first}.get(axis, axis)
    if name in LINEAR_REDUCTIONS:
        gone = _sum_over(user)
        # A sum would add a shift several times.
        if name == "aten.sum" or gone is None or axis in gone:
            return None
        assert isinstance(after, Tensor)
        return axis if after.ndim == ndim else axis - sum(d < axis for d in gone)
    if name in SLICES | PICKS:
        place = 2 if name in SPLITS else 1
        dim = argument(user, place)
        dim = (int(dim) if isinstance(dim, int) else 0) % ndim
        if dim == axis:
            return None
        return axis - (dim < axis) if name in PICKS else axis
    return None


def _shift_added(tracing: Tracing, node: fx.Node, user: fx.Node, axis: int) -> str | None:
    """The parameter that an addition lays along the axis as a shift; None where it does something else."""
    if operation_name(user) not in ADDITIONS or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    name = tracing.source_of(other)
    if name is None or not isinstance(other, fx.Node) or user.args[0] is user.args[1]:
        return None
    value = other.meta["val"]
    return name if value.ndim == 1 and axis == node.meta["val"].ndim - 1 == user.meta["val"].ndim - 1 else None


def _consumer_at(
    tracing: Tracing, node: fx.Node, user: fx.Node, axis: int, readers: Mapping[str, list[fx.Node]]
) -> Consumer | str:
    """The parameter of a product that sums over the axis; in words, what stands in the way where there is none."""
    name = operation_name(user)
    who = f"{name} in {module_path(user) or 'the model'}" if user.op != "output" else "an output of the model"
    refusal = f"{who} reads it, which can take in no factor a unit"
    last = node.meta["val"].ndim - 1
    weight: object = None
    bias: object = None
    dim = 1
    if name in LINEAR_LAYERS and axis == last:
        weight, bias = argument(user, 1), user.kwargs.get("bias", argument(user, 2))
    elif name in CONVOLUTIONS and _groups_of(user) == 1 and axis == last - _spatial_of(name):
        weight = argument(user, 1)  # its bias takes in no shift: zeros are padded behind the norm
    elif name in MATRIX_PRODUCTS and axis == last:
        weight, dim = argument(user, 1), 0
    elif name == "aten.addmm" and axis == last and not user.kwargs and argument(user, 1) is node:
        weight, bias, dim = argument(user, 2), argument(user, 0), 0
    if not isinstance(weight, fx.Node) or (name != "aten.addmm" and argument(user, 0) is not node):
        return refusal
    parameter, flipped = _parameter_behind(tracing, weight)
    if parameter is None:
        return f"{who} multiplies it with something that is no parameter as it stands"
    if readers[parameter] != [user]:
        return f"{parameter} reads it, but is tied: something else reads that tensor too"
    own = tracing.source_of(bias) if isinstance(bias, fx.Node) and bias.meta["val"].ndim == 1 else None
    return Consumer(parameter, 1 - dim if flipped else dim, own if own and readers[own] == [user] else None)


def _parameter_behind(tracing: Tracing, node: fx.Node) -> tuple[str | None, bool]:
    """The parameter that a node is, and whether it was transposed on the way."""
    flipped = False
    while (name := tracing.source_of(node)) is None:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node.meta["val"].ndim != 2:
            return None, False
        operation = operation_name(node)
        if operation not in TRANSPOSES or (operation == "aten.permute" and list(node.args[1]) != [1, 0]):  # type: ignore[arg-type]
            return None, False
        node, flipped = source, not flipped
    return name, flipped


def _groups_of(node: fx.Node) -> int:
    """A convolution's number of groups."""
    groups = node.kwargs.get("groups", argument(node, 6))
    return groups if isinstance(groups, int) else 1


def _spatial_of(name: str) -> int:
    """How many dimensions a convolution slides over."""
    return int(name[len("aten.conv")])
