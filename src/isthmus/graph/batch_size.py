"""Whether a graph that was written for one batch size can be run at another.

A program that was exported without a dynamic batch size has its sizes written into its operations: what was
`x.view(len(x), -1)` is `view(x, [2, -1])`. At another size most such operations fail, but some run and mix samples.
"""

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from isthmus.graph.operations import RESHAPE_OVERLOADS, overload_name

Shape = tuple[int, ...]


def first_mixing(graph: fx.Graph, other: fx.Graph, inputs: Sequence[str]) -> str | None:
    """The first node whose shapes do not prove that every sample keeps its own place; None if there is none.

    Of every value that the samples reach, exactly one dimension must grow as the batch does. Reshapes must keep what
    stands before it, and other operations its length, so that samples lie there one after the other.

    Args:
        graph: The graph at one batch size.
        other: The same operations at another.
        inputs: Names of the placeholders that are the model's inputs.
    """
    shapes = {node.name: _leaf_shapes(node) for node in other.nodes}
    batch = _batch_sizes([(a, b) for n in graph.nodes if n.name in inputs for a, b in _paired(n, shapes)])
    if batch is None:
        return next(iter(inputs), "the inputs")
    dims: dict[str, list[int | None]] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        pairs = _paired(node, shapes)
        found = [_grown(a, b, batch) for a, b in pairs]
        sources = [each for each in node.all_input_nodes if any(dim is not None for dim in dims.get(each.name, ()))]
        dims[node.name] = found
        if -1 in found or len(pairs) != len(shapes[node.name]):
            return node.name
        if not sources:
            continue
        own = isinstance(node.target, OpOverload) or node.target is operator.getitem  # else it holds another graph
        if not own or None in found or (not pairs and node.users):
            return node.name
        before = [
            (shapes[each.name][index], dim)
            for each in sources
            for index, dim in enumerate(dims[each.name])
            if dim is not None
        ]
        for (_, shape), dim in zip(pairs, found, strict=True):
            assert dim is not None
            if overload_name(node) in RESHAPE_OVERLOADS:
                kept = shape[:dim] == before[0][0][: before[0][1]]
            else:
                kept = shape[dim] in {there[place] for there, place in before}
            if not kept:
                return node.name
    return None


def _leaf_shapes(node: fx.Node) -> list[Shape]:
    """Shapes of all tensors of a node's value."""
    leaves: list[Any] = pytree.tree_leaves(node.meta.get("val"))
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _paired(node: fx.Node, shapes: dict[str, list[Shape]]) -> list[tuple[Shape, Shape]]:
    """The shapes of a node's value in both graphs."""
    return list(zip(_leaf_shapes(node), shapes[node.name], strict=False))


def _batch_sizes(inputs: Sequence[tuple[Shape, Shape]]) -> tuple[int, int] | None:
    """The batch size in both graphs, from the first input that differs, if it does in one dimension only."""
    for a, b in inputs:
        if a != b:
            changed = [(m, n) for m, n in zip(a, b, strict=False) if m != n]
            return changed[0] if len(a) == len(b) and len(changed) == 1 and prod(changed[0]) else None
    return None


def _grown(a: Shape, b: Shape, batch: tuple[int, int]) -> int | None:
    """The one dimension that grows as the batch does; None if the shapes are the same, -1 if they differ otherwise."""
    if a == b:
        return None
    changed = [dim for dim in range(min(len(a), len(b))) if a[dim] != b[dim]]
    if len(a) != len(b) or len(changed) != 1 or a[changed[0]] * batch[1] != b[changed[0]] * batch[0]:
        return -1
    return changed[0]
