"""Running a captured graph node by node over all batches at once, so that weights may change between nodes."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from isthmus.data.batches import Batch
from isthmus.graph.capture import Program
from isthmus.graph.operations import writes_in_place
from isthmus.graph.reader import feed, program_for


class Sweep:
    """A network that is run breadth first: every node on all batches before the next node.

    Values are kept until their last use; values of nodes in `keep` are kept until `forget`.

    Args:
        program: The captured graph.
        state: The network's tensors; `set` changes single ones on the way.
        batches: Inputs, in the precision of the state.
        keep: Nodes whose values are asked for.
    """

    def __init__(
        self, program: Program, state: Mapping[str, Tensor], batches: Sequence[Batch], keep: Iterable[str]
    ) -> None:
        self.state = dict(state)
        self.keep = set(keep)
        self.order = {node.name: index for index, node in enumerate(program.graph.nodes)}
        self.runs = [_BatchSweep(program_for(program, batch), self.state, batch) for batch in batches]
        self.program = program
        self.position = -1
        self.last_use: dict[str, int] = {}
        for index, node in enumerate(program.graph.nodes):
            for source in node.all_input_nodes:
                self.last_use[source.name] = index

    def advance(self, node: str, *, before: bool = False) -> None:
        """Runs all nodes up to and with `node`, or up to the one before it."""
        end = self.order[node] - before
        while self.position < end:
            self.position += 1
            with torch.no_grad():
                for run in self.runs:
                    run.step(self.position, self.keep)
            done = [name for name, last in self.last_use.items() if last == self.position and name not in self.keep]
            self._drop(done)

    def values(self, node: str) -> list[Tensor]:
        """A kept node's value, batch by batch."""
        return [run.value(node) for run in self.runs]

    def set(self, name: str, tensor: Tensor) -> None:
        """Changes one tensor of the network for all nodes that have not run yet."""
        self.state[name] = tensor
        for run in self.runs:
            run.set(name, tensor)

    def forget(self, node: str) -> None:
        """Lets go of a kept node's value."""
        self.keep.discard(node)
        if self.last_use.get(node, -1) <= self.position:
            self._drop([node])

    def _drop(self, names: Sequence[str]) -> None:
        for run in self.runs:
            for name in names:
                run.drop(name)


class _BatchSweep(fx.Interpreter):
    """One batch's values in a sweep."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], batch: Batch) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=False)
        self.kept: dict[str, Tensor] = {}  # values that were saved before an operation wrote into them
        self.nodes = list(program.graph.nodes)
        self.named = {node.name: node for node in self.nodes}
        self.parameters = program.parameters
        self.env = feed(program, state, batch)

    def step(self, position: int, keep: set[str]) -> None:
        """Runs one node; what is kept is safe from operations that write into their input."""
        node = self.nodes[position]
        if node.op in ("placeholder", "output"):
            return
        if writes_in_place(node):
            for source in node.all_input_nodes:
                if source.name in keep and isinstance(self.env[source], Tensor):
                    self.kept[source.name] = self.env[source].clone()
        self.env[node] = self.run_node(node)

    def value(self, name: str) -> Tensor:
        """The value of a node as it was computed."""
        return self.kept[name] if name in self.kept else self.env[self.named[name]]

    def set(self, name: str, tensor: Tensor) -> None:
        """Changes a parameter or buffer."""
        for node in self.nodes:
            if node.op == "placeholder" and self.parameters.get(node.name) == name:
                self.env[node] = tensor

    def drop(self, name: str) -> None:
        """Lets go of a node's value, unless it is an input or a parameter."""
        node = self.named[name]
        self.kept.pop(name, None)
        if node.op != "placeholder":
            self.env.pop(node, None)
