"""Executes a captured graph on labels instead of numbers, one rule for each operation."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate, map_arg

from isthmus.graph.capture import Program, module_path
from isthmus.graph.operations import operation_name
from isthmus.symmetry.traced_graph import BatchNorm, Contraction
from isthmus.tracing.labels import Choice, Value, as_parameter, constant_value, relate_parts, rigid_value
from isthmus.tracing.stacks import labelled_together
from isthmus.tracing.units import WILDCARD, Ids, UnitTable

# Constants up to this many elements are computed for real, so that index tensors can be followed.
LARGEST_CONSTANT = 2**24


@dataclass(frozen=True, eq=False)
class GainUse:
    """A product of an activation with one factor a unit; whether it ties units down is known once all has run.

    Attributes:
        node: Graph node of the product.
        axis: The dimension of the node's value that the factors lie along.
        parameter: State-dict name of the factors.
        offset: What is added to the parameter before it multiplies.
        bias: State-dict name of a shift that the same node adds, or None.
        values: What is used unit by unit if the factors cannot be taken in by what reads the product.
    """

    node: fx.Node
    axis: int
    parameter: str
    offset: float
    bias: str | None
    values: tuple[Value, ...]


@dataclass(eq=False)
class Tracing:
    """What has been learnt from a graph so far.

    Attributes:
        units: All units and their relations.
        values: The traced value of every node.
        parameters: The value of every parameter and persistent buffer that the graph reads, by state-dict name.
        contractions: Products of activations with parameters.
        batch_norms: Normalisations by running statistics.
        nonlinear: Nodes that are the input of a nonlinear pointwise operation.
        gain_uses: Products with one factor a unit.
        squares: Values that are squares, by node: harmless where they are only summed over all units.
        offsets: Nodes that are a parameter plus a number: the parameter, the number and the node's value.
        slots: Units that number the slots of tensors of chosen indices, by the history and shape of the indices.
        cut: For nodes that select a part of a value, the units that are in no part of it.
    """

    units: UnitTable = field(default_factory=UnitTable)
    values: dict[str, object] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    batch_norms: list[BatchNorm] = field(default_factory=list)
    nonlinear: list[str] = field(default_factory=list)
    gain_uses: list[GainUse] = field(default_factory=list)
    squares: dict[str, Value] = field(default_factory=dict)
    offsets: dict[str, tuple[str, float, Value]] = field(default_factory=dict)
    cut: dict[str, list[Ids]] = field(default_factory=dict)
    slots: dict[tuple[tuple[str, ...], tuple[int, ...]], Ids] = field(default_factory=dict)

    def source_of(self, node: Any) -> str | None:
        """State-dict name of the parameter that a graph argument is, if it is one and not a view of one."""
        value = self.values.get(node.name) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value) or value.source is None or value is not self.parameters.get(value.source):
            return None
        return value.source


Rule = Callable[[Tracing, fx.Node, SimpleNamespace], Any]


@dataclass(frozen=True)
class Rules:
    """What each operation does to labels.

    Attributes:
        table: A rule for each operation, by overload packet (`"aten.linear"`); `"pointwise"` serves all such ones.
        is_pointwise: Whether an operation works element by element.
        mutate: Gives the result of an operation that works in place to all that it changes.
        spread: Applies a rule to values that data choose; its last argument says that the rule treats each of the
            slots by itself.
        views: The rules that only move elements, or leave them as they are.
    """

    table: dict[str, Rule]
    is_pointwise: Callable[[OpOverload], bool]
    mutate: Callable[[Tracing, fx.Node, object], None]
    spread: Callable[[Tracing, fx.Node, SimpleNamespace, Rule, bool], object]
    views: frozenset[Rule]

    def rule_for(self, op: OpOverload) -> Rule | None:
        """The rule of an operation; None where there is none."""
        name = str(op.overloadpacket)
        rule = self.table.get(name) or self.table.get(name.removesuffix("_"))
        return self.table["pointwise"] if rule is None and self.is_pointwise(op) else rule


def execute(program: Program, rules: Rules) -> Tracing:
    """Runs every operation of the graph on labels, and fixes what enters or leaves the model.

    Args:
        program: The captured graph.
        rules: What each operation does.
    """
    tracing = Tracing()
    units = tracing.units
    unused = unused_nodes(program.graph)
    for node in program.graph.nodes:
        if node in unused:
            continue
        units.place = (operation_name(node), module_path(node))
        if node.op == "placeholder":
            tracing.values[node.name] = _placeholder(tracing, program, node)
        elif node.op == "call_function":
            tracing.values[node.name] = _call(tracing, node, rules)
        elif node.op == "get_attr":
            attribute = getattr(program.exported.graph_module, str(node.target), None)
            tracing.values[node.name] = constant_value(units, attribute) if isinstance(attribute, Tensor) else attribute
        elif node.op == "output":
            for value in values_in(_read(tracing, node.args)):
                freeze_value(units, value, "output of the model")
        _note(units, tracing.values.get(node.name))
    units.place = ("", "")
    for value in tracing.parameters.values():
        relate_parts(units, value)
    units.freeze(_never_read(tracing, program.graph), "no operation reads it on inputs of this shape")
    return tracing


def unused_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Operations of whose results at most the shape is looked at, which the graph does not show any more."""
    unused: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        op = node.target
        if node.op == "call_function" and isinstance(op, OpOverload) and not op._schema.is_mutable:
            if all(user in unused for user in node.users):
                unused.add(node)  # among them assertions, which have no results
        elif op is operator.getitem and all(user in unused for user in node.users):
            unused.add(node)
    return unused


def _note(units: UnitTable, item: Any) -> None:
    """Records that units occur in a node's value; the units of all alternatives occur at one place."""
    if isinstance(item, Choice):
        kinds = {tuple(layer.shape for layer in value.layers) for value in item.values}
        for layers in zip(*(value.layers for value in item.values), strict=len(kinds) == 1):
            units.occur(np.stack(layers))
    elif isinstance(item, list | tuple):
        for each in item:
            _note(units, each)
    elif isinstance(item, Value):
        for layer in item.layers:
            units.occur(layer)


def _never_read(tracing: Tracing, graph: fx.Graph) -> Ids:
    """Units that are cut off before any operation has read them.

    How much is cut off often follows the inputs' shape (of a table of positions, the rows behind the last position), so
    that on other inputs something would read these units, and tell them apart.
    """
    units = tracing.units
    if not tracing.cut:
        return np.empty(0, dtype=np.int64)
    lost = {name: np.unique(units.find(np.concatenate(ids))) for name, ids in tracing.cut.items()}
    candidates = np.unique(np.concatenate(list(lost.values())))
    candidates = candidates[(candidates != WILDCARD) & ~units.is_frozen(candidates)]
    if not len(candidates):
        return candidates
    wanted = np.zeros(units.size + 1, dtype=bool)  # the last entry stands for wildcards
    wanted[candidates] = True
    held: dict[str, Ids] = {}
    for node in graph.nodes:
        roots = [units.find(layer) for value in values_in(tracing.values.get(node.name)) for layer in value.layers]
        found = [np.unique(root[wanted[root]]) for root in roots]
        held[node.name] = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))
    read_by_some = [
        np.setdiff1d(np.setdiff1d(held[source.name], held[node.name]), lost.get(node.name, ()))
        for node in graph.nodes
        for source in node.all_input_nodes
        if len(held[source.name])
    ]
    return np.setdiff1d(candidates, np.concatenate([np.empty(0, dtype=np.int64), *read_by_some]))


def _placeholder(tracing: Tracing, program: Program, node: fx.Node) -> Any:
    """The value of a parameter, constant or input."""
    units = tracing.units
    if not node.users:
        return None
    if node.name in program.parameters:
        name = program.parameters[node.name]
        if name not in tracing.parameters:
            shape = tuple(node.meta["val"].shape)
            tracing.parameters[name] = as_parameter(units, name, shape, labelled_together(node, shape))
        return tracing.parameters[name]
    if node.name in program.constants:
        constant = program.constants[node.name]
        if isinstance(constant, Tensor) and not constant.is_meta and constant.numel() <= LARGEST_CONSTANT:
            return constant_value(units, constant.detach())
        return rigid_value(units, tuple(constant.shape)) if isinstance(constant, Tensor) else constant
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        return example
    value = rigid_value(units, tuple(example.shape))
    return value


def _call(tracing: Tracing, node: fx.Node, rules: Rules) -> Any:
    """The value of one operation: its rule's, or fixed positions where there is no rule."""
    if node.target is operator.getitem:
        container, index = _read(tracing, node.args)
        return container[index]
    if not isinstance(node.target, OpOverload):
        if not values_in(_read(tracing, (node.args, node.kwargs))):
            assert callable(node.target)  # arithmetic on sizes
            return node.target(*_read(tracing, node.args), **_read(tracing, node.kwargs))
        return _without_rule(tracing, node)
    op = node.target
    if not op._schema.returns and not op._schema.is_mutable:
        return None  # an assertion
    arguments = bind(op, _read(tracing, node.args), _read(tracing, node.kwargs))
    folded = _fold_constant(tracing.units, node, op, arguments)
    if folded is not None:
        return folded
    rule = rules.rule_for(op)
    if rule not in rules.views:
        for value in values_in(vars(arguments)):
            freeze_names(tracing.units, value)
    if rule is None:
        result = _without_rule(tracing, node)
    elif _has_choice(vars(arguments)):
        elementwise = rule in rules.views or rule is rules.table["pointwise"]
        result = rules.spread(tracing, node, arguments, rule, elementwise)
    else:
        result = rule(tracing, node, arguments)
    if result is NotImplemented:
        result = _without_rule(tracing, node)
    if op._schema.is_mutable:
        rules.mutate(tracing, node, result)
    return result


def _has_choice(argument: Any) -> bool:
    """Whether an argument holds a value that data choose."""
    found: list[Choice] = []
    map_aggregate(argument, lambda item: found.append(item) if isinstance(item, Choice) else None)
    return bool(found)


def freeze_names(units: UnitTable, value: Value) -> None:
    """Fixes the units that a tensor of indices names, where something else than a look-up reads the indices."""
    if value.names is not None:
        units.freeze(value.names.ids, "an operation reads their indices")


def _read(tracing: Tracing, argument: Any) -> Any:
    """A graph argument with nodes replaced by their values."""

    def value_of(node: fx.Node) -> Any:
        return tracing.values[node.name]

    return map_arg(argument, value_of)


def bind(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Arguments by their names in the operation's schema, defaults filled in."""
    bound = {}
    for index, parameter in enumerate(op._schema.arguments):
        if index < len(args) and not parameter.kwarg_only:
            bound[parameter.name] = args[index]
        elif parameter.name in kwargs:
            bound[parameter.name] = kwargs[parameter.name]
        else:
            bound[parameter.name] = parameter.default_value if parameter.has_default_value() else None
    return SimpleNamespace(**bound)


def values_in(argument: Any) -> list[Value]:
    """All traced values inside an argument, every alternative of a choice among them."""
    found: list[Value] = []

    def collect(item: Any) -> None:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, Choice):
            found.extend(item.values)

    map_aggregate(argument, collect)
    return found


def _fold_constant(units: UnitTable, node: fx.Node, op: OpOverload, arguments: SimpleNamespace) -> Any:
    """The operation's numbers, where all that it reads is constant; None where it is not."""
    values = values_in(vars(arguments))
    if any(value.constant is None for value in values) or torch.Tag.nondeterministic_seeded in op.tags:
        return None
    shapes = output_shapes(node)
    if shapes is None or op._schema.is_mutable:
        return None
    every = [shape for shape in shapes if shape is not None] if isinstance(shapes, list) else [shapes]
    if sum(math.prod(shape) for shape in every) > LARGEST_CONSTANT:
        return None
    numbers = map_aggregate(vars(arguments), lambda x: x.constant if isinstance(x, Value) else x)
    assert isinstance(numbers, dict)
    numbers = dict(numbers)
    if "device" in numbers:
        numbers["device"] = torch.device("cpu")
    if not any(isinstance(x, Tensor) and x.is_meta for x in numbers.values()):
        positional = [numbers[p.name] for p in op._schema.arguments if not p.kwarg_only]
        named = {p.name: numbers[p.name] for p in op._schema.arguments if p.kwarg_only}
        result = op(*positional, **named)
        if isinstance(result, Tensor):
            return constant_value(units, result)
        if isinstance(result, list | tuple) and all(isinstance(each, Tensor) for each in result):
            return [constant_value(units, each) for each in result]
    return None


def output_shapes(node: fx.Node) -> tuple[int, ...] | list[Any] | None:
    """The shape of a node's result, a list of shapes where it has several, None where it is no tensor."""
    example = node.meta.get("val")
    if isinstance(example, Tensor):
        return tuple(int(size) for size in example.shape)
    if isinstance(example, tuple | list):
        return [tuple(int(s) for s in x.shape) if isinstance(x, Tensor) else None for x in example]
    return None


def _without_rule(tracing: Tracing, node: fx.Node) -> Any:
    """Fixed positions, after fixing every unit that reaches an operation for which there is no rule."""
    for value in values_in(_read(tracing, (node.args, node.kwargs))):
        freeze_value(tracing.units, value, "reaches an operation without a rule", expected=False)
    shapes = output_shapes(node)
    if isinstance(shapes, list):
        return [None if shape is None else rigid_value(tracing.units, shape) for shape in shapes]
    return node.meta.get("val") if shapes is None else rigid_value(tracing.units, shapes)


def freeze_value(units: UnitTable, value: Value, text: str, *, expected: bool = True) -> None:
    """Fixes every unit of a value."""
    for layer in value.layers:
        units.freeze(layer, text, expected=expected)
    freeze_names(units, value)


def origin(node: fx.Node) -> fx.Node:
    """The node that a chain of views and in-place operations starts from."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        op = node.target
        is_view = isinstance(op, OpOverload) and any(result.alias_info is not None for result in op._schema.returns)
        made_apart = op is operator.getitem and not _returns_views(node.args[0])
        if made_apart or (not is_view and op is not operator.getitem):
            break
        node = node.args[0]
    return node


def _returns_views(node: fx.Node) -> bool:
    """Whether the several results of an operation share memory with what it was given, and so with one another."""
    op = node.target
    return not isinstance(op, OpOverload) or any(result.alias_info is not None for result in op._schema.returns)
