"""Layers of a traced graph: a product with a parameter and the BatchNorm right behind it, as one affine map.

Suffixes: O units out, I units in times places of the kernel, R rows (samples and positions).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx

from isthmus.data.batches import Batch, Data, read_batches
from isthmus.errors import DataError
from isthmus.graph.capture import Program
from isthmus.graph.operations import (
    ADDITION_OVERLOADS,
    CONVOLUTION_OVERLOADS,
    LINEAR_LAYERS,
    RECTIFIERS,
    operation_name,
    overload_name,
)
from isthmus.state import State
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.traced_graph import BatchNorm, Contraction
from isthmus.symmetry.transform import Transforms, move_site


@dataclass(frozen=True, eq=False)
class Layer:
    """One affine map of the network.

    Attributes:
        contraction: The product with a parameter.
        norm: The BatchNorm that alone reads it, or None.
        output: Node of the map's value.
        stream: Node of the sum that this value alone goes into, where the other addend is computed before: a residual
            stream. None where there is none.
        shortcut: Node of the other addend.
        rectified: Whether nothing but ReLU reads the output, or the stream where there is one.
        node: The graph node of the product.
    """

    contraction: Contraction
    norm: BatchNorm | None
    output: str
    stream: str | None
    shortcut: str | None
    rectified: bool
    node: fx.Node

    @property
    def target(self) -> str:
        """Node whose value the layer is to bring about: the stream, or its own output."""
        return self.stream or self.output


def layers_of(symmetry: Symmetry) -> list[Layer]:
    """All layers whose rows can be gathered, in the order in which the graph runs them.

    A weight that several operations share, such as two products, or a tied head and embedding, belongs to none.
    """
    graph = symmetry.traced
    nodes = {node.name: node for node in graph.program.graph.nodes}
    order = {name: index for index, name in enumerate(nodes)}
    norms = {norm.source: norm for norm in graph.batch_norms}
    shared = shared_weights(graph.program)
    found = []
    for contraction in sorted(graph.contractions, key=lambda each: order[each.node]):
        node = nodes[contraction.node]
        if not _rows_can_be_gathered(node) or contraction.weight in shared:
            continue
        norm = norms.get(contraction.node)
        if norm is not None and (len(node.users) != 1 or None in (norm.weight, norm.bias, norm.mean, norm.variance)):
            norm = None
        output = nodes[norm.node] if norm else node
        stream, shortcut = _stream_of(output, order, order[contraction.node])
        last = nodes[stream] if stream else output
        rectified = bool(last.users) and all(operation_name(user) in RECTIFIERS for user in last.users)
        found.append(Layer(contraction, norm, output.name, stream, shortcut, rectified, node))
    return found


def _rows_can_be_gathered(node: fx.Node) -> bool:
    """Whether a product reads: input, weight, bias, and for convolutions stride, padding, dilation, groups."""
    return operation_name(node) in LINEAR_LAYERS or overload_name(node) in CONVOLUTION_OVERLOADS


def shared_weights(program: Program) -> set[str]:
    """The tensors that more than one operation of the graph reads."""
    users: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.name in program.parameters:
            name = program.parameters[node.name]
            users[name] = users.get(name, 0) + len(node.users)
    return {name for name, count in users.items() if count > 1}


def _stream_of(output: fx.Node, order: Mapping[str, int], position: int) -> tuple[str | None, str | None]:
    """The sum that a value goes into, and its other addend, if that is known when the layer runs."""
    if len(output.users) != 1:
        return None, None
    (user,) = output.users
    addends = user.all_input_nodes
    if overload_name(user) not in ADDITION_OVERLOADS or len(user.args) != 2 or user.kwargs or len(addends) != 2:
        return None, None
    other = addends[1] if addends[0] is output else addends[0]
    same = other.meta["val"].shape == output.meta["val"].shape == user.meta["val"].shape
    if not same or order[other.name] >= position:
        return None, None
    return user.name, other.name


def folded(layer: Layer, state: State) -> tuple[Tensor, Tensor]:
    """The layer's weight and bias in float64 with its BatchNorm folded in; the weight keeps its shape."""
    weight = state[layer.contraction.weight].double()
    bias = state[layer.contraction.bias].double() if layer.contraction.bias else weight.new_zeros(weight.shape[0])
    if layer.norm is None:
        return weight, bias
    gain, shift, mean, variance = _norm_tensors(layer.norm, state)
    scale = gain / (variance + layer.norm.epsilon).sqrt()
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift + scale * (bias - mean)


def _norm_tensors(norm: BatchNorm, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A BatchNorm's gain, shift, running mean and running variance, in float64."""
    assert norm.weight is not None
    assert norm.bias is not None
    assert norm.mean is not None
    assert norm.variance is not None
    gain, shift, mean, variance = (state[name].double() for name in (norm.weight, norm.bias, norm.mean, norm.variance))
    return gain, shift, mean, variance


def unfold_layer(layer: Layer, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer that computes `weight`, `bias` as one affine map: the inverse of `folded`.

    Args:
        layer: The layer.
        weight: In the parameter's shape.
        bias: One number a unit.
        mean: Mean of the product over the data, which becomes the running mean.
        variance: Its variance, which becomes the running variance.
    """
    tensors = {layer.contraction.weight: weight}
    norm = layer.norm
    if norm is None:
        return tensors | ({layer.contraction.bias: bias} if layer.contraction.bias else {})
    assert norm.weight is not None
    assert norm.bias is not None
    assert norm.mean is not None
    assert norm.variance is not None
    if layer.contraction.bias:
        tensors[layer.contraction.bias] = torch.zeros_like(bias)
    return tensors | {
        norm.weight: (variance + norm.epsilon).sqrt(),
        norm.bias: bias + mean,
        norm.mean: mean,
        norm.variance: variance,
    }


def move_folded(symmetry: Symmetry, layer: Layer, weight: Tensor, transforms: Transforms) -> Tensor:
    """A folded weight moved into the common frame."""
    for space, site in symmetry.sites.get(layer.contraction.weight, []):
        weight = move_site(weight, site, transforms[space.name])
    return weight


def move_value(symmetry: Symmetry, node: str, value: Tensor, transforms: Transforms) -> Tensor:
    """A node's value moved into the common frame."""
    for name, site in symmetry.traced.activations.get(node, []):
        value = move_site(value, site, transforms[name])
    return value


def carries_outputs(symmetry: Symmetry, layer: Layer) -> bool:
    """Whether the spaces of the units that a layer produces can be moved in its target's value."""
    places = symmetry.sites.get(layer.contraction.weight, [])
    produced = {space.name for space, site in places if layer.contraction.output in site.dims}
    return produced <= {name for name, _ in symmetry.traced.activations.get(layer.target, [])}


def sample_positions(
    layer: Layer, shape: Sequence[int], count: int, generator: torch.Generator
) -> Int[Tensor, " positions"]:
    """Up to `count` positions of a layer's output, flat over all but the batch's and the units' dimensions."""
    return torch.randperm(math.prod(_position_shape(layer, shape)), generator=generator)[:count]


def _position_shape(layer: Layer, shape: Sequence[int]) -> list[int]:
    """The sizes of an output's dimensions that are neither the batch's nor the units'."""
    return [size for d, size in enumerate(shape) if d not in (0, layer.contraction.channel % len(shape))]


def output_rows(layer: Layer, value: Tensor, positions: Int[Tensor, " positions"]) -> Float[Tensor, "rows units"]:
    """A layer's output at some positions of every sample, one row each."""
    units = value.movedim(layer.contraction.channel % value.ndim, -1)
    return units.flatten(1, -2)[:, positions].flatten(0, 1) if units.ndim > 2 else units


def input_rows(
    layer: Layer, value: Tensor, positions: Int[Tensor, " positions"], kernel: Sequence[int], shape: Sequence[int]
) -> list[Float[Tensor, "rows inputs"]]:
    """What a layer's product reads at some positions, one matrix a group of channels, in the order of its weight.

    Args:
        layer: The layer.
        value: The product's input.
        positions: Positions of its output.
        kernel: The weight's dimensions behind the first two.
        shape: Shape of the output.
    """
    if operation_name(layer.node) in LINEAR_LAYERS:
        rows = value.flatten(1, -2)[:, positions].flatten(0, 1) if value.ndim > 2 else value
        return [rows]
    spatial = len(kernel)
    stride, padding, dilation, groups = _convolution_options(layer.node, spatial, kernel)
    padded = F.pad(value, [side for pair in reversed(padding) for side in pair])
    index = torch.unravel_index(positions, tuple(_position_shape(layer, shape)))
    patches = []
    for offset in product(*(range(size) for size in kernel)):
        places = [index[d] * stride[d] + offset[d] * dilation[d] for d in range(spatial)]
        patches.append(padded[(slice(None), slice(None), *places)])
    rows = torch.stack(patches, dim=2).permute(0, 3, 1, 2)  # batch, positions, channels, kernel
    return [part.flatten(0, 1).flatten(1) for part in rows.chunk(groups, dim=2)]


def _convolution_options(
    node: fx.Node, spatial: int, kernel: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """Stride, padding (before and after), dilation and groups of a convolution's node."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def each(name: str, default: int) -> list[int]:
        values = given.get(name, default)
        values = [values] if isinstance(values, int) else list(values)
        return values * spatial if len(values) == 1 else values

    dilation = each("dilation", 1)
    if given.get("padding") == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(t // 2, t - t // 2) for t in total]
    elif given.get("padding") == "valid":
        padding = [(0, 0)] * spatial
    else:
        padding = [(p, p) for p in each("padding", 0)]
    return each("stride", 1), padding, dilation, given.get("groups", 1)


def take(data: Data | None, samples: int, state: State) -> list[Batch]:
    """The first batches of the data, `samples` inputs in all, in the precision and on the device of a state.

    Raises:
        DataError: There is none.
    """
    batches: list[Batch] = []
    left = samples
    for batch in read_batches(data):
        if left < 1:
            break
        batch = batch.head(min(left, batch.size))
        batches.append(batch.like(state).clone())
        left -= batch.size
    if not batches:
        raise DataError("the data is empty: fitting layers needs inputs")
    return batches


def chunked_product(
    a: Float[Tensor, "rows left"], b: Float[Tensor, "rows right"], size: int = 4096
) -> Float[Tensor, "left right"]:
    """aᵀ b, summed in float64 over chunks of float32 products."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(size), b.split(size), strict=True):
        total += (left.T @ right).double()
    return total


def seen_by(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """An observer that keeps a copy of a node's value, safe from operations that write into it."""

    def keep(value: Tensor) -> None:
        seen[name] = value.clone()

    return keep
