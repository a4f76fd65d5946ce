"""From a solution to a symmetry: spaces with their sites, what is frozen and why, and where activations are read."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from isthmus.graph.capture import Program
from isthmus.symmetry.spaces import Frozen, Gain, Gauge, Group, Site, Space
from isthmus.symmetry.traced_graph import Graph
from isthmus.tracing.execute import Tracing
from isthmus.tracing.labels import Value, support
from isthmus.tracing.solution import IrregularError, Places
from isthmus.tracing.units import ORTHOGONAL_LEVEL, SCALE, SIGN, WILDCARD

# By level of evidence: nothing but linear maps, squared norms, norms of centred values, units used one by one.
GROUPS = (Group.INVERTIBLE, Group.ORTHOGONAL, Group.ORTHOGONAL_FIXING_ONES, Group.PERMUTATION)


def describe_spaces(
    tracing: Tracing, places: Places, names: Sequence[str], gains: Sequence[Gain] = ()
) -> tuple[list[Space], list[Gauge], list[str]]:
    """The public spaces, parents first, their gauges, and every block's name ("" where it has no space).

    Args:
        tracing: What was learnt from the graph.
        places: Where the spaces under construction lie.
        names: The state dict's, in order.
        gains: The norms' gains.
    """
    variances = {norm.variance for norm in tracing.batch_norms}
    absorbed = {gain.parameter for gain in gains if not gain.obstacle}
    sites: dict[int, list[Site]] = defaultdict(list)
    solution = places.solution
    gauged = {index for index, block in enumerate(solution.blocks) if block.factors}
    levels = [block.level for block in solution.blocks]
    ordered = sorted(tracing.parameters.items(), key=lambda item: names.index(item[0]))
    for name, value in ordered:
        for block in places.blocks_in(value):
            for dims, positions, layer in places.locate(value, block):
                ids = layer[layer != WILDCARD]
                contracted, kept = tracing.units.contracted[ids].any(), tracing.units.kept[ids].any()
                if contracted and kept:
                    gauged.discard(block)
                    # It moves by T and by T⁻¹ at once.
                    levels[block] = max(levels[block], ORTHOGONAL_LEVEL)
                role = "variance" if name in variances else "covector" if contracted and not kept else "vector"
                sites[block].append(Site(name, dims, positions, role))
    has_children = {block.parent for block in solution.blocks}
    for block, level in enumerate(levels):
        if block not in has_children and GROUPS[level] is not Group.PERMUTATION:
            sites[block] = [replace(s, role="diagonal") if s.parameter in absorbed else s for s in sites[block]]
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    for block in range(len(solution.blocks)):
        if sites[block]:
            chosen[block] = _unique_name(sites[block], solution.blocks[block].parent is not None, taken)
    spaces: list[Space] = []
    gauges: list[Gauge] = []
    for block, found in enumerate(solution.blocks):
        if block not in chosen:
            continue
        if block in gauged - has_children and GROUPS[levels[block]] is Group.PERMUTATION:
            kinds = [kind for bit, kind in ((SIGN, "sign"), (SCALE, "scale")) if found.factors & bit]
            gauges += [Gauge(chosen[block], kind) for kind in kinds]
        spaces.append(
            Space(
                name=chosen[block],
                size=found.size,
                # Units that hold others are no vectors: only whole units can change places.
                group=Group.PERMUTATION if block in has_children else GROUPS[levels[block]],
                sites=tuple(sites[block]),
                parent=None if found.parent is None else chosen[found.parent],
                copies=found.copies,
            )
        )
    return spaces, gauges, [chosen.get(block, "") for block in range(len(solution.blocks))]


def _unique_name(sites: Sequence[Site], nested: bool, taken: set[str]) -> str:
    """The path of the module whose parameter first produces the units, made unique."""
    producer = next((site for site in sites if site.role == "vector"), sites[0])
    base = producer.parameter.rpartition(".")[0] or producer.parameter
    base = f"{base}/units" if nested else base
    name, number = base, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    taken.add(name)
    return name


def describe_frozen(tracing: Tracing, places: Places) -> list[Frozen]:
    """What cannot move, dimension by dimension, with the reason that froze it."""
    found: list[Frozen] = []
    coordinates_of = places.solution.coordinates
    for name, value in tracing.parameters.items():
        for layer in value.layers:
            roots = tracing.units.find(layer.ravel())
            counts: dict[tuple[str, str, str, bool], int] = defaultdict(int)
            ids = np.unique(roots)
            still = [i for i, u in enumerate(ids.tolist()) if not (u in coordinates_of and coordinates_of[u].spaces)]
            for index, number in zip(*np.unique(tracing.units.reasons_of(ids[still]), return_counts=True), strict=True):
                if index < 0:
                    counts["", "", "no other unit takes part in the same operations", True] += int(number)
                else:
                    reason = tracing.units.reasons[index]
                    counts[reason.operation, reason.module, reason.text, reason.expected] += int(number)
            dims = ",".join(str(d) for d in support(layer))
            for (operation, module, text, expected), number in counts.items():
                found.append(Frozen(name, dims, number, operation, module, text, expected))
    return found


def describe_graph(tracing: Tracing, places: Places, program: Program, names: Sequence[str]) -> Graph:
    """Where in the graph each space can be read."""
    sources = [contraction.source for contraction in tracing.contractions]
    wanted = {
        *sources,
        *(contraction.node for contraction in tracing.contractions),
        *(norm.node for norm in tracing.batch_norms),
        *tracing.nonlinear,
    }
    activations: dict[str, list[tuple[str, Site]]] = {}
    partial: set[str] = set()
    for node in program.graph.nodes:
        value = tracing.values.get(node.name)
        if node.name not in wanted or not isinstance(value, Value):
            continue
        there = []
        for block in places.blocks_in(value):
            try:
                located = places.locate(value, block)
            except IrregularError:
                partial.add(node.name)
                continue  # a part of a space, or several spaces side by side: it cannot stand for the whole
            if names[block]:
                there += [(names[block], Site(node.name, dims, at, "vector")) for dims, at, _ in located]
        if there:
            activations[node.name] = there
    read_at = {
        name: tuple(node for node in activations if node in sources and any(s == name for s, _ in activations[node]))
        for name in names
        if name
    }
    made_at = {
        name: tuple(
            node for node in activations if node in tracing.nonlinear and any(s == name for s, _ in activations[node])
        )
        for name in read_at
    }
    produced = {
        name: tuple(c.node for c in tracing.contractions if any(s == name for s, _ in activations.get(c.node, ())))
        for name in read_at
    }
    post = {name: nodes or produced[name] for name, nodes in read_at.items()}
    return Graph(
        program=program,
        activations=activations,
        post=post,
        pre={name: nodes or post[name] for name, nodes in made_at.items()},
        contractions=tracing.contractions,
        batch_norms=tracing.batch_norms,
        partial=frozenset(partial),
    )
