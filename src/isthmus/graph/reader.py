"""Running a captured graph on numbers, and reading its values on the way."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch
from isthmus.graph.capture import Program
from isthmus.state import first_float


class Reader(fx.Interpreter):
    """Runs a captured graph on numbers and hands the values of some nodes to observers.

    Args:
        program: The captured graph.
        observers: For each node to watch, what to do with its value; a returned tensor replaces the value.
        until: Stop once all watched nodes have run, and return None; else run to the end.
    """

    def __init__(
        self, program: Program, observers: Mapping[str, Callable[[Tensor], Tensor | None]], *, until: bool = True
    ) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.program = program
        self.observers = observers
        order = [node.name for node in program.graph.nodes]
        self.last = max((order.index(name) for name in observers), default=-1) if until else len(order)
        self.position = {name: index for index, name in enumerate(order)}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, or what its observer made of it; None behind the last watched node."""
        if self.position[n.name] > self.last and n.op != "placeholder":
            return None
        value = super().run_node(n)
        observer = self.observers.get(n.name)
        if observer is not None:
            replaced = observer(value)
            value = value if replaced is None else replaced
        return value

    def read(self, state: Mapping[str, Tensor], batch: Batch) -> Any:
        """The graph's outputs on a batch, with the weights of `state`."""
        names, kwargs = self.program.parameters, batch.kwargs
        if kwargs.keys() == self.program.kwargs.keys():  # the graph takes them in the order of its example
            kwargs = {name: kwargs[name] for name in self.program.kwargs}
        inputs = iter(pytree.tree_leaves((batch.args, dict(kwargs))))
        arguments = []
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                arguments.append(state[names[node.name]])
            elif node.name in self.program.constants:
                arguments.append(self.program.constants[node.name])
            else:
                arguments.append(next(inputs))
        with torch.no_grad():
            return self.run(*arguments, enable_io_processing=False)


def program_for(program: Program, batch: Batch) -> Program:
    """The graph for batches of that shape, whatever the precision and device of the model that it was captured from.

    Raises:
        TraceError: The graph is another one at this shape.
    """
    own = first_float(program.module.state_dict())
    alike = batch.to(own.device, own.dtype)
    return program.for_inputs(alike.args, alike.kwargs)


def node_shapes(program: Program) -> dict[str, torch.Size]:
    """The shape of every node's value; nodes whose value is no tensor, such as the list of a split, have none."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}
