"""The weight matrices of a graph, and their singular value decompositions.

Suffixes: B blocks, M rows of a block, N columns of a block, K singular values of a block, min(M, N).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from isthmus.errors import InputError
from isthmus.observe.given import as_modules, symmetry_of
from isthmus.state import State
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import told_by_fields


@dataclass(frozen=True)
class Weight:
    """A weight matrix of the graph.

    Attributes:
        name: State-dict name of the parameter.
        output: The parameter's dimension of produced units.
        groups: Blocks of the matrix: groups of a convolution.
    """

    name: str
    output: int
    groups: int

    __repr__ = told_by_fields

    def blocks(self, state: State) -> Float[Tensor, "blocks rows columns"]:
        """The matrix of a state, in float64 on the CPU."""
        tensor = state[self.name].detach().cpu().double().movedim(self.output, 0)
        return tensor.reshape(self.groups, tensor.shape[0] // self.groups, -1)

    def restored(self, blocks: Float[Tensor, "blocks rows columns"], like: Tensor) -> Tensor:
        """The parameter that `blocks` were taken from, in the dtype and on the device of `like`."""
        turned = like.movedim(self.output, 0)
        return blocks.reshape(turned.shape).movedim(0, self.output).to(like.device, like.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Factors:
    """The singular value decomposition of a weight matrix, block by block; values fall within each block."""

    left: Float[Tensor, "blocks rows ranks"]
    values: Float[Tensor, "blocks ranks"]
    right: Float[Tensor, "blocks ranks columns"]

    __repr__ = told_by_fields

    @property
    def precision(self) -> float:
        """What singular values are computed to: the spacing of float64 at the largest, times the matrix's size."""
        size = max(self.left.shape[1], self.right.shape[2])
        return size * torch.finfo(torch.float64).eps * float(self.values.max())

    def kept(self, threshold: float) -> Float[Tensor, "blocks ranks"]:
        """1 for singular values of at least `threshold` times the layer's largest that are not zero, else 0."""
        known = (self.values >= threshold * self.values.max()) & (self.values > self.precision)
        return known.double()

    def ordered(self, numbers: Float[Tensor, "blocks ranks"]) -> Float[Tensor, " kept"]:
        """One number a direction, by falling singular value; directions of value zero are left out."""
        order = self.values.flatten().argsort(descending=True, stable=True)
        return numbers.flatten()[order[self.kept(0.0).flatten()[order] > 0]]


def factorise(blocks: Float[Tensor, "blocks rows columns"]) -> Factors:
    """The singular value decomposition of every block."""
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    return Factors(left, values, right)


def weights_of(symmetry: Symmetry, model: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """Every weight matrix of the graph in the order of its first use, and the other trained tensors with the reason."""
    graph = symmetry.traced
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.program.graph.nodes}
    order = {name: index for index, name in enumerate(nodes)}
    found: dict[str, Weight] = {}
    for contraction in sorted(graph.contractions, key=lambda each: order[each.node]):
        shape = symmetry.shapes[contraction.weight]
        groups = 1
        if len(shape) > 2 and contraction.output == 0:
            groups = nodes[contraction.source].meta["val"].shape[contraction.channel] // shape[1]
        found.setdefault(contraction.weight, Weight(contraction.weight, contraction.output, groups))
    skipped = {
        symmetry.tied.get(name, name): "no linear layer or plain convolution multiplies its input by this tensor itself"
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.ndim > 1 and symmetry.tied.get(name, name) not in found
    }
    skipped |= {name: "never read" for name in symmetry.untouched if name in skipped}
    return list(found.values()), skipped


def as_pair(models: Sequence[nn.Module | State], module: nn.Module | None = None) -> list[nn.Module]:
    """Two models as modules in `eval()`.

    Raises:
        InputError: Not two models.
        ModelError: They are not of one architecture.
    """
    if len(models) != 2:
        raise InputError(
            f"{len(models)} models: singular directions are compared between two, with an alignment of two"
        )
    return as_modules(models, module)


def with_graph(model: nn.Module, symmetry: Symmetry | None, data: Any) -> Symmetry:
    """A symmetry of the model that has its graph.

    Raises:
        InputError: There is none, and no data to trace with.
        SymmetryError: The symmetry is not the model's.
    """
    if symmetry is None and data is None:
        raise InputError("no symmetry: give symmetry=isthmus.trace(model, inputs), an alignment, or data=")
    found = symmetry_of(model, symmetry, None, data)
    if found.graph is None:
        raise InputError(
            "the symmetry has no graph, in which weight matrices are found: trace the model, or give data="
        )
    return found
