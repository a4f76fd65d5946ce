"""Executes a captured graph on labels instead of numbers, one rule for each operation."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate, map_arg

from isthmus.trace.capture import Program, module_path
from isthmus.trace.labels import Units, Value, as_parameter, constant_value, contains, identifies, rigid_value

# Constants up to this many elements are computed for real, so that index tensors can be followed.
LARGEST_CONSTANT = 2**24


@dataclass(frozen=True)
class Contraction:
    """A product of an activation with a parameter, summed over units: where spaces are consumed and produced.

    Attributes:
        node: Graph node of the product.
        source: Graph node of the activation that it consumes.
        weight: State-dict name of the parameter.
        bias: State-dict name of the bias, or None.
        channel: The dimension of the node's output that carries the produced units.
        output: The weight's dimension of produced units.
    """

    node: str
    source: str
    weight: str
    bias: str | None
    channel: int
    output: int


@dataclass(frozen=True)
class BatchNorm:
    """A normalisation by running statistics: its node, input node, tensors (None where absent) and ε."""

    node: str
    source: str
    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    epsilon: float


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
    """

    units: Units = field(default_factory=Units)
    values: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    batch_norms: list[BatchNorm] = field(default_factory=list)
    nonlinear: list[str] = field(default_factory=list)
    gain_uses: list[GainUse] = field(default_factory=list)
    squares: dict[str, Value] = field(default_factory=dict)
    offsets: dict[str, tuple[str, float, Value]] = field(default_factory=dict)

    def source_of(self, node: Any) -> str | None:
        """State-dict name of the parameter that a graph argument is, if it is one and not a view of one."""
        value = self.values.get(node.name) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value) or value.source is None or value is not self.parameters.get(value.source):
            return None
        return value.source


Rule = Callable[[Tracing, fx.Node, SimpleNamespace], Any]


def execute(program: Program, rules: dict[str, Rule], is_pointwise: Callable[[OpOverload], bool]) -> Tracing:
    """Runs every operation of the graph on labels, and fixes what enters or leaves the model.

    Args:
        program: The captured graph.
        rules: A rule for each operation, by overload packet (`"aten.linear"`); `"pointwise"` serves all such ones.
        is_pointwise: Whether an operation works element by element.
    """
    tracing = Tracing()
    units = tracing.units
    for node in program.graph.nodes:
        units.place = (operation_name(node), module_path(node))
        if node.op == "placeholder":
            tracing.values[node.name] = placeholder(tracing, program, node)
        elif node.op == "call_function":
            tracing.values[node.name] = call(tracing, node, rules, is_pointwise)
        elif node.op == "get_attr":
            attribute = getattr(program.exported.graph_module, str(node.target), None)
            tracing.values[node.name] = constant_value(units, attribute) if isinstance(attribute, Tensor) else attribute
        elif node.op == "output":
            for value in values_in(read(tracing, node.args)):
                freeze_value(units, value, "output of the model")
        for value in values_in(tracing.values.get(node.name)):
            for layer in value.layers:
                units.occur(layer)
    return tracing


def operation_name(node: fx.Node) -> str:
    """A short name of the operation that a node runs."""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op


def placeholder(tracing: Tracing, program: Program, node: fx.Node) -> Any:
    """The value of a parameter, constant or input."""
    units = tracing.units
    if not node.users:
        return None
    if node.name in program.parameters:
        name = program.parameters[node.name]
        if name not in tracing.parameters:
            tracing.parameters[name] = as_parameter(units, name, tuple(node.meta["val"].shape))
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


def call(tracing: Tracing, node: fx.Node, rules: dict[str, Rule], is_pointwise: Callable[[OpOverload], bool]) -> Any:
    """The value of one operation: its rule's, or fixed positions where there is no rule."""
    if node.target is operator.getitem:
        container, index = read(tracing, node.args)
        return container[index]
    if not isinstance(node.target, OpOverload):
        if not values_in(read(tracing, (node.args, node.kwargs))):
            assert callable(node.target)  # arithmetic on sizes
            return node.target(*read(tracing, node.args), **read(tracing, node.kwargs))
        return without_rule(tracing, node)
    op = node.target
    if not op._schema.returns and not op._schema.is_mutable:
        return None  # an assertion
    arguments = bind(op, read(tracing, node.args), read(tracing, node.kwargs))
    folded = fold_constant(tracing.units, node, op, arguments)
    if folded is not None:
        return folded
    rule = rules.get(str(op.overloadpacket)) or rules.get(str(op.overloadpacket).removesuffix("_"))
    if rule is None and is_pointwise(op):
        rule = rules["pointwise"]
    result = without_rule(tracing, node) if rule is None else rule(tracing, node, arguments)
    if result is NotImplemented:
        result = without_rule(tracing, node)
    if op._schema.is_mutable:
        mutate(tracing, node, result)
    return result


def read(tracing: Tracing, argument: Any) -> Any:
    """A graph argument with nodes replaced by their values."""
    return map_arg(argument, lambda node: tracing.values[node.name])


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
    """All traced values inside an argument."""
    found: list[Value] = []
    map_aggregate(argument, lambda item: found.append(item) if isinstance(item, Value) else None)
    return found


def fold_constant(units: Units, node: fx.Node, op: OpOverload, arguments: SimpleNamespace) -> Any:
    """The operation's numbers, where all that it reads is constant; None where it is not."""
    values = values_in(vars(arguments))
    if any(value.constant is None for value in values) or torch.Tag.nondeterministic_seeded in op.tags:
        return None
    shapes = output_shapes(node)
    if not isinstance(shapes, tuple) or op._schema.is_mutable:
        return None
    size = 1
    for length in shapes:
        size *= length
    if size > LARGEST_CONSTANT:
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
    return None


def output_shapes(node: fx.Node) -> tuple[int, ...] | list[Any] | None:
    """The shape of a node's result, a list of shapes where it has several, None where it is no tensor."""
    example = node.meta.get("val")
    if isinstance(example, Tensor):
        return tuple(int(size) for size in example.shape)
    if isinstance(example, tuple | list):
        return [tuple(int(s) for s in x.shape) if isinstance(x, Tensor) else None for x in example]
    return None


def without_rule(tracing: Tracing, node: fx.Node) -> Any:
    """Fixed positions, after fixing every unit that reaches an operation for which there is no rule."""
    for value in values_in(read(tracing, (node.args, node.kwargs))):
        freeze_value(tracing.units, value, "reaches an operation without a rule", expected=False)
    shapes = output_shapes(node)
    if isinstance(shapes, list):
        return [None if shape is None else rigid_value(tracing.units, shape) for shape in shapes]
    return node.meta.get("val") if shapes is None else rigid_value(tracing.units, shapes)


def freeze_value(units: Units, value: Value, text: str, *, expected: bool = True) -> None:
    """Fixes every unit that a value carries."""
    for layer in value.layers:
        units.freeze(layer, text, expected=expected)


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
    tracing.values[target.name] = result
    whole = tracing.values[origin(target).name]
    if alike and isinstance(whole, Value) and (whole.shape == result.shape or identifies(tracing.units, whole)):
        return
    family = [name for name in sharing_memory(tracing, target) if name != target.name]
    if not family:
        return
    # Which part of the others was written over is not followed.
    freeze_value(tracing.units, result, "written into a part of a tensor", expected=False)
    for name in family:
        for value in values_in(tracing.values[name]):
            freeze_value(tracing.units, value, "a part of it is written over", expected=False)
        tracing.values[name] = map_aggregate(tracing.values[name], lambda item: rigidified(tracing.units, item))


def rigidified(units: Units, item: Any) -> Any:
    """A value with every position fixed; anything else as it is."""
    return rigid_value(units, item.shape) if isinstance(item, Value) else item


def sharing_memory(tracing: Tracing, node: fx.Node) -> list[str]:
    """Names of all traced nodes that are views of the tensor that a node is a view of."""
    return [other.name for other in node.graph.nodes if other.name in tracing.values and origin(other) is origin(node)]


def origin(node: fx.Node) -> fx.Node:
    """The node that a chain of views and in-place operations starts from."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        op = node.target
        is_view = isinstance(op, OpOverload) and any(result.alias_info is not None for result in op._schema.returns)
        if not is_view and op is not operator.getitem:
            break
        node = node.args[0]
    return node
