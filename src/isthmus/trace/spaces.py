"""From labels to spaces: which units can be exchanged, what is nested in what, and where each tensor touches them."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from isthmus.symmetry import Frozen, Gain, Gauge, Group, Site, Space
from isthmus.trace.capture import Program
from isthmus.trace.execute import BatchNorm, Contraction, Tracing
from isthmus.trace.labels import (
    ORTHOGONAL_LEVEL,
    SCALE,
    SIGN,
    WILDCARD,
    Hashes,
    Ids,
    Units,
    Value,
    scramble,
    support,
)
from isthmus.trace.solution import Block, Coordinates, IrregularError, Places, Solution, Tag

# By level of evidence: nothing but linear maps, squared norms, norms of centred values, units used one by one.
GROUPS = (Group.INVERTIBLE, Group.ORTHOGONAL, Group.ORTHOGONAL_FIXING_ONES, Group.PERMUTATION)


@dataclass(eq=False)
class Graph:
    """The traced graph: where in it each space can be read.

    Attributes:
        program: The captured program.
        activations: For nodes that carry units: every space there and its positions in the node's value.
        post: For each space, the nodes that its consumers read.
        pre: For each space, the nodes that enter a nonlinear operation; those of `post` where there are none.
        contractions: Products of activations with parameters.
        batch_norms: Normalisations by running statistics.
        partial: Nodes that carry units of which `activations` does not tell, or not of all.
    """

    program: Program
    activations: dict[str, list[tuple[str, Site]]]
    post: dict[str, tuple[str, ...]]
    pre: dict[str, tuple[str, ...]]
    contractions: list[Contraction]
    batch_norms: list[BatchNorm]
    partial: frozenset[str] = frozenset()


def solve(tracing: Tracing) -> Places:
    """Finds all spaces; freezes what turns out irregular and starts again until nothing does."""
    units = tracing.units
    units.place = ("", "")
    while True:
        edges = close_relations(units)
        colours = colour_units(units, edges)
        solution, irregular = build_blocks(units, edges, colours, units_of_interest(tracing))
        places = Places(units, solution)
        if irregular is None:
            irregular = irregular_sites(tracing, places)
        if irregular is None:
            return places
        units.freeze(irregular, "its units meet others in an irregular pattern", expected=False)


def close_relations(units: Units) -> Int[np.ndarray, "edges 3"]:
    """All triples (child, parent, relation), after drawing every conclusion that two relations of one child allow."""
    while True:
        before = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        records = canonical_relations(units)
        for children, parents in records:
            order = np.argsort(children, kind="stable")
            same = np.flatnonzero(children[order][1:] == children[order][:-1])
            if len(same):  # a function has one value: two parents of one child in one relation are the same unit
                units.unite(parents[order[same]], parents[order[same + 1]], ordered=False)
        movable = [(c, p) for c, p in records if not units.is_frozen(p).all()]
        for first, second in overlapping(movable):
            relate_images(units, movable[first], movable[second])
        after = (
            len(units.relations),
            int(np.count_nonzero(units.find(np.arange(units.size)) != np.arange(units.size))),
        )
        if before == after:
            break
    # Which relation says so matters: in x_i − x_j one parent is the first and one the second.
    edges = [
        np.stack([children, parents, np.full_like(children, number)], axis=1)
        for number, (children, parents) in enumerate(canonical_relations(units))
    ]
    found = np.concatenate(edges) if edges else np.empty((0, 3), dtype=np.int64)
    while True:  # a fixed unit fixes what it is inside of
        stuck = units.is_frozen(found[:, 0]) & ~units.is_frozen(found[:, 1])
        if not stuck.any():
            return found
        units.freeze(found[stuck, 1], "holds units that are fixed")


def canonical_relations(units: Units) -> list[tuple[Ids, Ids]]:
    """The relations between representatives, without repetitions; they replace the recorded ones."""
    unique: dict[bytes, tuple[Ids, Ids]] = {}
    for children, parents in units.relations:
        pairs = np.stack([units.find(children), units.find(parents)])
        pairs = np.unique(pairs[:, (pairs[0] != pairs[1]) & (pairs >= 0).all(axis=0)], axis=1)
        if pairs.shape[1]:
            unique.setdefault(pairs.tobytes(), (pairs[0], pairs[1]))
    units.relations = list(unique.values())
    return units.relations[:]


def overlapping(records: Sequence[tuple[Ids, Ids]]) -> list[tuple[int, int]]:
    """Pairs of relations that share a child."""
    if not records:
        return []
    # Each child once for a relation; then children that stand in the same relations count once.
    pairs = [
        np.stack([np.unique(children), np.full(len(np.unique(children)), k)]) for k, (children, _) in enumerate(records)
    ]
    held = np.concatenate(pairs, axis=1)
    _, child = np.unique(held[0], return_inverse=True)
    signature = np.zeros(int(child.max()) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(signature, child, scramble(held[1].astype(np.uint64)))
    _, first = np.unique(signature, return_index=True)
    order = np.argsort(child, kind="stable")
    starts = np.searchsorted(child[order], np.arange(len(signature) + 1))
    found: set[tuple[int, int]] = set()
    for one in first.tolist():
        group = held[1][order[starts[one] : starts[one + 1]]].tolist()
        found |= {(a, b) for i, a in enumerate(group) for b in group[i + 1 :]}
    return sorted(found)


def relate_images(units: Units, first: tuple[Ids, Ids], second: tuple[Ids, Ids]) -> None:
    """Two maps on one set of children induce pairs of parents; those pairs are a relation like any other."""
    shared, a, b = np.intersect1d(first[0], second[0], return_indices=True)
    if len(shared) < 2:
        return
    left, right = units.find(first[1][a]), units.find(second[1][b])
    differ = left != right
    if differ.any():
        pairs = np.unique(np.stack([left, right]), axis=1)
        if not (units.is_frozen(pairs[0]).all() or units.is_frozen(pairs[1]).all()) and units.is_news(pairs):
            units.relate_pairs(pairs[0], pairs[1])


def colour_units(units: Units, edges: Int[np.ndarray, "edges 3"]) -> Hashes:
    """A number for each unit, equal for units that occur at the same places and stand in the same relations.

    Colour refinement (Weisfeiler and Leman, 1968): start from the places of the graph where a unit occurs, and how
    often; then add the colours of what it is inside of and of what it holds, until no more units are told apart.
    """
    count = units.size
    colours = np.zeros(count, dtype=np.uint64)
    seen: dict[bytes, tuple[Ids, Ids]] = {}
    with np.errstate(over="ignore"):
        for place, layer in enumerate(units.occurrences):
            roots = units.find(layer.ravel())
            key = hashlib.sha256(roots.tobytes()).digest()
            if key not in seen:
                ids, times = np.unique(roots, return_counts=True)
                seen[key] = (ids[ids != WILDCARD], times[ids != WILDCARD])
            ids, times = seen[key]
            colours[ids] += scramble(np.uint64(place) * np.uint64(2**32) + times.astype(np.uint64))
        frozen = units.is_frozen(np.arange(count))
        colours[frozen] = scramble(np.arange(count, dtype=np.uint64))[frozen]
        children, parents = edges[:, 0], edges[:, 1]
        kinds = scramble(edges[:, 2].astype(np.uint64))
        distinct = 0
        while True:
            above, below = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
            np.add.at(above, children, scramble(colours[parents] ^ kinds ^ np.uint64(1)))
            np.add.at(below, parents, scramble(colours[children] ^ kinds ^ np.uint64(2)))
            refined = scramble(scramble(colours) + scramble(above) * np.uint64(3) + scramble(below) * np.uint64(5))
            refined[frozen] = colours[frozen]
            found = len(np.unique(refined))
            if found == distinct:
                return colours
            colours, distinct = refined, found


def units_of_interest(tracing: Tracing) -> Ids:
    """Representatives of all movable units that lie along a parameter."""
    layers = [layer.ravel() for value in tracing.parameters.values() for layer in value.layers]
    if not layers:
        return np.empty(0, dtype=np.int64)
    roots = np.unique(tracing.units.find(np.concatenate(layers)))
    return roots[~tracing.units.is_frozen(roots)]


def build_blocks(
    units: Units, edges: Int[np.ndarray, "edges 3"], colours: Hashes, wanted: Ids
) -> tuple[Solution, Ids | None]:
    """Spaces from colours: exchangeable units that share what they are inside of form one copy of a space.

    Returns:
        The solution, and units to freeze before trying again, or None.
    """
    parents: dict[int, list[int]] = defaultdict(list)
    tags: dict[int, list[Tag]] = defaultdict(list)
    frozen_parent = units.is_frozen(edges[:, 1])
    for (child, parent, number), fixed in zip(edges.tolist(), frozen_parent.tolist(), strict=True):
        if fixed:
            tags[child].append((number, parent))
        elif parent not in parents[child]:
            parents[child].append(parent)
    solution = Solution([], {}, colours)
    depths, cycle = depth_of(wanted.tolist(), parents)
    if cycle:
        return solution, np.array(cycle)
    classes: dict[int, list[int]] = defaultdict(list)
    for root in depths:
        classes[int(colours[root])].append(root)
    levels, factors = units.levels(), units.factors()
    while (levels[edges[:, 1]] < levels[edges[:, 0]]).any():  # what holds for units holds for what they are inside of
        np.maximum.at(levels, edges[:, 1], levels[edges[:, 0]])
    while (factors[edges[:, 1]] & ~factors[edges[:, 0]]).any():
        np.bitwise_and.at(factors, edges[:, 1], factors[edges[:, 0]])
    for members in sorted(classes.values(), key=lambda group: (depths[group[0]], min(group))):
        above = {root: direct_parents(root, parents) for root in members}
        families: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for root in sorted(members):
            families[tuple(above[root])].append(root)
        if not place_class(solution, families, tags, levels):
            return solution, np.array(members)
    for block in solution.blocks:
        block.factors = int(np.bitwise_and.reduce(factors[block.roots.ravel()]))
    return solution, None


def depth_of(wanted: Sequence[int], parents: Mapping[int, list[int]]) -> tuple[dict[int, int], list[int]]:
    """How deeply each unit and each of its ancestors is nested; or the units of a cycle."""
    depths: dict[int, int] = {}
    for start in wanted:
        stack, path = [start], set()
        while stack:
            root = stack[-1]
            open_parents = [p for p in parents.get(root, ()) if p not in depths]
            if root in depths:
                stack.pop()
            elif not open_parents:
                depths[root] = 1 + max((depths[p] for p in parents.get(root, ())), default=-1)
                stack.pop()
                path.discard(root)
            elif any(p in path for p in open_parents):
                return depths, sorted(path)
            else:
                path.add(root)
                stack += open_parents
    return depths, []


def direct_parents(root: int, parents: Mapping[int, list[int]]) -> list[int]:
    """A unit's parents without those that another of its parents is itself inside of."""
    direct = sorted(parents.get(root, ()))
    if len(direct) < 2:
        return direct
    higher: set[int] = set()
    stack = [p for parent in direct for p in parents.get(parent, ())]
    while stack:
        one = stack.pop()
        if one not in higher:
            higher.add(one)
            stack += parents.get(one, ())
    return [p for p in direct if p not in higher]


def place_class(
    solution: Solution, families: Mapping[tuple[int, ...], list[int]], tags: Mapping[int, list[Tag]], levels: Ids
) -> bool:
    """Gives coordinates to a class of exchangeable units; False where their families differ in size."""
    sizes = {len(family) for family in families.values()}
    if len(sizes) != 1:
        return False
    size = sizes.pop()
    base = {key: inherit(solution, key) for key in families}
    if any(coordinates is None for coordinates in base.values()):
        return False
    parent, is_chain = innermost(solution, [c for c in base.values() if c is not None])
    own: int | None = None
    if size > 1 and is_chain:
        copies = 1 if parent is None else solution.blocks[parent].copies * solution.blocks[parent].size
        if len(families) != copies:
            return False
        own = len(solution.blocks)
        roots = np.empty((copies, size), dtype=np.int64)
        for key, family in families.items():
            row = 0 if parent is None else flat_of(solution, base[key], parent)
            roots[row] = family
        solution.blocks.append(Block(roots, parent, max(int(levels[r]) for r in roots.ravel())))
    for key, family in families.items():
        inherited = base[key]
        assert inherited is not None
        for index, root in enumerate(family):
            # Siblings that cannot move on their own keep a fixed place among themselves.
            place = ((-1, index),) if own is None and size > 1 else ()
            spaces = dict(inherited.spaces) | ({} if own is None else {own: index})
            told = (*inherited.tags, *sorted(tags.get(root, ())), *place)
            solution.coordinates[root] = Coordinates(spaces, told)
    return True


def inherit(solution: Solution, key: tuple[int, ...]) -> Coordinates | None:
    """The coordinates that a unit has from its parents; None where two parents stand in one space at two places."""
    spaces: dict[int, int] = {}
    tags: list[Tag] = []
    for parent in key:
        coordinates = solution.coordinates[parent]
        for block, index in coordinates.spaces.items():
            if spaces.setdefault(block, index) != index:
                return None
        tags += coordinates.tags
    return Coordinates(spaces, tuple(tags))


def innermost(solution: Solution, bases: Sequence[Coordinates]) -> tuple[int | None, bool]:
    """The space that a class is nested in, and whether its coordinates are just that space and its ancestors."""
    blocks = set(bases[0].spaces)
    if any(set(base.spaces) != blocks for base in bases):
        return None, False
    if not blocks:
        return None, True
    deepest = max(blocks, key=lambda block: len(solution.ancestors(block)))
    return deepest, set(solution.ancestors(deepest)) == blocks


def flat_of(solution: Solution, coordinates: Coordinates | None, block: int) -> int:
    """The flat index, over all copies, of coordinates in a space."""
    assert coordinates is not None
    flat = 0
    for each in reversed(solution.ancestors(block)):
        flat = flat * solution.blocks[each].size + coordinates.spaces[each]
    return flat


def irregular_sites(tracing: Tracing, places: Places) -> Ids | None:
    """The units of the first space that some parameter touches irregularly; None where all are regular."""
    for value in tracing.parameters.values():
        for block in places.blocks_in(value):
            try:
                places.locate(value, block)
            except IrregularError:
                return places.solution.blocks[block].roots.ravel()
    return None


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
            chosen[block] = unique_name(sites[block], solution.blocks[block].parent is not None, taken)
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


def unique_name(sites: Sequence[Site], nested: bool, taken: set[str]) -> str:
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
