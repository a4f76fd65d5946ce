"""Running a captured graph on numbers, and watching its values on the way."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch, Data, read_batches
from isthmus.graph.capture import Program
from isthmus.graph.operations import writes_in_place
from isthmus.progress import progress
from isthmus.state import State

# What to do with a node's value; a tensor that it returns replaces the value.
Observer = Callable[[Any], Tensor | None]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def feed(program: Program, state: State, batch: Batch) -> dict[fx.Node, Any]:
    """The values of a graph's placeholders.

    Parameters that the state lacks have none, so that a state may hold no more than is read. Constants are brought to
    the inputs' device.
    """
    leaves: list[Any] = pytree.tree_leaves((batch.args, program.in_order(batch.kwargs)))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
    inputs = iter(leaves)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in program.parameters:
            if program.parameters[node.name] in state:
                values[node] = state[program.parameters[node.name]]
        elif node.name in program.constants:
            constant = program.constants[node.name]
            values[node] = constant.to(device) if isinstance(constant, Tensor) else constant
        else:
            values[node] = next(inputs)
    return values


def run(
    program: Program,
    state: State,
    batch: Batch,
    observers: Mapping[str, Observer] = _NOTHING,
    *,
    until: str | None = None,
    only: Collection[str] | None = None,
    given: Mapping[str, Any] = _NOTHING,
    instead: Mapping[str, Callable[..., Any]] = _NOTHING,
) -> Any:
    """Runs a graph's nodes in their order; gradients are recorded as they are around the call.

    A value is let go after its last use. Inputs are copied where a node that is run writes into one of its arguments.

    Args:
        program: The graph, captured for the batch's shape (`program_for`).
        state: Tensors by state-dict name; only those that are read need be there.
        batch: The inputs, on the state's device and in its precision.
        observers: For each node to watch, what to do with its value; a returned tensor replaces the value.
        until: The last node to run; None runs to the end.
        only: The nodes to run; None runs all. What they read must be among them, a placeholder, or given.
        given: Values of nodes that are not to be run.
        instead: For some nodes, what to call with the node's arguments in place of its operation.

    Returns:
        The value of `until`; without it the model's outputs in their own form, or None if the output is not in `only`.
    """
    nodes = [node for node in program.graph.nodes if node.name not in given]
    if until is not None:
        nodes = nodes[: 1 + [node.name for node in nodes].index(until)]
    if only is not None:
        nodes = [node for node in nodes if node.op == "placeholder" or node.name in only]
    if any(writes_in_place(node) for node in nodes):
        batch = batch.clone()
    interpreter = fx.Interpreter(program.exported.graph_module, garbage_collect_values=False)
    env = interpreter.env = feed(program, state, batch)
    env |= {node: given[node.name] for node in program.graph.nodes if node.name in given}
    last = {source: node for node in nodes for source in node.all_input_nodes}
    for node in nodes:
        if node.op == "output":
            answer: Any = interpreter.map_nodes_to_values(node.args[0], node)
            form: Any = program.exported.call_spec.out_spec
            return pytree.tree_unflatten(list(answer), form)
        if node.name in instead:
            args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
            env[node] = instead[node.name](*args, **kwargs)
        elif node.op != "placeholder":
            env[node] = interpreter.run_node(node)
        if node.name in observers:
            replaced = observers[node.name](env[node])
            env[node] = env[node] if replaced is None else replaced
        if node.name == until:
            return env[node]
        for source in node.all_input_nodes:
            if last[source] is node:
                del env[source]
    return None


def observe_batch(program: Program, state: State, batch: Batch, observers: Mapping[str, Observer]) -> None:
    """Shows observers their nodes' values on one batch; the graph is run without gradients and as far as they need.

    Args:
        program: The captured graph, for any batch size.
        state: The network's tensors.
        batch: Inputs on any device and in any precision.
        observers: For each node to watch, what to do with its value; a returned tensor replaces the value.

    Raises:
        TraceError: The graph is another one at the batch's shape.
    """
    batch = batch.like(state)
    program = program_for(program, batch)
    last = [node.name for node in program.graph.nodes if node.name in observers][-1:]
    if last:
        with torch.no_grad():
            run(program, state, batch, observers, until=last[0])


def observe(program: Program, state: State, data: Data, observers: Mapping[str, Observer], description: str) -> None:
    """Shows observers their nodes' values on all data, batch by batch.

    Args:
        program: The captured graph, for any batch size.
        state: The network's tensors.
        data: Re-iterable batches; targets are not used.
        observers: For each node to watch, what to do with its value; a returned tensor replaces the value.
        description: What is being done, for the progress bar.

    Raises:
        DataError: No data, no batches, an empty batch, or batches of an unknown form.
        TraceError: The graph is another one at a batch's shape.
    """
    for batch in progress(read_batches(data), description, data):
        observe_batch(program, state, batch, observers)


def needed_for(program: Program, name: str) -> list[fx.Node]:
    """The nodes, without placeholders, that a node's value depends on, itself included, in the graph's order."""
    order = list(program.graph.nodes)
    target = next(node for node in order if node.name == name)
    before = order[: order.index(target)]
    # An operation in place changes values that other nodes hold, which the edges of the graph do not tell.
    needed = {target, *(node for node in before if writes_in_place(node))}
    for node in reversed(before):
        if any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in order if node in needed and node.op != "placeholder"]


def program_for(program: Program, batch: Batch) -> Program:
    """The graph for batches of that shape, whatever the precision and device of the model that it was captured from.

    Raises:
        TraceError: The graph is another one at this shape.
    """
    alike = batch.like(program.module.state_dict())
    return program.for_inputs(alike.args, alike.kwargs)


def node_shapes(program: Program) -> dict[str, torch.Size]:
    """The shape of every node's value; nodes whose value is no tensor, such as the list of a split, have none."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}
