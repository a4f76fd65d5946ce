"""Cutting the models' graphs in two: a trunk that all share, and what is every model's own.

A node belongs to the trunk if every tensor that it reads lies in merged spaces only, and everything it is computed from
belongs to the trunk; all other nodes are every model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.errors import SymmetryError, TraceError
from isthmus.graph.capture import Program
from isthmus.graph.operations import writes_in_place
from isthmus.symmetry.spaces import Site
from isthmus.symmetry.symmetry import Symmetry
from isthmus.tracing.execute import origin

Places = list[tuple[str, Site]]


@dataclass(frozen=True, eq=False)
class Cut:
    """A model's graph in two parts.

    Attributes:
        trunk: Nodes of the shared part.
        border: Nodes of the shared part whose values the own part reads, and where units lie in them.
        head: Nodes of the own part; some may also be in the trunk, where units could not be read back behind them.
        trunk_tensors: State-dict names that the trunk reads.
        head_tensors: Those that the head reads.
    """

    trunk: frozenset[str]
    border: Mapping[str, Places]
    head: frozenset[str]
    trunk_tensors: frozenset[str]
    head_tensors: frozenset[str]


def cut_all(symmetries: Sequence[Symmetry], shared: set[str]) -> list[Cut]:
    """Every model's graph cut at the same place.

    Raises:
        SymmetryError: The models run other operations in the trunk.
        TraceError: An operation in place crosses the border.
    """
    programs: list[Program] = [symmetry.traced.program for symmetry in symmetries]
    constants = {name for name in programs[0].constants if all(_same_constant(programs[0], p, name) for p in programs)}
    common = [_trunk_nodes(program, shared, constants) for program in programs]
    cuts = [_cut(symmetry, nodes) for symmetry, nodes in zip(symmetries, common, strict=True)]
    needed = frozenset().union(*(each.trunk for each in cuts))
    tensors = frozenset().union(*(each.trunk_tensors for each in cuts))
    told = [_operations(program, needed) for program in programs]
    for index, each in enumerate(told):
        if each != told[0]:
            raise SymmetryError(f"model {index} runs other operations in the trunk than the first: stop earlier")
    cuts = [replace(each, trunk=needed, trunk_tensors=tensors) for each in cuts]
    for program, each in zip(programs, cuts, strict=True):
        _check_writes(program.graph, each)
    return cuts


def _same_constant(first: Program, other: Program, name: str) -> bool:
    """Whether two graphs hold the same constant under a name."""
    if name not in other.constants:
        return False
    a, b = first.constants[name], other.constants[name]
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b


def _operations(program: Program, nodes: frozenset[str]) -> list[tuple[str, str, str, str]]:
    """What some nodes do, in order."""
    return [
        (node.name, str(node.target), str(node.args), str(node.kwargs))
        for node in program.graph.nodes
        if node.name in nodes
    ]


def _trunk_nodes(program: Program, shared: set[str], constants: set[str]) -> set[str]:
    """All nodes that are computed from the inputs, shared tensors and common constants alone."""
    found = set(program.inputs) | constants
    sources_of = _sources_in(program.graph)
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        sources = [source.name for source in sources_of[node]]
        if all(name in found or program.parameters.get(name) in shared for name in sources):
            found.add(node.name)
    return found


def _sources_in(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What every node depends on: its arguments, and all that was written into their memory before it."""
    written: dict[fx.Node, list[fx.Node]] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = list(node.all_input_nodes)
        for source in node.all_input_nodes:
            found[node] += written.get(origin(source), [])
        if writes_in_place(node):
            written.setdefault(origin(node), []).append(node)
    return found


def _cut(symmetry: Symmetry, common: set[str]) -> Cut:
    """The part of a graph that the outputs need, cut behind the last nodes of `common` whose units are all known."""
    graph = symmetry.traced
    program: Program = graph.program
    known = {name for name in common if name in graph.activations and name not in graph.partial}
    outputs = [node.name for node in program.graph.nodes if node.op == "output"]
    sources = {node.name: found for node, found in _sources_in(program.graph).items()}
    head, head_tensors, border = _needed_for(program, sources, outputs, known)
    trunk, trunk_tensors, _ = _needed_for(program, sources, sorted(border), set())
    return Cut(
        frozenset(trunk | border),
        {name: graph.activations[name] for name in border},
        frozenset(head),
        frozenset(trunk_tensors),
        frozenset(head_tensors),
    )


def _needed_for(
    program: Program, sources: Mapping[str, Sequence[fx.Node]], wanted: Sequence[str], known: set[str]
) -> tuple[set[str], set[str], set[str]]:
    """What some nodes are computed from, back to known ones: the nodes, the tensors, the known nodes."""
    found, tensors, border = set(wanted), set(), set()
    left = list(wanted)
    while left:
        for source in sources[left.pop()]:
            if source.name in program.parameters:
                tensors.add(program.parameters[source.name])
            elif source.name in known:
                border.add(source.name)
            elif source.op != "placeholder" and source.name not in found:
                found.add(source.name)
                left.append(source.name)
    return found, tensors, border


def _check_writes(graph: fx.Graph, parts: Cut) -> None:
    """Refuses operations in place whose effect would have to cross the border.

    Raises:
        TraceError: There is one.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for write in graph.nodes:
        if not writes_in_place(write) or write.name not in parts.trunk | parts.head:
            continue
        root = origin(write)
        for node in graph.nodes:
            if order[node] >= order[write] or origin(node) is not root:
                continue
            for reader in node.users:
                if reader is write or order[reader] < order[write]:
                    continue
                apart = write.name in parts.head and node.name not in parts.head
                crossing = write.name in parts.trunk and node.name in parts.border and reader.name in parts.head
                if apart or crossing:
                    raise TraceError(
                        f"{write.name} writes in place over {node.name}, which {reader.name} reads later across the "
                        "border of the trunk: stop elsewhere, or leave out inplace=True"
                    )


def shared_tensors(symmetries: Sequence[Symmetry], names: Sequence[str]) -> set[str]:
    """The tensors that produce units of merged spaces and touch no other, alike in all models."""

    def described(symmetry: Symmetry, tensor: str) -> list[tuple[Any, ...]] | None:
        sites = symmetry.sites.get(tensor, [])
        if not {space.name for space, _ in sites} <= set(names) or all(site.role == "covector" for _, site in sites):
            return None
        places = [(space.name, site.dims, site.role, site.positions.tobytes()) for space, site in sites]
        return [tuple(symmetry.shapes[tensor]), *places]

    return {
        tensor
        for tensor in symmetries[0].sites
        if (told := described(symmetries[0], tensor)) is not None
        and all(described(symmetry, tensor) == told for symmetry in symmetries[1:])
    }


def restrict(symmetry: Symmetry, names: Sequence[str], shared: set[str], parts: Cut) -> Symmetry:
    """The symmetry of the trunk alone: its spaces, their places in shared tensors, and where the trunk reads them."""
    spaces = tuple(
        replace(space, sites=tuple(site for site in space.sites if site.parameter in shared))
        for space in symmetry
        if space.name in names
    )
    graph = symmetry.traced

    def within(read: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(node for node in nodes if node in parts.trunk) or nodes for name, nodes in read.items()}

    return replace(
        symmetry,
        spaces=spaces,
        shapes={name: shape for name, shape in symmetry.shapes.items() if name in shared},
        tied={},
        graph=replace(graph, post=within(graph.post), pre=within(graph.pre)),
    )
