"""What tracing leaves of a graph: where in it each space can be read."""

from dataclasses import dataclass

from isthmus.graph.capture import Program
from isthmus.symmetry.spaces import Site
from isthmus.wording.short import counted, told


@dataclass(frozen=True)
class Contraction:
    """A product of an activation with a parameter, summed over units: where spaces are consumed and produced.

    Attributes:
        node: Graph node of the product.
        source: Graph node of the activation that it consumes.
        weight: State-dict name of the parameter.
        bias: State-dict name of the bias, or None.
        channel: The dimension of the node's output that the produced units lie along.
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


@dataclass(eq=False)
class Graph:
    """The traced graph: where in it each space can be read.

    Attributes:
        program: The captured program.
        activations: For nodes whose values hold units: every space there and its positions in the value.
        post: For each space, the nodes that its consumers read.
        pre: For each space, the nodes that enter a nonlinear operation; where there are none, the nodes of `post`.
        contractions: Products of activations with parameters.
        batch_norms: Normalisations by running statistics.
        partial: Nodes whose values hold units that `activations` leaves out, some or all of them.
    """

    program: Program
    activations: dict[str, list[tuple[str, Site]]]
    post: dict[str, tuple[str, ...]]
    pre: dict[str, tuple[str, ...]]
    contractions: list[Contraction]
    batch_norms: list[BatchNorm]
    partial: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        nodes = counted(len(self.program.graph.nodes), "node")
        return told(
            self, nodes, counted(len(self.contractions), "contraction"), counted(len(self.batch_norms), "BatchNorm")
        )
